"""Contrastive preference optimisation: DPO against a uniform reference, and likelihood of the chosen answer beside it.

    L = -log sigmoid(beta (log pi(y_chosen | x) - log pi(y_rejected | x))) + alpha NLL
    NLL = -log pi(y_chosen | x) / |y_chosen|

Source: 2401.08417 section 3. log pi is summed over the completion's tokens. NLL is per token, each answer by its own
length, as in the authors' and TRL's code up to how answers of one batch are weighed; printed is the sum. With label
smoothing eps as in DPO.
Why: a uniform pi_ref cancels, so nothing but the policy is held and run; alpha NLL takes the reference's place in keeping
the model from unlearning good answers.
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
class CPOConfig:
    kind: Literal["cpo"] = "cpo"
    beta: float = 0.1
    alpha: float = 1.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.beta <= 0 or self.alpha < 0 or not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"cpo needs beta > 0, alpha >= 0 and label_smoothing in [0, 0.5), not {self.beta}, {self.alpha}, "
                f"{self.label_smoothing}"
            )

    def build(self) -> CPO:
        return CPO(self)


def contrastive_loss(chosen: Tensor, rejected: Tensor, cfg: CPOConfig) -> Tensor:
    """(P,) the preference term of each pair from two (P,) summed log-probabilities."""
    d, eps = cfg.beta * (chosen - rejected), cfg.label_smoothing
    return -(1 - eps) * F.logsigmoid(d) - eps * F.logsigmoid(-d)


class CPO:
    def __init__(self, cfg: CPOConfig):
        self.cfg = cfg

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        sums, counts, aux = row_logps(model, batch)
        chosen, rejected = sides(sums)
        losses = contrastive_loss(chosen, rejected, self.cfg) - self.cfg.alpha * per_token(sums, counts)[0::2]
        return pair_loss(losses, self.cfg.beta * (chosen - rejected), sums, aux)
