"""FineWeb's own filters: what the older rules let through and a better model came from leaving out.

Over the lines that are not blank (in this order; the first that fails is the reason):

    1  lines that end with . ! ? or another script's full stop     >= 0.12
    2  lines of at most 30 characters                              <= 0.67
    3  characters in lines that stood before                       <= 0.1    of all characters but line ends
    4  line ends per word                                          <= 0.3    else it is a list

*Source*: Penedo et al. 2024, "The FineWeb Datasets", 2406.17557, section 3.6, where 1 to 3 were chosen by training models;
comparisons, order and rule 4 are those of datatrove's code, whose default for 3 is 0.01 where the paper says 0.1. Changed: a
closing quotation mark or bracket may follow the full stop. datatrove wants the bare stop, so takes direct speech for unfinished
lines, and would remove 18 % of Jane Austen (``closing: ""`` is its rule). *Why*: menus and lists that Gopher's and C4's rules let
through. The cheapest of the steps.

Chinese: rule 1 from FineWeb-2's configuration for cmn_Hani (2506.20920). A line is short at 9 characters: what 30 English
characters say (5 words and their blanks, at 1.6 characters a word). Rule 4 is 0.3 / 1.6 = 0.19 per character: a list has
lines of 5. Other languages: the English numbers.
"""

from __future__ import annotations

from dataclasses import field
from typing import ClassVar, Literal

from zero2llm.core.config import config
from zero2llm.data.document import Removed, Step
from zero2llm.data.steps.repetition import repeated
from zero2llm.data.steps.thresholds import Changes, by_rules, tables
from zero2llm.data.steps.words import CHARACTERS_PER_WORD, words

FULL_STOPS = tuple(".!?。！？．｡﹒﹖﹗‼⁇⁈⁉؟۔।॥።፧։၊။។៕")


@config
class FineWebRules:
    """The numbers for one language. None: this rule rests."""

    min_punctuated_lines: float | None = 0.12
    max_short_lines: float | None = 0.67
    short_line: int = 30
    max_repeated_characters: float | None = 0.1
    max_line_ends_per_word: float | None = 0.3
    closing: str = "\"'”’»)]"  # marks that may stand behind the full stop

    def __post_init__(self):
        for name in ("min_punctuated_lines", "max_short_lines", "max_repeated_characters"):
            share = getattr(self, name)
            if share is not None and not 0 <= share <= 1:
                raise ValueError(f"{name} = {share}: a share lies between 0 and 1")


ENGLISH = FineWebRules()
CHINESE = FineWebRules(
    min_punctuated_lines=0.106, short_line=9, max_line_ends_per_word=0.3 / CHARACTERS_PER_WORD, closing="”’」』）\"'"
)
DEFAULTS = {"en": ENGLISH, "zh": CHINESE, "other": ENGLISH}


@config
class FineWebConfig:
    """``languages`` changes thresholds: {zh: {short_line: 6}}."""

    kind: Literal["fineweb"] = "fineweb"
    looks_at: ClassVar[str] = "document"
    languages: Changes = field(default_factory=dict)

    def __post_init__(self):
        tables(self.kind, DEFAULTS, self.languages)

    def build(self) -> Step:
        return by_rules(self.kind, tables(self.kind, DEFAULTS, self.languages), fault)


def fault(text: str, r: FineWebRules) -> Removed | None:
    """The first rule that a text breaks."""
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        return Removed("no text")
    punctuated = sum(line.rstrip(r.closing or None).endswith(FULL_STOPS) for line in lines)
    short = sum(len(line) <= r.short_line for line in lines)
    characters, again = len(text) - text.count("\n"), repeated(lines)[1]
    if r.min_punctuated_lines is not None and punctuated / len(lines) < r.min_punctuated_lines:
        return _removed("too few lines end with punctuation", punctuated, len(lines), f"< {r.min_punctuated_lines}")
    if r.max_short_lines is not None and short / len(lines) > r.max_short_lines:
        return _removed("too many short lines", short, len(lines), f"> {r.max_short_lines}")
    if r.max_repeated_characters is not None and again / characters > r.max_repeated_characters:
        return _removed("characters in repeated lines", again, characters, f"> {r.max_repeated_characters}")
    n_words = len(words(text))
    if r.max_line_ends_per_word is not None and text.count("\n") / n_words > r.max_line_ends_per_word:
        return _removed("a list", text.count("\n"), n_words, f"> {r.max_line_ends_per_word} line ends per word")
    return None


def _removed(reason: str, n: int, of: int, limit: str) -> Removed:
    return Removed(reason, f"{n} of {of} = {n / of:.3f} {limit}")
