"""Next-token prediction, for pretraining and for fine-tuning alike: which positions count is the labels' business.

    L = sum_t  -log p(x_(t+1) | x_<=t)         over the positions whose label is not IGNORE

In pretraining every token of a document and its end are labels; in SFT only the assistant's tokens and its
end-of-turn token (the renderer's own mask). Auxiliary losses of layers are weighed per target token.
With `mtp_weight` also the tokens behind the next one, by the model's own depths (mtp.py).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from zero2llm.core.batch import IGNORE, Batch
from zero2llm.core.config import config
from zero2llm.core.seq import merge_aux
from zero2llm.train.loss import Loss
from zero2llm.train.objectives.mtp import entropy, tokens_ahead


@config
class CLMConfig:
    kind: Literal["clm", "sft"] = "clm"
    mtp_weight: float | None = None  # of a model with `mtp`; 0.3 then 0.1 late in training in DeepSeek-V3

    def __post_init__(self) -> None:
        if self.mtp_weight is not None and self.mtp_weight <= 0:
            raise ValueError(f"mtp_weight = {self.mtp_weight} must be positive; null = the next token alone")

    def build(self) -> CLM:
        return CLM(self.mtp_weight)


class CLM:
    def __init__(self, mtp_weight: float | None = None):
        self.mtp_weight = mtp_weight

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        hidden, aux = model(batch.tokens, batch.seq)
        nats = entropy(hidden, model, batch.labels)
        count = (batch.labels != IGNORE).sum()
        total, metrics = nats, {"loss": (nats.detach(), count)}
        if self.mtp_weight is not None:
            further, found, more = tokens_ahead(model, hidden, batch)
            total, aux, metrics = total + self.mtp_weight * further, merge_aux([aux, more]), metrics | found
        for name, value in aux.items():
            if name.endswith("_loss"):
                total = total + value * count
        return Loss(
            total, count, metrics | {name: (value.detach(), torch.ones_like(count)) for name, value in aux.items()}
        )
