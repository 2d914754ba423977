"""What an objective returns: sums and counts, never means, so that micro-batches and ranks add up exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zero2llm.core.batch import Batch
from zero2llm.core.seq import Aux
from zero2llm.train.shared import hidden_of_shared, shared_prompts


@dataclass
class Loss:
    """total : scalar, the SUM of the loss over the batch's units (nats over tokens; pairs for a preference).
    count : scalar tensor, how many units were summed; the loop divides by the count of the *global* batch.
    metrics : name -> (sum, count), for the log.
    """

    total: Tensor
    count: Tensor
    metrics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


Objective = Callable[[nn.Module, Batch], Loss]


def hidden_states(model: nn.Module, batch: Batch) -> tuple[Tensor, Aux]:
    """(B, T, D) hidden states, 0 in columns that are padding in every row, and what layers report.

    Those columns are not computed: rows are padded to the longest of a step or of a rollout, and a micro-batch rarely holds it. A
    prompt that several rows begin with is computed once (shared.py).
    """
    seg, width = batch.seq.seg, batch.tokens.shape[1]
    if seg is None or torch.compiler.is_compiling():  # compiled: shapes that do not depend on the data
        return model(batch.tokens, batch.seq)
    real = (seg != 0).any(0) * torch.arange(1, width + 1, device=seg.device)
    end = max(int(real.max()), 1)
    part = Batch(batch.tokens[:, :end], batch.labels[:, :end], batch.seq.window(0, end))
    prompts = shared_prompts(model, part)
    hidden, aux = model(part.tokens, part.seq) if prompts is None else (hidden_of_shared(model, part, prompts), {})
    return F.pad(hidden, (0, 0, 0, width - end)), aux
