"""What can be adapted: a Linear, or a projection that keeps its weight packed (4 bits) and can spell it out."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class Packed(Protocol):
    """A frozen projection whose forward is differentiable in x."""

    in_features: int
    out_features: int
    bias: Tensor | None

    def dequantized(self) -> Tensor: ...  # (out, in)


def is_projection(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Packed)


def dense(base: nn.Module) -> Tensor:
    """(out, in) weight of a projection; of a packed one a fresh tensor."""
    return base.weight.detach() if isinstance(base, nn.Linear) else base.dequantized()


def shape_of(base: nn.Module) -> Tensor:
    """As `dense`, for those who ask for size, type and place alone: a packed weight is not unpacked for them."""
    if isinstance(base, nn.Linear):
        return base.weight.detach()
    return torch.empty((), dtype=torch.float32, device=next(base.buffers()).device).expand(base.out_features, base.in_features)
