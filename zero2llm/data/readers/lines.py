"""JSON lines: one value a line, every line that is not blank read or listed.

A file is cut into ranges of bytes at line ends; how many lines stand before each is counted on the way, which costs one
pass at the disk's speed and gives every record its true line number.
*Why.* A worker holds one line in memory, never more than ``max_line_mib``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from zero2llm.data.readers.record import BadRecords, Record, Unit
from zero2llm.data.readers.streams import Opened
from zero2llm.data.readers.values import parse, parse_several

BLOCK = 1 << 20
BOM = b"\xef\xbb\xbf"


def lines(file: BinaryIO, most: int, number: int = 1) -> Iterator[tuple[int, bytes, int]]:
    """(number, bytes, length) of every line; of one longer than ``most`` bytes only the beginning is kept."""
    while raw := file.readline(most + 1):
        size = len(raw)
        if size > most and not raw.endswith(b"\n"):
            raw = raw[:80]
            while more := file.readline(BLOCK):
                size += len(more)
                if more.endswith(b"\n"):
                    break
        yield number, raw, size
        number += 1


def is_cut(raw: bytes, size: int, most: int) -> bool:
    return size > most and not raw.endswith(b"\n")


def too_long(size: int, most: int) -> str:
    return f"{size:,} bytes long; at most {most:,} are read (max_line_mib)"


def not_text(error: UnicodeDecodeError, opened: Opened) -> str:
    """Names the byte and, where nobody said what the encoding is, the option that says it."""
    if opened.encoding != "UTF-8":
        return f"not {opened.encoding}, which the file's mark, its own heading or the option encoding says it is"
    byte = error.object[error.start]
    return f"not UTF-8 (byte {byte:#04x}); convert it, or say what it is: encoding: gb18030 (Chinese), latin-1 (Western) ..."


def json_lines(opened: Opened, unit: Unit, bad: BadRecords) -> Iterator[Record]:
    most, place = unit.source.max_bytes, unit.place
    for number, raw, size in lines(opened.file, most, unit.line):
        if number == unit.line == 1:
            raw = raw.removeprefix(BOM)
        if is_cut(raw, size, most):
            bad.add(place, number, too_long(size, most))
            continue
        if not raw.strip():
            continue
        try:
            values = _values(raw.decode(), number)
        except UnicodeDecodeError as error:
            bad.add(place, number, not_text(error, opened))
        except ValueError as error:
            if not (opened.fault and not raw.endswith(b"\n")):  # half a line before the damage, which is listed itself
                bad.add(place, number, str(error))
        else:
            for value in values:
                yield Record(value, place, number)


def _values(text: str, number: int) -> list:
    try:
        return [parse(text)]
    except ValueError as error:
        reason = str(error)
        if "Extra data" in reason:
            try:
                return parse_several(text.strip())
            except ValueError:
                pass
        if number == 1 and text.strip() == "[":
            reason += "; this looks like a JSON array: name it .json"
        raise ValueError(reason) from None


def cuts(path: str, target: int, size: int) -> list[tuple[int, int, int]]:
    """(start, end, number of its first line) of ranges of about ``target`` bytes that end at line ends."""
    ranges, start, line, number, at = [], 0, 1, 1, 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(BLOCK):
            while at + len(block) >= start + target:
                i = block.find(b"\n", max(start + target - at - 1, 0))
                if i < 0:
                    break
                number += block.count(b"\n", 0, i + 1)
                ranges.append((start, at + i + 1, line))
                at, start, line, block = at + i + 1, at + i + 1, number, block[i + 1 :]
            number += block.count(b"\n")
            at += len(block)
    return ranges + ([(start, size, line)] if start < size else [])
