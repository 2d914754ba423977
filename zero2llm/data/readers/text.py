"""Plain text, markdown and pages: a document is a file, a paragraph or a line.

A "file" of several gigabytes is cut at the end of a paragraph past 16 MiB (at the end of a line past 32), each document
then says which part it is, and the cuts are counted. Pages (html) are whole or bad: half a page has no meaning.
"""

from __future__ import annotations

from collections.abc import Iterator

from zero2llm.data.readers.kinds import PAGES, kind_of
from zero2llm.data.readers.lines import BOM, is_cut, lines, not_text, too_long
from zero2llm.data.readers.record import BadRecords, Record, Unit
from zero2llm.data.readers.streams import Opened

DOCUMENT = 16 << 20  # bytes
CUT = "text files cut at the end of a paragraph, as they are longer than 16 MiB"


def text_records(opened: Opened, unit: Unit, bad: BadRecords) -> Iterator[Record]:
    """{"text", "format" of markdown and pages, "part" of a cut file}; what is blank is no document."""
    kind = kind_of(unit.member or unit.file)[0]
    if kind in PAGES:
        pieces = _page(opened, unit, bad)
    else:
        pieces = _pieces(opened, unit, bad)
    extra = {"format": "html"} if kind in PAGES else {"format": "md"} if kind == ".md" else {}
    part = 0
    for line, raw, cut in pieces:
        if not raw.strip():
            continue
        part += 1 if cut or part else 0
        bad.noted.update([CUT] if cut else [])
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            bad.add(unit.place, line + raw.count(b"\n", 0, error.start), not_text(error, opened))
        else:
            yield Record({"text": text, **extra, **({"part": part} if part else {})}, unit.place, line)


def _page(opened: Opened, unit: Unit, bad: BadRecords) -> Iterator[tuple[int, bytes, bool]]:
    most = unit.source.max_bytes
    raw = opened.file.read(most + 1)
    if len(raw) > most:
        bad.add(unit.place, 1, f"a page of more than {most:,} bytes, which is not read (max_line_mib)")
    elif not opened.fault:
        yield 1, raw.removeprefix(BOM), False


def _pieces(opened: Opened, unit: Unit, bad: BadRecords) -> Iterator[tuple[int, bytes, bool]]:
    """(first line, bytes, whether the file goes on in another piece)."""
    mode, most = unit.source.text_documents, unit.source.max_bytes
    held: list[bytes] = []
    size = first = 0
    for number, raw, length in lines(opened.file, most):
        if number == 1:
            raw = raw.removeprefix(BOM)
        if too := is_cut(raw, length, most):
            bad.add(unit.place, number, too_long(length, most))
        else:
            first = first if held else number
            held.append(raw)
            size += len(raw)
        if too or _ends(mode, raw, size):
            yield first, b"".join(held), mode == "file"
            held, size = [], 0
    if held and not (opened.fault and mode != "line" or opened.fault and not held[-1].endswith(b"\n")):
        yield first, b"".join(held), False


def _ends(mode: str, line: bytes, size: int) -> bool:
    if mode == "line":
        return True
    if mode == "paragraph":
        return not line.strip()
    return size > DOCUMENT and not line.strip() or size > 2 * DOCUMENT
