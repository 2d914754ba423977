"""Every shape of a record that is known: told apart by its keys or named, never guessed.

A record fits a schema if it has all keys of one of its alternatives and none of those that mean something else. One that
fits two, or none, is an error that lists its keys and the schemas. A stage that is told what it reads (SFT: conversations)
does not ask.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zero2llm.data.pictures import Pictured, as_pictured, image_path
from zero2llm.data.shapes import (
    Judged,
    Preference,
    Prompt,
    SameAnswers,
    as_agent,
    as_conversation,
    as_judged,
    as_judged_sides,
    as_object,
    as_preference,
    as_single_prompt,
    as_single_turn,
    as_spoken,
    as_spoken_prompt,
    has,
)
from zero2llm.data.sources import BadRecords, Record, read_records, text_fault
from zero2llm.data.turns import Conversation, Message, as_messages

__all__ = [
    "SCHEMAS", "Conversation", "Judged", "Message", "Pictured", "Preference", "Prompt", "as_conversation", "as_messages",
    "as_preference", "conversations", "describe", "detect", "image_texts", "judged", "parse", "parse_all",
    "preferences", "prompts",
]  # fmt: skip


def as_text(value: object) -> str:
    record = as_object(value)
    if fault := text_fault(record.get("text")):
        raise ValueError(f"field 'text' {fault}; {has(record)}")
    return record["text"]


@dataclass(frozen=True)
class Schema:
    """``keys``: alternatives, each a group of keys that must all be there.  ``without``: keys that make it another one."""

    keys: tuple[tuple[str, ...], ...]
    without: tuple[str, ...]
    parse: Callable[[object], Any]
    about: str

    def fits(self, record: dict) -> bool:
        there = {key for key, value in record.items() if value not in (None, [])}
        return any(there.issuperset(group) for group in self.keys) and not there.intersection(self.without)

    def wanted(self) -> str:
        return " or ".join("+".join(group) for group in self.keys)


_LISTS = (("messages",), ("conversations",))
_PICTURES = ("image", "images")
SCHEMAS = {
    "text": Schema((("text",),), (), as_text, "pretraining: a document"),
    "conversation": Schema(_LISTS, ("gt", *_PICTURES), as_spoken, "SFT, distillation, RL prompts: turns with roles, tools, thoughts"),
    "single-turn": Schema(
        (("instruction", "output"), ("prompt", "response"), ("prompt", "completion")), ("label",), as_single_turn,
        "SFT: one question and its answer",
    ),
    "preference": Schema((("chosen", "rejected"),), (), as_preference, "DPO and relatives: a better and a worse answer"),
    "unpaired": Schema((("prompt", "completion", "label"),), (), as_judged, "KTO: an answer that is good (true) or not"),
    "prompt": Schema(
        (("prompt",),), ("response", "completion", "chosen", "rejected", "messages", "conversations"),
        as_single_prompt,
        "RL: a question, perhaps with the answer that a reward compares with",
    ),
    "agent": Schema(
        tuple((key, "gt") for (key,) in _LISTS), _PICTURES, as_agent, "RL with tools: gt must appear in the final answer"
    ),
    "image-text": Schema(
        tuple((key, picture) for (key,) in _LISTS for picture in _PICTURES), ("gt",), as_pictured,
        "vision: pictures, and a conversation with <image> in it",
    ),
}  # fmt: skip


def describe(name: str) -> str:
    """One line: keys and purpose. Raises ValueError naming the schemas that exist."""
    schema = _schema(name)
    return f"{schema.wanted()} ({schema.about})"


def _schema(name: str) -> Schema:
    if name not in SCHEMAS:
        raise ValueError(f"there is no schema {name!r}; there are: {', '.join(SCHEMAS)}")
    return SCHEMAS[name]


def detect(record: object, among: Sequence[str] = tuple(SCHEMAS)) -> str:
    """The schema that a record fits. Raises ValueError if it is none or more than one of ``among``."""
    value = as_object(record)
    fitting = [name for name in among if SCHEMAS[name].fits(value)]
    if len(fitting) == 1:
        return fitting[0]
    known = "; ".join(f"{name}: {SCHEMAS[name].wanted()}" for name in among)
    if not fitting:
        raise ValueError(f"it fits no schema; {has(value)}; known are {known}")
    raise ValueError(f"it fits {' and '.join(fitting)}; name one of them (schema); {has(value)}; known are {known}")


def parse(record: object, schema: str | None = None, among: Sequence[str] = tuple(SCHEMAS)) -> Any:
    """What the record is under its schema, named or detected. Raises ValueError saying what is wrong with it."""
    return _schema(schema or detect(record, among)).parse(record)


def parse_all(paths: Sequence[str], bad: BadRecords, schema: str | None = None) -> Iterator[tuple[str, str, Any]]:
    """(where, schema, value) of every record of every kind: what ``data validate`` and ``data inspect`` walk through."""
    for record in read_records(paths, bad):
        try:
            name = schema or detect(record.value)
            value = _schema(name).parse(record.value)
        except ValueError as error:
            bad.add(record.file, record.line, str(error))
        else:
            yield f"{record.file}, line {record.line}", name, value


def conversations(paths: Sequence[str], bad: BadRecords, schema: str | None = None) -> Iterator[Conversation]:
    """One conversation a record. Bad: no conversation in it, or nothing that the assistant says."""
    named = {None: as_conversation, "conversation": as_spoken, "agent": as_spoken, "single-turn": as_single_turn}
    for where, messages in _parsed(paths, bad, _one_of(named, schema)):
        messages.where = where
        yield messages


def preferences(paths: Sequence[str], bad: BadRecords) -> Iterator[Preference]:
    """One pair a record. Bad: no prompt. Two answers that are the same are left out, and listed in ``bad``."""
    for where, pair in _parsed(paths, bad, as_preference):
        yield replace(pair, where=where)


def judged(paths: Sequence[str], bad: BadRecords) -> Iterator[Judged]:
    """One judged answer a record (KTO), or two of a pair; ``bad.noted`` counts the pairs."""
    for where, answers in _parsed(paths, bad, as_judged_sides):
        if len(answers) == 2:
            bad.noted["pairs read as two judged answers each"] += 1
        for answer in answers:
            yield replace(answer, where=where)


def prompts(paths: Sequence[str], bad: BadRecords, schema: str | None = None) -> Iterator[Prompt]:
    """One prompt a record, or a line of a .txt file, where a line that begins with # is a comment."""
    named = {None: _any_prompt, "conversation": as_spoken_prompt, "prompt": as_single_prompt, "agent": as_agent}
    for where, prompt in _parsed(paths, bad, _one_of(named, schema), lines=True):
        yield replace(prompt, where=where)


def image_texts(paths: Sequence[str], folder: str | Path, bad: BadRecords) -> Iterator[Pictured]:
    """Conversations about pictures in ``folder``. Bad: a picture that is missing or lies elsewhere."""

    def pictured(value: object) -> Pictured:
        found = as_pictured(value)
        for name in found.images:
            image_path(folder, name)
        return found

    for where, found in _parsed(paths, bad, pictured):
        yield replace(found, where=where)


def _any_prompt(value: object) -> Prompt:
    kind = detect(value, ("prompt", "agent", "conversation"))
    return as_spoken_prompt(value) if kind == "conversation" else SCHEMAS[kind].parse(value)


def _one_of(named: dict[str | None, Callable[[object], Any]], schema: str | None) -> Callable[[object], Any]:
    if schema not in named:
        raise ValueError(f"schema {schema!r} does not serve here; these do: {', '.join(n for n in named if n)}")
    return named[schema]


def _parsed(
    paths: Sequence[str], bad: BadRecords, parse: Callable[[object], Any], lines: bool = False
) -> Iterator[tuple[str, Any]]:
    for whole in read_records(paths, bad):
        for record in _lines(whole) if lines else [whole]:
            try:
                value = parse(record.value)
            except SameAnswers as error:
                bad.leave_out(f"{record.file}, line {record.line}", str(error))
            except ValueError as error:
                bad.add(record.file, record.line, str(error))
            else:
                yield f"{record.file}, line {record.line}", value


def _lines(record: Record) -> Iterator[Record]:
    """A .txt file arrives as one document: each of its lines is a prompt."""
    if not re.search(r"\.txt(\.(gz|xz|zst|bz2))?$", record.file) or set(record.value) != {"text"}:
        yield record
        return
    for number, line in enumerate(record.value["text"].splitlines(), record.line):
        if line.strip() and not line.lstrip().startswith("#"):
            yield Record({"prompt": line.strip()}, record.file, number)
