"""SimPO: the chosen answer's mean log-probability above the rejected one's by a margin, without a reference.

    a = log pi(y | x) / |y|                              mean over the completion's tokens
    L = -log sigmoid(beta (a_chosen - a_rejected) - gamma)

Source: 2405.14734 eq. 6; beta 2 to 2.5 and gamma 0.5 to 1.5 there. gamma is not multiplied by beta. `sft_weight` adds the
chosen answer's mean negative log-likelihood, as TRL's CPO-SimPO does; the logged `loss` is without it.
Why: what is compared is what generation maximises, so long answers gain nothing by being long; no reference, so half of
DPO's forward passes and memory. Nothing but the learning rate keeps the model near where it began.
Shapes: rows come as chosen 0, rejected 0, chosen 1, rejected 1 ... (batch.group = 2); labels only on completions.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from zero2llm.core.batch import Batch
from zero2llm.core.config import config
from zero2llm.train.loss import Loss
from zero2llm.train.objectives.pairs import pair_loss, per_token, row_logps, sides


@config
class SimPOConfig:
    kind: Literal["simpo"] = "simpo"
    beta: float = 2.0
    gamma: float = 1.0
    sft_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.beta <= 0 or self.gamma < 0 or self.sft_weight < 0:
            raise ValueError(
                f"simpo needs beta > 0, gamma >= 0 and sft_weight >= 0, not {self.beta}, {self.gamma}, {self.sft_weight}"
            )

    def build(self) -> SimPO:
        return SimPO(self)


def simple_loss(a_chosen: Tensor, a_rejected: Tensor, beta: float, gamma: float) -> Tensor:
    """(P,) the loss of each pair from two (P,) mean log-probabilities."""
    return -F.logsigmoid(beta * (a_chosen - a_rejected) - gamma)


class SimPO:
    def __init__(self, cfg: SimPOConfig):
        self.cfg = cfg

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        sums, counts, aux = row_logps(model, batch)
        chosen, rejected = sides(per_token(sums, counts))
        losses = simple_loss(chosen, rejected, self.cfg.beta, self.cfg.gamma)
        return pair_loss(losses, self.cfg.beta * (chosen - rejected), sums, aux, -self.cfg.sft_weight * chosen)
