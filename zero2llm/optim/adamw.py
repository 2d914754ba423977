"""AdamW: Adam with weight decay applied to the weights, not to the gradient.

    m <- b1 m + (1 - b1) g          v <- b2 v + (1 - b2) g^2
    w <- w (1 - lr * decay) - lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

Source: 1711.05101 algorithm 2; the step size multiplies the decay too. State: 2 values a parameter.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from zero2llm.core.config import config


@config
class AdamWConfig:
    kind: Literal["adamw"] = "adamw"
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        if self.lr <= 0 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"lr = {self.lr} must be positive and betas = {self.betas} in [0, 1)")


class AdamW(torch.optim.Optimizer):
    def __init__(self, groups: list[dict], cfg: AdamWConfig):
        super().__init__(groups, {"lr": cfg.lr, "weight_decay": cfg.weight_decay})
        self.betas, self.eps = cfg.betas, cfg.eps

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(params, group["lr"], group["weight_decay"])

    def _update(self, params: list[nn.Parameter], lr: float, decay: float) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p] = {"step": torch.zeros(()), "m": torch.zeros_like(p), "v": torch.zeros_like(p)}
            self.state[p]["step"] += 1
        b1, b2 = self.betas
        grads: list[Tensor] = [p.grad for p in params]
        m, v = ([self.state[p][key] for p in params] for key in "mv")
        t = float(self.state[params[0]]["step"])
        torch._foreach_lerp_(m, grads, 1 - b1)
        torch._foreach_mul_(v, b2)
        torch._foreach_addcmul_(v, grads, grads, 1 - b2)
        denominator = torch._foreach_sqrt(v)
        torch._foreach_div_(denominator, (1 - b2**t) ** 0.5)
        torch._foreach_add_(denominator, self.eps)
        torch._foreach_mul_(params, 1 - lr * decay)
        torch._foreach_addcdiv_(params, m, denominator, -lr / (1 - b1**t))
