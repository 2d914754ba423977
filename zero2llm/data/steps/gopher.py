"""Gopher's quality rules: is this running text at all?

A document stays if all of these hold, for the words of `words.py` (rules in this order; the first that fails is the reason):

    1  50 <= words <= 100,000                         words made of marks alone do not count here and in 2
    2  3 <= mean length of a word <= 10 characters
    3  # per word <= 0.1    and   ellipses per word <= 0.1
    4  lines that begin with a bullet <= 90 %
    5  lines that end with an ellipsis <= 30 %
    6  words with a letter >= 80 %                    a letter of any script: Han too
    7  at least 2 different stop words of  the be to of and that have with

*Source*: Rae et al. 2021, "Scaling Language Models: Methods, Analysis & Insights from Training Gopher", 2112.11446, section
A.1.1; the order of the tests is datatrove's. *Why*: removes menus, tables, keyword lists and machine noise for the
price of a split: about 30 MB/s of English and 12 MB/s of Chinese on one core.

Chinese, where a word is a character: the counts are 1.6 x the English ones (`CHARACTERS_PER_WORD`), the ratio per word is 1/1.6 of
its own. The mean length of such a word is 1 and has no lower bound; it passes 4 only where most words are Latin or numbers. Stop
words are the function words in FineWeb-2's configuration for cmn_Hani (2506.20920), in both scripts, and classical ones, since 的
and 了 are modern. A poem has fewer than 80 characters, as a sonnet has more than 50 words: a corpus of verse needs
``languages: {zh: {min_words: 20, min_stop_words: 1}}``. Other languages: rules 2 and 7 rest until a recipe gives numbers.
"""

from __future__ import annotations

from dataclasses import field
from typing import ClassVar, Literal

from zero2llm.core.config import config
from zero2llm.data.document import Removed, Step
from zero2llm.data.steps.thresholds import Changes, by_rules, tables
from zero2llm.data.steps.words import CHARACTERS_PER_WORD, words

MARKS = "，。、；：？！“”‘’「」『』《》（）,.;:?!\"'()"


@config
class GopherRules:
    """The numbers for one language. None: this rule rests."""

    min_words: int | None = 50
    max_words: int | None = 100_000
    min_mean_word_length: float | None = 3
    max_mean_word_length: float | None = 10
    max_symbols_per_word: float | None = 0.1
    max_bullet_lines: float | None = 0.9
    max_ellipsis_lines: float | None = 0.3
    min_alphabetic_words: float | None = 0.8
    min_stop_words: int | None = 2
    stop_words: tuple[str, ...] = ("the", "be", "to", "of", "and", "that", "have", "with")
    bullets: tuple[str, ...] = ("•", "-")

    def __post_init__(self):
        for name in ("max_bullet_lines", "max_ellipsis_lines", "min_alphabetic_words"):
            share = getattr(self, name)
            if share is not None and not 0 <= share <= 1:
                raise ValueError(f"{name} = {share}: a share lies between 0 and 1")
        if self.min_stop_words is not None and self.min_stop_words > len(set(self.stop_words)):
            raise ValueError(f"min_stop_words = {self.min_stop_words}, but stop_words are {len(set(self.stop_words))}")


ENGLISH = GopherRules()
CHINESE = GopherRules(
    min_words=round(50 * CHARACTERS_PER_WORD),
    max_words=round(100_000 * CHARACTERS_PER_WORD),
    min_mean_word_length=None,
    max_mean_word_length=4,
    max_symbols_per_word=0.1 / CHARACTERS_PER_WORD,
    stop_words=tuple("的在是和了於于為为有被人中他與与後后也而由不之其以者這这一我"),
    bullets=("•", "-", "●", "○", "■", "◆", "·"),
)
OTHER = GopherRules(min_mean_word_length=None, max_mean_word_length=None, min_stop_words=None)
DEFAULTS = {"en": ENGLISH, "zh": CHINESE, "other": OTHER}


@config
class GopherConfig:
    """``languages`` changes thresholds: {zh: {min_words: 20}}."""

    kind: Literal["gopher"] = "gopher"
    looks_at: ClassVar[str] = "document"
    languages: Changes = field(default_factory=dict)

    def __post_init__(self):
        tables(self.kind, DEFAULTS, self.languages)

    def build(self) -> Step:
        return by_rules(self.kind, tables(self.kind, DEFAULTS, self.languages), fault)


def fault(text: str, r: GopherRules) -> Removed | None:
    """The first rule that a text breaks."""
    found = words(text)
    odd = [word for word in found if not word[0].isalpha()]  # few, so that the slow look at each character is rare
    marks_only = [word for word in odd if not any(map(str.isalnum, word))]
    n_words = len(found) - len(marks_only)
    if r.min_words is not None and n_words < r.min_words:
        return Removed("too few words", f"{n_words} < {r.min_words}")
    if r.max_words is not None and n_words > r.max_words:
        return Removed("too many words", f"{n_words} > {r.max_words}")
    mean = (sum(map(len, found)) - sum(map(len, marks_only))) / max(n_words, 1)
    if r.min_mean_word_length is not None and mean < r.min_mean_word_length:
        return Removed("words too short", f"mean length {mean:.2f} < {r.min_mean_word_length}")
    if r.max_mean_word_length is not None and mean > r.max_mean_word_length:
        return Removed("words too long", f"mean length {mean:.2f} > {r.max_mean_word_length}")
    n_alphabetic = len(found) - sum(1 for word in odd if not any(map(str.isalpha, word)))
    return (
        symbol_fault(text, len(found), r)
        or line_fault(text.splitlines(), r)
        or _below("too few words with a letter", n_alphabetic, len(found), r.min_alphabetic_words)
        or stop_word_fault(found, r)
    )


def symbol_fault(text: str, n_words: int, r: GopherRules) -> Removed | None:
    ellipses = text.count("...") + text.count("…") - text.count("……")  # Chinese writes one as two characters
    return _above("too many #", text.count("#"), n_words, r.max_symbols_per_word) or _above(
        "too many ellipses", ellipses, n_words, r.max_symbols_per_word
    )


def line_fault(lines: list[str], r: GopherRules) -> Removed | None:
    bullets = sum(line.lstrip().startswith(r.bullets) for line in lines)
    ellipses = sum(line.rstrip().endswith(("...", "…")) for line in lines)
    return _above("too many bullet lines", bullets, len(lines), r.max_bullet_lines) or _above(
        "too many lines end with an ellipsis", ellipses, len(lines), r.max_ellipsis_lines
    )


def stop_word_fault(found: list[str], r: GopherRules) -> Removed | None:
    if not r.min_stop_words:
        return None
    seen = set(r.stop_words).intersection(found)
    if len(seen) < r.min_stop_words:  # "of," is one too, but a text of prose has bare ones: look again only if needed
        seen = set(r.stop_words).intersection(word.strip(MARKS) for word in found)
    if len(seen) < r.min_stop_words:
        return Removed("too few stop words", f"{len(seen)} < {r.min_stop_words}")
    return None


def _above(reason: str, n: int, of: int, limit: float | None) -> Removed | None:
    if limit is not None and of and n / of > limit:
        return Removed(reason, f"{n} of {of} = {n / of:.3f} > {limit}")
    return None


def _below(reason: str, n: int, of: int, limit: float | None) -> Removed | None:
    if limit is not None and of and n / of < limit:
        return Removed(reason, f"{n} of {of} = {n / of:.3f} < {limit}")
    return None
