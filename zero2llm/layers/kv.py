"""What an attention layer remembers: keys and values at fixed addresses, a ring when only a window is seen."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from zero2llm.core.seq import Seq

ROUND = 16  # slots read are a multiple of this: few different shapes, and kernels like it


class Seen(NamedTuple):
    """k, v : (B, G, S, K) keys and values.  mask : (B, 1, T, S) bool, True = may see.  pos : (B, S) the keys' positions."""

    k: Tensor
    v: Tensor
    mask: Tensor
    pos: Tensor


class KVState:
    """Keys and values (B, G, S + 1, K) of the current document of each row.

    The token at position p lives in slot p mod S; slot S is a bin that padding writes to. Nothing here counts: the
    clock is ``seq.pos``. Going back to an earlier position needs no undo while S holds the whole text; a ring
    (S = window) overwrites, so it is saved by `snapshot`. A document that starts (pos 0) sees no older slot. Without a
    ring the caller keeps pos < S: nothing here refuses a longer text, it would only lose its first tokens.
    """

    def __init__(self, k: Tensor, v: Tensor, ring: bool):
        self.k, self.v, self.ring = k, v, ring

    @staticmethod
    def empty(
        batch: int, n_kv: int, slots: int, k_dim: int, v_dim: int, ring: bool, device=None, dtype=None
    ) -> KVState:
        new = lambda width: torch.zeros(batch, n_kv, slots + 1, width, device=device, dtype=dtype)
        return KVState(new(k_dim), new(v_dim), ring)

    @property
    def slots(self) -> int:
        return self.k.shape[2] - 1

    def extend(self, k: Tensor, v: Tensor, seq: Seq, window: int | None) -> Seen:
        """Remember the new tokens' k, v (B, G, T, K) and return what each of them attends to."""
        if k.shape[2] == 1:  # write first, then look at the slots in place: decoding copies nothing
            slot, seen, pos = seq.once(("kv", self.slots), lambda: self._clock(seq))
            row = torch.arange(len(k), device=k.device)
            self.k[row, :, slot[:, 0]] = k[:, :, 0].to(self.k.dtype)
            self.v[row, :, slot[:, 0]] = v[:, :, 0].to(self.v.dtype)
            return Seen(self.k[:, :, : pos.shape[1]], self.v[:, :, : pos.shape[1]], seen, pos)
        real = _real(seq)
        first = real.int().argmax(1, keepdim=True)  # (B, 1) column of each row's first real token
        start = seq.pos.gather(1, first)
        stored = self._stored_positions(start - 1, seq)[:, None]  # (B, 1, S)
        old = (stored >= 0).expand(-1, k.shape[2], -1)
        new = torch.ones(k.shape[2], k.shape[2], dtype=torch.bool, device=k.device).tril().expand(len(k), -1, -1)
        last = real
        if seq.seg is not None:
            old = old & (seq.seg == seq.seg.gather(1, first))[:, :, None]  # only the first document continues
            new = new & (seq.seg[:, :, None] == seq.seg[:, None, :])
            last = real & (seq.seg == (seq.seg * real).amax(1, keepdim=True))
        if window is not None:
            old = old & (seq.pos[:, :, None] - stored < window)
            new = new.triu(1 - window)
        filled = stored.shape[2]
        keys, values = torch.cat((self.k[:, :, :filled], k), 2), torch.cat((self.v[:, :, :filled], v), 2)
        end = torch.where(last, seq.pos, -1).amax(1, keepdim=True)
        self._write(k, v, self._slot(seq.pos, last & (seq.pos > end - self.slots)))
        return Seen(keys, values, torch.cat((old, new), 2)[:, None], torch.cat((stored[:, 0], seq.pos), 1))

    def _stored_positions(self, last: Tensor, seq: Seq) -> Tensor:
        """(B, S') position that each slot holds once ``last`` (B, 1) are the latest; negative = nothing yet.

        S' : the slots that any row has filled, rounded up; nobody reads the others. All of them where shapes may not depend on data.
        """
        used = self.slots
        if not torch.compiler.is_compiling():
            used = seq.once(("filled", self.slots), lambda: min(self.slots, -(-(int(last.max()) + 1) // ROUND) * ROUND))
        slot = torch.arange(used, device=last.device)
        return last - (last - slot) % self.slots

    def _clock(self, seq: Seq) -> tuple[Tensor, Tensor, Tensor]:
        """For one new token a row: its slot (B, 1), which slots it sees (B, 1, 1, S'), and their positions (B, S')."""
        stored = self._stored_positions(seq.pos, seq)
        return self._slot(seq.pos, _real(seq)), (stored >= 0)[:, None, None], stored

    def _slot(self, pos: Tensor, keep: Tensor) -> Tensor:
        """(B, T) slot of each token; what is not to be kept goes to the bin."""
        return torch.where(keep, pos % self.slots, self.slots)

    def _write(self, k: Tensor, v: Tensor, slot: Tensor) -> None:
        for store, new in ((self.k, k), (self.v, v)):
            index = slot[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
            store.scatter_(2, index, new.to(store.dtype))

    def gather(self, rows: Tensor) -> KVState:
        return KVState(self.k.index_select(0, rows), self.v.index_select(0, rows), self.ring)

    def snapshot(self) -> KVState | None:
        return KVState(self.k.clone(), self.v.clone(), True) if self.ring else None

    def restore(self, saved: KVState | None) -> None:
        if saved is not None:
            self.k.copy_(saved.k)
            self.v.copy_(saved.v)

    def nbytes(self) -> int:
        """Bytes of the slots (without the bin)."""
        return (self.k[:, :, 1:].numel() + self.v[:, :, 1:].numel()) * self.k.element_size()


def _real(seq: Seq) -> Tensor:
    """(B, T) bool: not padding."""
    return torch.ones_like(seq.pos, dtype=torch.bool) if seq.seg is None else seq.seg != 0
