"""BERT's words: clean the text, set Chinese characters apart, cut at blanks and around punctuation.

    clean -> [strip accents] -> [lower] -> split at blanks -> every punctuation mark is a word of its own

Source: google-research/bert, BasicTokenizer (1810.04805 section 3.2 and its code); the ranges of Chinese characters are
those of the tokenizers library. We lower character by character as that library does, so a Greek final sigma stays one.
Why: WordPiece never sees a blank, so its vocabulary needs no piece twice ("the" and " the"). The price: blanks, line
breaks and control characters are gone for good, and a Chinese character is never joined with the next one.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

CHINESE = (
    (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F), (0x2B920, 0x2CEAF),
    (0xF900, 0xFAFF), (0x2F800, 0x2FA1F),
)  # fmt: skip


@dataclass(frozen=True)
class BertWords:
    """``lower``: no capitals. ``strip_accents``: é becomes e; None: if and only if ``lower``, as BERT has it."""

    lower: bool = False
    strip_accents: bool | None = None

    def __call__(self, text: str) -> list[str]:
        """The words of a text, in order."""
        out = []
        for word in self.normalise(text).split():
            begin = 0
            for i, char in enumerate(word):
                if is_punctuation(char):
                    out += [word[begin:i], char] if begin < i else [char]
                    begin = i + 1
            out += [word[begin:]] if begin < len(word) else []
        return out

    def normalise(self, text: str) -> str:
        text = "".join(_clean(char) for char in text)
        if self.lower if self.strip_accents is None else self.strip_accents:
            text = "".join(c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn")
        return "".join(map(str.lower, text)) if self.lower else text


def _clean(char: str) -> str:
    """Any blank is a space; control, format and private characters go; Chinese characters stand between spaces."""
    if char in "\t\n\r":
        return " "
    if char in "\0\ufffd" or unicodedata.category(char) in ("Cc", "Cf", "Co"):
        return ""
    if char.isspace():
        return " "
    return f" {char} " if is_chinese(char) else char


def is_chinese(char: str) -> bool:
    return any(first <= ord(char) <= last for first, last in CHINESE)


def is_punctuation(char: str) -> bool:
    """Unicode's punctuation, and of ASCII all that is neither letter, digit nor blank: BERT also counts $ + < = > ^ ` | ~."""
    return unicodedata.category(char)[0] == "P" or char in "$+<=>^`|~"
