"""What a recurrent layer remembers: named tensors of fixed size, overwritten in place; and two memories as one."""

from __future__ import annotations

import torch
from torch import Tensor

from zero2llm.core.seq import State


class Memory:
    """Tensors (B, ...) by name. ``write`` overwrites them where they lie, so that their addresses never change; what a gradient
    flows through is replaced instead, for the backward pass still needs the old one.

    Always fp32 or wider: a state is summed over the whole text, and half precision forgets the small terms.
    """

    def __init__(self, **tensors: Tensor):
        self.tensors = tensors

    @staticmethod
    def zeros(batch: int, device=None, dtype=None, **shapes: tuple[int, ...]) -> Memory:
        """One zero tensor (batch, *shape) for each name."""
        dtype = dtype if dtype in (None, torch.float32, torch.float64) else torch.float32
        return Memory(**{n: torch.zeros(batch, *shape, device=device, dtype=dtype) for n, shape in shapes.items()})

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def write(self, **new: Tensor) -> None:
        for name, tensor in new.items():
            if tensor.requires_grad:
                self.tensors[name] = tensor.to(self.tensors[name].dtype)
            else:
                self.tensors[name].copy_(tensor)

    def gather(self, rows: Tensor) -> Memory:
        return Memory(**{name: tensor.index_select(0, rows) for name, tensor in self.tensors.items()})

    def snapshot(self) -> Memory:
        return Memory(**{name: tensor.clone() for name, tensor in self.tensors.items()})

    def restore(self, saved: Memory | None) -> None:
        if saved is not None:
            self.write(**saved.tensors)

    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


class Both:
    """Several memories that are forked, saved and undone together: a mixer's and its feed-forward's, say."""

    def __init__(self, *parts: State):
        self.parts = parts

    def gather(self, rows: Tensor) -> Both:
        return Both(*(part.gather(rows) for part in self.parts))

    def snapshot(self) -> Both:
        return Both(*(part.snapshot() for part in self.parts))

    def restore(self, saved: Both | None) -> None:
        if saved is not None:
            for part, copy in zip(self.parts, saved.parts, strict=True):
                part.restore(copy)

    def nbytes(self) -> int:
        return sum(part.nbytes() for part in self.parts)
