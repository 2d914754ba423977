"""Next-token prediction, for pretraining and for fine-tuning alike: which positions count is the labels' business.

    L = sum_t  -log p(x_(t+1) | x_<=t)         over the positions whose label is not IGNORE

In pretraining every token of a document and its end are labels; in SFT only the assistant's tokens and its
end-of-turn token (the renderer's own mask). Auxiliary losses of layers are weighed per target token.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from zero2llm.core.batch import IGNORE, Batch
from zero2llm.core.config import config
from zero2llm.ops.xent import cross_entropy_plain, cross_entropy_sum
from zero2llm.train.loss import Loss


@config
class CLMConfig:
    kind: Literal["clm", "sft"] = "clm"

    def build(self) -> CLM:
        return CLM()


class CLM:
    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        hidden, aux = model(batch.tokens, batch.seq)
        entropy = cross_entropy_plain if torch.compiler.is_compiling() else cross_entropy_sum
        nats = entropy(hidden, model.head_weight, batch.labels, model.logit_softcap)
        count = (batch.labels != IGNORE).sum()
        total = nats
        for name, value in aux.items():
            if name.endswith("_loss"):
                total = total + value * count
        metrics = {"loss": (nats.detach(), count)}
        return Loss(
            total, count, metrics | {name: (value.detach(), torch.ones_like(count)) for name, value in aux.items()}
        )
