"""Decontamination: no document may hold a stretch of an evaluation set.

    token        = a word of letters and digits, lower case, without its apostrophe; or one Han character
    contaminated = n tokens in a row stand in the document and in an item           n = 13 words, 20 Han characters
    h(t_i .. t_{i+n-1}) = n + B^i  sum_k  hash(t_k) B^-k   mod 2^64                  B odd: every window from one running sum

An item of 8 to 12 words (12 to 19 characters) is searched for as a whole; a shorter one cannot be told from chance and is
reported, not searched. A document is removed, or with ``action: cut`` loses the stretch and 35 words on either side; what is
left falls into parts, those under 35 words go, and a document in more than 10 parts goes whole.

*Source*: Brown et al. 2020 (GPT-3), 2005.14165, appendix C: 13 words, 8 at least, lower case without punctuation, 200
characters (35 words) around, 10 parts. Not done: leaving out n-grams that more than 10 training documents share, which one
document cannot know. Chinese: 13 words at 1.6 characters, rounded down to 20; a couplet of verse or a set phrase of 14 is no
leak. *Why*: a score on questions that the model has read measures memory. Against 10^6 windows of evaluation sets, 64-bit
hashes mistake one in 10^13 windows read.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np

from zero2llm.core.config import config
from zero2llm.core.log import log_once
from zero2llm.data.document import Document, Removed, Result, Step
from zero2llm.data.sources import BadRecords, read_records
from zero2llm.data.steps.words import SOLO, has_solo

BASE = 0x9E3779B97F4A7C15  # odd; the golden ratio's bits
MAX_WORDS = 1 << 20  # hashes of words kept in memory
_token = re.compile(rf"[{SOLO}]|[^\W{SOLO}]+(?:['’][^\W{SOLO}]+)*")


@config
class EvaluationSet:
    """Files of one evaluation set (also ``embedded:NAME``); the text of an item is what stands in its ``fields``."""

    name: str
    paths: tuple[str, ...]
    fields: tuple[str, ...] = ("text",)


@config
class DecontaminateConfig:
    """``shortest``, ``margin``, ``min_part``: words; of Han characters the n_characters / n-fold."""

    kind: Literal["decontaminate"] = "decontaminate"
    looks_at: ClassVar[str] = "document"
    against: tuple[EvaluationSet, ...]
    n: int = 13
    n_characters: int = 20
    shortest: int = 8
    action: Literal["remove", "cut"] = "remove"
    margin: int = 35
    min_part: int = 35
    max_parts: int = 10

    def __post_init__(self):
        if not self.against:
            raise ValueError("against is empty: name an evaluation set, {name: ..., paths: [...], fields: [...]}")
        if not 1 <= self.shortest <= self.n:
            raise ValueError(f"shortest = {self.shortest} and n = {self.n}: 1 <= shortest <= n is needed")
        if self.n_characters < self.n:
            raise ValueError(f"n_characters = {self.n_characters} < n = {self.n}: a character says less than a word")
        for name in ("margin", "min_part", "max_parts"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)} must not be negative")

    def build(self) -> Step:
        """Reads the evaluation sets. Raises ValueError for a missing file or field, or a set with nothing long enough."""
        return Decontaminate(self)

    def scaled(self, n_words: int, solo: bool) -> int:
        return round(n_words * self.n_characters / self.n) if solo else n_words


@dataclass(frozen=True)
class Item:
    """An item of an evaluation set: where it stands, and how many tokens in a row betray it."""

    source: str
    where: str
    n: int
    solo: bool  # Chinese and the like


class Decontaminate:
    def __init__(self, cfg: DecontaminateConfig):
        self.cfg = cfg
        self.hashes: dict[str, int] = {}
        self.items: list[Item] = []
        self.too_short: dict[str, int] = {}
        found: list[np.ndarray] = []
        for source in cfg.against:
            already = len(self.items)
            for where, text in texts(source):
                self._index(source.name, where, _token.findall(text), found)
            if len(self.items) == already:
                raise ValueError(
                    f"decontaminate: no item of {source.name!r} has {cfg.shortest} words or more in {', '.join(source.fields)}; "
                    "name other fields, or lower shortest"
                )
            if n := self.too_short.get(source.name):
                log_once(f"decontaminate: {n} items of {source.name!r} are too short to be searched for")
        self.lengths = sorted({item.n for item in self.items})
        self.known, first = np.unique(np.concatenate(found), return_index=True)
        self.owner = np.repeat(np.arange(len(found)), [len(part) for part in found])[first]  # the first item with it
        self.shift = np.uint64(max(64 - 3 - len(self.known).bit_length(), 32))
        self.begins = np.zeros(1 << (64 - int(self.shift)), bool)  # whether a known hash begins with these bits:
        self.begins[self.known >> self.shift] = True  # one look says no to seven of eight that are unknown

    def _index(self, source: str, where: str, tokens: list[str], found: list[np.ndarray]) -> None:
        solo = sum(map(has_solo, tokens)) > len(tokens) / 2
        if len(tokens) < self.cfg.scaled(self.cfg.shortest, solo):
            self.too_short[source] = self.too_short.get(source, 0) + 1
            return
        n = min(len(tokens), self.cfg.n_characters if solo else self.cfg.n)
        found += windows(self._hash(tokens), [n])
        self.items.append(Item(source, where, n, solo))

    def __call__(self, doc: Document) -> Result:
        hits = self._hits(_token.findall(doc.text))
        if not hits:
            return doc
        start, item = hits[0]
        spans = [match.span() for match in _token.finditer(doc.text)]
        stretch = doc.text[spans[start][0] : spans[start + item.n - 1][1]]
        removed = Removed(f"overlaps {item.source}", f"{item.where}: {' '.join(stretch.split())!r}")
        return removed if self.cfg.action == "remove" else self._cut(doc, hits, spans, removed)

    def _hits(self, tokens: list[str]) -> list[tuple[int, Item]]:
        """(number of the first token, whose stretch it is), from left to right."""
        parts = windows(self._hash(tokens), self.lengths)
        seen = np.concatenate(parts)
        maybe = np.flatnonzero(self.begins[seen >> self.shift])
        at = np.minimum(np.searchsorted(self.known, seen[maybe]), len(self.known) - 1)
        true = self.known[at] == seen[maybe]
        starts = np.concatenate([np.arange(len(part)) for part in parts])
        hits = zip(starts[maybe[true]].tolist(), self.owner[at[true]].tolist(), strict=True)
        return [(start, self.items[number]) for start, number in sorted(hits)]

    def _cut(
        self, doc: Document, hits: list[tuple[int, Item]], spans: list[tuple[int, int]], removed: Removed
    ) -> Result:
        gone = np.zeros(len(spans) + 2, bool)  # a sentinel on either side
        gone[[0, -1]] = True
        for start, item in hits:
            margin = self.cfg.scaled(self.cfg.margin, item.solo)
            gone[max(start - margin, 0) + 1 : min(start + item.n + margin, len(spans)) + 1] = True
        edges = np.flatnonzero(gone[1:] != gone[:-1]).reshape(-1, 2)
        least = self.cfg.scaled(self.cfg.min_part, hits[0][1].solo)
        edges = [(a, b) for a, b in edges.tolist() if b - a >= least]
        if not edges or len(edges) > self.cfg.max_parts:
            why = "no part is long enough" if not edges else f"cut into {len(edges)} parts"
            return Removed(removed.reason, f"{removed.detail}; {why}")
        size = len(doc.text)
        bounds = [(spans[a][0] if a else 0, spans[b][0] if b < len(spans) else size) for a, b in edges]
        parts = [
            Document(doc.text[a:b].strip(), f"{doc.where}, part {i}", dict(doc.meta))
            for i, (a, b) in enumerate(bounds, 1)
        ]
        parts[0].notes = doc.notes
        parts[0].notes["decontaminate: documents cut"] += 1
        parts[0].notes["decontaminate: characters cut"] += size - sum(b - a for a, b in bounds)
        return parts

    def _hash(self, tokens: list[str]) -> np.ndarray:
        """(T,) uint64, one for each token; how a word was written (case, full width, apostrophe) makes no difference."""
        known = self.hashes
        if len(known) > MAX_WORDS:
            known.clear()
        for token in set(tokens).difference(known):
            plain = re.sub("['’]", "", unicodedata.normalize("NFKC", token).casefold())
            known[token] = int.from_bytes(
                hashlib.blake2b(plain.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little"
            )
        return np.fromiter(map(known.__getitem__, tokens), np.uint64, len(tokens))


def windows(hashes: np.ndarray, lengths: list[int]) -> list[np.ndarray]:
    """For each n the hashes of all n tokens in a row, (max(T - n + 1, 0),) uint64, by the running sum of the docstring."""
    size = len(hashes)
    up, down = powers(1 << size.bit_length())
    total = np.zeros(size + 1, np.uint64)
    np.cumsum(hashes * down[:size], out=total[1:])
    return [(total[n:] - total[:-n]) * up[: max(size - n + 1, 0)] + np.uint64(n) for n in lengths]


@lru_cache(maxsize=32)
def powers(size: int) -> tuple[np.ndarray, np.ndarray]:
    """B, B^2, B^3 ... and their inverses, all mod 2^64."""
    up, down = (np.full(size, base, np.uint64).cumprod() for base in (BASE, pow(BASE, -1, 1 << 64)))
    return up, down


def texts(source: EvaluationSet) -> Iterator[tuple[str, str]]:
    """(where, text) of each item. Raises ValueError for a record without one of the fields."""
    for record in read_records(source.paths, BadRecords()):
        where, value = f"{record.file}, line {record.line}", record.value
        if isinstance(value, str):
            value = {"text": value}
        if not isinstance(value, dict):
            raise ValueError(f"{where}: {source.name!r} needs objects, this is a {type(value).__name__}")
        for name in source.fields:
            if name not in value:
                raise ValueError(f"{where}: no field {name!r}; it has: {', '.join(map(str, value)) or 'nothing'}")
        yield where, "\n".join(text for name in source.fields for text in strings(value[name]))


def strings(value: Any) -> Iterator[str]:
    """All text in a field: a string, a list of choices, messages."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from strings(part)
    elif isinstance(value, dict):
        yield from strings(value["content"] if "content" in value else list(value.values()))
