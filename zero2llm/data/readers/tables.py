"""Tables: csv and tsv with a header row, parquet by row groups; each row a record under the names of the columns.

*Trap.* After a quote that is wrong nobody knows for certain whether a line end is data or the end of a row. Reading goes
on at the next line, and every row with another number of columns than the header is listed.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import BinaryIO

from zero2llm.data.readers.kinds import kind_of
from zero2llm.data.readers.lines import BOM, is_cut, lines, too_long
from zero2llm.data.readers.record import BadRecords, Record, Unit
from zero2llm.data.readers.streams import Opened
from zero2llm.data.readers.values import plain

IN_MEMORY = 256 << 20  # bytes of a parquet file that must be unpacked first: its index stands at its end
AT_ONCE = 8 << 20  # bytes of rows
LOST = "where the next row begins is not certain, so the rest of the file is left out"


class _Text:
    """The lines of a row for csv.reader, and what is wrong with them; ``begin`` starts a row."""

    def __init__(self, opened: Opened, most: int):
        self.lines, self.opened, self.most, self.number = lines(opened.file, most), opened, most, 0
        self.begin()

    def begin(self) -> None:
        self.first, self.size, self.fault, self.lost = self.number + 1, 0, "", False

    def __iter__(self) -> _Text:
        return self

    def __next__(self) -> str:
        self.number, raw, size = next(self.lines)
        if self.opened.fault and not raw.endswith(b"\n"):
            raise StopIteration  # half a line before the damage
        self.size += size
        self.lost = is_cut(raw, size, self.most) or self.size > self.most + 2
        if self.lost:
            raise csv.Error(too_long(self.size, self.most))
        if self.number == 1:
            raw = raw.removeprefix(BOM)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            self.fault = f"not {self.opened.encoding} (byte {raw[error.start]:#04x}); name the file's encoding, or convert it"
            return raw.decode(errors="replace")


def csv_records(opened: Opened, unit: Unit, bad: BadRecords) -> Iterator[Record]:
    most, place = unit.source.max_bytes, unit.place
    csv.field_size_limit(max(csv.field_size_limit(), most + 2))
    delimiter = unit.source.delimiter or ("\t" if kind_of(unit.member or unit.file)[0] == ".tsv" else ",")
    text = _Text(opened, most)
    rows = csv.reader(text, delimiter=delimiter, strict=True)
    names: list[str] | None = None
    while True:
        text.begin()
        try:
            row = next(rows)
            fault = text.fault
        except StopIteration:
            return
        except csv.Error as error:
            if opened.fault and not text.lost:
                return  # a row cut by the damage, which is listed itself
            row, fault = [], _csv_fault(error, text)
        if names is None and (fault or row):
            if fault := fault or _header_fault(row, delimiter):
                bad.add(place, text.first, fault)
                return
            names = row
        elif fault or row and len(row) != len(names):
            bad.add(place, text.first, fault or f"{len(row)} columns, the header has {len(names)}")
            if text.lost:
                return
        elif row:
            yield Record(dict(zip(names, row, strict=True)), place, text.first)


def _csv_fault(error: csv.Error, text: _Text) -> str:
    lines = f"lines {text.first} to {text.number}" if text.number > text.first else f"line {text.first}"
    if "unexpected end of data" in str(error):
        return f"a quote that opens here is never closed; {lines} are left out"
    return f"not a row ({error}); {LOST}" if text.lost else f"not a row ({error}); {lines} left out"


def _header_fault(names: list[str], delimiter: str) -> str:
    if twice := [name for name in names if names.count(name) > 1]:
        return f"the header has two columns {twice[0]!r}; a header row with different names is needed"
    if not all(name.strip() for name in names):
        return f"the header has a column without a name: {', '.join(map(repr, names))}"
    if len(names) == 1 and (other := next((d for d in ";\t|," if d != delimiter and d in names[0]), "")):
        return f"one column {names[0]!r}; if the columns are separated otherwise, say it: delimiter: {other!r}"
    return ""


def parquet_file(file: str | BinaryIO):
    """Raises ValueError if it is no parquet file, or the extra is missing."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ValueError("parquet needs the extra: pip install 'zero2llm[parquet]'") from None
    try:
        return parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
    except Exception as error:  # pyarrow's errors share no base class
        raise ValueError(f"cannot be read as parquet ({error})") from None


def row_groups(path: str, target: int) -> list[tuple[int, int, int]]:
    """(first group, end, number of its first row) of runs of about ``target`` bytes."""
    runs, begin, size, first, row = [], 0, 0, 1, 1
    with parquet_file(path) as file:
        for i in range(file.num_row_groups):
            group = file.metadata.row_group(i)
            size, row = size + group.total_byte_size, row + group.num_rows
            if size >= target or i == file.num_row_groups - 1:
                runs.append((begin, i + 1, first))
                begin, size, first = i + 1, 0, row
    return runs


def parquet_records(opened: Opened | None, unit: Unit, bad: BadRecords) -> Iterator[Record]:
    """Rows of the unit's groups, ``opened`` only if the file lies in another. A damaged group does not take the next."""
    if opened is not None:
        data = opened.file.read(IN_MEMORY + 1)
        if len(data) > IN_MEMORY:
            bad.reject(unit.place, "a parquet file of more than 256 MiB inside another file; unpack it first")
            return
        if opened.fault:
            return
    try:
        file = parquet_file(unit.file if opened is None else io.BytesIO(data))
    except ValueError as error:
        bad.reject(unit.place, str(error))
        return
    whole = opened is not None or unit.end is None
    number = unit.line
    with file:
        for i in range(0 if whole else unit.start, file.num_row_groups if whole else unit.end):
            yield from _group(file, i, number, unit.place, bad)
            number += file.metadata.row_group(i).num_rows


def _group(file, i: int, number: int, place: str, bad: BadRecords) -> Iterator[Record]:
    group = file.metadata.row_group(i)
    size = max(min(AT_ONCE * group.num_rows // max(group.total_byte_size, 1), 1024), 1)
    last, batches = number + group.num_rows - 1, file.iter_batches(size, row_groups=[i])
    while True:
        try:
            rows = _rows(next(batches))
        except StopIteration:
            return
        except Exception as error:
            bad.reject(f"{place}, rows {number} to {last}", f"cannot be read ({error})")
            return
        for value in rows:
            try:
                if isinstance(value, ValueError):
                    raise value
                value = plain(value, bad.noted)
            except ValueError as error:
                bad.reject(f"{place}, row {number}", str(error))
            else:
                yield Record(value, place, number)
            number += 1


def _rows(batch) -> list:
    """Values of the rows; for a row that is no text, as its column says it is, the error."""
    try:
        return batch.to_pylist()
    except ValueError:
        rows = []
        for i in range(batch.num_rows):
            try:
                rows += batch.slice(i, 1).to_pylist()
            except ValueError as error:
                rows.append(error)
        return rows
