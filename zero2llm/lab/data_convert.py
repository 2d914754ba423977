"""Records from one file format and one schema to another. What the target cannot hold is named, never dropped unasked.

    chats        messages, conversations, sharegpt, alpaca, prompt-response, prompt-completion: any of them into any other
    preferences  any record with chosen and rejected, into prompt + chosen + rejected as lists of turns
    text         any record with a text field, which then is called "text"

Fields that a schema does not speak of go along unchanged, as do keys of a turn such as tool_calls and reasoning_content;
tools stand beside the turns, in the record.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zero2llm.core.log import console
from zero2llm.data.shapes import as_preference, as_single_turn
from zero2llm.data.sources import BadRecords, Source, text_fault
from zero2llm.data.turns import Conversation, conversation, spoken
from zero2llm.lab.data_files import format_of, refuse_existing, writer
from zero2llm.lab.data_tools import watched

PAIRS = {"alpaca": ("instruction", "output"), "prompt-response": ("prompt", "response"), "prompt-completion": ("prompt", "completion")}
LISTS = {"messages": "messages", "conversations": "conversations", "sharegpt": "conversations"}  # schema -> field
SCHEMAS = ("text", *LISTS, *PAIRS, "preference")
SHAREGPT = {"user": "human", "assistant": "gpt", "tool": "observation"}
BESIDE = {"system", "history", "tools"}  # of a record: part of what is said


@dataclass
class Chat:
    """Messages with their tools, and the fields of the record that are no part of them."""

    turns: Conversation
    rest: dict[str, Any]


@dataclass
class Lost:
    """Fields that would not be in the result: how many records have them, and where the first is."""

    allowed: frozenset[str]
    count: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)

    def note(self, name: str, where: str) -> None:
        if name in self.allowed:
            self.dropped[name] += 1
        else:
            self.count[name] += 1
            self.first.setdefault(name, where)

    def without(self, record: dict, where: str) -> dict:
        """The record without the fields that may go."""
        for name in self.allowed.intersection(record) - {"role", "content"}:
            self.note(name, where)
        return {key: item for key, item in record.items() if key not in self.allowed or key in ("role", "content")}

    def check(self) -> None:
        """Raises ValueError with all that would be lost, or with names to drop that no record has."""
        if self.count:
            lines = [f"{name} ({n:,} records, first: {self.first[name]})" for name, n in sorted(self.count.items())]
            raise ValueError(
                f"the result would lose: {'; '.join(lines)}. Choose another target, or accept it with --drop-fields {','.join(sorted(self.count))}"
            )
        if unknown := sorted(self.allowed - set(self.dropped)):
            raise ValueError(f"--drop-fields {', '.join(unknown)}: no record has it")


def read_chat(value: Any) -> Chat:
    """Raises ValueError for a record that is no conversation, may be read in two ways, or has a turn that is none."""
    if not isinstance(value, dict):
        raise ValueError(f"an object was expected, this is a {type(value).__name__}")
    lists = [key for key in ("messages", "conversations") if value.get(key) is not None]
    pairs = [pair for pair in PAIRS.values() if set(pair) <= set(value)]
    if len(lists) + len(pairs) != 1:
        found = f"{len(lists) + len(pairs)} conversations" if lists or pairs else "no conversation"
        raise ValueError(f"{found} in it; it has: {', '.join(map(str, value)) or 'nothing'}")
    if lists:
        turns, used = spoken(value), {*lists, "tools"} | ({"system"} if isinstance(value.get("system"), str) else set())
    else:
        turns, used = as_single_turn(value), {*pairs[0], "input"} | BESIDE
    return Chat(turns, {key: item for key, item in value.items() if key not in used})


def write_list(chat: Chat, schema: str) -> dict:
    key, turns = LISTS[schema], chat.turns
    if schema == "sharegpt":
        rename = {"role": "from", "content": "value"}
        turns = [{rename.get(k, k): SHAREGPT.get(v, v) if k == "role" else v for k, v in turn.items()} for turn in turns]
    return joined({key: list(turns)}, chat)


def write_pair(chat: Chat, schema: str, lost: Lost, where: str) -> dict:
    """One question and its answer; earlier ones as alpaca's ``history``. Raises ValueError for turns that do not fit."""
    turns = list(chat.turns)
    system = turns.pop(0)["content"] if turns and turns[0]["role"] == "system" else None
    if [turn["role"] for turn in turns] != ["user", "assistant"] * (len(turns) // 2) or not turns:
        raise ValueError(f"its turns ({', '.join(t['role'] for t in turns) or 'none'}) do not alternate; {schema} cannot hold them: use messages")
    if len(turns) > 2 and schema != "alpaca":
        raise ValueError(f"{len(turns)} turns; {schema} holds one question and its answer: use messages or alpaca")
    for name in dict.fromkeys(key for turn in chat.turns for key in turn if key not in ("role", "content")):
        lost.note(name, where)
    said = [turn["content"] for turn in turns]
    asked, answer = PAIRS[schema]
    new = {asked: said[-2]} | ({"input": ""} if schema == "alpaca" else {}) | {answer: said[-1]}
    new |= {"system": system} if system else {}
    new |= {"history": [list(pair) for pair in zip(said[:-2:2], said[1:-2:2], strict=True)]} if len(said) > 2 else {}
    return joined(new, chat)


def joined(new: dict, chat: Chat) -> dict:
    """The new fields, tools beside them, then all that was in the record besides."""
    if chat.turns.tools:
        new["tools"] = chat.turns.tools
    if clash := sorted(set(new) & set(chat.rest)):
        raise ValueError(f"field {clash[0]!r} stands in the record already; pass --drop-fields {clash[0]} to replace it")
    return new | chat.rest


def write_preference(value: Any) -> dict:
    """Prompt, chosen and rejected apart, each a list of turns. Raises ValueError for a pair that teaches nothing."""
    pair = as_preference(value)
    new = {"prompt": list(pair.prompt), "chosen": list(pair.chosen), "rejected": list(pair.rejected)}
    used = {*new, "instruction", "input"} | BESIDE | ({"messages", "conversations"} if isinstance(value["chosen"], dict) else set())
    return joined(new, Chat(conversation([], pair.tools), {key: item for key, item in value.items() if key not in used}))


def write_text(value: Any, name: str) -> dict:
    if isinstance(value, str):
        return {"text": value}
    if not isinstance(value, dict) or name not in value:
        has = ", ".join(map(str, value)) if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"no field {name!r}; it has: {has or 'nothing'}; a chat becomes text by a chat template, in training")
    if fault := text_fault(value[name]):
        raise ValueError(f"field {name!r} {fault}")
    return joined({"text": value[name]}, Chat(conversation([]), {k: v for k, v in value.items() if k != name}))


def converted(value: Any, schema: str | None, name: str, lost: Lost, where: str) -> Any:
    """The record in its new shape. Fields, and keys of turns, that --drop-fields names go first."""
    if isinstance(value, dict):
        value = lost.without(value, where)
    if schema is None:
        return value
    if schema == "text":
        return write_text(value, name)
    if schema == "preference":
        return write_preference(value)
    chat = read_chat(value)
    chat.turns[:] = [lost.without(turn, where) for turn in chat.turns]
    return write_list(chat, schema) if schema in LISTS else write_pair(chat, schema, lost, where)


def convert_files(
    source: Source, out: Path, schema: str | None, drop: frozenset[str], name: str, between: str, skip: bool, overwrite: bool
) -> None:
    """All records into the one file ``out``. Raises ValueError, before anything is replaced, for what it cannot hold."""
    kind, _ = format_of(out)
    refuse_existing(out, overwrite)
    if schema is not None and schema not in SCHEMAS:
        raise ValueError(f"--to-schema {schema}: unknown; there are: {', '.join(SCHEMAS)}")
    bad, lost, n = BadRecords(skip=skip), Lost(drop), 0
    with writer(out, overwrite, between) as write:
        with watched(source, bad, "converting") as records:
            for record in records:
                where = f"{record.file}, line {record.line}"
                try:
                    value = converted(record.value, schema, name, lost, where)
                except ValueError as error:
                    bad.add(record.file, record.line, str(error))
                    continue
                if kind == ".txt":
                    value = only_text(value, name, lost, where)
                if not lost.count:  # what will be refused need not be written
                    write(value, where)
                n += 1
        lost.check()
        if not n:
            raise ValueError(f"{source.title}: no usable record")
    gone = "".join(f"; {count:,} x {key!r} left out" for key, count in sorted(lost.dropped.items()))
    console().print(f"{out}: {n:,} records{gone}", markup=False, soft_wrap=True)


def only_text(value: Any, name: str, lost: Lost, where: str) -> Any:
    """A .txt file holds one field; all others are lost."""
    if not isinstance(value, dict) or name not in value:
        return value
    for key in value:
        if key != name:
            lost.note(key, where)
    return {"text": value[name]}
