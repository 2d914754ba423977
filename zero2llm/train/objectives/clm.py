"""Next-token prediction, for pretraining and for fine-tuning alike: which positions count is the labels' business.

    L = sum_t  -log p(x_(t+1) | x_<=t)         over the positions whose label is not IGNORE

In pretraining every token of a document and its end are labels; in SFT only the assistant's tokens and its
end-of-turn token (the renderer's own mask). Auxiliary losses of layers are weighed per target token.
With `mtp_weight` also the tokens behind the next one, by the model's own depths (mtp.py); with `neftune` the model reads
its tokens through noise while it trains (neftune.py).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn

from zero2llm.core.batch import IGNORE, Batch
from zero2llm.core.config import config
from zero2llm.core.seq import merge_aux
from zero2llm.train.loss import Loss
from zero2llm.train.objectives.mtp import entropy, tokens_ahead
from zero2llm.train.objectives.neftune import noisy


@config
class CLMConfig:
    kind: Literal["clm", "sft"] = "clm"
    mtp_weight: float | None = None  # of a model with `mtp`; 0.3 then 0.1 late in training in DeepSeek-V3
    neftune: float | None = None  # alpha of the noise on embeddings, 5 to 15 in the paper; null = none

    def __post_init__(self) -> None:
        if self.mtp_weight is not None and self.mtp_weight <= 0:
            raise ValueError(f"mtp_weight = {self.mtp_weight} must be positive; null = the next token alone")
        if self.neftune is not None and not 0 < self.neftune < math.inf:
            raise ValueError(f"neftune = {self.neftune} must be positive; null = no noise")

    def build(self) -> CLM:
        return CLM(self.mtp_weight, self.neftune)


class CLM:
    def __init__(self, mtp_weight: float | None = None, neftune: float | None = None):
        self.mtp_weight, self.neftune = mtp_weight, neftune

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        with noisy(model, batch.seq, self.neftune):
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
