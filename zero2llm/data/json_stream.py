"""A JSON array element by element: files of several gigabytes are normal, and need not fit into memory."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

CHUNK = 1 << 20  # bytes read at a time; an element may be longer
BLANK = re.compile(r"[ \t\r\n]*")
LONGEST_LITERAL = 16  # an error this near to the end of what was read may be a literal or an escape cut in two


class _Window:
    """The part of a file that was read and not yet used, and the line on which it begins."""

    def __init__(self, file: BinaryIO):
        self.file, self.decoder = file, codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.at, self.line, self.ended = "", 0, 1, False

    def more(self) -> None:
        raw = self.file.read(max(CHUNK, len(self.text) - self.at))
        self.ended = not raw
        self.text, self.at = self.text[self.at :], 0
        try:
            self.text += self.decoder.decode(raw, final=self.ended)
        except UnicodeDecodeError as error:
            line = self.line + self.text.count("\n") + error.object[: error.start].count(b"\n")
            raise ValueError(f"line {line}: not UTF-8; convert the file to UTF-8") from None

    def move(self, to: int) -> None:
        self.line += self.text.count("\n", self.at, to)
        self.at = to

    def peek(self) -> str:
        """The next character that is not blank; empty at the end of the file."""
        while True:
            self.move(BLANK.match(self.text, self.at).end())
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.more()

    def value(self) -> Any:
        while True:
            try:
                value, stop = json.JSONDecoder().raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos >= len(self.text) - LONGEST_LITERAL
                if self.ended or not cut:
                    line = self.line + self.text.count("\n", self.at, error.pos)
                    raise ValueError(f"line {line}: not JSON ({error.msg})") from None
                self.more()
            except RecursionError:
                raise ValueError(f"line {self.line}: nested too deeply") from None
            else:
                self.move(stop)
                return value


def elements(file: BinaryIO) -> Iterator[tuple[Any, int]]:
    """(value, line on which it begins) of each element of an array; objects without an array around them are taken too.

    Raises ValueError beginning with the line: not JSON, not UTF-8, or cut short.
    """
    window = _Window(file)
    first = window.peek()
    if first == "[":
        window.move(window.at + 1)
    elif first not in ("{", ""):
        raise ValueError(f"line {window.line}: an array of records was expected, this begins with {first!r}")
    while (char := window.peek()) not in ("]", ""):
        line = window.line
        yield window.value(), line
        char = window.peek()
        if first == "[" and char == ",":
            window.move(window.at + 1)
        elif first == "[" and char not in ("]", ""):
            raise ValueError(f"line {window.line}: ',' or ']' was expected, not {char!r}")
    if first == "[" and char == "":
        raise ValueError(f"line {window.line}: the file ends inside the array; it was cut short")
    if char == "]":
        window.move(window.at + 1)
        if first != "[" or window.peek():
            raise ValueError(f"line {window.line}: something stands behind the end of the array")
