"""Direct preference optimisation: raise the chosen answer above the rejected one, measured against a reference.

    h = log pi(y | x) - log pi_ref(y | x)                summed over the completion's tokens, never averaged
    L = -log sigmoid(beta (h_chosen - h_rejected))       one term per pair
    with label smoothing eps:  L = -(1 - eps) log sigmoid(beta d) - eps log sigmoid(-beta d)

Source: 2305.18290 eq. 7; smoothing: section 3 of 2403.00409 (conservative DPO). `sft_weight` adds the chosen
answer's mean negative log-likelihood (RPO, 2404.19733 eq. 1), which keeps its probability from sinking along. What layers
report as losses (a router's balance, an indexer's) counts once per pair.
Cost: a forward pass of the frozen reference beside each training pass, and its weights in memory.
Shapes: rows come as chosen 0, rejected 0, chosen 1, rejected 1 ... (batch.group = 2); labels only on completions.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zero2llm.core.batch import IGNORE, Batch
from zero2llm.core.config import config
from zero2llm.core.seq import Aux
from zero2llm.ops.xent import token_logps
from zero2llm.train.loss import Loss


@config
class DPOConfig:
    kind: Literal["dpo"] = "dpo"
    beta: float = 0.1
    label_smoothing: float = 0.0
    sft_weight: float = 0.0

    def build(self, reference: nn.Module) -> DPO:
        if self.beta <= 0 or not 0 <= self.label_smoothing < 0.5 or self.sft_weight < 0:
            raise ValueError(
                f"dpo needs beta > 0, label_smoothing in [0, 0.5) and sft_weight >= 0, not {self.beta}, "
                f"{self.label_smoothing}, {self.sft_weight}"
            )
        return DPO(reference, self)


def sequence_logps(model: nn.Module, batch: Batch) -> Tensor:
    """(B,) fp32 sum of log p over each row's labelled tokens, in nats."""
    return _logps_and_aux(model, batch)[0]


def _logps_and_aux(model: nn.Module, batch: Batch) -> tuple[Tensor, Aux]:
    hidden, aux = model(batch.tokens, batch.seq)
    return token_logps(hidden, model.head_weight, batch.labels, model.logit_softcap).sum(-1), aux


def preference_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, cfg: DPOConfig
) -> Tensor:
    """(P,) the loss of each pair from four (P,) summed log-probabilities."""
    d = cfg.beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    eps = cfg.label_smoothing
    return -(1 - eps) * F.logsigmoid(d) - eps * F.logsigmoid(-d)


class DPO:
    def __init__(self, reference: nn.Module, cfg: DPOConfig):
        self.reference, self.cfg = reference.eval().requires_grad_(False), cfg

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        logps, aux = _logps_and_aux(model, batch)
        with torch.no_grad():
            ref = sequence_logps(self.reference, batch)
        chosen, rejected, ref_chosen, ref_rejected = logps[0::2], logps[1::2], ref[0::2], ref[1::2]
        losses = preference_loss(chosen, rejected, ref_chosen, ref_rejected, self.cfg)
        total, pairs = losses.sum(), torch.tensor(len(chosen), device=logps.device)
        total = total + sum(value for name, value in aux.items() if name.endswith("_loss")) * pairs
        if self.cfg.sft_weight:
            lengths = (batch.labels[0::2] != IGNORE).sum(-1).clamp(min=1)
            total = total - self.cfg.sft_weight * (chosen / lengths).sum()
        margin = ((chosen - ref_chosen) - (rejected - ref_rejected)).detach()
        sums = {
            "loss": losses,
            "margin": self.cfg.beta * margin,  # how far the pair moved apart, in reward units
            "moved_right": (margin > 0).float(),  # share of pairs that moved towards the preference
            "win_rate": (chosen > rejected).float(),  # share where the model itself prefers the chosen answer
            "logp_chosen": chosen,
            "logp_rejected": rejected,
        }
        return Loss(total, pairs, {name: (value.detach().sum(), pairs) for name, value in sums.items()})
