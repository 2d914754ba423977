"""ORPO: fine-tuning on the chosen answer and, in the same step, odds against the rejected one.

    a = log pi(y | x) / |y|                              mean over the completion's tokens
    log odds = a - log(1 - e^a)
    L = -a_chosen - beta log sigmoid(log odds_chosen - log odds_rejected)

Source: 2403.07691 eqs. 3 to 7 (beta is its lambda; 0.1). Both terms read the completion alone, each answer by its own
length, as printed; TRL's likelihood runs over the prompt too and over all tokens of the batch at once.
Why: neither a reference nor an SFT stage before it: the first term teaches to answer, the second which way.
log(1 - e^a) is worked out without cancellation; an answer so certain that e^a rounds to 1 counts as one rounding below it.
Shapes: rows come as chosen 0, rejected 0, chosen 1, rejected 1 ... (batch.group = 2); labels only on completions.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zero2llm.core.batch import Batch
from zero2llm.core.config import config
from zero2llm.train.loss import Loss
from zero2llm.train.objectives.pairs import pair_loss, per_token, row_logps, sides


@config
class ORPOConfig:
    kind: Literal["orpo"] = "orpo"
    beta: float = 0.1

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ValueError(f"orpo needs beta > 0, not {self.beta}; without odds it is objective sft")

    def build(self) -> ORPO:
        return ORPO(self)


def log_odds(a: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = e^a, a <= 0; at most one rounding away from p = 1."""
    a = a.clamp(max=-torch.finfo(a.dtype).eps)
    near = a > -math.log(2)  # which form keeps its digits
    return a - torch.where(near, torch.log(-torch.expm1(a)), torch.log1p(-torch.exp(a)))


def odds_loss(a_chosen: Tensor, a_rejected: Tensor) -> Tensor:
    """(P,) the odds term of each pair from two (P,) mean log-probabilities, without beta."""
    return -F.logsigmoid(log_odds(a_chosen) - log_odds(a_rejected))


class ORPO:
    def __init__(self, cfg: ORPOConfig):
        self.cfg = cfg

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        sums, counts, aux = row_logps(model, batch)
        chosen, rejected = sides(per_token(sums, counts))
        losses = -chosen + self.cfg.beta * odds_loss(chosen, rejected)
        return pair_loss(losses, log_odds(chosen) - log_odds(rejected), sums, aux)
