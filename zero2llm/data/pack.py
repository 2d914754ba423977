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


def fill_row(pieces: np.ndarray, tokens: np.ndarray, offsets: np.ndarray, seq_len: int, pad: int, end: int):
    """(tokens, labels, seg), each (seq_len,): one row of `concat_rows`.

    The label of a token is the next one of its document, wherever that stands; of the last one it is ``end``.
    """
    row = np.full(seq_len, pad, dtype=np.int64)
    labels = np.full(seq_len, IGNORE, dtype=np.int64)
    seg = np.zeros(seq_len, dtype=np.int32)
    for number, (_, column, document, offset) in enumerate(pieces, 1):
        a, b = offsets[document] + offset, offsets[document + 1]
        n = int(min(b - a, (pieces[number][1] if number < len(pieces) else seq_len) - column))
        row[column : column + n] = tokens[a : a + n]
        labels[column : column + n - 1] = tokens[a + 1 : a + n]
        labels[column + n - 1] = tokens[a + n] if a + n < b else end
        seg[column : column + n] = number
    return row, labels, seg


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
