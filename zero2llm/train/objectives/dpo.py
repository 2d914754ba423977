"""Direct preference optimisation: raise the chosen answer above the rejected one, measured against a reference.

    h = log pi(y | x) - log pi_ref(y | x)                summed over the completion's tokens, never averaged
    L = -log sigmoid(beta (h_chosen - h_rejected))       one term per pair
    with label smoothing eps:  L = -(1 - eps) log sigmoid(beta d) - eps log sigmoid(-beta d)

Source: 2305.18290 eq. 7; smoothing: section 3 of 2403.00409 (conservative DPO). `sft_weight` adds the chosen
answer's mean negative log-likelihood (RPO, 2404.19733 eq. 1), which keeps its probability from sinking along; the logged
`loss` is without it. `reference: none` takes h = log pi (the authors' reference-free option).
Why: no reward model and no sampling; the policy is its own reward, beta h.
Cost: a forward pass of the frozen reference beside each training pass, and its weights in memory; with `precomputed` one
pass over the data before training, and eight bytes a pair.
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
from zero2llm.train.objectives.reference import Reference, ReferenceKind


@config
class DPOConfig:
    kind: Literal["dpo"] = "dpo"
    beta: float = 0.1  # how much leaving the reference costs; smaller = further away
    label_smoothing: float = 0.0  # the share of labels that are thought to be wrong
    sft_weight: float = 0.0
    reference: ReferenceKind = "model"

    def __post_init__(self) -> None:
        if self.beta <= 0 or not 0 <= self.label_smoothing < 0.5 or self.sft_weight < 0:
            raise ValueError(
                f"dpo needs beta > 0, label_smoothing in [0, 0.5) and sft_weight >= 0, not {self.beta}, "
                f"{self.label_smoothing}, {self.sft_weight}"
            )

    def build(self, reference: Reference) -> DPO:
        return DPO(reference, self)


def preference_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, cfg: DPOConfig
) -> Tensor:
    """(P,) the loss of each pair from four (P,) summed log-probabilities."""
    d = cfg.beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    eps = cfg.label_smoothing
    return -(1 - eps) * F.logsigmoid(d) - eps * F.logsigmoid(-d)


class DPO:
    def __init__(self, reference: Reference, cfg: DPOConfig):
        self.reference, self.cfg = reference, cfg

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        sums, counts, aux = row_logps(model, batch)
        ref = self.reference(batch)
        losses = preference_loss(*sides(sums), *sides(ref), self.cfg)
        h_chosen, h_rejected = sides(sums - ref)
        nll = -per_token(sums, counts)[0::2]
        return pair_loss(losses, self.cfg.beta * (h_chosen - h_rejected), sums, aux, self.cfg.sft_weight * nll)
