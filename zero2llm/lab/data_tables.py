"""Records as tables, whose columns must hold them all: csv and parquet, or a ValueError that names record and field.

Both look at every record twice: once for the columns and their types, once to write.
Source: RFC 4180 (csv); Apache Parquet through pyarrow.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

Records = Callable[[], Iterator[tuple[Any, str]]]  # can be read again: (record, where)
ROWS = 1_024  # of one parquet batch


def columns(records: Records) -> list[str]:
    """Every field, in the order of first appearance. Raises ValueError for a record that is no object."""
    found: dict[str, None] = {}
    for value, where in records():
        if not isinstance(value, dict):
            raise ValueError(f"{where}: a table holds objects with fields, this is a {type(value).__name__}; use .jsonl")
        found.update(dict.fromkeys(value))
    return list(found)


def write_csv(records: Records, file: io.BufferedIOBase, delimiter: str) -> None:
    """A header and a row a record. An absent field or null is an empty cell; numbers and booleans as JSON spells them.

    Raises ValueError for a list or an object in a field, and where an empty cell could be an empty text as well.
    """
    names = columns(records)
    absent, empty = {}, {}
    text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
    rows = csv.writer(text, delimiter=delimiter, lineterminator="\r\n")  # so that either in a text is quoted
    if names:
        rows.writerow(names)
    for value, where in records():
        for name in names:
            if value.get(name) is None:
                absent.setdefault(name, where)
            elif value[name] == "":
                empty.setdefault(name, where)
            if name in absent and name in empty:
                raise ValueError(
                    f"field {name!r} is absent or null in {absent[name]} and an empty text in {empty[name]}; in a table both would be "
                    "an empty cell: use .jsonl or .parquet, or pass --drop-fields"
                )
        rows.writerow([_cell(value.get(name), name, where) for name in names])
    text.detach()


def _cell(value: Any, name: str, where: str) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, list | dict):
        raise ValueError(
            f"{where}: field {name!r} holds a {type(value).__name__}, which a cell cannot; use .jsonl or .parquet, "
            f"or pass --drop-fields {name}"
        )
    return json.dumps(value)


def write_parquet(records: Records, path: Path) -> None:
    """An absent field is stored as null, as the format knows no other way. Types are those that hold every record's value.

    Raises ValueError if a field's values share no type, or would not come back as they were.
    """
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise ValueError("parquet needs the extra: pip install 'zero2llm[parquet]'") from None
    names, schema = columns(records), arrow.schema([])
    fault = lambda rows, error: ValueError(
        f"between {rows[0][1]} and {rows[-1][1]}: parquet cannot hold these records ({error}); a column has one type: use .jsonl, or pass --drop-fields"
    )
    for rows in _batches(records()):
        try:
            found = arrow.table({name: [value.get(name) for value, _ in rows] for name in names}).schema
            schema = arrow.unify_schemas([schema, found], promote_options="permissive")
        except (arrow.ArrowException, OverflowError, TypeError) as error:
            raise fault(rows, error) from None
    try:
        with parquet.ParquetWriter(path, schema, compression="zstd") as out:
            for rows in _batches(records()):
                table = arrow.Table.from_pylist([value for value, _ in rows], schema=schema)
                for (value, where), back in zip(rows, table.to_pylist(), strict=True):
                    if not same(value, back):
                        raise ValueError(f"{where}: would not come back from parquet as it is; use .jsonl")
                out.write_table(table)
    except (arrow.ArrowException, OverflowError, TypeError) as error:
        raise ValueError(f"parquet cannot hold these records ({error}); use .jsonl, or pass --drop-fields") from None


def _batches(records: Iterator[tuple[Any, str]]) -> Iterator[list[tuple[Any, str]]]:
    while rows := list(islice(records, ROWS)):
        yield rows


def same(a: Any, b: Any) -> bool:
    """Equal, where an absent field and null count as one."""
    if isinstance(a, dict) and isinstance(b, dict):
        return all(same(a.get(key), b.get(key)) for key in {*a, *b})
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, bool) is not isinstance(b, bool):
        return False
    if isinstance(a, dict) and b is None:
        return all(same(v, None) for v in a.values())
    return a == b
