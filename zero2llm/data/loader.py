"""Batches for the loop: a deterministic order, an exact cursor, and a share for every rank.

Row number g of training (counted over all steps and epochs) is row ``g mod R`` of epoch ``g div R``, in an order
drawn from (seed, epoch). So the position in the data is one integer, an epoch's last rows share a batch with the
next epoch's first, and the global batch is the same for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch

from zero2llm.core.batch import Batch
from zero2llm.core.seq import Seq
from zero2llm.data.pack import best_fit, concat_rows, fill_row
from zero2llm.data.shards import TokenShards


class Rows(Protocol):
    """Where rows come from. ``unit`` rows belong together (2 for preference pairs)."""

    unit: int
    identity: dict  # what a position in the data depends on, beside seed and batch size

    def __len__(self) -> int: ...  # units in one epoch
    def batch(self, wanted: list[tuple[int, int]]) -> Batch: ...  # (epoch, unit) each


def shuffled(n: int, seed: int | None, epoch: int) -> np.ndarray:
    """A permutation that depends on (seed, epoch) only; the natural order without a seed."""
    return np.arange(n) if seed is None else np.random.Generator(np.random.PCG64([seed, epoch])).permutation(n)


def identity(shards: TokenShards, seq_len: int | None) -> dict:
    return {"seq_len": seq_len, "data": shards.manifest["sha256"]["tokens.bin"][:16]}


def check_trained(shards: TokenShards) -> None:
    """Raises ValueError for an item whose mask trains nothing: its row would carry no loss, and a mean over none is NaN.

    The first token of an item does not count: nothing stands before it that could predict it.
    """
    if shards.mask is None:
        raise ValueError(f"{shards.path}: has no loss mask; these are documents, not conversations or pairs")
    starts = shards.offsets[:-1]
    trained = np.add.reduceat(shards.mask, starts, dtype=np.int64) - shards.mask[starts]
    if not trained.all():
        raise ValueError(
            f"{shards.path}: item {int(np.argmin(trained != 0))} has no trained token; remove it from the data"
        )


class DocumentRows:
    """Pretraining: documents in shuffled order, end to end, cut into rows; every token is a target once an epoch.

    The rows are then shuffled too, so that a long document does not fill a whole batch.
    """

    unit = 1

    def __init__(self, shards: TokenShards, seq_len: int, pad_id: int, eos_id: int, seed: int | None):
        self.shards, self.seq_len, self.pad_id, self.eos_id, self.seed = shards, seq_len, pad_id, eos_id, seed
        self.lengths, self.identity = np.diff(shards.offsets), identity(shards, seq_len)
        self.pieces = lru_cache(maxsize=2)(self._pieces)

    def __len__(self) -> int:
        return -(-int(self.shards.offsets[-1]) // self.seq_len)

    def _pieces(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        pieces = concat_rows(self.lengths, shuffled(len(self.lengths), self.seed, epoch), self.seq_len)
        return pieces, np.searchsorted(pieces[:, 0], np.arange(len(self) + 1)), shuffled(len(self), self.seed, epoch)

    def batch(self, wanted: list[tuple[int, int]]) -> Batch:
        rows = []
        for epoch, row in wanted:
            pieces, first, order = self.pieces(epoch)
            here = pieces[first[order[row]] : first[order[row] + 1]]
            rows.append(fill_row(here, self.shards.tokens, self.shards.offsets, self.seq_len, self.pad_id, self.eos_id))
        tokens, labels, seg = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
        return Batch(tokens, labels, Seq.of_segments(seg))


class ConversationRows:
    """SFT: whole conversations packed into rows, loss where the renderer's mask says."""

    unit = 1

    def __init__(self, shards: TokenShards, seq_len: int, pad_id: int, seed: int | None):
        self.shards, self.seq_len, self.pad_id, self.seed = shards, seq_len, pad_id, seed
        check_trained(shards)
        self.rows, self.identity = best_fit(np.diff(shards.offsets), seq_len), identity(shards, seq_len)
        self.order = lru_cache(maxsize=2)(lambda epoch: shuffled(len(self.rows), self.seed, epoch))

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, wanted: list[tuple[int, int]]) -> Batch:
        shape = (len(wanted), self.seq_len)
        tokens, seg = np.full(shape, self.pad_id, dtype=np.int64), np.zeros(shape, dtype=np.int32)
        mask = np.zeros(shape, dtype=np.uint8)
        for r, (epoch, row) in enumerate(wanted):
            at = 0
            for number, item in enumerate(self.rows[self.order(epoch)[row]], 1):
                a, b = self.shards.offsets[item : item + 2]
                here = slice(at, at + int(b - a))
                tokens[r, here], mask[r, here], seg[r, here] = self.shards.tokens[a:b], self.shards.mask[a:b], number
                at += int(b - a)
        return Batch.shifted(torch.from_numpy(tokens), torch.from_numpy(mask), Seq.of_segments(torch.from_numpy(seg)))


class PairRows:
    """Preferences: items 2i and 2i + 1 are the chosen and the rejected side of pair i, one row each."""

    unit = 2
    MULTIPLE = 16  # row length is rounded up to this, so that few different shapes occur

    def __init__(self, shards: TokenShards, pad_id: int, seed: int | None):
        check_trained(shards)
        if len(shards) % 2:
            raise ValueError(
                f"{shards.path}: holds {len(shards)} items; pairs come as chosen, rejected, chosen, rejected ..."
            )
        self.shards, self.pad_id, self.seed, self.identity = shards, pad_id, seed, identity(shards, None)
        self.order = lru_cache(maxsize=2)(lambda epoch: shuffled(len(self), self.seed, epoch))

    def __len__(self) -> int:
        return len(self.shards) // 2

    def batch(self, wanted: list[tuple[int, int]]) -> Batch:
        pairs = [int(self.order(epoch)[pair]) for epoch, pair in wanted]
        items = [2 * pair + side for pair in pairs for side in (0, 1)]
        lengths = [int(self.shards.offsets[i + 1] - self.shards.offsets[i]) for i in items]
        width = -(-max(lengths) // self.MULTIPLE) * self.MULTIPLE
        tokens = np.full((len(items), width), self.pad_id, dtype=np.int64)
        mask = np.zeros((len(items), width), dtype=np.uint8)
        for row, (i, n) in enumerate(zip(items, lengths, strict=True)):
            a = self.shards.offsets[i]
            tokens[row, :n], mask[row, :n] = self.shards.tokens[a : a + n], self.shards.mask[a : a + n]
        seq = Seq.ragged(torch.tensor(lengths), width)
        extra = {"pair": torch.tensor(pairs).repeat_interleave(2)}
        return Batch.shifted(torch.from_numpy(tokens), torch.from_numpy(mask), seq, group=2, extra=extra)


class Loader:
    """Batches of ``rows`` rows per step over all ranks; this rank gets its contiguous part.

    repeat=True goes on for ever (training); False is one pass, whose last batch may be short (validation) and which
    every rank sees whole. Raises ValueError if the data cannot fill one batch, or rows do not divide among ranks.
    """

    def __init__(self, source: Rows, rows: int, *, seed: int, rank: int = 0, world: int = 1, repeat: bool = True):
        self.source, self.rows, self.seed, self.rank, self.world, self.repeat = source, rows, seed, rank, world, repeat
        self.units, self.step = rows // source.unit, 0
        assert 0 <= rank < world, (rank, world)
        if rows < 1 or rows % (source.unit * world):
            raise ValueError(
                f"a batch of {rows} rows does not divide among {world} ranks in groups of {source.unit}; change batch_tokens"
            )
        if repeat and len(source) < self.units:
            raise ValueError(
                f"the training data fills {len(source) * source.unit} rows, one batch needs {rows}: "
                "lower batch_tokens or seq_len, or give more data"
            )

    def __len__(self) -> int:
        """Batches in one epoch, the last one counted whole."""
        return -(-len(self.source) // self.units)

    def __iter__(self) -> Iterator[Batch]:
        n = len(self.source)
        while self.repeat or self.step * self.units < n:
            first, last = self.step * self.units, (self.step + 1) * self.units
            wanted = [(g // n, g % n) for g in range(first, last if self.repeat else min(last, n))]
            part = len(wanted) // self.world
            self.step += 1  # before the yield: the cursor points behind the batch that is being trained
            if self.repeat:
                wanted = wanted[self.rank * part : (self.rank + 1) * part]
            yield self.source.batch(wanted)

    def state_dict(self) -> dict:
        own = {"step": self.step, "seed": self.seed, "rows": self.rows, "units": len(self.source)}
        return own | self.source.identity

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError if the position belongs to other data, another seed, row length or batch."""
        for key, value in self.state_dict().items():
            if key != "step" and state.get(key) != value:
                raise ValueError(
                    f"cannot resume: the data's {key} was {state.get(key)} and is now {value}; restore it or start anew"
                )
        self.step = state["step"]
