"""Interpolated Kneser-Ney: the language model to beat before a neural one has earned its keep.

For a token w after the history h = (v, h'), with c the adjusted counts:

    P(w | h)  = max(c(h, w) - D, 0) / c(h)  +  D t(h) / c(h) * P(w | h')       c(h) = sum_w c(h, w)
    t(h)      = how many different tokens followed h                            P(w | h') alone if c(h) = 0
    P(w | no history) = (max(c(w) - D, 0) + D t / V) / c                        V = vocabulary size
    D         = n1 / (n1 + 2 n2), one for each order                            nk = n-grams with adjusted count k

The longest n-grams have plain counts. A shorter one counts in how many *different* contexts it was seen (how many
tokens v precede it), since it is asked only when the longer context failed: "Francisco" is frequent but follows
one word. At the start of a document no token precedes, and the shorter n-gram keeps its plain count there.

*Source*: Kneser and Ney 1995; the interpolated form and D from Chen and Goodman 1999, "An empirical study of smoothing
techniques for language modeling", sections 2.7 and 3 (we use one D per order, not their three). *Why*: no
gradient, seconds on one core, and it is stronger than any n-gram with cruder smoothing. One stored int64 key and one
count for each distinct n-gram.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

NONE = -1  # no token: the history reaches back beyond the document


@dataclass(frozen=True)
class _Table:
    """Adjusted counts of one order: sorted n-gram keys, and for each sorted history its total and its types."""

    keys: np.ndarray
    counts: np.ndarray
    histories: np.ndarray
    totals: np.ndarray
    types: np.ndarray
    discount: float


def _table(keys: np.ndarray, counts: np.ndarray, vocab_size: int) -> _Table:
    histories, starts = np.unique(keys // vocab_size, return_index=True)  # keys are sorted, so histories are grouped
    totals = np.add.reduceat(counts, starts)
    types = np.diff(np.append(starts, len(keys)))
    n1, n2 = int((counts == 1).sum()), int((counts == 2).sum())
    discount = n1 / (n1 + 2 * n2) if n1 else 0.5  # 0 would leave nothing for what was never seen
    return _Table(keys, counts, histories, totals, types, discount)


def _find(table: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(index of each wanted value in a sorted table, whether it is there)."""
    if not len(table):  # no n-gram this long was ever seen
        return np.zeros(len(wanted), np.int64), np.zeros(len(wanted), bool)
    index = np.searchsorted(table, wanted)
    index[index == len(table)] = 0
    return index, table[index] == wanted


class KneserNey:
    """An n-gram model over token ids. ``KneserNey(3).fit(docs, V).nats(held_out)``.

    A document is ``[eos] + ids + [eos]`` (or a piece of one); every token but the first is a target, as for a neural model.
    Not supported: orders whose n-grams do not fit 63 bits (V**order), counts beyond one machine's memory.
    """

    def __init__(self, order: int):
        if order < 1:
            raise ValueError(f"order = {order}: an n-gram has at least one token")
        self.order = order
        self.vocab_size = 0
        self.tables: list[_Table] = []  # tables[k]: n-grams of k + 1 tokens

    def fit(self, token_docs: Iterable[np.ndarray], vocab_size: int) -> KneserNey:
        """Count. Raises ValueError for ids outside 0 .. vocab_size - 1, or a vocabulary too large for the order."""
        if vocab_size**self.order >= 2**63:
            raise ValueError(f"vocab_size {vocab_size} ** order {self.order} does not fit 63 bits; lower the order")
        self.vocab_size = V = vocab_size
        windows = self._windows(token_docs)
        lengths = np.minimum((windows != NONE).sum(1), self.order)  # tokens in each window
        longer, tables = np.empty(0, np.int64), []
        for n in range(self.order, 0, -1):
            whole = self._pack(windows[lengths == n], n)
            keys, counts = np.unique(np.concatenate([longer % V**n, whole]), return_counts=True)
            tables.append(_table(keys, counts, V))
            longer = keys
        self.tables = tables[::-1]
        return self

    def nats(self, token_docs: Iterable[np.ndarray]) -> tuple[float, int]:
        """(total negative log-likelihood in nats, number of targets)."""
        windows = self._windows(token_docs)
        return float(-np.log(self._probs(windows)).sum()), len(windows)

    def distribution(self, history: Sequence[int]) -> np.ndarray:
        """(V,) float64: P(w | history) for every token w. A history shorter than order - 1 starts a document."""
        known = list(history)[-(self.order - 1) :] if self.order > 1 else []
        windows = np.full((self.vocab_size, self.order), NONE, np.int64)
        windows[:, self.order - 1 - len(known) : -1] = known
        windows[:, -1] = np.arange(self.vocab_size)
        return self._probs(windows)

    def arrays(self) -> dict[str, np.ndarray]:
        """The fitted model as named arrays; ``from_arrays`` reads them back."""
        shape = np.array([self.order, self.vocab_size], np.int64)
        tables = {f"{n}.{name}": np.asarray(v) for n, t in enumerate(self.tables) for name, v in asdict(t).items()}
        return {"shape": shape, **tables}

    @staticmethod
    def from_arrays(arrays: dict[str, np.ndarray]) -> KneserNey:
        model = KneserNey(int(arrays["shape"][0]))
        model.vocab_size = int(arrays["shape"][1])
        for n in range(model.order):
            parts = {name: arrays[f"{n}.{name}"] for name in _Table.__dataclass_fields__}
            model.tables.append(_Table(**{**parts, "discount": float(parts["discount"])}))
        return model

    def _windows(self, token_docs: Iterable[np.ndarray]) -> np.ndarray:
        """(N, order): each target with the tokens before it, NONE where the document had not begun."""
        docs = [np.asarray(doc, dtype=np.int64) for doc in token_docs]
        if not docs or not all(len(doc) > 1 for doc in docs):
            raise ValueError(
                "documents of at least two tokens are needed, [eos] + ids + [eos]: one is shorter, or there are none"
            )
        gap = np.full(max(self.order - 2, 0), NONE, np.int64)  # the first target sees one token, its eos
        stream = np.concatenate([part for doc in docs for part in (gap, doc)])
        low, high = min(int(doc.min()) for doc in docs), int(stream.max())
        if low < 0 or high >= self.vocab_size:
            raise ValueError(f"token ids {low} .. {high} lie outside the vocabulary 0 .. {self.vocab_size - 1}")
        lengths = np.array([len(doc) - 1 for doc in docs])  # targets: all tokens but the first
        shift = np.repeat(np.arange(len(docs)) * (len(gap) + 1) + len(gap) + 1, lengths)  # skips each gap and eos
        at = np.arange(lengths.sum()) + shift
        return np.stack([stream[at - back] for back in range(self.order - 1, -1, -1)], axis=1)

    def _pack(self, windows: np.ndarray, n: int) -> np.ndarray:
        """The last ``n`` tokens of each window as one integer; token order is digit order."""
        key = np.zeros(len(windows), np.int64)
        for column in range(self.order - n, self.order):
            key = key * self.vocab_size + windows[:, column]
        return key

    def _probs(self, windows: np.ndarray) -> np.ndarray:
        assert self.tables, "fit first"
        p = np.full(len(windows), 1 / self.vocab_size)
        for n, table in enumerate(self.tables, start=1):
            rows = np.flatnonzero(windows[:, self.order - n] != NONE)
            keys = self._pack(windows[rows], n)
            history, known = _find(table.histories, keys // self.vocab_size)
            rows, keys, history = rows[known], keys[known], history[known]
            index, seen = _find(table.keys, keys)
            counts = np.where(seen, table.counts[index], 0)
            kept = np.maximum(counts - table.discount, 0) + table.discount * table.types[history] * p[rows]
            p[rows] = kept / table.totals[history]
        return p
