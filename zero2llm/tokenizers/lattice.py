"""All ways to cut a word into pieces, and what can be asked of them, each in one pass over the characters.

    best     best[e] = max_s best[s] + score(s, e)                          the best cut (Viterbi)
    sum      log_sum[e] = log sum_s exp(log_sum[s] + score(s, e))           all cuts at once (forward)
    draw     from the end, s with p = exp(log_sum[s] + score(s, e) - log_sum[e])          a cut with its probability
    expect   E count(piece) = sum of exp(before[s] + score(s, e) + after[e] - total) over the places (s, e) of the piece

Source: Kudo 1804.10959 section 3.2 (expected counts) and 3.3 (drawing); forward-backward as in any textbook on hidden Markov
models. A word of n characters has 2 ** (n - 1) cuts; the lattice holds at most n x (longest piece) edges.
Of equally good cuts the one with the longest last piece wins, as in SentencePiece.
"""

from __future__ import annotations

import heapq
import random
from math import exp, inf, log

Edge = tuple[int, int, float]  # begin, piece, score
Lattice = list[list[Edge]]  # the edges that end at 0 .. n, longest first; every place is reached
Step = tuple[int, int, int]  # begin, end, piece


def best_cut(ends: Lattice) -> list[Step]:
    """Viterbi: the best way to reach each end, then back from the last."""
    best, back = [0.0], [(0, 0)]
    for edges in ends[1:]:
        score, begin, piece = -inf, 0, 0
        for b, p, s in edges:
            if best[b] + s > score:
                score, begin, piece = best[b] + s, b, p
        best.append(score)
        back.append((begin, piece))
    return _trace(back)


def _trace(back: list[tuple[int, int]]) -> list[Step]:
    steps, end = [], len(back) - 1
    while end > 0:
        begin, piece = back[end]
        steps.append((begin, end, piece))
        end = begin
    return steps[::-1]


def best_cuts(ends: Lattice, n: int) -> list[tuple[float, list[Step]]]:
    """The same with the ``n`` best ways to reach each end instead of one."""
    ways: list[list[tuple[float, list[Step]]]] = [[(0.0, [])]]
    for end, edges in enumerate(ends[1:], 1):
        found = ((score + s, [*steps, (begin, end, piece)]) for begin, piece, s in edges for score, steps in ways[begin])
        ways.append(heapq.nlargest(n, found, key=lambda way: way[0]))
    return ways[-1]


def log_sums(ends: Lattice, theta: float = 1.0) -> list[float]:
    """Forward: log of the sum, over all cuts of the first e characters, of p(cut) ** theta."""
    sums = [0.0]
    for edges in ends[1:]:
        terms = [sums[begin] + theta * score for begin, _, score in edges]
        top = max(terms)
        sums.append(top + log(sum(exp(term - top) for term in terms)))
    return sums


def drawn_cut(ends: Lattice, theta: float, rng: random.Random) -> list[Step]:
    """Forward filtering, backward sampling: an exact draw from all cuts."""
    sums, steps, end = log_sums(ends, theta), [], len(ends) - 1
    while end > 0:
        weights = [exp(sums[begin] + theta * score - sums[end]) for begin, _, score in ends[end]]
        begin, piece, _ = rng.choices(ends[end], weights)[0]
        steps.append((begin, end, piece))
        end = begin
    return steps[::-1]


def expected_counts(ends: Lattice) -> dict[int, float]:
    """How often each piece occurs on average over all cuts, weighted by their probability (forward-backward)."""
    before = log_sums(ends)
    after = [-inf] * len(before)
    after[-1] = 0.0
    counts: dict[int, float] = {}
    for end in range(len(ends) - 1, 0, -1):
        for begin, piece, score in ends[end]:
            x, y = after[begin], score + after[end]
            after[begin] = max(x, y) + log(exp(x - max(x, y)) + exp(y - max(x, y)))
            counts[piece] = counts.get(piece, 0.0) + exp(before[begin] + score + after[end] - before[-1])
    return counts
