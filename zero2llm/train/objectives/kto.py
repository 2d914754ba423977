"""Kahneman-Tversky optimisation: learn from single answers that somebody called good or bad, not from pairs.

    h = log pi(y | x) - log pi_ref(y | x)                summed over the completion's tokens
    z = max(0, mean h over mismatched rows)              x with the answer to another question; no gradient
    L = lambda_D (1 - sigmoid(beta (h - z)))             a good (desirable) answer
    L = lambda_U (1 - sigmoid(beta (z - h)))             a bad one

Source: 2402.01306 section 4, with its estimate of KL(pi || pi_ref) as z.
z is that of the whole step, exactly: `WithReferencePoint` runs the mismatched rows of the global batch before its
micro-batches, adds up over ranks, and gives every row the same z. Which answer a prompt gets is fixed for the data
(data/judged_rows.py), so that ranks need not see each other's rows.
Weights: the paper wants n_D lambda_D / (n_U lambda_U) between 1 and 4/3; outside of that a run says so.
Cost: as DPO for the answers, and two forward passes without gradient for as many mismatched rows (one, if precomputed).
Shapes: answers one a row, extra = {label (B,) bool, z (B,)}; the count is that of answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from zero2llm.core.batch import Batch
from zero2llm.core.config import config
from zero2llm.parallel.plan import World
from zero2llm.train.loss import Loss
from zero2llm.train.objectives.pairs import reported, row_logps, sequence_logps
from zero2llm.train.objectives.reference import Reference, ReferenceKind


@config
class KTOConfig:
    kind: Literal["kto"] = "kto"
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    reference: ReferenceKind = "model"

    def __post_init__(self) -> None:
        if min(self.beta, self.desirable_weight, self.undesirable_weight) <= 0:
            raise ValueError(
                f"kto needs beta, desirable_weight and undesirable_weight > 0, not {self.beta}, {self.desirable_weight}, "
                f"{self.undesirable_weight}"
            )

    def build(self, reference: Reference) -> KTO:
        return KTO(reference, self)

    def balance(self, good: int, bad: int) -> float:
        """n_D lambda_D / (n_U lambda_U); infinite without a bad answer."""
        return good * self.desirable_weight / (bad * self.undesirable_weight) if bad else float("inf")


def prospect_loss(h: Tensor, z: Tensor, label: Tensor, cfg: KTOConfig) -> Tensor:
    """(B,) the loss of each answer from its log-ratio h, the reference point z and whether it is good, all (B,)."""
    good = cfg.desirable_weight * torch.sigmoid(cfg.beta * (z - h))  # 1 - sigmoid(x) = sigmoid(-x)
    bad = cfg.undesirable_weight * torch.sigmoid(cfg.beta * (h - z))
    return torch.where(label, good, bad)


class KTO:
    def __init__(self, reference: Reference, cfg: KTOConfig):
        self.reference, self.cfg = reference, cfg

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        sums, _, aux = row_logps(model, batch)
        h, z, label = sums - self.reference(batch), batch.extra["z"], batch.extra["label"]
        losses = prospect_loss(h, z, label, self.cfg)
        n = torch.tensor(len(losses), device=losses.device)
        more, log = reported(aux, n)
        h, sums = h.detach(), sums.detach()
        moved = torch.where(label, h > 0, h < 0)
        log |= {"loss": (losses.detach().sum(), n), "z": (z.sum(), n), "moved_right": (moved.float().sum(), n)}
        for name, which in (("chosen", label), ("rejected", ~label)):
            log |= {f"reward_{name}": (self.cfg.beta * (h * which).sum(), which.sum())}
            log |= {f"logp_{name}": ((sums * which).sum(), which.sum())}
        return Loss(losses.sum() + more, n, log)


class WithReferencePoint:
    """Batches of answer 0, mismatched 0, answer 1, mismatched 1 ... -> the answers alone, each with the z of the step.

    The model is asked as it stands when the batch is. One pass over ``batches``; their place is the wrapper's place.
    """

    def __init__(
        self, batches: Iterable[Batch], model: nn.Module, reference: Reference, *, micro_rows: int, dtype: torch.dtype,
        world: World,
    ):  # fmt: skip
        self.batches, self.model, self.reference = batches, model, reference
        self.micro_rows, self.dtype, self.world = micro_rows, dtype, world

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            answers, mismatched = (batch.rows(slice(side, None, 2)) for side in (0, 1))
            z = self.point(mismatched).to(batch.tokens.device)
            extra = answers.extra | {"z": z.expand(len(answers))}
            yield Batch(answers.tokens, answers.labels, answers.seq, extra)

    @torch.no_grad()
    def point(self, mismatched: Batch) -> Tensor:
        """z of the rows of all ranks."""
        device, parts, training = next(self.model.parameters()).device, [], self.model.training
        self.model.eval()  # an adapter's dropout is no part of the policy
        for part in mismatched.split(self.micro_rows):
            part = part.to(device)
            with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
                parts.append(sequence_logps(self.model, part) - self.reference(part))
        self.model.train(training)
        h = torch.cat(parts)
        count = torch.tensor(float(len(h)), device=device)
        return (self.world.sum(h.sum()) / self.world.sum(count)).clamp(min=0)

    def state_dict(self) -> dict:
        return self.batches.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.batches.load_state_dict(state)
