"""Single jobs on files of records: counting, splitting, sampling. One pass, memory that does not grow with the file."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.progress import Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from zero2llm.core.files import write_atomic
from zero2llm.core.log import console, err_console
from zero2llm.data.document import Document
from zero2llm.data.schemas import detect
from zero2llm.data.shards import share
from zero2llm.data.sources import BadRecords, Record, Source, expand, read_records, text_fault
from zero2llm.data.stats import Stats
from zero2llm.lab import data_view
from zero2llm.lab.data_files import format_of, refuse_existing, writer
from zero2llm.tokenizers.tokenizer import Tokenizer

SPOKEN = ("system", "history", "instruction", "input", "prompt", "messages", "conversations", "output", "response", "completion",
          "chosen", "rejected", "question", "answer")  # fields that hold text where there is no field of that name  # fmt: skip
SHOWN = 20  # bad records that a command lists; `zero2llm data validate` lists all
EVERY = 500  # records between two looks at the clock


@contextmanager
def watched(source: Source, bad: BadRecords, what: str, tell: bool = True) -> Iterator[Iterator[Record]]:
    """All records, with a line of progress where somebody watches, and at the end the bad ones listed (``tell``)."""
    screen = err_console()
    bar = Progress(
        TextColumn(what), TextColumn("{task.completed:,} records"), TextColumn("{task.fields[file]}", markup=False),
        TimeElapsedColumn(), console=screen, transient=True, disable=not screen.is_terminal,
    )  # fmt: skip

    n_files, met = len(expand(source.paths)), {}

    def records() -> Iterator[Record]:
        task = bar.add_task(what, total=None, file="")
        for n, record in enumerate(read_records(source, bad), 1):
            number = met.setdefault(record.file, len(met) + 1)
            if n % EVERY == 1:
                bar.update(task, completed=n, file=record.file + (f", file {number} of {n_files}" if n_files > 1 else ""))
            yield record

    with bar:
        yield records()
    if tell:
        tell_bad(bad)


def tell_bad(bad: BadRecords) -> None:
    for line in bad.found[:SHOWN]:
        err_console().print(f"left out: {line}", style="yellow", markup=False, soft_wrap=True)
    if bad.total > SHOWN:
        err_console().print(f"left out: {bad.total - SHOWN:,} more; see them with: zero2llm data validate", style="yellow", markup=False, soft_wrap=True)
    for what, n in bad.noted.items():
        err_console().print(f"note: {what}: {n:,}", style="yellow", markup=False, soft_wrap=True)


def content(value: Any, field: str | None) -> str:
    """All text of a record: ``field``, or without one its "text", or what is said in a conversation or preference.

    Raises ValueError if there is none.
    """
    if isinstance(value, str):
        value = {field or "text": value}
    if not isinstance(value, dict):
        raise ValueError(f"an object was expected, this is a {type(value).__name__}")
    name = field or ("text" if "text" in value else None)
    if name is not None and name not in value:
        raise ValueError(f"no field {name!r}; it has: {', '.join(map(str, value)) or 'nothing'}")
    if name is not None:
        if fault := text_fault(value[name]):
            raise ValueError(f"field {name!r} {fault}")
        return value[name]
    said = "\n".join(part for key in SPOKEN for part in spoken(value.get(key)))
    if not said.strip():
        raise ValueError(f"no field 'text' and no conversation; it has: {', '.join(map(str, value)) or 'nothing'}; name the text's with --field")
    if fault := text_fault(said):
        raise ValueError(fault)
    return said


def spoken(value: Any) -> Iterator[str]:
    """The strings of a turn, a list of turns, or a history of pairs, in order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from spoken(value.get("content", value.get("value")))
    elif isinstance(value, list):
        for turn in value:
            yield from spoken(turn)


def contents(records: Iterator[Record], field: str | None, bad: BadRecords) -> Iterator[tuple[Record, str]]:
    for record in records:
        try:
            text = content(record.value, field)
        except ValueError as error:
            bad.add(record.file, record.line, str(error))
        else:
            yield record, text


def schema_of(value: Any) -> str:
    """The record's schema as its keys say; "other" where none of them fits."""
    try:
        return detect({"text": value} if isinstance(value, str) else value)
    except ValueError:
        return "other"


def stats_files(
    source: Source, field: str | None, tokenizer: Path | None, languages: bool, html: Path | None, skip: bool, overwrite: bool
) -> None:
    """Count everything and print it; with ``html`` also write the page with the charts."""
    if html is not None:
        refuse_existing(html, overwrite)
    encoder = None if tokenizer is None else Tokenizer.load(tokenizer)
    speaks = language_step() if languages else lambda text: None
    bad, stats, schemas = BadRecords(skip=skip), Stats(), Counter()
    with watched(source, bad, "counting") as records:
        for record, text in contents(records, field, bad):
            schemas[schema_of(record.value)] += 1
            stats.add(text, speaks(text), None if encoder is None else encoder.encode(text))
    if not stats.documents:
        raise ValueError(f"{source.title}: no usable record")
    counted = sorted(schemas.items(), key=lambda item: (-item[1], item[0]))
    view = data_view.view([("", "blue", stats.to_dict())], encoder)
    console().print(stats_table(view, stats, counted, bad))
    if html is not None:
        parts = {"title": "What is in the data", "lead": source.title, "p": view, "counted": counted, "bad": bad.lines(), "n_bad": bad.total}
        write_atomic(html, data_view.render("stats.html", parts))
        console().print(f"wrote {html}", markup=False, soft_wrap=True)


def stats_table(view: dict, stats: Stats, schemas: list[tuple[str, int]], bad: BadRecords) -> Table:
    table = Table("what", "value", show_header=False)
    for name, (value,) in view["sizes"]:
        table.add_row(name, value)
    for name, n in schemas:
        table.add_row(Text(f"schema {name}"), f"{n:,} records")
    for code, (n, n_bytes, _) in sorted(stats.languages.items(), key=lambda item: (-item[1][1], item[0]))[:10]:
        table.add_row(Text(f"language {data_view.NAMES.get(code, code)}"), f"{n:,} documents, {data_view.percent(n_bytes / stats.bytes)} of the bytes")
    for name in ("words", "pairs", "tokens"):
        if view[name]:
            table.add_row(f"frequent {name}", Text(", ".join(f"{row[0][0]} {row[0][1]:,}" for row in view[name][:10])))
    table.add_row("bad records", f"{bad.total:,}")
    return table


def language_step():
    """text -> language code."""
    from zero2llm.data.steps.language import LanguageConfig

    step = LanguageConfig().build()
    return lambda text: step(Document(text, "")).meta["language"]


def split_files(
    source: Source, out: Path, shares: dict[str, float], suffix: str, field: str | None, seed: int, skip: bool, overwrite: bool
) -> None:
    """A file for each of ``shares`` and one for the rest, "train": by content, so that equal texts never part."""
    if not shares or any(not 0 < s < 1 for s in shares.values()) or sum(shares.values()) >= 1 or "train" in shares:
        raise ValueError(f"shares {shares or 'none'}: give at least one between 0 and 1, together below 1; train takes the rest")
    names, bad, counts = ["train", *shares], BadRecords(skip=skip), Counter()
    paths = {name: out / f"{name}{suffix}" for name in names}
    for path in paths.values():
        format_of(path)
        refuse_existing(path, overwrite)
    with ExitStack() as stack:
        write = {name: stack.enter_context(writer(path, overwrite)) for name, path in paths.items()}
        with watched(source, bad, "splitting") as records:
            for record, text in contents(records, field, bad):
                name = split_of(text, shares, seed)
                counts[name] += 1
                write[name](record.value, f"{record.file}, line {record.line}")
    total = sum(counts.values()) or 1
    for name in names:
        console().print(f"{paths[name]}: {counts[name]:,} records ({data_view.percent(counts[name] / total)})", markup=False, soft_wrap=True)
    for name in names:
        if not counts[name]:
            err_console().print(f"note: {name} is empty: too few different texts for so small a share", style="yellow", markup=False, soft_wrap=True)


def split_of(text: str, shares: dict[str, float], seed: int) -> str:
    at = share(f"{seed}\0{text}")  # salted: the rest must not be special to another split by content
    for name, size in shares.items():
        if at < size:
            return name
        at -= size
    return "train"


def sample_files(source: Source, out: Path, n: int | None, part: float | None, seed: int, skip: bool, overwrite: bool) -> None:
    """``n`` records, every set of n equally likely, or each with chance ``part``; in the order of the files."""
    if (n is None) == (part is None):
        raise ValueError("give either --n or --share")
    if n is not None and n < 1:
        raise ValueError(f"--n {n} must be at least 1")
    if part is not None and not 0 < part < 1:
        raise ValueError(f"--share {part} must lie between 0 and 1")
    bad, seen, kept = BadRecords(skip=skip), Counter(), 0
    with writer(out, overwrite) as write, watched(source, bad, "sampling") as records:
        records = counted(records, seen)
        for record in lottery(records, part, seed) if n is None else reservoir(records, n, seed):
            write(record.value, f"{record.file}, line {record.line}")
            kept += 1
        if n is not None and kept < n:
            raise ValueError(f"--n {n}: there are only {kept:,} records")
    console().print(f"{out}: {kept:,} of {seen['records']:,} records", markup=False, soft_wrap=True)


def counted(records: Iterator[Record], seen: Counter) -> Iterator[Record]:
    for record in records:
        seen["records"] += 1
        yield record


def lottery(records: Iterator[Record], part: float, seed: int) -> Iterator[Record]:
    chance = random.Random(seed).random  # the one method whose numbers Python promises to keep
    return (record for record in records if chance() < part)


def reservoir(records: Iterator[Record], n: int, seed: int) -> list[Record]:
    """The record at place i takes a random one of n slots with chance n / i (Vitter 1985, algorithm R); then in order."""
    chance, kept = random.Random(seed).random, []
    for i, record in enumerate(records, 1):
        if i <= n:
            kept.append((i, record))
        elif (slot := int(chance() * i)) < n:
            kept[slot] = i, record
    return [record for _, record in sorted(kept, key=lambda pair: pair[0])]
