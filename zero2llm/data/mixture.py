"""Several sources in one stream, each with its weight; and weights that change as training goes on.

Training is cut into phases, each with weights of its own (a curriculum; one phase = a plain mixture). In a phase every
block of 1,024 rows holds each source in proportion (largest remainders), in an order drawn from the seed. So how many
rows of a source stand before row g is counted, not remembered: the place in every source follows from g alone, and
resuming is as exact as without a mixture. A source that is used up begins its next epoch while others are still in
their first: `epochs` says how often each was seen.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from zero2llm.core.batch import Batch
from zero2llm.core.seq import Seq
from zero2llm.data.rows import Rows

BLOCK = 1024


def apportion(weights: Sequence[float], seats: int) -> np.ndarray:
    """Whole numbers in proportion to ``weights`` that add up to ``seats`` (largest remainders; ties to the first)."""
    exact = np.asarray(weights, dtype=np.float64) / sum(weights) * seats
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: seats - counts.sum()]] += 1
    return counts


def check_weights(weights: Sequence[float], n: int) -> None:
    if len(weights) != n or not all(0 <= w < float("inf") for w in weights) or not sum(weights):
        raise ValueError(f"weights {weights}: {n} finite numbers, none negative and not all 0, were expected")
    for weight, rows in zip(weights, apportion(weights, BLOCK), strict=True):
        if weight and not rows:
            raise ValueError(f"weights {weights}: {weight} is less than one row in {BLOCK}, so it would never come; raise it or take 0")


@dataclass(frozen=True)
class Phase:
    """From row ``start`` on, sources come with these ``weights``."""

    start: int
    weights: tuple[float, ...]


class MixtureRows:
    """Rows of fixed length from several sources. Raises ValueError for weights that do not fit the sources."""

    unit = 1

    def __init__(self, sources: Sequence[Rows], phases: Sequence[Phase], seed: int):
        if not phases or phases[0].start != 0 or any(a.start >= b.start for a, b in zip(phases, phases[1:], strict=False)):
            raise ValueError(f"phases begin at rows {[p.start for p in phases]}; the first must begin at 0, each later than the last")
        for phase in phases:
            check_weights(phase.weights, len(sources))
        if any(source.unit != 1 for source in sources):
            raise ValueError("preference pairs cannot be mixed with weights: give their files in one list")
        self.sources, self.phases, self.seed = sources, phases, seed
        self.identity = {"sources": [s.identity for s in sources], "phases": [[p.start, *p.weights] for p in phases]}
        self.blocks = []  # of each phase: (BLOCK,) which source, (BLOCK + 1, n) rows of each source before
        for number, phase in enumerate(phases):
            order = np.repeat(np.arange(len(sources)), apportion(phase.weights, BLOCK))
            order = np.random.Generator(np.random.PCG64([seed, number])).permutation(order)
            before = np.cumsum(np.eye(len(sources), dtype=np.int64)[order], axis=0)
            self.blocks.append((order, np.concatenate([np.zeros((1, len(sources)), np.int64), before])))

    def __len__(self) -> int:
        """Rows of one pass over as much data as there is; a source with a high weight repeats before it ends."""
        return sum(map(len, self.sources))

    def over(self, sources: Sequence[Rows]) -> MixtureRows:
        """The same mixture of the same rows with more about them, say what a teacher says."""
        return MixtureRows(sources, self.phases, self.seed)

    def before(self, g: int) -> np.ndarray:
        """(n,) rows of each source among the first ``g``."""
        counts = np.zeros(len(self.sources), np.int64)
        for number, phase in enumerate(self.phases):
            end = self.phases[number + 1].start if number + 1 < len(self.phases) else g
            rows = min(end, g) - phase.start
            if rows > 0:
                table = self.blocks[number][1]
                counts += rows // BLOCK * table[-1] + table[rows % BLOCK]
        return counts

    def place(self, g: int) -> tuple[int, int]:
        """(source, row of it counted over its epochs) of row ``g`` of training."""
        number = bisect_right([p.start for p in self.phases], g) - 1
        source = int(self.blocks[number][0][(g - self.phases[number].start) % BLOCK])
        return source, int(self.before(g)[source])

    def epochs(self, g: int) -> list[float]:
        """How often each source has been seen after ``g`` rows."""
        return [float(n) / len(source) for n, source in zip(self.before(g), self.sources, strict=True)]

    def batch(self, wanted: list[tuple[int, int]]) -> Batch:
        places = [self.place(epoch * len(self) + row) for epoch, row in wanted]
        parts, where = [], []
        for i, source in enumerate(self.sources):
            mine = [j for j, (which, _) in enumerate(places) if which == i]
            if mine:
                parts.append(source.batch([divmod(places[j][1], len(source)) for j in mine]))
                where += mine
        back = torch.tensor(where).argsort()
        tokens, labels, seg = (torch.cat(x)[back] for x in zip(*((p.tokens, p.labels, p.seq.seg) for p in parts), strict=True))
        extra = {name: torch.cat([p.extra[name] for p in parts])[back] for name in parts[0].extra}
        return Batch(tokens, labels, Seq.of_segments(seg), extra)
