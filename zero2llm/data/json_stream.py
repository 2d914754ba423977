"""A JSON array element by element: files of several gigabytes are normal, and need not fit into memory.

    value:  parse at the window's start; if that fails, read on until the element's end is in the window
    after a bad element:  go on where the next one certainly begins, otherwise leave the rest out, and say so

Certain means one of two things. Either the bad element consists of whole tokens whose brackets match (NaN, a key given
twice, a missing value): it ends where its bracket closes. Or the layout says it: a string cannot hold a line break, so in
a file that stands one element a line, or indented, the next line of the same indentation begins the next element.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from zero2llm.data.readers.values import DECODER, DEEPEST, unwritable

CHUNK = 1 << 20  # bytes read at a time; an element may be longer
LONGEST = 64 << 20  # characters of one element
BLANK = re.compile(r"[ \t\r\n]*")
TOKEN = re.compile(
    r'[ \t\r\n]+|"[^"\\\x00-\x1f]*(?:\\.[^"\\\x00-\x1f]*)*"|[-+]?[0-9][0-9.eE+-]*|true|false|null|-?Infinity|NaN|[{}\[\],:]'
)
NUMBER = re.compile("[-+.0-9eE]*")
UNDECODED = re.compile("[\udc80-\udcff]")
CONTROL = re.compile("[\x00-\x1f]")
LITERALS = ("true", "false", "null", "NaN", "Infinity", "-Infinity")
REST = "where the next element begins is not certain, so the rest of the file is left out"
Fault = Callable[[int, str], None]  # line, reason


class _Window:
    """The part of a file that was read and not yet used, and the line on which it begins."""

    def __init__(self, file: BinaryIO, longest: int):
        self.file, self.longest = file, longest
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.at, self.line, self.ended = "", 0, 1, False
        self.dirty = False  # some bytes were no UTF-8: they stand in the text as half characters
        self.lead: str | None = ""  # what stands between the last line break and `at`; None if not only blanks

    def more(self) -> None:
        held = len(self.text) - self.at
        raw = self.file.read(max(CHUNK, min(held, self.longest - held)))
        self.ended = not raw
        self.text, self.at = self.text[self.at :], 0
        try:
            self.text += self.decoder.decode(raw, final=self.ended)
        except UnicodeDecodeError:
            self.decoder.errors, self.dirty = "surrogateescape", True
            self.text += self.decoder.decode(raw, final=self.ended)
            self.decoder.errors = "strict"

    def move(self, to: int) -> None:
        self.line += self.text.count("\n", self.at, to)
        begin = self.text.rfind("\n", self.at, to)
        lead = self.text[begin + 1 : to] if begin >= 0 else None if self.lead is None else self.lead + self.text[self.at : to]
        self.lead, self.at = lead if lead is not None and not lead.strip(" \t\r") else None, to

    def peek(self) -> str:
        """The next character that is not blank; empty at the end of the file."""
        while True:
            self.move(BLANK.match(self.text, self.at).end())
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.more()

    def full(self) -> bool:
        return len(self.text) - self.at > self.longest

    def value(self) -> Any:
        """Raises ValueError (line, reason); the window then stands where the value began."""
        while True:
            try:
                value, stop = DECODER.raw_decode(self.text, self.at)
            except (ValueError, RecursionError) as error:
                if self.ended or self.full() or not self._may_go_on():
                    raise self._fault(error) from None
            else:
                scalar = not isinstance(value, dict | list | str)  # 345 may go on as 345.5 in what is not yet read
                if self.ended or not scalar or NUMBER.match(self.text, stop).end() < len(self.text):
                    return self._checked(value, stop)
            self.more()

    def _may_go_on(self) -> bool:
        """Whether the error may only mean that the value is not yet read to its end."""
        return self.end_of_tokens() in (None, len(self.text))

    def _checked(self, value: Any, stop: int) -> Any:
        text = self.text[self.at : stop]
        fault = f"longer than {self.longest:,} characters (max_line_mib)" if len(text) > self.longest else ""
        if self.dirty and UNDECODED.search(text):
            fault = "not UTF-8; name the file's encoding, or convert it"
        if fault := fault or unwritable(value, text):
            raise ValueError(self.line, fault)
        self.move(stop)
        return value

    def _fault(self, error: Exception) -> ValueError:
        if self.full() and not self.ended:
            return ValueError(self.line, f"an element of more than {self.longest:,} characters (max_line_mib)")
        if isinstance(error, json.JSONDecodeError):
            line = self.line + self.text.count("\n", self.at, error.pos)
            near = self.text[self.at : error.pos + 1]
            what = "not UTF-8; name the file's encoding" if self.dirty and UNDECODED.search(near) else error.msg
            return ValueError(line, f"not JSON ({what})")
        deep = isinstance(error, RecursionError)
        return ValueError(self.line, f"nested too deeply (more than {DEEPEST})" if deep else f"not JSON ({error})")

    def end_of_tokens(self) -> int | None:
        """Where the element that begins here ends, if it is made of whole tokens; None if that is not yet read, -1 if it is not."""
        open_brackets, at, text = [], self.at, self.text
        while at < len(text):
            char = text[at]
            if not open_brackets and (char in ",]" or at > self.at and char in "{["):
                return at
            found = TOKEN.match(text, at)
            if found is None:
                unfinished = any(word.startswith(text[at : at + 10]) for word in LITERALS)
                return None if unfinished or char == '"' and not CONTROL.search(text, at) else -1
            if char in "{[":
                open_brackets.append(char)
            elif char in "}]":
                if not open_brackets or open_brackets.pop() + char not in ("{}", "[]"):
                    return -1
            at = found.end()
        return len(text) if self.ended and not open_brackets else None

    def next_line_of_same_lead(self, one_a_line: bool, array: bool) -> int:
        """Where the line begins, behind its blanks, that must be the next element (or the end); -1 if none must be."""
        lead, at = self.lead, self.at
        while lead is not None:
            stop = self.text.find("\n", at)
            if stop < 0 and (self.ended or self.full()):
                break
            if stop < 0 or not self.ended and len(self.text) - stop < len(lead) + 8:
                gone = self.at
                self.more()
                at -= gone
                continue
            before, blanks = self.text[at:stop].rstrip(), BLANK.match(self.text, stop)
            at, char, indent = stop + 1, self.text[blanks.end() : blanks.end() + 1], blanks.group().rpartition("\n")[2]
            if indent.startswith(lead) and indent != lead and char:
                continue  # deeper: still inside
            if lead and indent == lead and char in ("}", "]"):
                at, one_a_line = blanks.end(), True  # the line that closes the element
                continue
            ends = before.endswith(("}", "]")) and (char == "]" if array else not char and self.ended)
            goes_on = before.endswith(("},", "],") if array else "}") and char in ("{", "[") and indent == lead
            return blanks.end() if one_a_line and (ends or goes_on) else -1
        return -1


def elements(file: BinaryIO, fault: Fault | None = None, longest: int = LONGEST) -> Iterator[tuple[Any, int]]:
    """(value, line on which it begins) of each element of an array; objects without an array around them are taken too.

    ``fault(line, reason)`` hears what is bad. Without it: ValueError beginning with the line.
    """
    fault, window = fault or _raise, _Window(file, longest)
    first = window.peek()
    if first == "[":
        window.move(window.at + 1)
        window.lead = ""  # an element that begins right behind it begins its line
    elif first not in ("{", ""):
        fault(window.line, f"an array of records was expected, this begins with {first!r}")
        return
    one_a_line, n = True, 0
    while (char := window.peek()) not in ("]", ""):
        line, lead = window.line, window.lead
        try:
            value = window.value()
        except ValueError as error:
            if not _go_on(window, error, fault, one_a_line and n > 0, first == "["):
                return
            if window.peek() != ",":
                continue  # at the next element already
        else:
            one_a_line, n = one_a_line and lead is not None and window.line == line, n + 1
            yield value, line
        char = window.peek()
        if char == ",":
            window.move(window.at + 1)
        elif first == "[" and char not in ("]", ""):
            fault(window.line, f"',' or ']' was expected, not {char!r}")
    if first == "[" and char == "":
        fault(window.line, "the file ends inside the array; it was cut short")
    elif char == "]":
        window.move(window.at + 1)
        if first != "[" or window.peek():
            fault(window.line, "something stands behind the end of the array")


def _raise(line: int, reason: str) -> None:
    raise ValueError(f"line {line}: {reason}")


def _go_on(window: _Window, error: ValueError, fault: Fault, one_a_line: bool, array: bool) -> bool:
    """List a bad element and stand behind it. False: nobody knows where that is."""
    line, reason = error.args
    while (to := window.end_of_tokens()) is None and not window.ended and not window.full():
        window.more()
    if to is None or to < 0 or to == window.at and window.text[to : to + 1] != ",":
        to = window.next_line_of_same_lead(one_a_line, array)
    if to < 0:
        inside = window.ended and window.end_of_tokens() is None
        fault(line, f"{reason}; " + ("the file ends inside this element, it was cut short" if inside else REST))
        return False
    fault(line, reason)
    window.move(to)
    return True
