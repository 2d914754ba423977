"""What is read and from where: a source's options, the part of it that one worker reads, a record, and the account of bad ones."""

from __future__ import annotations

import codecs
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from zero2llm.core.config import config

EMBEDDED = Path(__file__).parent.parent / "embedded"  # texts that come with the package
LISTED = 1_000  # bad records that are described; the rest are counted
REASON = 500  # characters of one description


@config
class Source:
    """Files, folders, globs, archives or hub data sets that are read in the same way.

    field : where a record's text stands.  encoding : of files without a byte-order mark; None means UTF-8.
    text_documents : what a document of a .txt or .md file is.  delimiter : of .csv and .tsv files, if not the usual one.
    max_line_mib : a longer line, row or array element is a bad record.  endpoint : the mirror of a hub, as a URL.
    """

    paths: tuple[str, ...] = ()
    name: str = ""
    field: str = "text"
    encoding: str | None = None
    text_documents: Literal["file", "line", "paragraph"] = "file"
    delimiter: str | None = None
    max_line_mib: float = 64
    endpoint: str | None = None

    def __post_init__(self):
        if isinstance(self.paths, str):
            raise ValueError(f"paths: {self.paths!r} is one string; write a list: [{self.paths!r}]")
        if self.encoding is not None:
            try:
                codecs.getincrementaldecoder(self.encoding)
                "a".encode(self.encoding)
            except LookupError:
                raise ValueError(f"encoding: {self.encoding!r} is unknown; examples: gb18030, big5, latin-1") from None
        if self.delimiter is not None and (len(self.delimiter) != 1 or self.delimiter in '\r\n"'):
            raise ValueError(f"delimiter: {self.delimiter!r} must be one character")
        if not self.max_line_mib > 0:
            raise ValueError(f"max_line_mib: {self.max_line_mib} must be above 0")

    @property
    def title(self) -> str:
        return self.name or ", ".join(self.paths)

    @property
    def max_bytes(self) -> int:
        return max(int(self.max_line_mib * (1 << 20)), 1)

    @property
    def is_utf8(self) -> bool:
        return self.encoding is None or codecs.lookup(self.encoding).name in ("utf-8", "utf-8-sig", "ascii")


@dataclass(frozen=True)
class Unit:
    """A part of a source that one worker reads alone.

    member : a file in an archive, a split of a hub's data set.  start, end : bytes of a jsonl file or a tar's member, the
    header of a zip's member, row groups of a parquet file, the shard of a hub's split.  line : number of the first line.
    """

    file: str
    member: str = ""
    start: int = 0
    end: int | None = None
    line: int = 1
    source: Source = Source()

    @property
    def place(self) -> str:
        """How messages and results name it: nothing in them depends on where this package lies."""
        if Path(self.file).parent == EMBEDDED:
            return f"embedded:{Path(self.file).name.partition('.')[0]}"
        return f"{self.file}!{self.member}" if self.member else self.file


@dataclass(frozen=True)
class Record:
    """One object of a file. ``line`` counts from 1: where it begins (txt: its first line; parquet, hub: the row)."""

    value: Any
    file: str
    line: int


@dataclass
class BadRecords:
    """What could not be used. With ``skip`` it is counted and listed; without, the first one ends the run.

    ``total`` is exact; ``found`` describes the first 1,000. ``noted`` counts what was read, but not quite as it stood
    ("text cut at a paragraph's end").
    """

    skip: bool = False
    found: list[str] = field(default_factory=list)
    total: int = 0
    noted: Counter[str] = field(default_factory=Counter)

    def add(self, file: str, line: int, reason: str) -> None:
        self.reject(f"{file}, line {line}", reason)

    def reject(self, where: str, reason: str) -> None:
        """The same for a place that is already a sentence's beginning."""
        reason = reason if len(reason) <= REASON else reason[:REASON] + " ..."
        if not self.skip:
            raise ValueError(f"{where}: {reason}; correct it, or pass --skip-bad-records to leave such records out")
        self.leave_out(where, reason)

    def leave_out(self, where: str, reason: str) -> None:
        """Count and list a record that is no mistake, but of no use: with or without ``skip`` the run goes on."""
        self.total += 1
        if len(self.found) < LISTED:
            self.found.append(f"{where}: {reason}")

    def merge(self, other: BadRecords) -> None:
        """Add what another worker met; in the order of the units, so that the list is always the same."""
        self.total += other.total
        self.found += other.found[: LISTED - len(self.found)]
        self.noted.update(other.noted)

    def lines(self) -> list[str]:
        """The list, and how many more there are."""
        more = self.total - len(self.found)
        return self.found + ([f"... and {more:,} more"] if more else [])
