"""C4's rules: keep the lines that are sentences, and the pages that have some.

A line goes if one of these holds (in this order):

    1  it has a word of more than 1,000 characters
    2  it does not end with . ? ! " or ', or ends with "..."    after citation marks ([12], [edit]) are taken out
    3  it has fewer than 5 words
    4  it says javascript, or a phrase of a policy notice ("terms of use", "uses cookies" ...)

A document goes if a line that passed 1 to 3 holds "lorem ipsum" or one that passed "javascript" a curly bracket {, if the lines
that stay have fewer than 3 sentences, or if they hold a word of the list of bad words (none unless a file is named).

*Source*: Raffel et al. 2020 (T5), 1910.10683, section 2.2, with the numbers and the order of the code that made C4 (TensorFlow
Datasets, c4_utils); the ' is datatrove's, whose own defaults are 3 words and 5 sentences. Not done here: C4 also removes
repeated spans of three sentences (the step `lines` removes repeated lines). Blanks at the ends of lines go. Changed: blank lines
stay, so that paragraphs do. *Why*: menus, buttons and notices are lines without a full stop. Strict: verse, lists, headings and
code go too; FineWeb uses it with ``terminal_punctuation: false``.

Chinese, where a word is a character: 8 characters a line; a line may end with 。！？ and closing quotation marks and brackets;
"……" counts as "...", and policy phrases are Chinese ones beside the English. Other languages: the marks of both.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import field
from pathlib import Path
from typing import ClassVar, Literal

from zero2llm.core.config import config
from zero2llm.data.document import Document, Removed, Result, Step
from zero2llm.data.steps.thresholds import Changes, rules_of, tables
from zero2llm.data.steps.words import CHARACTERS_PER_WORD, has_solo, language_of, sentences, words

_citation = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
POLICY_ZH = (
    "使用条款",
    "使用條款",
    "服务条款",
    "服務條款",
    "隐私政策",
    "隱私政策",
    "隱私權政策",
    "使用cookie",
    "cookie政策",
)


@config
class C4Rules:
    """The numbers for one language. 0: no least number."""

    min_line_words: int = 5
    min_sentences: int = 3
    max_word_length: int = 1000
    end_marks: tuple[str, ...] = (".", "?", "!", '"', "'")
    ellipses: tuple[str, ...] = ("...",)
    policy: tuple[str, ...] = POLICY


ENGLISH = C4Rules()
CHINESE = C4Rules(
    min_line_words=round(5 * CHARACTERS_PER_WORD),
    end_marks=(*ENGLISH.end_marks, "。", "！", "？", "｡", "”", "’", "」", "』", "）"),
    ellipses=("...", "…"),
    policy=POLICY + POLICY_ZH,
)
OTHER = C4Rules(end_marks=(*CHINESE.end_marks, "»", "।", "؟", "۔"), ellipses=CHINESE.ellipses)
DEFAULTS = {"en": ENGLISH, "zh": CHINESE, "other": OTHER}


@config
class C4Config:
    """``bad_words``: language -> file with one word or phrase a line. The other keys switch rules off."""

    kind: Literal["c4"] = "c4"
    looks_at: ClassVar[str] = "document"
    terminal_punctuation: bool = True
    citations: bool = True
    javascript: bool = True
    lorem_ipsum: bool = True
    curly_bracket: bool = True
    policy: bool = True
    bad_words: dict[str, str] = field(default_factory=dict)
    languages: Changes = field(default_factory=dict)

    def __post_init__(self):
        tables(self.kind, DEFAULTS, self.languages)

    def build(self) -> Step:
        table = tables(self.kind, DEFAULTS, self.languages)
        bad = {language: word_list(path) for language, path in self.bad_words.items()}

        def step(doc: Document) -> Result:
            rules = rules_of(self.kind, table, doc)
            kept, dropped, fault = clean(doc.text.splitlines(), rules, self)
            text = re.sub("\n{3,}", "\n\n", "\n".join(kept)).strip()
            n = sum(map(len, map(sentences, kept)))
            if fault is None and n < rules.min_sentences:
                fault = Removed("too few sentences", f"{n} < {rules.min_sentences} in {len(kept)} lines kept")
            if fault is None and (pattern := bad.get(language_of(doc))) and (found := pattern.search(text)):
                fault = Removed("bad word", found.group())
            if fault:
                return fault
            doc.text = text
            doc.notes += dropped
            return doc

        return step


def clean(lines: list[str], r: C4Rules, cfg: C4Config) -> tuple[list[str], Counter[str], Removed | None]:
    """(lines that stay, how many went for which reason, why the whole document goes)."""
    kept: list[str] = []
    dropped: Counter[str] = Counter()
    for number, line in enumerate(lines, 1):
        line = line.strip()
        text = _citation.sub("", line) if cfg.citations and "[" in line else line
        if reason := line and line_fault(line, text, r, cfg):
            dropped[f"c4: line dropped: {reason}"] += 1
            continue
        lower = text.lower()
        if cfg.lorem_ipsum and "lorem ipsum" in lower:
            return kept, dropped, Removed("lorem ipsum", f"line {number}")
        if cfg.javascript and "javascript" in lower:
            dropped["c4: line dropped: javascript"] += 1
            continue
        if cfg.curly_bracket and "{" in text:
            return kept, dropped, Removed("curly bracket", f"line {number}")
        if cfg.policy and any(phrase in lower for phrase in r.policy):
            dropped["c4: line dropped: policy notice"] += 1
            continue
        kept.append(text)
        if text != line:
            dropped["c4: citation mark"] += len(_citation.findall(line))
    return kept, dropped, None


def line_fault(line: str, text: str, r: C4Rules, cfg: C4Config) -> str:
    """Why a line goes, by its form alone; empty if it stays. ``text``: the line without citation marks."""
    if len(line) > r.max_word_length and any(
        len(word) > r.max_word_length for word in line.split() if not has_solo(word)
    ):
        return "word too long"
    if cfg.terminal_punctuation and (not text.endswith(r.end_marks) or text.endswith(r.ellipses)):
        return "no terminal punctuation"
    if r.min_line_words and len(words(line)) < r.min_line_words:
        return "too few words"
    return ""


def word_list(path: str) -> re.Pattern[str]:
    """Any of the words, whatever their case; between word boundaries unless the script has none."""
    try:
        entries = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"c4, bad_words: {path} cannot be read ({error}); give a UTF-8 file with one word a line"
        ) from None
    if not entries:
        raise ValueError(f"c4, bad_words: {path} holds no word")
    entries.sort(key=len, reverse=True)
    return re.compile(
        "|".join(re.escape(e) if has_solo(e) else rf"(?<!\w){re.escape(e)}(?!\w)" for e in entries), re.IGNORECASE
    )
