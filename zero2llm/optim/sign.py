"""Sign descent on counts: how the choice bias of a mixture of experts follows the load.

    b <- b - rate * sign(g)          g_e = E load_e - sum load, so a crowded expert loses and an empty one gains

Source: 2408.15664 algorithm 1. The gradient is no slope but the load of the global batch (`CountLoad` in
layers/ffns/routers.py): it takes no part in clipping, the rate no part in the schedule, and nothing decays. No state.
"""

from __future__ import annotations

import torch
from torch import nn


class SignSGD(torch.optim.Optimizer):
    """``rates``: parameter -> step size. A count of 0 (exactly even load) moves nothing."""

    def __init__(self, rates: dict[nn.Parameter, float]):
        super().__init__([{"params": [p], "lr": rate} for p, rate in rates.items()], {})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad.sign(), alpha=group["lr"])
