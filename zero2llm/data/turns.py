"""Messages and conversations from the shapes in the wild; roles are read, never guessed by position.

message       {"role", "content": text}, and where there is any: "reasoning_content" (text), "tool_calls" (tool_calls.py),
              "train": false where it is not to be learned (also written weight: 0 or loss: false; trained.py);
              further keys (name, tool_call_id) stay, templates may read them
conversation  a list of messages, with the tools that the assistant may call

Why: whatever is not understood is refused with a reason. A key that is skipped because nobody reads it trains a model
on something else than its owner thinks.
"""

from __future__ import annotations

import json
from typing import Any

from zero2llm.data.sources import text_fault
from zero2llm.data.tool_calls import as_calls, as_tools, same_tools

Message = dict[str, Any]
ROLE_NAMES = {
    "human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant",
    "developer": "system", "function": "tool", "observation": "tool", "tool_response": "tool",
    "function_call": "assistant", "tool_call": "assistant",
}  # fmt: skip
ANSWERING = ("assistant", *(name for name, role in ROLE_NAMES.items() if role == "assistant"))
ROLES = ("system", "user", "assistant", "tool")
THOUGHT = ("reasoning_content", "reasoning", "thinking")
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
WEIGHTS = ("weight", "train", "loss")  # OpenAI and others: 0 leaves a message out of the loss
LEFT_OUT = "train"  # ours: false
READ = {"role", "from", "content", "value", "tools", "tool_calls", "function_call", *THOUGHT, *WEIGHTS}


class Conversation(list):
    """Messages with their tools, and where they were read: a fault that shows only later can still name its line."""

    where = ""
    tools: list[dict] | None = None


def conversation(messages: list[Message], tools: list[dict] | None = None, where: str = "") -> Conversation:
    made = Conversation(messages)
    made.tools, made.where = tools, where
    return made


def as_messages(value: object) -> Conversation:
    """A list of ``role``/``content`` or ``from``/``value`` turns. Raises ValueError saying which turn is wrong."""
    if not isinstance(value, list) or not value:
        raise ValueError("a non-empty list of messages was expected")
    tools = same_tools(*(as_tools(m.get("tools"), f"message {i}") for i, m in enumerate(value) if isinstance(m, dict)))
    return conversation([_message(i, turn) for i, turn in enumerate(value)], tools)


def _message(i: int, turn: object) -> Message:
    if not isinstance(turn, dict):
        raise ValueError(f"message {i} is a {type(turn).__name__}, not an object")
    named = turn.get("role", turn.get("from"))
    role = ROLE_NAMES.get(named, named) if isinstance(named, str) else named
    if role not in ROLES or turn.get("from", named) != named:
        raise ValueError(f"message {i}: role {named!r} is not known; {', '.join((*ROLES, *ROLE_NAMES))} are")
    where = f"message {i} ({role})"
    _refuse(turn, where)
    content, calls = turn.get("content", turn.get("value")), turn.get("tool_calls") or turn.get("function_call")
    if named in ("function_call", "tool_call"):
        content, calls = None, content
    calls = as_calls(calls, where)
    thought = _thought(turn, where)
    if (calls or thought) and role != "assistant":
        raise ValueError(
            f"{where}: only an assistant calls tools and thinks; here stands {'tool_calls' if calls else thought[:40]!r}"
        )
    content = "" if content is None and calls else _text(content, role, where)
    if content.strip() or (role == "assistant" and not calls):  # an empty system turn is common and harmless
        if fault := text_fault(content):
            raise ValueError(f"{where}: content {fault}")
    made = {"role": role, "content": content}
    made |= {"reasoning_content": thought} if thought else {}
    made |= {"tool_calls": calls} if calls else {}
    made |= {LEFT_OUT: False} if _left_out(turn, where) else {}
    return made | {k: v for k, v in turn.items() if k not in READ and v not in (None, "", [], {})}


def _refuse(turn: dict, where: str) -> None:
    """What a message may say beside its text that cannot be kept."""
    for key in MEDIA:
        if turn.get(key):
            raise ValueError(
                f"{where}: {key!r} would be dropped unseen; images stand beside the conversation (schema image-text)"
            )


def _left_out(turn: dict, where: str) -> bool:
    said = {key: turn[key] for key in WEIGHTS if turn.get(key) is not None}
    for key, value in said.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise ValueError(f"{where}: {key} {value!r} cannot be honoured: an answer is trained (1, true) or not (0, false)")
    if len({bool(value) for value in said.values()}) > 1:
        raise ValueError(f"{where}: {' and '.join(said)} contradict each other; keep one")
    return 0 in said.values()


def _thought(turn: dict, where: str) -> str:
    found = [_text(turn[key], "assistant", f"{where}: {key}") for key in THOUGHT if turn.get(key)]
    if any(text != found[0] for text in found):
        raise ValueError(f"{where}: {' and '.join(k for k in THOUGHT if turn.get(k))} differ; keep one")
    if found and (fault := text_fault(found[0])) and found[0].strip():
        raise ValueError(f"{where}: reasoning_content {fault}")
    return found[0] if found and found[0].strip() else ""


def _text(value: Any, role: str, where: str) -> str:
    """Content as text: a string, a list of text parts, or (from a tool) any JSON value."""
    if isinstance(value, str):
        return value
    parts = [value] if isinstance(value, dict) else value
    if isinstance(parts, list) and parts and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in parts):
        bare = "" if role == "tool" else "text"  # a tool may well return {"text": ...}
        if all(p.get("type", bare) == "text" and set(p) <= {"type", "text"} for p in parts):
            return "".join(p["text"] for p in parts)
    if role == "tool" and value is not None:
        return json.dumps(value, ensure_ascii=False)
    raise ValueError(
        f"{where}: content is {json.dumps(value, ensure_ascii=False, default=str)[:60] if value else value!r}, not text"
    )


def turns_of(value: object, role: str, key: str) -> Conversation:
    """A string as one message of ``role``, or a message, or a list of messages."""
    if isinstance(value, list | dict):
        return as_messages(value if isinstance(value, list) else [value])
    if fault := text_fault(value):
        raise ValueError(f"field {key!r} {fault}")
    return conversation([{"role": role, "content": value}])


def question_of(record: dict, key: str) -> Conversation:
    """What is asked in a record of single turns: system, history, and ``key`` with its ``input``."""
    turns = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    for pair in record.get("history") or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"history holds {pair!r}; [question, answer] was expected")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    question, more = record[key], record.get("input")
    if more and not (isinstance(question, str) and isinstance(more, str)):
        raise ValueError(f"field 'input' is {more!r} beside {key!r}; two texts were expected")
    asked = turns_of("\n".join(part for part in (question, more) if part) if more else question, "user", key)
    before = as_messages(turns) if turns else []
    return conversation([*before, *asked], same_tools(asked.tools, as_tools(record.get("tools"), "the record")))


def spoken(record: dict) -> Conversation | None:
    """The record's list of messages, with the system message and tools that stand beside it; None if it has no list."""
    keys = [key for key in ("messages", "conversations") if record.get(key) is not None]
    if not keys:
        return None
    if len(keys) == 2:
        raise ValueError("it has messages and conversations; remove one")
    messages = as_messages(record[keys[0]])
    tools = same_tools(messages.tools, as_tools(record.get("tools"), "the record"))
    system = record.get("system")
    if isinstance(system, str) and system.strip() and messages[0] != {"role": "system", "content": system}:
        if messages[0]["role"] == "system":
            raise ValueError("the record has a system text beside the one in its messages; keep one")
        messages.insert(0, {"role": "system", "content": system})
    return conversation(messages, tools)
