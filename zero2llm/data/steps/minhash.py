"""MinHash-LSH: near-duplicates, found without comparing every pair of documents.

    J(A, B) = |A & B| / |A | B|                       how much two sets of shingles overlap
    h_i(A)  = min over x in A of (a_i x + b_i mod 2^32)            one slot of the signature, i = 1 .. bands * rows
    P(h_i(A) = h_i(B)) = J(A, B)                     so the share of equal slots estimates J: sd = sqrt(J (1-J) / slots)
    candidate: all slots of some band are equal       P = 1 - (1 - J^rows)^bands, an S curve with its knee near
    duplicate: candidate, and share >= threshold      (1 / bands)^(1 / rows)

Source: Broder 1997, section 3; banding: Leskovec, Rajaraman & Ullman, Mining of Massive Datasets, 3.4; for corpora:
Lee et al. 2107.06499, appendix A. Word 5-grams and the aim of "at least 75 % similar" are FineWeb's (2406.17557).
Ours: candidates are checked, by the signatures' own estimate (Lee et al. compare the texts). FineWeb takes every
candidate of 14 x 8, a gentle curve that passes 92 % at J = 0.8 and still 21 % at 0.6; here 21 x 6 passes 99.8 % at
0.8 and 63 % at 0.6, and the check then cuts where the threshold says.
Why: bands decide what is found and the check what is believed, so both can be had. Every a_i is odd, so x -> a_i x +
b_i is a permutation of the 2^32 values, in which different shingle hashes never meet; they are random enough that
such simple permutations show no bias (measured). 508 bytes per document on disk, 90 in memory while bands are sorted.

Of a bucket the first document is compared with all others, then of those left the first, at most LEADERS times. What
is alike only to a document that left with an earlier leader, or stands behind too many, stays unless another band
shows it: at worst too much is kept, and a template that a hundred thousand pages share costs minutes, not the square
of its number. `engine: rensa` makes the signatures in Rust; they are different numbers with the same law (its
R-MinHash reads every shingle; the sampling "rho" pipeline is not used), judged by the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import numpy as np

from zero2llm.core.config import config
from zero2llm.data.document import Document, Removed, Verdict
from zero2llm.data.shingles import STEP, mix, random_bits, shingles
from zero2llm.data.union import first_of_equal, join

LEADERS = 64  # comparisons of one document in one bucket: half a millisecond if all 21 are crowded
SHINGLES = 256  # permuted at once: with 126 slots 126 KB, which stay in the cache
ROWS = 1 << 11  # signatures read at once: two times 1 MB, which stay in the cache


@config
class MinHashConfig:
    kind: Literal["minhash"] = "minhash"
    looks_at: ClassVar[str] = "corpus"
    ngram: int = 5  # units (words, or characters of scripts without spaces) in a shingle
    bands: int = 21
    rows: int = 6  # slots in a band
    threshold: float = 0.75  # of the estimated Jaccard similarity; 0: every candidate is a duplicate
    keep: Literal["first", "longest"] = "first"  # of each group
    engine: Literal["handwritten", "rensa"] = "handwritten"
    seed: int = 0

    def __post_init__(self):
        for name in ("ngram", "bands", "rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: at least 1")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold = {self.threshold}: a similarity is between 0 and 1")
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"seed = {self.seed}: from 0 to 2^32 - 1")
        if self.threshold and (found := chance(self.threshold, self.bands, self.rows)) < 0.5:
            raise ValueError(
                f"bands = {self.bands} x rows = {self.rows} would find {found:.0%} of the pairs at threshold = "
                f"{self.threshold}; more bands or fewer rows find more"
            )

    def build(self) -> MinHash:
        slots = self.bands * self.rows
        engine = Permutations(slots, self.seed) if self.engine == "handwritten" else rensa_engine(slots, self.seed)
        return MinHash(self, engine)


def chance(similarity: float, bands: int, rows: int) -> float:
    """The S curve: with what probability two documents of that similarity become candidates."""
    return 1 - (1 - similarity**rows) ** bands


class Permutations:
    """Handwritten signatures: every slot permutes all shingles and keeps the smallest."""

    def __init__(self, slots: int, seed: int):
        bits = random_bits(2 * slots, seed).astype(np.uint32)
        self.a, self.b = bits[:slots] | np.uint32(1), bits[slots:]

    def __call__(self, hashes: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """(S,) uint64 shingles, (D + 1,) where each document's begin -> (D, slots) uint32. None may be empty."""
        low = hashes.astype(np.uint32)
        out = np.empty((len(offsets) - 1, len(self.a)), dtype=np.uint32)
        for row, start, end in zip(out, offsets[:-1], offsets[1:], strict=True):
            row[:] = self.minima(low[start:end])
        return out

    def minima(self, x: np.ndarray) -> np.ndarray:
        lowest = np.full(len(self.a), (1 << 32) - 1, dtype=np.uint32)
        for i in range(0, len(x), SHINGLES):
            permuted = x[i : i + SHINGLES, None] * self.a + self.b  # (shingles, slots); wraps at 2^32
            np.minimum(lowest, permuted.min(axis=0), out=lowest)
        return lowest


def rensa_engine(slots: int, seed: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Signatures of the library rensa, with the meaning of `Permutations`."""
    try:
        from rensa import RMinHash
    except ImportError:
        raise ValueError("engine: rensa needs the extra: pip install 'zero2llm[data]'") from None

    def sign(hashes: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        made = RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets.astype(np.uint64), slots, seed)
        return np.array(made.to_rows(), dtype=np.uint32).reshape(-1, slots)

    return sign


def agreement(rows: np.ndarray, a: np.ndarray, b: np.ndarray, slots: int) -> np.ndarray:
    """(M,) estimated similarity of the rows a[i] and b[i]: the share of equal slots."""
    share = np.empty(len(a))
    for i in range(0, len(a), ROWS):
        left, right = (np.take(rows, x[i : i + ROWS], axis=0)[:, :slots] for x in (a, b))
        share[i : i + ROWS] = (left == right).mean(axis=1)
    return share


def band_keys(rows: np.ndarray, start: int, end: int) -> np.ndarray:
    """(N,) uint64: one number for the slots from start to end."""
    keys = np.zeros(len(rows), dtype=np.uint64)
    for i in range(0, len(rows), ROWS):
        for column in np.asarray(rows[i : i + ROWS, start:end]).T:
            keys[i : i + ROWS] = keys[i : i + ROWS] * STEP + column
    return mix(keys)


def first_or_longest(group: np.ndarray, lengths: np.ndarray, keep: str) -> np.ndarray:
    """(N,) bool, one True in each group; of equally long ones the first."""
    if keep == "first":
        return group == np.arange(len(group))
    order = np.lexsort((-lengths.astype(np.int64), group))
    kept = np.zeros(len(group), dtype=bool)
    kept[order[np.diff(group[order], prepend=-1) > 0]] = True
    return kept


class MinHash:
    """Rows: the slots, and last how many shingles there were. A document without letters has no row and stays."""

    def __init__(self, cfg: MinHashConfig, engine: Callable[[np.ndarray, np.ndarray], np.ndarray]):
        self.cfg, self.engine, self.slots = cfg, engine, cfg.bands * cfg.rows

    def sign(self, doc: Document) -> np.ndarray:
        return self.sign_many([doc])[0]

    def sign_many(self, docs: Sequence[Document]) -> list[np.ndarray]:
        """The same rows several times as fast for short documents; a few hundred at once are enough."""
        hashes, offsets = shingles([doc.text for doc in docs], self.cfg.ngram)
        number = np.diff(offsets)
        some = number > 0
        rows = np.empty((some.sum(), self.slots + 1), dtype=np.uint32)
        if len(rows):
            rows[:, :-1] = self.engine(hashes, np.append(offsets[:-1][some], offsets[-1]))
        rows[:, -1] = number[some]
        return np.split(rows, np.cumsum(some)[:-1]) if docs else []

    def decide(self, rows: np.ndarray, owner: np.ndarray) -> Verdict:
        group = np.arange(len(rows))
        for band in range(self.cfg.bands):
            self.join_bucket_mates(rows, band_keys(rows, band * self.cfg.rows, (band + 1) * self.cfg.rows), group)
        return Verdict(first_or_longest(group, rows[:, -1], self.cfg.keep), group)

    def join_bucket_mates(self, rows: np.ndarray, keys: np.ndarray, group: np.ndarray) -> None:
        """Join those with equal keys whose signatures agree too; ``group`` is changed in place."""
        leader = first_of_equal(keys)
        left = np.flatnonzero(leader != np.arange(len(keys)))
        leader = leader[left]
        for _ in range(LEADERS):
            apart = group[left] != group[leader]  # an earlier band joined the others
            left, leader = left[apart], leader[apart]
            alike = agreement(rows, left, leader, self.slots) >= self.cfg.threshold
            join(group, left[alike], leader[alike])
            left, leader = left[~alike], leader[~alike]
            if not len(left):
                return
            nearest = left[first_of_equal(leader)]
            left, leader = left[nearest != left], nearest[nearest != left]

    def apply(self, doc: Document, keep: np.ndarray) -> Document | Removed:
        return doc if keep.all() else Removed("near-duplicate (MinHash)")
