"""Conversations and preferences from the record shapes in the wild; roles are read, never guessed by position."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from zero2llm.data.sources import BadRecords, read_records, text_fault

Message = dict[str, str]
ROLE_NAMES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}  # ShareGPT and relatives
ROLES = ("system", "user", "assistant")


class Conversation(list):
    """Messages, and where they were read: a fault that shows only later can still name its line."""

    where = ""


@dataclass(frozen=True)
class Preference:
    """The shared turns, and two assistant turns that could follow."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    where: str = field(default="", compare=False)


def as_messages(value: object) -> list[Message]:
    """A list of ``role``/``content`` or ``from``/``value`` turns. Raises ValueError saying which turn is wrong."""
    if not isinstance(value, list) or not value:
        raise ValueError("a non-empty list of messages was expected")
    return [_message(i, turn) for i, turn in enumerate(value)]


def _message(i: int, turn: object) -> Message:
    if not isinstance(turn, dict):
        raise ValueError(f"message {i} is a {type(turn).__name__}, not an object")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    role = ROLE_NAMES.get(role, role)
    if role not in ROLES:
        raise ValueError(f"message {i}: role {role!r} is not supported; {', '.join(ROLES)} are (tools: not yet)")
    extra = [k for k in ("tool_calls", "tools", "reasoning_content") if turn.get(k)]
    if extra:
        raise ValueError(f"message {i}: {extra[0]!r} is not supported yet; it would be dropped unseen")
    if not isinstance(content, str):
        raise ValueError(f"message {i} ({role}): content is {content!r}, not text")
    if content.strip() or role == "assistant":  # an empty system turn is common and harmless
        if fault := text_fault(content):
            raise ValueError(f"message {i} ({role}): content {fault}")
    return {"role": role, "content": content}


def as_conversation(value: object) -> list[Message]:
    """One record as messages that end with an assistant turn: what follows the last one has nothing to teach.

    Raises ValueError with the keys that the record has.
    """
    if not isinstance(value, dict):
        raise ValueError(f"an object was expected, this is a {type(value).__name__}")
    key = next((k for k in ("messages", "conversations") if k in value), None)
    messages = as_messages(value[key]) if key else _single_turn(value)
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        raise ValueError("no assistant message to learn from")
    return messages


def _single_turn(value: dict) -> list[Message]:
    for asked, answer in (("instruction", "output"), ("prompt", "response"), ("prompt", "completion")):
        if asked in value and answer in value:
            break
    else:
        raise ValueError(
            "no conversation in it: messages, conversations, instruction+output, prompt+response or prompt+completion "
            f"are known; it has: {', '.join(map(str, value)) or 'nothing'}"
        )
    if value.get("label") is False:
        raise ValueError("label is false: this completion is an example of what not to say")
    turns = [("system", value["system"])] if value.get("system") else []
    for pair in value.get("history") or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"history holds {pair!r}; [question, answer] was expected")
        turns += [("user", pair[0]), ("assistant", pair[1])]
    before = as_messages([{"role": role, "content": content} for role, content in turns]) if turns else []
    question = value[asked]
    if isinstance(question, str) and value.get("input"):
        question = "\n".join(part for part in (question, str(value["input"])) if part)
    return before + _turns(question, "user", asked) + _turns(value[answer], "assistant", answer)


def _turns(value: object, role: str, key: str) -> list[Message]:
    """A string as one message of ``role``, or a list of messages."""
    if isinstance(value, list):
        return as_messages(value)
    if fault := text_fault(value):
        raise ValueError(f"field {key!r} {fault}")
    return [{"role": role, "content": value}]


def as_preference(value: object) -> Preference:
    """One record with ``chosen`` and ``rejected``; a prompt that stands both apart and inside is not doubled."""
    if not isinstance(value, dict) or not {"chosen", "rejected"} <= set(value):
        has = ", ".join(map(str, value)) if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"chosen and rejected are needed; it has: {has}")
    prompt = _turns(value["prompt"], "user", "prompt") if value.get("prompt") else []
    whole = [_turns(value[key], "assistant", key) for key in ("chosen", "rejected")]
    chosen, rejected = (turns[len(prompt) :] if _same(turns[: len(prompt)], prompt) else turns for turns in whole)
    apart = chosen is whole[0] or rejected is whole[1]
    shared = 0
    while shared < min(len(chosen), len(rejected)) and _same(
        chosen[shared : shared + 1], rejected[shared : shared + 1]
    ):
        shared += 1
    inside, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if (
        prompt and apart and _same(inside[-len(prompt) :], prompt)
    ):  # the lists hold more than it: a system turn, history
        prompt = []
    if not chosen and not rejected:
        raise ValueError("chosen and rejected are the same; such a pair teaches nothing")
    if not chosen or not rejected:
        raise ValueError("one of chosen and rejected is the other's beginning; there is nothing to compare")
    if not prompt + inside:
        raise ValueError("no prompt: neither a field 'prompt' nor turns that chosen and rejected share")
    if any(turns[0]["role"] != "assistant" for turns in (chosen, rejected)):
        raise ValueError("chosen and rejected must part at an assistant message; here the prompts differ")
    return Preference(prompt + inside, chosen, rejected)


def _same(a: list[Message], b: list[Message]) -> bool:
    strip = lambda turns: [(m["role"], m["content"].strip()) for m in turns]
    return strip(a) == strip(b)


def conversations(paths: Sequence[str], bad: BadRecords) -> Iterator[Conversation]:
    """One conversation a record. Bad: no conversation in it, or nothing that the assistant says."""
    for where, messages in _parsed(paths, bad, as_conversation):
        conversation = Conversation(messages)
        conversation.where = where
        yield conversation


def preferences(paths: Sequence[str], bad: BadRecords) -> Iterator[Preference]:
    """One pair a record. Bad: no prompt, or no difference between the two answers."""
    for where, pair in _parsed(paths, bad, as_preference):
        yield replace(pair, where=where)


def _parsed(paths: Sequence[str], bad: BadRecords, parse: Callable[[object], Any]) -> Iterator[tuple[str, Any]]:
    for record in read_records(paths, bad):
        try:
            value = parse(record.value)
        except ValueError as error:
            bad.add(record.file, record.line, str(error))
        else:
            yield f"{record.file}, line {record.line}", value
