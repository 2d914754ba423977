"""What an objective returns: sums and counts, never means, so that micro-batches and ranks add up exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn

from zero2llm.core.batch import Batch


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
