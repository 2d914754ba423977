"""A reward model: one number per answer, the higher the better, learned from which of two was preferred.

    r = w . h_last + b                                   the score head on the last token of prompt and answer
    L = -log sigmoid(r_chosen - r_rejected - margin) + c (r_chosen + r_rejected)^2

Source: Bradley-Terry 1952 as in 2203.02155 eq. 1; margin (how much better, from the record; 0 without) 2307.09288 eq. 2;
centring 2312.09244 eq. 2: scores are defined up to a constant, c > 0 keeps their mean at 0.
Logged: accuracy (r_chosen > r_rejected); on held-out pairs its calibration in ten bins, and what length alone could explain:
how often the longer answer is the chosen one (the accuracy of a ruler), and the model's accuracy where it is the shorter.
Cost: the vocabulary's head is neither run nor trained.
Shapes: rows come as chosen 0, rejected 0, chosen 1, rejected 1 ... (batch.group = 2); extra = {margin (2 P,)} or nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zero2llm.core.batch import IGNORE, Batch
from zero2llm.core.config import config
from zero2llm.model.heads import row_scores
from zero2llm.train.loss import Loss
from zero2llm.train.objectives.pairs import reported, sides

BINS = 10
Sums = dict[str, tuple[Tensor, Tensor]]


@config
class RewardConfig:
    kind: Literal["reward"] = "reward"
    center: float = 0.0  # c; 0.01 in the paper

    def __post_init__(self) -> None:
        if self.center < 0:
            raise ValueError(f"reward needs center >= 0, not {self.center}")

    def build(self) -> RewardModel:
        return RewardModel(self)


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor, center: float) -> Tensor:
    """(P,) the loss of each pair from two scores and the margin, all (P,)."""
    return -F.logsigmoid(chosen - rejected - margin) + center * (chosen + rejected).square()


class RewardModel:
    def __init__(self, cfg: RewardConfig):
        self.cfg = cfg

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        hidden, aux = model(batch.tokens, batch.seq)
        scores = row_scores(model.score(hidden), batch.seq)
        chosen, rejected = sides(scores)
        margin = sides(batch.extra["margin"])[0] if "margin" in batch.extra else torch.zeros_like(chosen)
        losses = bradley_terry(chosen, rejected, margin, self.cfg.center)
        pairs = torch.tensor(len(losses), device=losses.device)
        more, log = reported(aux, pairs)
        log |= _agreement((chosen - rejected).detach(), *sides((batch.labels != IGNORE).sum(-1)))
        log |= {"loss": (losses.detach().sum(), pairs), "reward": (scores.detach().sum(), 2 * pairs)}
        if not model.training:
            log |= _gaps((chosen - rejected).detach())
        return Loss(losses.sum() + more, pairs, log)


def _agreement(ahead: Tensor, long: Tensor, short: Tensor) -> Sums:
    """ahead (P,) of the chosen score, and the lengths (P,) of the chosen and the rejected answer."""
    pairs, right = torch.tensor(len(ahead), device=ahead.device), (ahead > 0).float()
    return {
        "accuracy": (right.sum(), pairs),
        "margin": (ahead.sum(), pairs),
        "longer_chosen": ((long > short).float().sum(), (long != short).sum()),
        "accuracy_shorter": ((right * (long < short)).sum(), (long < short).sum()),
    }


def _gaps(ahead: Tensor) -> Sums:
    """For each bin of confidence sigmoid(|ahead|), from 0.5 to 1: the sum of (right - confidence), over all pairs."""
    sure, right = torch.sigmoid(ahead.abs()), (ahead > 0).float()
    where = ((sure - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
    pairs = torch.tensor(len(ahead), device=ahead.device)
    return {f"gap_{i}": (((right - sure) * (where == i)).sum(), pairs) for i in range(BINS)}


def calibration(found: Mapping[str, float]) -> dict[str, float]:
    """Metrics of a held-out set with `calibration`, the expected calibration error sum_i |gap_i|, in place of the bins.

    The mean over bins of |accuracy - confidence|, each bin by its share of pairs: 0 = a score difference d means that
    sigmoid(d) of such pairs are ordered rightly.
    """
    bins = [abs(found[f"gap_{i}"]) for i in range(BINS)]
    return {name: value for name, value in found.items() if not name.startswith("gap_")} | {"calibration": sum(bins)}
