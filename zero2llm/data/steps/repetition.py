"""Gopher's repetition rules: how much of a document says the same again?

A document goes if one of these shares is larger than its limit (in this order; characters are out of all of the text's):

    paragraphs that stood before        0.30     characters of the most frequent 2-gram of words   0.20
    characters in them                  0.20                                     3-gram            0.18
    lines that stood before             0.30                                     4-gram            0.16
    characters in them                  0.20     characters in 5- .. 10-grams that stood before    0.15 0.14 0.13 0.12 0.11 0.10

"Stood before": the first of several equal ones is not counted. A character counts once for each n, however many repeated n-grams
overlap there: behind a repeated n-gram the search goes on after its last word.

*Source*: Rae et al. 2021 (Gopher), 2112.11446, section A.1.2, table A1; reading and order as in datatrove, but an n-gram that
occurs once is no repetition (in a poem of 20 characters any 5 are a quarter of the text). *Why*: templates, spam and broken
extraction look like prose to every other rule, and a model that learns from them loops. About
12 MB/s of English and 5 MB/s of Chinese on one core.

A 5-gram that stood before lies inside every longer n-gram that did, so where the repeated 5-grams hold few characters, the
longer ones need no search. Chinese, where a word is a character: n is 1.6 x as large (`CHARACTERS_PER_WORD`), and the limits
are those of FineWeb-2's configuration for cmn_Hani (2506.20920), found for words as jieba cuts them. Other languages: the
English table, which knows no word of English.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import field
from typing import ClassVar, Literal

from zero2llm.core.config import config
from zero2llm.data.document import Removed, Step
from zero2llm.data.steps.thresholds import Changes, by_rules, tables
from zero2llm.data.steps.words import words

Limits = tuple[tuple[int, float], ...]  # n, largest share


@config
class RepetitionRules:
    """The limits for one language. ``gap``: characters between two words. None or (): this rule rests."""

    paragraphs: float | None = 0.3
    paragraph_characters: float | None = 0.2
    lines: float | None = 0.3
    line_characters: float | None = 0.2
    top_grams: Limits = ((2, 0.20), (3, 0.18), (4, 0.16))
    duplicate_grams: Limits = ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))
    gap: int = 1

    def __post_init__(self):
        for n, limit in self.top_grams + self.duplicate_grams:
            if n < 1 or not 0 <= limit <= 1:
                raise ValueError(f"[{n}, {limit}]: n is at least 1, and a share lies between 0 and 1")
        for name in ("top_grams", "duplicate_grams"):
            sizes = [n for n, _ in getattr(self, name)]
            if sizes != sorted(set(sizes)):
                raise ValueError(f"{name}: n must rise, this is {sizes}")


ENGLISH = RepetitionRules()
CHINESE = RepetitionRules(
    lines=0.287,
    top_grams=((3, 0.256), (5, 0.201), (6, 0.171)),
    duplicate_grams=((8, 0.198), (10, 0.182), (11, 0.167), (13, 0.154), (14, 0.14), (16, 0.127)),
    gap=0,
)
DEFAULTS = {"en": ENGLISH, "zh": CHINESE, "other": ENGLISH}


@config
class RepetitionConfig:
    """``languages`` changes limits: {zh: {lines: 0.4}}."""

    kind: Literal["repetition"] = "repetition"
    looks_at: ClassVar[str] = "document"
    languages: Changes = field(default_factory=dict)

    def __post_init__(self):
        tables(self.kind, DEFAULTS, self.languages)

    def build(self) -> Step:
        return by_rules(self.kind, tables(self.kind, DEFAULTS, self.languages), fault)


def fault(text: str, r: RepetitionRules) -> Removed | None:
    """The first limit that a text passes."""
    paragraphs, lines = re.split("\n{2,}", text.strip()), re.split("\n+", text.strip("\n"))
    found = part_fault("paragraphs", paragraphs, len(text), r.paragraphs, r.paragraph_characters)
    found = found or part_fault("lines", lines, len(text), r.lines, r.line_characters)
    if found:
        return found
    tokens = words(text)
    return top_gram_fault(tokens, len(text), r) or duplicate_gram_fault(tokens, len(text), r)


def part_fault(name: str, parts: list[str], size: int, limit: float | None, limit_of_characters: float | None):
    n, characters = repeated(parts)
    if limit is not None and n / len(parts) > limit:
        return Removed(f"repeated {name}", f"{n} of {len(parts)} = {n / len(parts):.3f} > {limit}")
    if limit_of_characters is not None and size:
        return _over(f"characters in repeated {name}", characters, size, limit_of_characters)
    return None


def repeated(parts: list[str]) -> tuple[int, int]:
    """(how many stood before, their characters)."""
    again = [(part, n - 1) for part, n in Counter(parts).items() if n > 1]
    return sum(n for _, n in again), sum(len(part) * n for part, n in again)


def grams(tokens: list[str], n: int) -> zip:
    return zip(*(tokens[i:] for i in range(n)), strict=False)


def top_gram_fault(tokens: list[str], size: int, r: RepetitionRules) -> Removed | None:
    longest = max(map(len, tokens), default=0)
    most = len(tokens)  # how often a gram can stand at most
    for n, limit in r.top_grams:
        if len(tokens) < n or most * (n * longest + r.gap * (n - 1)) <= limit * size:
            continue
        counts = Counter(grams(tokens, n))
        most = max(counts.values())  # no longer gram stands more often than this shorter one
        gram = next(gram for gram, count in counts.items() if count == most)
        characters = most * (sum(map(len, gram)) + r.gap * (n - 1))
        if most > 1 and (found := _over(f"most frequent {n}-gram", characters, size, limit, " ".join(gram))):
            return found
    return None


def duplicate_gram_fault(tokens: list[str], size: int, r: RepetitionRules) -> Removed | None:
    if not r.duplicate_grams or few_repeat(tokens, size, r.duplicate_grams):
        return None
    for n, limit in r.duplicate_grams:
        if found := _over(f"repeated {n}-grams", duplicate_characters(tokens, n), size, limit):
            return found
    return None


def few_repeat(tokens: list[str], size: int, limits: Limits) -> bool:
    """Whether the repeated n-grams of the smallest n, overlaps counted twice, already stay below every limit."""
    n, _ = limits[0]
    if len(set(grams(tokens, n))) == max(len(tokens) - n + 1, 0):
        return True
    counts = Counter(grams(tokens, n))
    characters = sum((count - 1) * len("".join(gram)) for gram, count in counts.items() if count > 1)
    return characters <= min(limit for _, limit in limits) * size


def duplicate_characters(tokens: list[str], n: int) -> int:
    """Characters in n-grams that stood before, none counted twice."""
    seen: set[tuple[str, ...]] = set()
    total = at = 0
    while at + n <= len(tokens):
        gram = tuple(tokens[at : at + n])
        if gram in seen:
            total += len("".join(gram))
            at += n
        else:
            seen.add(gram)
            at += 1
    return total


def _over(reason: str, characters: int, size: int, limit: float, what: str = "") -> Removed | None:
    if characters / size > limit:
        detail = f"{characters} of {size} characters = {characters / size:.3f} > {limit}"
        return Removed(reason, f"{detail}: {what!r}" if what else detail)
    return None
