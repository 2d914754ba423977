"""Rows of fixed length from documents of any length: pure functions on arrays."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np

from zero2llm.core.batch import IGNORE


def concat_rows(lengths: np.ndarray, order: np.ndarray, seq_len: int) -> np.ndarray:
    """Documents laid end to end in ``order`` and cut every ``seq_len`` tokens: (pieces, 4) of row, column, document, offset.

    Each row is filled completely except the last. A document that crosses a border goes on in the next row.
    """
    starts = np.concatenate([[0], np.cumsum(lengths[order])])  # where each document begins in the stream
    cuts = np.union1d(starts[:-1], np.arange(0, starts[-1], seq_len))
    which = np.searchsorted(starts, cuts, side="right") - 1
    return np.stack([cuts // seq_len, cuts % seq_len, order[which], cuts - starts[which]], axis=1)


def fill_row(pieces: np.ndarray, tokens, offsets: np.ndarray, filled: int, pad: int, end: int, seq_len: int | None = None):
    """(tokens, labels, seg), each (seq_len,): one row of `concat_rows`, of which ``filled`` places are taken.

    The label of a token is the next one of its document, wherever that stands; of the last one it is ``end``.
    """
    seq_len = seq_len or filled
    row = np.full(seq_len, pad, dtype=np.int64)
    labels = np.full(seq_len, IGNORE, dtype=np.int64)
    seg = np.zeros(seq_len, dtype=np.int32)
    for number, (_, column, document, offset) in enumerate(pieces.tolist(), 1):
        a, b = int(offsets[document]) + offset, int(offsets[document + 1])
        n = min(b - a, (int(pieces[number][1]) if number < len(pieces) else filled) - column)
        with_next = tokens[a : min(a + n + 1, b)]
        row[column : column + n] = with_next[:n]
        labels[column : column + len(with_next) - 1] = with_next[1:]
        if len(with_next) == n:
            labels[column + n - 1] = end
        seg[column : column + n] = number
    return row, labels, seg


def stored_row(shards, start: int, n: int, seq_len: int, pad: int, end: int):
    """(tokens, labels, seg) of ``n`` tokens of the stored stream from ``start`` on; behind its end it begins anew."""
    total, pieces, column = int(shards.offsets[-1]), [], 0
    document = int(np.searchsorted(shards.offsets, start, side="right")) - 1
    while column < n:
        offset = start - int(shards.offsets[document])
        pieces.append((0, column, document, offset))
        column += int(shards.offsets[document + 1]) - start
        start, document = int(shards.offsets[document + 1]), document + 1
        if start == total:
            start = document = 0
    return fill_row(np.asarray(pieces), shards.tokens, shards.offsets, n, pad, end, seq_len)


def cut_rows(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, list[list[int]]]:
    """Documents into rows with as few cuts as can be: (pieces, 3) of document, offset, length, and the pieces of each row.

    Whole rows are cut from the front of documents that are too long; what remains is packed best-fit.
    """
    counts = -(-lengths // seq_len)
    document = np.repeat(np.arange(len(lengths)), counts)
    offset = (np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)) * seq_len
    pieces = np.stack([document, offset, np.minimum(lengths[document] - offset, seq_len)], axis=1)
    return pieces, best_fit(pieces[:, 2], seq_len)


def compare_packing(lengths: np.ndarray, seq_len: int) -> dict[str, dict[str, float]]:
    """What each way of packing costs: rows, share of padding, and share of documents that fit a row but are cut."""
    whole = lengths <= seq_len
    ends = np.cumsum(lengths)
    crossing = (ends - 1) // seq_len != (ends - lengths) // seq_len
    total, fitted = int(lengths.sum()), len(cut_rows(lengths, seq_len)[1])
    rows = -(-total // seq_len)
    return {
        "concat": {"rows": rows, "padding": 1 - total / (rows * seq_len), "cut": float((crossing & whole).mean())},
        "best_fit": {"rows": fitted, "padding": 1 - total / (fitted * seq_len), "cut": 0.0},
    }


def best_fit(lengths: np.ndarray, seq_len: int) -> list[list[int]]:
    """Items into rows, longest first, each into the fullest row that still has room (best-fit decreasing).

    Source: 2404.10830. Raises ValueError for an item longer than a row. Returns the items of each row.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted: the first that fits is the fullest
    for i in np.argsort(-lengths, kind="stable").tolist():
        n = int(lengths[i])
        if n > seq_len:
            raise ValueError(f"item {i} has {n} tokens, a row {seq_len}")
        at = bisect_left(room, (n, -1))
        if at < len(room):
            left, row = room.pop(at)
        else:
            left, row = seq_len, len(rows)
            rows.append([])
        rows[row].append(i)
        if left > n:
            insort(room, (left - n, row))
    return rows
