"""Lattices of many words at once: position by position, but for all words that are long enough together.

    before[e] = log sum_L exp(before[e - L] + score(piece of L characters that ends at e))      and so on, as in lattice.py

Why: training looks at every character of the corpus some thirty times. A step of numpy on thousands of words costs little
more than a step of Python on one. Memory: 4 bytes x (longest piece) for each character of different words.
Shapes: W words, N characters of text, P places: a word of n characters has n + 1, before, between and behind them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NONE = -1  # no piece; scores hold -inf at their end, where this index finds it


@dataclass(frozen=True)
class Words:
    """Words are stretches of one long text, the longest first: those still going at step t are always the first few.

    start, length, first : (W,)   first character, number of characters, first place
    edge : (N, L) int32           the piece that begins at a character and has 1 .. L characters, or NONE
    whole                         whether a word may be cut into one piece, itself
    """

    start: np.ndarray
    length: np.ndarray
    first: np.ndarray
    edge: np.ndarray
    whole: bool

    @staticmethod
    def of(start: np.ndarray, length: np.ndarray, edge: np.ndarray, whole: bool = True) -> Words:
        """Raises ValueError if the words do not come longest first."""
        if (np.diff(length) > 0).any():
            raise ValueError("words must come longest first")
        return Words(start, length, np.cumsum(length + 1) - (length + 1), edge, whole)

    def going(self, t: int) -> int:
        """How many words have at least ``t`` characters."""
        return int(np.searchsorted(-self.length, -t, side="right"))

    def arriving(self, t: int, value: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pieces that end behind a word's character ``t``, longest first: lengths (K,), pieces and value + score (n, K)."""
        n, sizes = self.going(t), np.arange(min(t, self.edge.shape[1]), 0, -1)
        piece = self.edge[self.start[:n, None] + t - sizes, sizes - 1]
        if not self.whole and sizes[0] == t:
            piece[self.length[:n] == t, 0] = NONE
        return sizes, piece, value[self.first[:n, None] + t - sizes] + score[piece]

    def places(self) -> int:
        return int((self.length + 1).sum())


def log_sum_exp(x: np.ndarray) -> np.ndarray:
    """(n, K) -> (n,). At least one of each row is finite."""
    top = x.max(1)
    return np.log(np.exp(x - top[:, None]).sum(1)) + top


def forward(words: Words, score: np.ndarray) -> np.ndarray:
    """(P,) log of the summed probability of all cuts of what stands before each place."""
    before = np.zeros(words.places())
    for t in range(1, words.length[0] + 1):
        _, _, reached = words.arriving(t, before, score)
        before[words.first[: len(reached)] + t] = log_sum_exp(reached)
    return before


def backward(words: Words, score: np.ndarray) -> np.ndarray:
    """(P,) the same for what stands behind each place."""
    longest = words.edge.shape[1]
    after = np.zeros(words.places() + longest)
    for t in range(words.length[0] - 1, -1, -1):
        n, sizes = words.going(t + 1), np.arange(1, longest + 1)
        piece = words.edge[words.start[:n] + t]
        inside = t + sizes <= words.length[:n, None]
        reached = np.where(inside, after[words.first[:n, None] + t + sizes] + score[piece], -np.inf)
        after[words.first[:n] + t] = log_sum_exp(reached)
    return after[: words.places()]


def expected_counts(words: Words, weight: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, float]:
    """How often each piece occurs on average over all cuts, words counted ``weight`` times; and the log-likelihood in nats."""
    before, after = forward(words, score), backward(words, score)
    total = before[words.first + words.length]
    word = np.repeat(np.arange(len(weight)), words.length)
    offset = np.arange(len(word)) - np.repeat(np.cumsum(words.length) - words.length, words.length)
    counts = np.zeros(len(score))
    for size in range(1, words.edge.shape[1] + 1):
        piece = words.edge[words.start[word] + offset, size - 1]
        use = (piece != NONE) & (offset + size <= words.length[word])
        w, p, place = word[use], piece[use], (words.first[word] + offset)[use]
        counts += np.bincount(p, np.exp(before[place] + score[p] + after[place + size] - total[w]) * weight[w], len(score))
    return counts[:-1], float(total @ weight)


def best_cuts(words: Words, score: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Viterbi. (W,) score of each word's best cut, -inf if it has none; then, for all their pieces: the word, the piece."""
    best, piece_at, size_at = np.zeros(words.places()), np.full(words.places(), NONE), np.zeros(words.places(), np.int64)
    for t in range(1, words.length[0] + 1):
        sizes, piece, reached = words.arriving(t, best, score)
        which, rows = reached.argmax(1), np.arange(len(reached))
        place = words.first[: len(reached)] + t
        best[place], piece_at[place], size_at[place] = reached[rows, which], piece[rows, which], sizes[which]
    scores, at = best[words.first + words.length], words.length.copy()
    active, found = np.flatnonzero(np.isfinite(scores)), []
    while len(active):
        place = words.first[active] + at[active]
        found.append((active, piece_at[place]))
        at[active] -= size_at[place]
        active = active[at[active] > 0]
    word, piece = (np.concatenate([pair[i] for pair in found]) if found else np.zeros(0, np.int64) for i in (0, 1))
    return scores, word, piece
