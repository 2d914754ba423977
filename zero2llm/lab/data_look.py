"""Look at records before anything is made of them: one by one, or all of them for faults."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from zero2llm.core.log import console
from zero2llm.data.schemas import describe, detect, parse
from zero2llm.data.sources import BadRecords, Record, Source, expand
from zero2llm.lab.charts import visible
from zero2llm.lab.data_files import as_json, own_file, refuse_existing
from zero2llm.lab.data_tools import reservoir, schema_of, watched

TURNS = ("messages", "conversations", "prompt", "chosen", "rejected")  # fields that may hold a list of turns
COLOURS = {"system": "magenta", "user": "cyan", "human": "cyan", "assistant": "green", "gpt": "green", "tool": "yellow"}
LISTED = 20  # faults that the terminal shows; --report writes all


def inspect_files(source: Source, n: int, chosen: bool, seed: int, line: int | None, characters: int, skip: bool) -> None:
    """Print the first ``n`` records, or ``n`` chosen at random, or the one at ``line``."""
    if n < 1 or characters < 1:
        raise ValueError(f"--n {n} and --characters {characters} must be at least 1")
    if line is not None and (several := len(expand(source.paths))) != 1:
        raise ValueError(f"--line {line}: name one file, not {several}")
    with watched(source, BadRecords(skip=skip), "reading") as records:
        if line is not None:
            found = list(islice((record for record in records if record.line == line), 1))
        else:
            found = reservoir(records, n, seed) if chosen else list(islice(records, n))
    if line is not None and not found:
        raise ValueError(f"{source.title}: no record begins on line {line}")
    for record in found:
        show_record(record, characters)


def show_record(record: Record, characters: int) -> None:
    out, value = console(), record.value
    title = Text.assemble((f"{record.file}, line {record.line}", "bold"), "  schema ", (schema_of(value), "bold blue"))
    out.print(title, soft_wrap=True)
    if not isinstance(value, dict):
        out.print(marked(as_text(value), characters), soft_wrap=True)
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("field", "type", "value"):
        table.add_column(name, overflow="fold")
    turns = {name: found for name, found in value.items() if name in TURNS and isinstance(found, list)}
    for name, found in value.items():
        shown = Text("below", style="dim") if name in turns else marked(as_text(found), characters)
        table.add_row(Text(visible(str(name))), kind(found), shown)
    out.print(table)
    for name, found in turns.items():
        out.print(Text(name, style="dim"))
        for turn in found:
            out.print(Text("  ") + turn_text(turn, characters), soft_wrap=True)
    out.print()


def as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def turn_text(turn: Any, characters: int) -> Text:
    """Role in its colour, what is said, and any other key of the turn."""
    if not isinstance(turn, dict):
        return Text(f"not a turn but a {type(turn).__name__}: ", style="bold red") + marked(as_text(turn), characters)
    role = str(turn.get("role", turn.get("from", "no role")))
    colour = COLOURS.get(role, "red")
    line = Text.assemble((visible(role), f"bold {colour}"), ": ")
    line.append_text(marked(as_text(turn.get("content", turn.get("value"))), characters, colour))
    for key in turn:
        if key not in ("role", "from", "content", "value"):
            line.append(f"\n    {visible(str(key))}: ", style="bold yellow")
            line.append_text(marked(as_text(turn[key]), characters))
    return line


def kind(value: Any) -> str:
    if isinstance(value, str):
        return f"text, {len(value):,} characters"
    if isinstance(value, list | dict):
        return f"{'list' if isinstance(value, list) else 'object'} of {len(value):,}"
    return "null" if value is None else type(value).__name__


def marked(text: str, most: int, style: str = "") -> Text:
    """``text`` with its blanks as pale signs (· ⇥ ↵), control characters escaped, cut after ``most`` characters."""
    out = Text(style=style)
    for char in text[:most]:
        sign = visible(char)
        out.append(sign, style=None if sign == char else "dim")
        if char == "\n":
            out.append("\n")
    if len(text) > most:
        out.append(f" … {len(text) - most:,} more characters", style="dim")
    return out


@dataclass
class Faults:
    """Stands where a `BadRecords` does and hands every fault on at once: a file of nothing but faults fills no memory."""

    sink: Callable[[dict], None]
    skip: bool = True
    found: list[str] = field(default_factory=list)
    total: int = 0
    noted: Counter[str] = field(default_factory=Counter)

    def add(self, file: str, line: int, reason: str) -> None:
        self._pass_on(file, line, reason)

    def reject(self, where: str, reason: str) -> None:
        self._pass_on(where, None, reason)

    def _pass_on(self, file: str, line: int | None, reason: str) -> None:
        self.total += 1
        fault = {"file": file, "line": line, "reason": reason}
        if len(self.found) < LISTED:
            self.found.append(f"{place(fault)}: {reason}")
        self.sink(fault)


def place(fault: dict) -> str:
    return fault["file"] if fault["line"] is None else f"{fault['file']}, line {fault['line']}"


def validate_files(source: Source, schema: str | None, report: Path | None, overwrite: bool) -> bool:
    """Look at every record of every file; True if all are good. A fault ends nothing, not even that of a whole file."""
    if schema is not None:
        describe(schema)  # an unknown name is refused before the first file
    if report is not None:
        refuse_existing(report, overwrite)
    counts, found = Counter(), []
    with ExitStack() as stack:
        lines = None if report is None else stack.enter_context(open(stack.enter_context(own_file(report, overwrite)), "wb"))

        def tell(fault: dict) -> None:
            if lines is not None:
                lines.write(as_json(fault) + b"\n")
            if sum(f.total for f in found) <= LISTED:
                console().print(f"{place(fault)}: {fault['reason']}", style="red", markup=False, soft_wrap=True)

        for path in map(str, expand(source.paths)):
            found.append(faults := Faults(tell))
            look_through(replace(source, paths=(path,)), schema, faults, counts)
            for what, n in faults.noted.items():
                console().print(f"{path}: {what}: {n:,}", style="yellow", markup=False, soft_wrap=True)
    total = sum(f.total for f in found)
    if total > LISTED:
        console().print(f"... and {total - LISTED:,} more" + ("" if report else "; --report FILE writes them all"), markup=False, soft_wrap=True)
    table = Table("schema", "good records")
    for name, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        table.add_row(name, f"{n:,}")
    console().print(table)
    console().print(f"{total:,} bad, {sum(counts.values()):,} good", style="red" if total else "green", markup=False, soft_wrap=True)
    return not total


def look_through(source: Source, schema: str | None, faults: Faults, counts: Counter) -> None:
    try:
        with watched(source, faults, "checking", tell=False) as records:
            for record in records:
                try:
                    counts[check(record.value, schema)] += 1
                except ValueError as error:
                    faults.add(record.file, record.line, str(error))
    except ValueError as error:  # the rest of this file cannot be read
        faults.reject(source.paths[0], str(error).removeprefix(f"{source.paths[0]}: "))


def check(value: Any, schema: str | None) -> str:
    """The schema of a good record, which is the required one if there is one. Raises ValueError saying what is wrong with it."""
    if isinstance(value, str):  # a bare string is a document
        value = {"text": value}
    found = schema or detect(value)
    parse(value, found)
    return found
