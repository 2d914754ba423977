"""Held-out loss with the training objective itself: sums over the whole set, divided once."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from zero2llm.core.batch import IGNORE, Batch
from zero2llm.train.loss import Objective


@torch.no_grad()
def evaluate(
    model: nn.Module,
    objective: Objective,
    batches: Iterable[Batch],
    *,
    micro_rows: int = 8,
    byte_lengths: Tensor | None = None,
) -> dict[str, float]:
    """Mean of every metric of ``objective`` over all batches.

    With ``byte_lengths`` (V,), the bytes each token stands for, also ``bpb``: nats / ln 2 / bytes of the targets, and
    ``ppl`` = exp(loss). Raises ValueError if nothing was counted.
    """
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    sums: dict[str, list[float]] = {}
    n_bytes = 0
    for batch in batches:
        for part in batch.split(micro_rows):
            loss = objective(model, part.to(device))
            for name, (value, count) in loss.metrics.items():
                total = sums.setdefault(name, [0.0, 0.0])
                total[0] += float(value)
                total[1] += float(count)
            if byte_lengths is not None:
                n_bytes += int(byte_lengths[part.labels[part.labels != IGNORE]].sum())
    model.train(was_training)
    if not sums or not sums["loss"][1]:
        raise ValueError("validation data holds no target token")
    result = {name: value / max(count, 1.0) for name, (value, count) in sums.items()}
    if byte_lengths is not None:
        result["ppl"] = math.exp(min(result["loss"], 700.0))
        if n_bytes:
            result["bpb"] = sums["loss"][0] / math.log(2) / n_bytes
    return result
