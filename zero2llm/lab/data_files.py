"""Records into files, in the format that the file's name says; a file is whole or absent, and what it cannot hold is refused."""

from __future__ import annotations

import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zero2llm.core.files import new_file
from zero2llm.lab.data_tables import write_csv, write_parquet

FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
COMPRESSED = (".gz", ".zst", ".xz")
BETWEEN = "\n<|endoftext|>\n"  # between documents of one .txt file
Write = Callable[[Any, str], None]  # a record, and where it was read


def format_of(path: Path) -> tuple[str, str]:
    """(".jsonl", ".gz") of a file's name. Raises ValueError for a name that says no format that can be written."""
    outer = path.suffix if path.suffix in COMPRESSED else ""
    kind = Path(path.stem).suffix if outer else path.suffix
    if kind not in FORMATS:
        raise ValueError(f"{path}: the name must end in {', '.join(FORMATS)}, if you like with {', '.join(COMPRESSED)} behind it")
    if kind == ".parquet" and outer:
        raise ValueError(f"{path}: parquet compresses itself; leave {outer} out of the name")
    return kind, outer


def refuse_existing(path: Path, overwrite: bool) -> None:
    """A file to be written must not be there, nor a folder of that name."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file in it")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} already exists; choose another name or pass --overwrite")


def with_held_out(out: Path, what: str, overwrite: bool) -> tuple[Path, Path]:
    """``out`` and, beside it, NAME-valid: where both sides of generated records go. Raises ValueError unless both can be written."""
    kind, outer = format_of(out)
    if kind != ".jsonl":
        raise ValueError(f"{out}: {what} are written as .jsonl")
    valid = out.with_name(f"{out.name.removesuffix(kind + outer)}-valid{kind}{outer}")
    for path in (out, valid):
        refuse_existing(path, overwrite)
    return out, valid


def write_records(out: Path, records: Iterable[Any], what: str, overwrite: bool) -> None:
    """what : one of them, in a message: "question" makes "question 3"."""
    with writer(out, overwrite) as write:
        for number, record in enumerate(records, 1):
            write(record, f"{what} {number}")


@contextmanager
def own_file(final: Path, overwrite: bool = False) -> Iterator[Path]:
    """`new_file`, unless something stands there."""
    refuse_existing(final, overwrite)
    with new_file(final) as part:
        yield part


@contextmanager
def opened(path: Path, outer: str) -> Iterator[io.BufferedIOBase]:
    """``path`` for writing bytes, compressed as ``outer`` says; no time stamp, so that equal data gives equal files."""
    if outer == ".zst":
        try:
            import zstandard
        except ImportError:
            raise ValueError("a .zst file needs the extra: pip install 'zero2llm[data]'") from None
    with open(path, "wb") as raw:
        if outer == ".gz":
            file = gzip.GzipFile("", "wb", fileobj=raw, mtime=0)
        elif outer == ".xz":
            file = lzma.open(raw, "wb")
        elif outer == ".zst":
            file = zstandard.ZstdCompressor(level=9).stream_writer(raw, closefd=False)
        else:
            yield raw
            return
        with file:
            yield file


@contextmanager
def writer(final: Path, overwrite: bool = False, between: str = BETWEEN) -> Iterator[Write]:
    """Yields ``write(record, where)``. Raises ValueError naming the record that the format cannot hold."""
    kind, outer = format_of(final)
    with own_file(final, overwrite) as part:
        if kind in (".csv", ".tsv", ".parquet"):  # columns are known when all records are
            with spooled(part) as (write, records):
                yield write
                if kind == ".parquet":
                    write_parquet(records, part)
                else:
                    with opened(part, outer) as file:
                        write_csv(records, file, "\t" if kind == ".tsv" else ",")
        else:
            with opened(part, outer) as file:
                form = {".jsonl": Lines(file), ".json": Array(file), ".txt": Texts(file, between)}[kind]
                yield form.write
                form.end()


class Lines:
    """One JSON record a line."""

    def __init__(self, file: io.BufferedIOBase):
        self.file = file

    def write(self, value: Any, where: str) -> None:
        self.file.write(as_json(value) + b"\n")

    def end(self) -> None:
        pass


class Array:
    """A JSON array, one record a line."""

    def __init__(self, file: io.BufferedIOBase):
        self.file, self.before = file, b"[\n"

    def write(self, value: Any, where: str) -> None:
        self.file.write(self.before + as_json(value))
        self.before = b",\n"

    def end(self) -> None:
        self.file.write(b"\n]\n" if self.before == b",\n" else b"[]\n")


def as_json(value: Any) -> bytes:
    """One line. Half a surrogate pair, which UTF-8 cannot spell, stays as JSON escapes it."""
    try:
        return json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return json.dumps(value).encode()


class Texts:
    """Bare documents of a .txt file. Raises ValueError where one cannot be told from two."""

    def __init__(self, file: io.BufferedIOBase, between: str):
        self.file, self.between, self.n = file, between, 0

    def write(self, value: Any, where: str) -> None:
        text = value if isinstance(value, str) else value.get("text") if isinstance(value, dict) and len(value) == 1 else None
        if not isinstance(text, str):
            has = ", ".join(map(str, value)) if isinstance(value, dict) else type(value).__name__
            raise ValueError(f"{where}: a .txt file holds only records with the one field 'text'; this has: {has}")
        if self.between in text:
            raise ValueError(f"{where}: the text holds {self.between!r}, which stands between documents; choose another --separator")
        self.file.write(((self.between if self.n else "") + text).encode())
        self.n += 1

    def end(self) -> None:
        pass


@contextmanager
def spooled(part: Path) -> Iterator[tuple[Write, Callable[[], Iterator[tuple[Any, str]]]]]:
    """A place on disk beside ``part`` for records that must all be seen before the first is written."""
    spool = part.with_name(part.name + ".rows")
    try:
        with open(spool, "wb") as file:

            def write(value: Any, where: str) -> None:
                file.write(as_json([value, where]) + b"\n")

            def records() -> Iterator[tuple[Any, str]]:
                file.flush()
                with open(spool, "rb") as rows:
                    for row in rows:
                        yield tuple(json.loads(row))

            yield write, records
    finally:
        spool.unlink(missing_ok=True)
