"""What a pile of documents looks like in numbers: sizes, lengths, languages, word and token frequencies.

Words are counted by rule, not by dictionary: a run of letters, lower-cased, with apostrophes inside ("don't"); in scripts
written without spaces (Chinese characters, kana) every single character, and apart from them, as ``pairs``, every two that
stand side by side, because most Chinese words are two characters long.

Zipf's law: the r-th most frequent word stands about n_1 / r times, a line of slope -1 where both axes are logarithmic.
Source: Zipf, Human Behavior and the Principle of Least Effort (1949).
Why: a plateau at the top is boilerplate that repeats, a broken tail is a vocabulary that deduplication or a filter cut.

Memory: at most ``most`` different words (and pairs). When there are more, the rarer half is forgotten, and ``undercount``
grows by the largest count that went (Misra & Gries 1982): a count shown is too low by at most that, never too high.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence

MOST = 200_000  # different words that one Stats remembers: about 30 MB
SINGLE = "\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"  # kana and Han
CHARACTER, PAIR = re.compile(f"[{SINGLE}]"), re.compile(f"(?=([{SINGLE}]{{2}}))")
LETTER = "a-z\u00df-\u00f6\u00f8-\u024f\u0370-\u1fff\uac00-\ud7a3"  # lower-cased Latin, Greek ... Indic, Thai, Hangul
WORD = re.compile(f"[{LETTER}]+(?:['\u2019][{LETTER}]+)*")
EDGES = (0, *dict.fromkeys(round(10 ** (k / 5)) for k in range(41)))  # five bins a decade, 1 to 10^8 characters
UNKNOWN = "und"  # ISO 639: the language of a document that no step identified


class Stats:
    """Counts that add up: merging parts in the same order gives the same numbers, whoever counted the parts."""

    def __init__(self, most: int = MOST):
        if most < 2:
            raise ValueError(f"most = {most} must be at least 2: it is halved when there are more words")
        self.most = most
        self.documents = self.bytes = self.characters = 0
        self.tokens, self.encoded = 0, 0  # encoded = documents whose tokens were counted
        self.lengths = [0] * len(EDGES)  # of documents with EDGES[i] <= characters < EDGES[i + 1]; the last bin is open
        self.languages: dict[str, list[int]] = {}  # code -> documents, bytes, tokens
        self.words: Counter[str] = Counter()
        self.pairs: Counter[str] = Counter()
        self.token_counts: Counter[int] = Counter()  # never cut: the vocabulary bounds it
        self.undercount = {"words": 0, "pairs": 0}

    def add(self, text: str, language: str | None = None, ids: Sequence[int] | None = None) -> None:
        """One document; ``ids`` = its tokens. Raises ValueError for half a surrogate pair, which has no bytes."""
        n_bytes, n_tokens = len(text.encode()), len(ids or ())
        self.documents += 1
        self.bytes += n_bytes
        self.characters += len(text)
        self.lengths[bisect_right(EDGES, len(text)) - 1] += 1
        self._language(language or UNKNOWN, (1, n_bytes, n_tokens))
        self.words.update(WORD.findall(text.lower()))
        if not text.isascii():
            self.words.update(CHARACTER.findall(text))
            self.pairs.update(PAIR.findall(text))
        if ids is not None:
            self.encoded += 1
            self.tokens += n_tokens
            self.token_counts.update(ids)
        self._prune()

    def merge(self, other: Stats) -> None:
        self.documents += other.documents
        self.bytes += other.bytes
        self.characters += other.characters
        self.tokens += other.tokens
        self.encoded += other.encoded
        self.lengths = [a + b for a, b in zip(self.lengths, other.lengths, strict=True)]
        for code, sizes in other.languages.items():
            self._language(code, sizes)
        self.words.update(other.words)
        self.pairs.update(other.pairs)
        self.token_counts.update(other.token_counts)
        for name in self.undercount:
            self.undercount[name] += other.undercount[name]
        self._prune()

    def _language(self, code: str, sizes: Sequence[int]) -> None:
        old = self.languages.get(code, (0, 0, 0))
        self.languages[code] = [a + b for a, b in zip(old, sizes, strict=True)]

    def _prune(self) -> None:
        for name, counts in (("words", self.words), ("pairs", self.pairs)):
            if len(counts) > self.most:
                ranked = ranking(counts)
                self.undercount[name] += ranked[self.most // 2][1]
                counts.clear()
                counts.update(dict(ranked[: self.most // 2]))

    def to_dict(self, most: int | None = None) -> dict:
        """JSON. ``most`` = list only so many words, pairs and tokens, for a report; without it nothing is lost.

        ``tokens`` is None unless every document came with its ids.
        """
        whole = self.encoded == self.documents > 0
        words, pairs, tokens = ranking(self.words), ranking(self.pairs), ranking(self.token_counts)
        languages = {
            code: {"documents": d, "bytes": b, "tokens": t if whole else None}
            for code, (d, b, t) in sorted(self.languages.items(), key=lambda item: (-item[1][1], item[0]))
        }
        return {
            "documents": self.documents,
            "bytes": self.bytes,
            "characters": self.characters,
            "tokens": self.tokens if whole else None,
            "bytes_per_token": self.bytes / self.tokens if whole and self.tokens else None,
            "lengths": {"edges": list(EDGES), "counts": list(self.lengths)},
            "languages": languages,
            "words": [[w, n] for w, n in words[:most]],
            "pairs": [[w, n] for w, n in pairs[:most]],
            "token_counts": [[i, n] for i, n in tokens[:most]],
            "zipf": zipf([n for _, n in words]),
            "token_zipf": zipf([n for _, n in tokens]),
            "distinct": {"words": len(words), "pairs": len(pairs), "tokens": len(tokens)},
            "undercount": dict(self.undercount),
            "partly_encoded": None if whole or not self.encoded else [self.encoded, self.tokens],
        }

    @staticmethod
    def from_dict(value: dict, most: int = MOST) -> Stats:
        """What `to_dict` gave. Raises ValueError for a report's: words that it does not list could not be added up."""
        lists = {"words": value["words"], "pairs": value["pairs"], "tokens": value["token_counts"]}
        for name, listed in lists.items():
            if len(listed) != value["distinct"][name]:
                raise ValueError(
                    f"these counts list {len(listed)} of {value['distinct'][name]} {name}: they were written for a report "
                    "(to_dict(most=...)) and cannot be added to others"
                )
        if value["lengths"]["edges"] != list(EDGES):
            raise ValueError("these counts come from a version with other length bins; count the documents again")
        stats = Stats(most)
        stats.documents, stats.bytes, stats.characters = value["documents"], value["bytes"], value["characters"]
        partly = value["partly_encoded"] or (0, 0)
        stats.encoded, stats.tokens = partly if value["tokens"] is None else (value["documents"], value["tokens"])
        stats.lengths = list(value["lengths"]["counts"])
        for code, size in value["languages"].items():
            stats.languages[code] = [size["documents"], size["bytes"], size["tokens"] or 0]
        stats.words.update({w: n for w, n in value["words"]})
        stats.pairs.update({w: n for w, n in value["pairs"]})
        stats.token_counts.update({i: n for i, n in value["token_counts"]})
        stats.undercount = dict(value["undercount"])
        stats._prune()
        return stats


def ranking(counts: Counter) -> list[tuple]:
    """Most frequent first; equal counts in the order of their keys, so that no order of counting shows."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def zipf(falling: Sequence[int]) -> dict[str, list[int]]:
    """Counts at ranks evenly spaced on a logarithmic axis, 20 a decade, the last rank included."""
    ranks = {round(10 ** (k / 20)) for k in range(160)} | {len(falling)}
    ranks = sorted(r for r in ranks if 1 <= r <= len(falling))
    return {"rank": ranks, "count": [falling[r - 1] for r in ranks]}
