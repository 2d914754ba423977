"""The pieces that Unigram training begins with: all characters, and the substrings that repeat.

    a substring of L characters is one of L - 1 and one character more, so numbering the pairs (number, character) numbers them;
    seeds are those that occur twice and are not covered, that is, not always followed by the same character;
    the best by count x length are kept

Source: SentencePiece's trainer (count x length, right-maximal substrings from a suffix array). Here one sort per length
replaces the suffix array: places whose substring occurs once drop out, so the sorts become short soon. A word's end is no
character here, so a word that is found in all its places at their end is a seed; in the libraries it is not.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np

from zero2llm.tokenizers.lattice_batch import NONE, Words
from zero2llm.tokenizers.unigram import BYTES, UNKNOWN

LONG_WORD = 512  # characters; a longer stretch without a cut is trained on in parts of this size


@dataclass
class State:
    """Pieces are stretches of the text: at, length, score (n,); the first ``n_chars`` are the characters, which stay."""

    text: str
    start: np.ndarray  # (W,) of each word, the longest first
    size: np.ndarray  # (W,)
    weight: np.ndarray  # (W,) occurrences
    at: np.ndarray
    length: np.ndarray
    score: np.ndarray
    edge: np.ndarray  # (N, longest), see lattice_batch.Words
    n_chars: int

    def piece(self, i: int) -> str:
        return self.text[self.at[i] : self.at[i] + self.length[i]]

    @property
    def scores(self) -> np.ndarray:
        return np.append(self.score, -np.inf)

    def words(self) -> Words:
        return Words.of(self.start, self.size, self.edge)

    def keep(self, which: np.ndarray) -> None:
        """Only the pieces of a mask remain; they are numbered anew."""
        number = np.append(np.where(which, np.cumsum(which) - 1, NONE), NONE).astype(np.int32)
        self.at, self.length, self.score, self.edge = self.at[which], self.length[which], self.score[which], number[self.edge]


def alphabet_of(words: Counter[str], coverage: float) -> set[str]:
    """The most frequent characters whose share of the text first reaches ``coverage``."""
    counts: Counter[str] = Counter()
    for word, n in words.items():
        for char in word:
            counts[char] += n
    chars, seen, total = set(), 0, counts.total()
    for char in sorted(counts, key=lambda c: (-counts[c], c)):
        if seen >= coverage * total:
            break
        chars.add(char)
        seen += counts[char]
    return chars


def stretches(words: Counter[str], chars: set[str]) -> list[tuple[str, int]]:
    """What is trained on: words between characters outside the alphabet, the longest first."""
    found: Counter[str] = Counter()
    known = re.compile(f"[{''.join(map(re.escape, sorted(chars)))}]{{1,{LONG_WORD}}}")
    for word, n in words.items():
        for part in known.findall(word):
            found[part] += n
    return sorted(found.items(), key=lambda pair: (-len(pair[0]), pair[0]))


def seed(words: Counter[str], chars: set[str], longest: int, seed_size: int) -> State | None:
    """Characters, and the ``seed_size`` substrings with the highest count x length. None if there is no text."""
    if not chars:
        return None
    parts = stretches(words, chars)
    text = "".join(part for part, _ in parts)
    size, weight = np.array([len(p) for p, _ in parts]), np.array([n for _, n in parts], float)
    start = np.cumsum(size) - size
    left = np.repeat(start + size, size) - np.arange(len(text))  # characters to the end of the word
    found, edge = substrings(text, left, np.repeat(weight, size), longest)
    at, length, count, covered = found
    n_chars = int((length == 1).sum())
    use = (count >= 2) & ~covered & (length > 1)
    order = np.argsort(-(count * length)[use], kind="stable")[:seed_size]
    chosen = np.zeros(len(at), bool)
    chosen[np.flatnonzero(use)[order]] = True
    chosen[:n_chars] = True
    for i in np.flatnonzero(chosen & np.isin(length, (len(UNKNOWN), len(BYTES[0])))):
        chosen[i] = text[at[i] : at[i] + length[i]] not in (UNKNOWN, *BYTES)
    value = np.log(count * length) - np.log((count * length)[chosen].sum())
    state = State(text, start, size, weight, at, length, value, edge, n_chars)
    state.keep(chosen)
    return state


def substrings(text: str, left: np.ndarray, weight: np.ndarray, longest: int) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """Substrings inside words, as long as they repeat: (a place, length, count, whether covered), and the edges to them."""
    code = np.unique(np.frombuffer(text.encode("utf-32-le"), np.uint32), return_inverse=True)[1].astype(np.int64)
    edge = np.full((len(text), longest), NONE, np.int32)
    here, number, n = np.arange(len(text)), code, 0  # places that are left, and the substring at each
    found = []
    for size in range(1, longest + 2):  # one more than is asked for, to know what it covers
        distinct, at, number = np.unique(number, return_index=True, return_inverse=True)
        count = np.bincount(number, weight[here])
        if found:
            parent = distinct // (code.max() + 1)
            found[-1][3][parent[count == found[-1][2][parent]]] = True
        if size > longest:
            break
        found.append((here[at], np.full(len(at), size), count, np.zeros(len(at), bool)))
        edge[here, size - 1] = n + number
        n += len(at)
        more = (count[number] >= 2) & (left[here] > size)
        here, number = here[more], number[more]
        if not len(here):
            break
        number = number * (code.max() + 1) + code[here + size]
    return tuple(np.concatenate(column) for column in zip(*found, strict=True)), edge
