"""Identity preference optimisation: a fixed distance between the answers, not an ever larger one.

    h = log pi(y | x) - log pi_ref(y | x)
    L = (h_chosen - h_rejected - 1 / (2 beta))^2         one term per pair; beta is the paper's tau

Source: 2310.12036 eq. 17. The printed equation has sums over tokens (`average: false`); the authors' results, and TRL after
talking with them (its PR 1265), divide each h by its answer's length, so that beta means the same for short and long
answers (`average: true`).
Why: where every label is certain DPO drives the distance to infinity whatever beta is; the square stops at 1 / (2 beta).
Cost and shapes: as DPO.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from zero2llm.core.batch import Batch
from zero2llm.core.config import config
from zero2llm.train.loss import Loss
from zero2llm.train.objectives.pairs import pair_loss, per_token, row_logps, sides
from zero2llm.train.objectives.reference import Reference, ReferenceKind


@config
class IPOConfig:
    kind: Literal["ipo"] = "ipo"
    beta: float = 0.1
    average: bool = True  # h per token, as TRL; false = summed, as printed
    reference: ReferenceKind = "model"

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ValueError(f"ipo needs beta > 0, not {self.beta}: answers end up 1 / (2 beta) apart")

    def build(self, reference: Reference) -> IPO:
        return IPO(reference, self)


def identity_loss(h_chosen: Tensor, h_rejected: Tensor, beta: float) -> Tensor:
    """(P,) the loss of each pair from its two log-ratios (P,), summed or averaged."""
    return (h_chosen - h_rejected - 1 / (2 * beta)).square()


class IPO:
    def __init__(self, reference: Reference, cfg: IPOConfig):
        self.reference, self.cfg = reference, cfg

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        sums, counts, aux = row_logps(model, batch)
        h = sums - self.reference(batch)
        chosen, rejected = sides(per_token(h, counts) if self.cfg.average else h)
        return pair_loss(identity_loss(chosen, rejected, self.cfg.beta), chosen - rejected, sums, aux)
