"""A unit's records: the stream is opened, its kind of file read, and damage said after what is good.

An archive that cannot be entered at a member (a packed tar, or a damaged one) is read here from its beginning to its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from zero2llm.data.hub import is_hub, read_hub
from zero2llm.data.json_stream import elements
from zero2llm.data.readers.archive import open_zip_member, walk_tar, walk_zip, zip_entries
from zero2llm.data.readers.kinds import ARCHIVES, LINES, PAGES, TABLES, TEXT, hidden, kind_of, known, readable
from zero2llm.data.readers.lines import json_lines
from zero2llm.data.readers.opening import open_range, open_unit, opened
from zero2llm.data.readers.record import BadRecords, Record, Unit
from zero2llm.data.readers.streams import BLOCK, Opened, buffered
from zero2llm.data.readers.tables import csv_records, parquet_records
from zero2llm.data.readers.text import text_records

NESTED = "an archive inside an archive is not read; unpack it"


def read(unit: Unit, bad: BadRecords) -> Iterator[Record]:
    kind, compression = kind_of(unit.file)
    try:
        if is_hub(unit.file):
            yield from read_hub(unit, bad)
        elif kind in ARCHIVES and not unit.member:
            yield from _archive(unit, bad)
        elif kind == ".parquet" and not compression:
            yield from parquet_records(None, unit, bad)
        elif unit.member and kind_of(unit.member)[0] in ARCHIVES:
            bad.reject(unit.place, NESTED)
        else:
            yield from _stream(lambda: open_unit(unit), unit, bad)
    except OSError as error:  # no permission, a failing disk
        raise ValueError(f"{unit.place}: cannot be read ({error})") from error


def _stream(source: Callable[[], Opened], unit: Unit, bad: BadRecords) -> Iterator[Record]:
    """Records of what ``source`` opens; if it is damaged, that is said after its good records."""
    kind, n = kind_of(unit.member or unit.file)[0], 0
    try:
        stream = source()
    except ValueError as error:  # encrypted, or packed by a method that nothing here reads
        bad.reject(unit.place, str(error))
        return
    try:
        for record in _records(stream, kind, unit, bad):
            n += 1
            yield record
        if stream.fault:
            doubt = "" if "cut short" in stream.fault else ", and the last of them may be wrong: it shows late"
            bad.reject(unit.place, f"cannot be read to its end ({stream.fault}); {n} records stand before it{doubt}")
    finally:
        stream.close()


def _records(stream: Opened, kind: str, unit: Unit, bad: BadRecords) -> Iterator[Record]:
    if kind in LINES:
        yield from json_lines(stream, unit, bad)
    elif kind == ".json":

        def fault(line: int, reason: str) -> None:
            bad.add(unit.place, line, f"cannot be read to its end ({stream.fault}): {reason}" if stream.fault else reason)

        for value, line in elements(stream.file, fault, unit.source.max_bytes):
            yield Record(value, unit.place, line)
    elif kind in TEXT + PAGES:
        yield from text_records(stream, unit, bad)
    elif kind in TABLES:
        yield from csv_records(stream, unit, bad)
    else:
        yield from parquet_records(stream, unit, bad)


def _archive(unit: Unit, bad: BadRecords) -> Iterator[Record]:
    kind, compression = kind_of(unit.file)
    found, before = 0, bad.total
    members = _zip(unit, bad) if kind == ".zip" else _tar(unit, bad)
    if kind == ".zip" and compression:
        bad.reject(unit.file, NESTED)
        return
    for name, source in members:
        if not readable(name) or hidden(name):
            continue
        found += 1
        inner = replace(unit, member=name)
        if kind_of(name)[0] in ARCHIVES:
            bad.reject(inner.place, NESTED)
        else:
            yield from _stream(lambda s=source, n=name: opened(s, n, unit.source), inner, bad)
    if not found and bad.total == before:
        bad.reject(unit.file, f"the archive holds no {known()} file")


Members = Iterator[tuple[str, Callable[[], Opened | None]]]


def _zip(unit: Unit, bad: BadRecords) -> Members:
    try:
        entries, fault = zip_entries(unit.file), ""
    except ValueError as error:
        entries, fault = walk_zip(unit.file), str(error)
    for entry in entries:
        yield entry.name, lambda e=entry: open_zip_member(unit.file, e)
    if fault:
        bad.reject(unit.file, f"cannot be read to its end ({fault}: cut short, damaged, or no zip file)")


def _tar(unit: Unit, bad: BadRecords) -> Members:
    stream = opened(lambda: open_range(unit.file), unit.file, unit.source)
    try:
        members = walk_tar(stream.file)
        while True:
            try:
                member = next(members, None)
            except ValueError as error:
                bad.reject(unit.file, f"cannot be read to its end ({stream.fault or error})")
                return
            if member is None:
                break
            once = iter((buffered(member.part), None))  # a stream cannot be read a second time
            yield member.name, lambda once=once: next(once)
        while stream.file.read(BLOCK):
            pass  # the checksum stands at the very end
        if stream.fault:
            bad.reject(unit.file, f"cannot be read to its end ({stream.fault})")
    finally:
        stream.close()
