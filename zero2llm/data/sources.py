"""Records from what people have: text, pages, jsonl, JSON, tables and parquet, in files, folders, archives and on hubs.

    paths -> units -> records       a unit is what one worker reads alone, the same whatever the number of workers

A record is read as it stands or listed with file, line and reason; nothing is dropped unseen, and nothing bad takes a good
one along. *Why.* Memory stays below a few hundred MB for files of any size: one line, element, row group or text of
16 MiB is held at a time.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from zero2llm.data.hub import hub_units, is_hub
from zero2llm.data.readers.archive import walk_tar, zip_entries
from zero2llm.data.readers.kinds import LINES, hidden, kind_of, known, readable
from zero2llm.data.readers.lines import cuts
from zero2llm.data.readers.reading import read
from zero2llm.data.readers.record import EMBEDDED as FOLDER
from zero2llm.data.readers.record import BadRecords, Record, Source, Unit
from zero2llm.data.readers.tables import row_groups
from zero2llm.data.readers.values import half_character

__all__ = ["BadRecords", "Record", "Source", "Unit", "documents", "expand", "read_records", "read_unit", "text_fault", "texts_of", "units"]

EMBEDDED = ("en_austen", "en_moby_dick", "zh_classical_prose", "zh_poetry_small", "zh_songci")
EMPTY = "the file is empty; remove it from the list or fill it"
DIRT = (b"\xff\xfe", b"\xfe\xff")  # a file that begins so may be UTF-16, and is not cut at bytes


def expand(paths: Sequence[str]) -> list[Path | str]:
    """Files named by paths, folders, globs, ``embedded`` or ``embedded:NAME``, each once, in order; hub names stay as they are.

    Raises ValueError for something that does not exist or holds no readable file.
    """
    files: list[Path | str] = []
    for path in map(str, paths):
        if path == "embedded" or path.startswith("embedded:"):
            files += _embedded(path.partition(":")[2])
        elif is_hub(path):
            files.append(path)
        elif Path(path).is_dir():
            inside = sorted(p for p in Path(path).rglob("*") if p.is_file() and readable(p.name))
            found = [p for p in inside if not hidden(p.relative_to(path).as_posix())]
            if not found:
                raise ValueError(f"{path}: the folder holds no {known()} file")
            files += found
        elif Path(path).is_file():
            files.append(Path(path))
        elif found := sorted(p for p in map(Path, glob.glob(path, recursive=True)) if p.is_file()):
            files += found
        else:
            raise ValueError(f"{path}: no such file")
    return list(dict.fromkeys(files))


def _embedded(name: str) -> list[Path]:
    if name and name not in EMBEDDED:
        raise ValueError(f"embedded:{name} does not exist; there are: {', '.join(EMBEDDED)}")
    return [FOLDER / f"{n}.jsonl.xz" for n in ([name] if name else EMBEDDED)]


def units(source: Source | Sequence[str], target_bytes: int = 32 << 20) -> list[Unit]:
    """The source in parts for workers: ranges of plain jsonl files and parquet's row groups of about ``target_bytes``,
    members of archives, shards of hub data sets, and whole files. Raises ValueError as `expand` does.
    """
    source = source if isinstance(source, Source) else Source(paths=tuple(source))
    return [unit for path in expand(source.paths) for unit in _units_of(str(path), source, target_bytes)]


def _units_of(path: str, source: Source, target: int | None) -> list[Unit]:
    """``target`` None: for one reader, so nothing is cut. A file that cannot be cut because it is damaged stays whole."""
    if is_hub(path):
        return hub_units(path, source)
    (kind, compression), whole = kind_of(path), Unit(path, source=source)
    if not readable(path):
        raise ValueError(f"{path}: unknown kind of file {Path(path).suffix!r}; readable are {known()}")
    try:
        if kind == ".zip" and not compression:
            return _members(whole, [replace(whole, member=e.name, start=e.header) for e in zip_entries(path)])
        if kind == ".tar" and not compression:
            with open(path, "rb") as file:
                found = [replace(whole, member=m.name, start=m.start, end=m.start + m.size) for m in walk_tar(file)]
            return _members(whole, found)
        if target is not None and kind == ".parquet" and not compression:
            return [replace(whole, start=a, end=b, line=row) for a, b, row in row_groups(path, target)] or [whole]
    except ValueError:
        return [whole]  # damaged: the reader says so, and what stands before the damage
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    if target is None or compression or kind not in LINES or Path(path).stat().st_size <= target or not _is_bytes(path, source):
        return [whole]
    ranges = cuts(path, target, Path(path).stat().st_size)
    return [replace(whole, start=a, end=b, line=line) for a, b, line in ranges]


def _is_bytes(path: str, source: Source) -> bool:
    with open(path, "rb") as file:
        return source.is_utf8 and file.read(2) not in DIRT


def _members(whole: Unit, found: list[Unit]) -> list[Unit]:
    """Members that are data; an archive without any is read whole, to say so."""
    return [unit for unit in found if readable(unit.member) and not hidden(unit.member)] or [whole]


def read_unit(unit: Unit, bad: BadRecords) -> Iterator[Record]:
    """Records in order. A file or member without any is bad. Raises ValueError for what no skipping helps against."""
    n, before = 0, bad.total
    for record in read(unit, bad):
        n += 1
        yield record
    cut = kind_of(unit.file)[0] in (*LINES, ".parquet") and unit.end is not None or is_hub(unit.file)
    if not n and bad.total == before and not cut:
        bad.reject(unit.place, EMPTY)


def read_records(paths: Sequence[str] | Source, bad: BadRecords) -> Iterator[Record]:
    """All records in file order. Raises ValueError for a file that is empty or of an unknown kind."""
    source = paths if isinstance(paths, Source) else Source(paths=tuple(paths))
    for path in expand(source.paths):
        n, before = 0, bad.total
        for unit in _units_of(str(path), source, None):
            for record in read(unit, bad):
                n += 1
                yield record
        if not n and bad.total == before:
            raise ValueError(f"{path}: {EMPTY}")


def documents(paths: Sequence[str] | Source, field: str = "text", bad: BadRecords | None = None) -> Iterator[str]:
    """The text of every record, as `texts_of` finds it."""
    bad = bad or BadRecords()
    yield from texts_of(read_records(paths, bad), field, bad)


def texts_of(records: Iterable[Record], field: str, bad: BadRecords) -> Iterator[str]:
    """The text of every record. Bad: not an object, without ``field``, not a string, or blank."""
    for record in records:
        value = {field: record.value} if isinstance(record.value, str) else record.value
        if not isinstance(value, dict):
            bad.add(record.file, record.line, f"an object was expected, this is a {type(value).__name__}")
        elif field not in value:
            bad.add(record.file, record.line, f"no field {field!r}; it has: {', '.join(map(str, value)) or 'nothing'}")
        elif fault := text_fault(value[field]):
            bad.add(record.file, record.line, f"field {field!r} {fault}")
        else:
            yield value[field]


def text_fault(value: Any) -> str:
    """Why a value cannot be learned from as text; empty if it can."""
    if not isinstance(value, str) or not value.strip():
        return f"holds no text: {str(value)[:40]!r}"
    return half_character(value)
