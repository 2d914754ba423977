"""SentencePiece's normalisation: a table of replacements, the longest match first.

    at each place: the longest key of the table that begins here is replaced by its value; else one character is kept

Source: normalizer.cc and the Darts-clone double array of google/sentencepiece. A table is: the trie's size (uint32), the
trie (uint32 units), the values (texts that end with a zero byte). A unit holds a label (low byte, top bit), whether a
key ends there (bit 8), and the distance to its children (bits 10 .., times 256 if bit 9 is set); a leaf is a place among the values.
Why by hand: the tokenizers library applies the same table to whole graphemes, and loses what follows the match in one
(a full-width letter with an accent loses the accent), so its ids differ from SentencePiece's.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable

import numpy as np


class Charsmap:
    """A table, ready to apply. Raises ValueError if the data is none."""

    def __init__(self, data: bytes):
        size = struct.unpack_from("<I", data)[0] if len(data) >= 4 else 0
        if not size or size % 4 or 4 + size > len(data):
            raise ValueError("the normalisation table is damaged")
        units, values = np.frombuffer(data, "<u4", size // 4, 4).astype(np.int64), data[4 + size :]
        self.table = {key.decode(): _text(values, place) for key, place in _keys(units).items()}
        self.longest = max(map(len, self.table), default=0)
        long = [key for key in self.table if len(key) > 1]  # mostly a letter and its accents: looked up only before an accent
        rules = [_class(key for key in self.table if len(key) == 1)]
        rules += [f"{_class(key[0] for key in long)}(?={_class(key[1] for key in long)})"] if long else []
        self.at = re.compile("|".join(rules)) if self.table else None

    def apply(self, text: str) -> str:
        """The normalised text."""
        out, begin, search = [], 0, self.at and self.at.search
        while search and (found := search(text, begin)):
            start = found.start()
            ends = range(min(start + self.longest, len(text)), start, -1)
            end = next((end for end in ends if text[start:end] in self.table), start + 1)
            out += [text[begin:start], self.table.get(text[start:end], text[start])]
            begin = end
        return "".join(out) + text[begin:] if out else text


def _class(chars: Iterable[str]) -> str:
    """The characters as a class of a regular expression, neighbours as ranges; one that matches nothing if there are none."""
    runs: list[list[int]] = []
    for code in sorted(set(map(ord, chars))):
        if runs and runs[-1][1] == code - 1:
            runs[-1][1] = code
        else:
            runs.append([code, code])
    return "[" + "".join(f"\\U{a:08x}-\\U{b:08x}" for a, b in runs) + "]" if runs else "(?!)"


def _keys(units: np.ndarray) -> dict[bytes, int]:
    """Every key of the trie and the place of its value."""
    labels, has_leaf = units & (1 << 31 | 0xFF), units >> 8 & 1
    step = (units >> 10) << ((units & 1 << 9) >> 6)
    letters = np.arange(1, 256)
    found, open_nodes = {}, [(b"", int(step[0]))]  # prefix, where its children stand: at this place xor their letter
    while open_nodes:
        prefix, base = open_nodes.pop()
        places = base ^ letters
        inside = places < len(units)
        children = letters[inside][labels[places[inside]] == letters[inside]]
        for letter in children.tolist():
            place, key = base ^ letter, prefix + bytes([letter])
            below = place ^ int(step[place])
            if has_leaf[place]:
                found[key] = int(units[below]) & 0x7FFFFFFF
            open_nodes.append((key, below))
    return found


def _text(values: bytes, place: int) -> str:
    return values[place : values.index(b"\0", place)].decode()
