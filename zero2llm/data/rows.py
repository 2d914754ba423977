"""Rows from token files: what one row of a batch holds, by its number and epoch, for each kind of training."""

from __future__ import annotations

import json
from functools import lru_cache
from hashlib import sha256
from typing import Protocol

import numpy as np
import torch

from zero2llm.core.batch import Batch
from zero2llm.core.seq import Seq
from zero2llm.data.pack import best_fit, concat_rows, cut_rows, fill_row, stored_row
from zero2llm.data.shards import TokenShards
from zero2llm.data.shuffle import Permutation

MULTIPLE = 16  # lengths of single rows are rounded up to this, so that few different shapes occur


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
    """Tokens, masks and where items begin: the same tokens under another mask are other data."""
    files = sorted(item for item in shards.manifest["sha256"].items() if item[0].endswith(".bin"))
    return {"seq_len": seq_len, "data": sha256(repr(files).encode()).hexdigest()[:16]}


def check_trained(shards: TokenShards, block: int = 1 << 16) -> None:
    """Raises ValueError for an item whose mask trains nothing: its row would carry no loss, and a mean over none is NaN.

    The first token of an item does not count: nothing stands before it that could predict it.
    """
    if shards.mask is None:
        raise ValueError(f"{shards.path}: has no loss mask; these are documents, not conversations or pairs")
    for first in range(0, len(shards), block):
        offsets = shards.offsets[first : first + block + 1]
        mask, starts = shards.mask[int(offsets[0]) : int(offsets[-1])], offsets[:-1] - offsets[0]
        trained = np.add.reduceat(mask, starts, dtype=np.int64) - mask[starts]
        if not trained.all():
            raise ValueError(
                f"{shards.path}: item {first + int(np.argmin(trained != 0))} has no trained token; remove it from the data"
            )


def item_of(shards: TokenShards, i: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask of one item."""
    here = slice(int(shards.offsets[i]), int(shards.offsets[i + 1]))
    return shards.tokens[here], shards.mask[here]


def stacked(rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Batch:
    """(tokens, labels, seg) of each row as a batch."""
    tokens, labels, seg = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
    return Batch(tokens, labels, Seq.of_segments(seg))


class DocumentRows:
    """Pretraining: documents in shuffled order, end to end, cut into rows; every token is a target once an epoch.

    The rows are then shuffled too, so that a long document does not fill a whole batch. The order of an epoch is held
    in memory: 50 bytes a document.
    """

    unit = 1

    def __init__(self, shards: TokenShards, seq_len: int, pad_id: int, eos_id: int, seed: int | None):
        self.shards, self.seq_len, self.pad_id, self.eos_id, self.seed = shards, seq_len, pad_id, eos_id, seed
        self.lengths, self.identity = np.diff(shards.offsets), identity(shards, seq_len) | {"packing": "concat"}
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
        return stacked(rows)


class StoredRows:
    """Pretraining from a corpus of any size: documents as they are stored, end to end, rows in shuffled order.

    Nothing of the index is held in memory: the order is computed (shuffle.py) and a row finds its documents by
    bisection. Every epoch is cut at other places. Neighbours in a row are neighbours in the files.
    """

    unit = 1

    def __init__(self, shards: TokenShards, seq_len: int, pad_id: int, eos_id: int, seed: int | None):
        self.shards, self.seq_len, self.pad_id, self.eos_id, self.seed = shards, seq_len, pad_id, eos_id, seed
        self.total, self.identity = int(shards.offsets[-1]), identity(shards, seq_len) | {"packing": "stored"}
        self.order = lru_cache(maxsize=2)(self._order)

    def __len__(self) -> int:
        return -(-self.total // self.seq_len)

    def _order(self, epoch: int) -> tuple[Permutation | range, int]:
        """Where each row of the epoch stands, and the token at which the first row begins."""
        if self.seed is None:
            return range(len(self)), 0
        begin = int(Permutation(self.total, self.seed, epoch)[0])
        return Permutation(len(self), self.seed, epoch), begin

    def batch(self, wanted: list[tuple[int, int]]) -> Batch:
        rows = []
        for epoch, row in wanted:
            order, begin = self.order(epoch)
            first = int(order[row]) * self.seq_len
            n = min(self.seq_len, self.total - first)
            rows.append(stored_row(self.shards, (begin + first) % self.total, n, self.seq_len, self.pad_id, self.eos_id))
        return stacked(rows)


class FittedRows:
    """Pretraining with as few cuts as possible: only documents longer than a row are cut, the rest packed best-fit.

    Costs padding, which `pack.compare_packing` reports beside what the other way cuts.
    """

    unit = 1

    def __init__(self, shards: TokenShards, seq_len: int, pad_id: int, eos_id: int, seed: int | None):
        self.shards, self.seq_len, self.pad_id, self.eos_id, self.seed = shards, seq_len, pad_id, eos_id, seed
        self.pieces, self.rows = cut_rows(np.diff(shards.offsets), seq_len)
        self.identity = identity(shards, seq_len) | {"packing": "best_fit"}
        self.order = lru_cache(maxsize=2)(lambda epoch: shuffled(len(self.rows), self.seed, epoch))

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, wanted: list[tuple[int, int]]) -> Batch:
        rows = []
        for epoch, row in wanted:
            document, offset, length = self.pieces[self.rows[self.order(epoch)[row]]].T
            column = np.cumsum(length) - length
            placed = np.stack([np.zeros_like(column), column, document, offset], axis=1)
            end = int(column[-1] + length[-1])
            rows.append(fill_row(placed, self.shards.tokens, self.shards.offsets, end, self.pad_id, self.eos_id, self.seq_len))
        return stacked(rows)


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
                a, b = map(int, self.shards.offsets[item : item + 2])
                here = slice(at, at + b - a)
                tokens[r, here], mask[r, here], seg[r, here] = self.shards.tokens[a:b], self.shards.mask[a:b], number
                at += b - a
        return Batch.shifted(torch.from_numpy(tokens), torch.from_numpy(mask), Seq.of_segments(torch.from_numpy(seg)))


def padded(items: list[tuple[np.ndarray, np.ndarray]], pad_id: int, max_len: int | None, extra: dict, group: int) -> Batch:
    """One row for each (tokens, mask), padded on the right; no wider than ``max_len``, which no item passes."""
    lengths = [len(tokens) for tokens, _ in items]
    width = min(-(-max(lengths) // MULTIPLE) * MULTIPLE, max_len or 1 << 30)
    tokens = np.full((len(items), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(items), width), dtype=np.uint8)
    for row, (n, (ids, trained)) in enumerate(zip(lengths, items, strict=True)):
        tokens[row, :n], mask[row, :n] = ids, trained
    seq = Seq.ragged(torch.tensor(lengths), width)
    return Batch.shifted(torch.from_numpy(tokens), torch.from_numpy(mask), seq, group=group, extra=extra)


def beside(shards: TokenShards, key: str) -> list | None:
    """What every item says under ``key`` in extra.jsonl; None if there is no such file."""
    if "extra.jsonl" not in shards.manifest["sizes"]:
        return None
    with open(shards.path / "extra.jsonl", encoding="utf-8") as file:
        return [json.loads(line)[key] for line in file]


class PairRows:
    """Preferences: items 2i and 2i + 1 are the chosen and the rejected side of pair i, one row each.

    reference : (pairs, 2) log-probabilities that another model gave the sides; the batch then has them as extra["ref"].
    A margin that stands beside the items becomes extra["margin"].
    """

    unit = 2

    def __init__(self, shards: TokenShards, pad_id: int, seed: int | None, max_len: int | None = None):
        check_trained(shards)
        if len(shards) % 2:
            raise ValueError(
                f"{shards.path}: holds {len(shards)} items; pairs come as chosen, rejected, chosen, rejected ..."
            )
        self.shards, self.pad_id, self.seed, self.identity = shards, pad_id, seed, identity(shards, None)
        self.max_len, self.reference, self.margins = max_len, None, beside(shards, "margin")
        self.order = lru_cache(maxsize=2)(lambda epoch: shuffled(len(self), self.seed, epoch))

    def __len__(self) -> int:
        return len(self.shards) // 2

    def batch(self, wanted: list[tuple[int, int]]) -> Batch:
        return self.numbered([int(self.order(epoch)[pair]) for epoch, pair in wanted])

    def numbered(self, pairs: list[int]) -> Batch:
        """These pairs, by their place in the files."""
        items = [2 * pair + side for pair in pairs for side in (0, 1)]
        extra = {"pair": torch.tensor(pairs).repeat_interleave(2)}
        if self.margins is not None:
            extra["margin"] = torch.tensor([self.margins[i] for i in items], dtype=torch.float32)
        if self.reference is not None:
            extra["ref"] = self.reference[pairs].flatten()
        return padded([item_of(self.shards, i) for i in items], self.pad_id, self.max_len, extra, group=2)
