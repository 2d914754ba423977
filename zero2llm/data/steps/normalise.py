"""One writing for what looks the same: repaired encodings, one Unicode form, one line end, no invisible characters.

Rules, in this order, repeated until nothing changes (so the step is idempotent): mojibake ("schÃ¶n" -> "schön"), halves of
surrogate pairs, line ends, terminal codes and control characters, invisible characters and byte-order marks, odd blanks, the Unicode
form, full-width letters and digits (if asked), runs of blanks and of empty lines.

Source: Unicode Standard Annex 15 (normalisation forms), chapter 23 (special characters); mojibake by ftfy (Speer 2019).
NFC keeps full-width punctuation, circled numbers and ligatures as they are; a CJK compatibility ideograph (U+F900 ff.) becomes
the unified one that Unicode defines as its equal. NFKC also turns "，" into "," and "①" into "1": not for Chinese.
Zero-width joiners stay, because emoji and Indic and Persian words are written with them, and so does the ideographic blank.

Why: the same word in two encodings is two tokens to learn, and a duplicate that no deduplication sees. Costs 30 to 45 MB/s of clean text.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from typing import ClassVar, Literal

from zero2llm.core.config import config
from zero2llm.data.document import Document, Removed, Step

# A quick look for what ftfy could call mojibake: a control character of C1, letters that begin it, or two neighbours from
# code pages' upper halves. ftfy's own look is 30 times slower.
SUSPECT = re.compile(r"[\x80-\x9fŒœÃÂ]|[\xa0-\u2fff\uf8ff\ufb00-\ufb06\ufffd]{2}")
# Each pattern begins with a class of single characters, for which the search runs at 100 MB/s and more.
HALF_PAIR = re.compile(r"[\ud800-\udfff](?:(?<=[\ud800-\udbff])[\udc00-\udfff])?")
LINE_END = re.compile(r"[\r\x0b\x0c\x85\u2028\u2029](?:(?<=\r)\n)?")
CONTROL = re.compile(
    r"[\x00-\x08\x0e-\x1f\x7f-\x9f\ufdd0-\ufdef\ufffe\uffff](?:(?<=\x1b)\[[0-9;?]*[ -/]*[@-~])?"
)  # \x1b[31m: red
INVISIBLE = re.compile(r"[\xad\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]")
ODD_BLANK = re.compile(r"[\xa0\u2000-\u200a\u202f\u205f]")
FULL_WIDTH = re.compile(r"[\uff10-\uff19\uff21-\uff3a\uff41-\uff5a]")
BLANKS = re.compile(r" (?<=\S ) +(?=\S)")  # inside a line: what indents it is meant
TRAILING = re.compile(
    r"[ \t](?<![ \t].)[ \t]*$", re.MULTILINE
)  # begun at the first blank only: a long run would cost its square


@config
class NormaliseConfig:
    """``max_empty_lines``: longer runs of empty lines are cut to so many; None leaves them."""

    kind: Literal["normalise"] = "normalise"
    looks_at: ClassVar[str] = "document"
    fix_mojibake: bool = True
    form: Literal["nfc", "nfkc", "none"] = "nfc"
    full_width_to_half: bool = False
    collapse_blanks: bool = True
    max_empty_lines: int | None = 2

    def __post_init__(self):
        if self.max_empty_lines is not None and self.max_empty_lines < 0:
            raise ValueError(
                f"max_empty_lines = {self.max_empty_lines} must be 0 or more, or null to leave empty lines alone"
            )

    def build(self) -> Step:
        """Raises ValueError where ftfy is needed and not installed."""
        return Normalise(self, repairer() if self.fix_mojibake else None)


def repairer() -> Callable[[str], str]:
    try:
        import ftfy
    except ImportError as error:
        raise ValueError("fix_mojibake needs ftfy: pip install 'zero2llm[data]', or set fix_mojibake: false") from error
    return ftfy.fix_encoding


class Normalise:
    def __init__(self, config: NormaliseConfig, repair: Callable[[str], str] | None):
        self.config, self.repair = config, repair

    def __call__(self, doc: Document) -> Document | Removed:
        text, before = doc.text, None
        while text != before:  # every change shortens the text or empties a class of characters: this ends
            before, text = text, self.once(text, doc.notes)
        if not text.strip():
            return Removed("empty", "nothing but blanks and control characters")
        doc.text = text
        return doc

    def once(self, text: str, notes: Counter[str]) -> str:
        if not text.isascii():
            if self.repair:
                text = fix_lines(text, self.repair, notes)
            text = _sub(HALF_PAIR, _whole, text, notes, "half surrogates")
        text = _sub(LINE_END, "\n", text, notes, "line ends")
        text = _sub(CONTROL, "", text, notes, "control characters")
        if not text.isascii():
            text = self._wide(text, notes)
        return self._blanks(text, notes)

    def _wide(self, text: str, notes: Counter[str]) -> str:
        text = _sub(INVISIBLE, "", text, notes, "invisible characters")
        text = _sub(ODD_BLANK, " ", text, notes, "odd blanks")
        form = self.config.form.upper()
        if form != "NONE" and not unicodedata.is_normalized(form, text):
            text = unicodedata.normalize(form, text)
            notes[f"not in {form}"] += 1
        if self.config.full_width_to_half:
            text = _sub(FULL_WIDTH, lambda m: chr(ord(m[0]) - 0xFEE0), text, notes, "full-width letters and digits")
        return text

    def _blanks(self, text: str, notes: Counter[str]) -> str:
        if self.config.collapse_blanks:
            if "  " in text:
                text = _sub(BLANKS, " ", text, notes, "runs of blanks")
            if " \n" in text or "\t\n" in text or text.endswith((" ", "\t")):
                text = _sub(TRAILING, "", text, notes, "trailing blanks")
        if self.config.max_empty_lines is not None:
            most = self.config.max_empty_lines + 1
            text = _sub(re.compile(rf"\n{{{most + 1},}}"), "\n" * most, text, notes, "runs of empty lines")
        return text


def fix_lines(text: str, repair: Callable[[str], str], notes: Counter[str]) -> str:
    """Each line alone: a file that was pasted together has several encodings, and one clean line must not veto the rest."""
    if not SUSPECT.search(text):
        return text
    lines = text.split("\n")
    for i, line in enumerate(lines):
        if SUSPECT.search(line) and (fixed := repair(line)) != line:
            lines[i] = fixed
            notes["mojibake"] += 1
    return "\n".join(lines)


def _whole(match: re.Match[str]) -> str:
    return match[0].encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _sub(
    pattern: re.Pattern[str], new: str | Callable[[re.Match[str]], str], text: str, notes: Counter[str], what: str
) -> str:
    text, n = pattern.subn(new, text)
    if n:
        notes[what] += n
    return text
