"""What a row of tokens *means*, what a layer remembers, and what a layer reports."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

Aux = dict[str, Tensor]  # scalars a layer reports, means over tokens; keys ending in "_loss" join the objective


@dataclass(frozen=True)
class Seq:
    """Positions and documents of a batch of rows; one object for training, packed and cached forward.

    pos : (B, T) int64, index of each token inside its own document (the clock; owned by the caller).
    seg : (B, T) int32 document number, rising along a row (KVState takes the highest as the last), 0 = padding;
        ``None`` = every row is one document without padding.
    grid : (B, T, 3) int64 time, height and width of each token for M-RoPE; ``None`` = text, all three equal pos.
    memo : what layers derive from pos and seg (masks, angles, slots), worked out once per forward pass, not per layer;
        and what a layer hands to later ones of the same pass (RWKV-7's first values).
    """

    pos: Tensor
    seg: Tensor | None = None
    grid: Tensor | None = None
    memo: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """``make()``, remembered under ``key`` as long as this object lives; it may depend on pos, seg, grid and key only."""
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]

    def fresh(self) -> Seq:
        """The same rows with nothing remembered: the model takes one per pass, for ``pos`` may change in place."""
        return Seq(self.pos, self.seg, self.grid)

    @staticmethod
    def rows(batch: int, length: int, start: int = 0, device=None) -> Seq:
        """One unpadded document per row, positions ``start .. start + length - 1``."""
        return Seq(torch.arange(start, start + length, device=device).expand(batch, length))

    @staticmethod
    def ragged(lengths: Tensor, length: int) -> Seq:
        """Rows of different ``lengths`` (B,), padded on the right to ``length`` tokens."""
        pos = torch.arange(length, device=lengths.device).expand(len(lengths), length)
        return Seq(pos, (pos < lengths[:, None]).to(torch.int32))

    @staticmethod
    def of_segments(seg: Tensor) -> Seq:
        """Positions that restart where the document number (B, T) changes along a row."""
        index = torch.arange(seg.shape[1], device=seg.device).expand_as(seg)
        starts = torch.ones_like(seg, dtype=torch.bool)
        starts[:, 1:] = seg[:, 1:] != seg[:, :-1]
        return Seq(index - torch.where(starts, index, 0).cummax(1).values, seg.to(torch.int32))

    def __getitem__(self, rows) -> Seq:
        return self._each(lambda x: x[rows])

    def window(self, start: int, stop: int) -> Seq:
        """Columns ``start .. stop - 1`` of every row: how a long row is streamed in chunks."""
        return self._each(lambda x: x[:, start:stop])

    def to(self, device) -> Seq:
        return self._each(lambda x: x.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Seq:
        return Seq(*(None if x is None else change(x) for x in (self.pos, self.seg, self.grid)))


class State(Protocol):
    """What one layer remembers of a batch of rows while decoding: tensors only, mutated in place."""

    def gather(self, rows: Tensor) -> State: ...  # fork, reorder or drop rows
    def snapshot(self) -> State | None: ...  # None where moving the clock back is enough
    def restore(self, saved: State | None) -> None: ...  # undo rejected speculative tokens
    def nbytes(self) -> int: ...


def merge_aux(parts: list[Aux]) -> Aux:
    """What several layers report under the same key: losses add up, of anything else the largest is kept."""
    total: Aux = {}
    for part in parts:
        for key, value in part.items():
            both = torch.add if key.endswith("_loss") else torch.maximum
            total[key] = both(total[key], value) if key in total else value
    return total
