"""Conversations and preferences from the record shapes in the wild; roles are read, never guessed by position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from zero2llm.data.sources import BadRecords, read_records

Message = dict[str, str]
ROLE_NAMES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}  # ShareGPT and relatives
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Preference:
    """The shared turns, and two assistant turns that could follow."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]


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
    return {"role": role, "content": content}


def as_conversation(value: object) -> list[Message]:
    """One record as messages with an assistant turn. Raises ValueError with the keys that it has."""
    if not isinstance(value, dict):
        raise ValueError(f"an object was expected, this is a {type(value).__name__}")
    for key in ("messages", "conversations"):
        if key in value:
            messages = as_messages(value[key])
            break
    else:
        messages = _single_turn(value)
    if not any(m["role"] == "assistant" and m["content"] for m in messages):
        raise ValueError("no assistant message to learn from")
    return messages


def _single_turn(value: dict) -> list[Message]:
    for asked, answer in (("instruction", "output"), ("prompt", "response"), ("prompt", "completion")):
        if asked in value and answer in value:
            question = "\n".join(str(value[k]) for k in (asked, "input") if value.get(k))
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": str(value[answer])}]
            return ([{"role": "system", "content": str(value["system"])}] if value.get("system") else []) + turns
    raise ValueError(
        "no conversation in it: messages, conversations, instruction+output, prompt+response or prompt+completion "
        f"are known; it has: {', '.join(map(str, value)) or 'nothing'}"
    )


def as_preference(value: object) -> Preference:
    """One record with ``chosen`` and ``rejected``; a prompt that stands both apart and inside is not doubled."""
    if not isinstance(value, dict) or not {"chosen", "rejected"} <= set(value):
        has = ", ".join(map(str, value)) if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"chosen and rejected are needed; it has: {has}")
    asked = value.get("prompt")
    prompt = [{"role": "user", "content": asked}] if isinstance(asked, str) else as_messages(asked) if asked else []
    answers = []
    for key in ("chosen", "rejected"):
        text = value[key]
        answers.append([{"role": "assistant", "content": text}] if isinstance(text, str) else as_messages(text))
    shared = 0
    while shared < min(map(len, answers)) and answers[0][shared] == answers[1][shared]:
        shared += 1
    inside = answers[0][:shared]
    prompt = prompt if inside[: len(prompt)] != prompt else []
    chosen, rejected = (answer[shared:] for answer in answers)
    if not chosen or not rejected:
        raise ValueError("chosen and rejected are the same; such a pair teaches nothing")
    if not prompt + inside:
        raise ValueError("no prompt: neither a field 'prompt' nor turns that chosen and rejected share")
    if any(turns[0]["role"] != "assistant" or not turns[0]["content"] for turns in (chosen, rejected)):
        raise ValueError("chosen and rejected must differ in an assistant message that is not empty")
    return Preference(prompt + inside, chosen, rejected)


def conversations(paths: Sequence[str], bad: BadRecords) -> Iterator[list[Message]]:
    yield from _parsed(paths, bad, as_conversation)


def preferences(paths: Sequence[str], bad: BadRecords) -> Iterator[Preference]:
    yield from _parsed(paths, bad, as_preference)


def _parsed(paths, bad, parse):
    for record in read_records(paths, bad):
        try:
            value = parse(record.value)
        except ValueError as error:
            bad.add(record.file, record.line, str(error))
            continue
        yield value
