"""Records from the files that people have: txt, jsonl, JSON arrays, parquet; every fault with its file and line."""

from __future__ import annotations

import glob
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from zero2llm.data.json_stream import elements

EMBEDDED = ("en_austen", "en_moby_dick", "zh_classical_prose", "zh_poetry_small", "zh_songci")
SUFFIXES = (".txt", ".md", ".jsonl", ".json", ".parquet")
OPENERS = {".xz": lzma.open, ".gz": gzip.open}


@dataclass(frozen=True)
class Record:
    """One object of a file. ``line`` counts from 1 (txt: 1; parquet: the row's number)."""

    value: Any
    file: str
    line: int


@dataclass
class BadRecords:
    """What could not be used. With ``skip`` it is counted and listed; without, the first one ends the run."""

    skip: bool = False
    found: list[str] = field(default_factory=list)

    def add(self, file: str, line: int, reason: str) -> None:
        self.reject(f"{file}, line {line}", reason)

    def reject(self, where: str, reason: str) -> None:
        """The same for a place that is already a sentence's beginning."""
        if not self.skip:
            raise ValueError(f"{where}: {reason}; correct it, or pass --skip-bad-records to leave such records out")
        self.found.append(f"{where}: {reason}")


def expand(paths: Sequence[str]) -> list[Path]:
    """Files named by paths, folders, globs, ``embedded`` or ``embedded:NAME``, each once, in order.

    Raises ValueError for something that does not exist or holds no readable file.
    """
    files: list[Path] = []
    for path in map(str, paths):
        if path == "embedded" or path.startswith("embedded:"):
            files += _embedded(path.partition(":")[2])
        elif Path(path).is_dir():
            found = sorted(p for p in Path(path).rglob("*") if p.is_file() and _kind(p) in SUFFIXES)
            if not found:
                raise ValueError(f"{path}: the folder holds no {', '.join(SUFFIXES)} file")
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
    folder = Path(str(resources.files("zero2llm") / "data" / "embedded"))
    return [folder / f"{n}.jsonl.xz" for n in ([name] if name else EMBEDDED)]


def _kind(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in OPENERS else path.suffix


def read_records(paths: Sequence[str], bad: BadRecords) -> Iterator[Record]:
    """All records in file order. Raises ValueError for a file that is empty, unreadable or of an unknown kind."""
    for path in expand(paths):
        count, already = 0, len(bad.found)
        try:
            for record in _read(path, bad):
                count += 1
                yield record
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:  # a damaged .xz or .gz, no permission ...
            raise ValueError(f"{path}: cannot be read ({error})") from error
        if not count and len(bad.found) == already:
            raise ValueError(f"{path}: the file is empty; remove it from the list or fill it")


def _read(path: Path, bad: BadRecords) -> Iterator[Record]:
    kind = _kind(path)
    if kind == ".parquet":
        yield from _parquet(path)
    elif kind == ".jsonl":
        yield from _json_lines(path, bad)
    elif kind == ".json":
        yield from _json_array(path)
    elif kind in (".txt", ".md"):
        text = _text(path)
        if text.strip():
            yield Record({"text": text}, str(path), 1)
    else:
        raise ValueError(
            f"{path}: unknown kind of file {path.suffix!r}; readable are {', '.join(SUFFIXES)}, also with .xz or .gz"
        )


def _binary(path: Path) -> io.BufferedIOBase:
    return OPENERS.get(path.suffix, open)(path, "rb")


def _text(path: Path) -> str:
    with _binary(path) as file:
        data = file.read()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path}, line {line}: not UTF-8 (byte {error.object[error.start]:#04x}); convert the file to UTF-8"
        ) from None


def _json_lines(path: Path, bad: BadRecords) -> Iterator[Record]:
    with _binary(path) as file:
        for number, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            try:
                yield Record(json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8")), str(path), number)
            except UnicodeDecodeError:
                bad.add(str(path), number, "not UTF-8")
            except (ValueError, RecursionError) as error:
                bad.add(str(path), number, f"not JSON ({error})")


def _json_array(path: Path) -> Iterator[Record]:
    with _binary(path) as file:
        try:
            for value, line in elements(file):
                yield Record(value, str(path), line)
        except ValueError as error:
            raise ValueError(f"{path}, {error}") from None


def _parquet(path: Path) -> Iterator[Record]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ValueError(f"{path}: parquet needs the extra: pip install 'zero2llm[parquet]'") from None
    try:
        file = parquet.ParquetFile(path)
    except Exception as error:  # pyarrow's errors share no base class
        raise ValueError(f"{path}: cannot be read as parquet ({error})") from None
    number = 0
    for batch in file.iter_batches(1024):
        for value in batch.to_pylist():
            number += 1
            yield Record(value, str(path), number)


def documents(paths: Sequence[str], field: str = "text", bad: BadRecords | None = None) -> Iterator[str]:
    """The text of every record. Bad: not an object, without ``field``, not a string, or blank."""
    bad = bad or BadRecords()
    for record in read_records(paths, bad):
        value = record.value
        if isinstance(value, str):
            value = {field: value}
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
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON may spell half of a surrogate pair, which no encoding can store
        return f"holds half a character (\\u{ord(value[error.start]):04x}) at position {error.start}"
    return ""
