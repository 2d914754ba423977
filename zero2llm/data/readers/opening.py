"""A unit as a stream of bytes: from a file, a range of it or an archive's member, unpacked, in UTF-8."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable

from zero2llm.data.readers.archive import open_zip_member, zip_member
from zero2llm.data.readers.engines import ENGINES
from zero2llm.data.readers.kinds import PAGES, TEXT, kind_of
from zero2llm.data.readers.record import Source, Unit
from zero2llm.data.readers.streams import BUFFER, Inflated, Opened, Part, Recoded, buffered

MARKS = (  # bytes, encoding, order and width of a character
    (codecs.BOM_UTF8, "utf-8", "big", 1),
    (codecs.BOM_UTF32_LE, "utf-32", "little", 4),  # before UTF-16: its mark begins with the same two bytes
    (codecs.BOM_UTF32_BE, "utf-32", "big", 4),
    (codecs.BOM_UTF16_LE, "utf-16", "little", 2),
    (codecs.BOM_UTF16_BE, "utf-16", "big", 2),
)
CHARSET = re.compile(rb"<meta[^>]+charset\s*=\s*[\"']?\s*([a-zA-Z0-9_:-]+)", re.I)
CHINESE = ("gb2312", "gbk", "x-gbk", "gb_2312-80")  # browsers read all of them as the larger set, gb18030


def open_unit(unit: Unit) -> Opened:
    """Raises ValueError without the place, OSError if the file cannot be opened."""
    outer = kind_of(unit.file)[0]
    if unit.member and outer == ".zip":
        entry = zip_member(unit.file, unit.start)
        return opened(lambda: open_zip_member(unit.file, entry), unit.member, unit.source)
    ranged = kind_of(unit.file)[1] == "" and (unit.start or unit.end is not None)
    name = unit.member or unit.file
    return opened(lambda: open_range(unit.file, unit.start, unit.end) if ranged else open_range(unit.file), name, unit.source)


def open_range(path: str, start: int = 0, end: int | None = None) -> Opened:
    file = open(path, "rb", buffering=BUFFER)
    if start == 0 and end is None:
        return Opened(file)
    file.seek(start)
    return buffered(Part(file, None if end is None else end - start))


def opened(source: Callable[[], Opened | None], name: str, how: Source) -> Opened:
    """``source`` gives the bytes under ``name``; the result is unpacked, and in UTF-8 if it is text.

    Raises ValueError if the encoding's name does not say in which order the bytes stand.
    """
    kind, compression = kind_of(name)
    stream = buffered(Inflated(source, ENGINES[compression])) if compression else source()
    if kind in (".parquet", ".tar", ".zip"):
        return stream
    encoding = _encoding(stream.file.peek(1024)[:1024], kind, how)
    return stream if encoding is None else buffered(Recoded(stream, encoding), encoding)


def _encoding(head: bytes, kind: str, how: Source) -> str | None:
    """What the file's mark, the option or the page itself says; None for UTF-8."""
    for mark, encoding, order, width in MARKS:
        first = head[len(mark) : len(mark) + width]
        # JSON and tables begin with an ASCII character; binary dirt that looks like a mark is not followed by one
        if head.startswith(mark) and (kind in TEXT + PAGES or not first or 8 < int.from_bytes(first, order) < 127):
            return None if encoding == "utf-8" else encoding
    if not how.is_utf8:
        name = codecs.lookup(how.encoding).name
        if name in ("utf-16", "utf-32") and not any(head.startswith(mark) for mark, kin, _, _ in MARKS if kin == name):
            raise ValueError(f"has no byte-order mark, so {how.encoding} is not enough: write {how.encoding}-le or {how.encoding}-be")
        return how.encoding
    if how.encoding is None and kind in PAGES and (found := CHARSET.search(head)):
        name = found.group(1).decode().lower()
        name = "gb18030" if name in CHINESE else name
        try:
            return None if name.startswith("utf") else codecs.lookup(name).name
        except LookupError:
            return None  # an unknown name: UTF-8, or a fault that names the line
    return None
