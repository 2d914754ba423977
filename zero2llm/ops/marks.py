"""What a recurrence has to know of a batch of rows: where documents begin, and what is padding.

Two rules make packed rows, ragged batches and streams one thing: a document that begins (pos 0) forgets everything
before it, and padding writes nothing and forgets nothing. Padding stands behind a document's tokens, never between the
state that is carried in and the tokens that continue it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from zero2llm.core.seq import Seq


@dataclass(frozen=True)
class Marks:
    """doc : (B, T) int64, which document of this call a token belongs to; 0 = the one that the state carries on.
    ``None`` = each row is one document that begins here. real : (B, T) bool, not padding; ``None`` = all are.
    """

    doc: Tensor | None = None
    real: Tensor | None = None

    @staticmethod
    def of(seq: Seq, streamed: bool) -> Marks:
        """``streamed`` = there is a state from before. Worked out once per forward pass."""
        return seq.once(("marks", streamed), lambda: Marks._of(seq, streamed))

    @staticmethod
    def _of(seq: Seq, streamed: bool) -> Marks:
        if seq.seg is None:
            return Marks((seq.pos == 0).cumsum(1) if streamed else None)
        real = seq.seg != 0
        return Marks((real & (seq.pos == 0)).cumsum(1), real)

    def silence(self, *tensors: Tensor) -> list[Tensor]:
        """Each (B, T, ...) with padding set to 0: keys and values that write nothing, log-decays that forget nothing."""
        if self.real is None:
            return list(tensors)
        return [t * self.real.view(*self.real.shape, *[1] * (t.ndim - 2)).to(t.dtype) for t in tensors]

    def chunks(self, size: int) -> Tensor | None:
        """doc as (B, N, size); the last chunk is filled up with its last document."""
        if self.doc is None:
            return None
        short = -self.doc.shape[1] % size
        return torch.cat((self.doc, self.doc[:, -1:].expand(-1, short)), 1).unflatten(1, (-1, size))


def split(x: Tensor, size: int, dim: int) -> Tensor:
    """Dimension ``dim`` (negative) as (N, size), zeros at the end of the last chunk."""
    short = -x.shape[dim] % size
    if short:
        x = F.pad(x, [0, 0] * (-dim - 1) + [0, short])
    return x.unflatten(dim, (-1, size))


def wide(*tensors: Tensor) -> list[Tensor]:
    """Half precision to fp32; fp32 and fp64 as they are. Recurrences sum too long for less."""
    return [t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors]


def full_precision(x: Tensor) -> AbstractContextManager:
    """Where autocast casts nothing on ``x``'s device; the meta device has no autocast to switch off."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast casts a product of ``x`` to; ``None`` where it is off."""
    on = not x.is_meta and torch.is_autocast_enabled(x.device.type)
    return torch.get_autocast_dtype(x.device.type) if on else None
