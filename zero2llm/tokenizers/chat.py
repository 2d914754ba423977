"""Conversations as text: one Jinja template, and the loss mask that comes with the text.

trained = what the assistant generates: from behind the template's generation prompt up to and including the end of turn

A template marks it with {% generation %} ... {% endgeneration %} (the convention of transformers); rendering leaves a
private character at each border. For a template without marks, answers.py finds the borders by rendering the
conversation's beginnings. Control strings that a user typed stay ordinary text (breaks.py).

Source: Hugging Face transformers 5, "Chat templates", whose rendered text this equals for the same template.
Why: searching tokens for "assistant" and an end marker, as many projects do, is one token off sooner or later and is
fooled by whoever types the marker.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from zero2llm.tokenizers.answers import Render, lost, marked_turns
from zero2llm.tokenizers.breaks import broken, broken_message
from zero2llm.tokenizers.sandbox import BEGIN, BREAK, END, FAULTS, compiled

Message = dict[str, Any]  # role, content; also reasoning_content, tool_calls, and what else a template may read
ROLES = ("system", "user", "assistant", "tool")
THOUGHT = ("reasoning_content", "thinking", "reasoning")  # names that templates know for it; the first is ours
THINKING = re.compile(r"(?:<think>|^)(?:(?!<think>).)*?</think>\n*", re.DOTALL)


@dataclass(frozen=True)
class Style:
    """How a conversation is rendered, beside the messages themselves.

    names : what the template may read beside messages and tools: bos_token, eos_token, enable_thinking, keep_thinking.
    train_thinking : whether <think> ... </think> and the line breaks behind it are part of the loss.
    """

    names: Mapping[str, Any] = field(default_factory=dict)
    train_thinking: bool = True


def chatml() -> str:
    """The default template."""
    return (resources.files("zero2llm") / "tokenizers" / "chatml.jinja").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Span:
    """A stretch of rendered text: a control string or ordinary text, trained or not as a whole."""

    text: str
    special: bool
    trained: bool


def check(messages: Sequence[Message]) -> None:
    """Raises ValueError naming the first message that is not one."""
    if not messages:
        raise ValueError("a conversation needs at least one message")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            role = message.get("role") if isinstance(message, dict) else message
            raise ValueError(f"message {i}: role {role!r} is not one of {', '.join(ROLES)}")
        who, calls = f"message {i} ({message['role']})", message.get("tool_calls") or []
        if not isinstance(message.get("content"), str) and not (calls and message.get("content") is None):
            raise ValueError(f"{who}: content must be a string, not {message.get('content')!r}")
        if not isinstance(calls, list) or not all(map(_is_call, calls)):
            raise ValueError(f"{who}: tool_calls must be a list of objects with a name and arguments, not {calls!r}")
        if reserved(message):
            raise ValueError(f"{who}: holds a character reserved for rendering (U+10FFF0..2)")


def _is_call(value: Any) -> bool:
    inner = value.get("function", value) if isinstance(value, dict) else None
    return isinstance(inner, dict) and isinstance(inner.get("name"), str)


def reserved(value: Any) -> bool:
    """Whether a JSON value holds one of the private characters anywhere. Raises ValueError if it is no JSON value."""
    if isinstance(value, str):
        return any(mark in value for mark in (BEGIN, END, BREAK))
    if isinstance(value, dict):
        return any(reserved(k) or reserved(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return any(map(reserved, value))
    if value is None or isinstance(value, bool | int | float):
        return False
    raise ValueError(f"a message may hold text, numbers, lists and objects, not {type(value).__name__}")


def _prepared(
    template: str, messages: Sequence[Message], tools: list[dict] | None
) -> tuple[list[Message], list | None]:
    """Messages in the form that templates expect, and the tools, which may also ride on a message.

    Raises ValueError for something that this template would leave out unseen.
    """
    check(messages)
    riding = [m["tools"] for m in messages if m.get("tools")]
    tools = tools or (riding[0] if riding else None)
    if any(other != tools for other in riding) or not all(isinstance(t, dict) for t in tools or ()):
        raise ValueError("tools must be one list of objects for the whole conversation")
    if reserved(tools):
        raise ValueError("tools: hold a character reserved for rendering (U+10FFF0..2)")
    ready = []
    for i, message in enumerate(messages):
        message = {k: v for k, v in message.items() if v is not None and k != "tools"}
        thought = next((message[k] for k in THOUGHT if k in message), None)
        if thought is not None:
            message = {"thinking": thought, **message, "reasoning_content": thought}
            if thought and not any(k in template for k in THOUGHT):
                raise ValueError(f"message {i}: this chat template has no place for reasoning_content")
        if calls := message.get("tool_calls"):
            if "tool_calls" not in template:
                raise ValueError(f"message {i}: this chat template has no place for tool_calls")
            message["tool_calls"] = [c if "function" in c else _wrapped(c) for c in calls]
        ready.append(message)
    if tools and "tools" not in template:
        raise ValueError("this chat template has no place for tools")
    return ready, tools


def _wrapped(call: dict) -> dict:
    """A call as OpenAI and transformers write it."""
    beside = {k: v for k, v in call.items() if k not in ("name", "arguments")}
    return {**beside, "type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}


def _renderer(template: str, tools: list[dict] | None, names: Mapping[str, Any]) -> Render:
    def render(messages: list[Message], add_generation_prompt: bool, names: Mapping[str, Any] = names) -> str:
        given = {"tools": tools, "documents": None, "add_generation_prompt": add_generation_prompt}
        try:
            return compiled(template).render({**given, **names, "messages": messages})
        except FAULTS as error:
            raise ValueError(f"chat template: {error}") from error

    return render


def render_text(
    template: str, messages: Sequence[Message], *, add_generation_prompt: bool = False,
    tools: list[dict] | None = None, style: Style = Style(),
) -> str:  # fmt: skip
    """The conversation as one string. Raises ValueError for what the template refuses or cannot hold."""
    ready, tools = _prepared(template, messages, tools)
    return re.sub(f"[{BEGIN}{END}]", "", _renderer(template, tools, style.names)(ready, add_generation_prompt))


def render_spans(
    template: str, messages: Sequence[Message], specials: Sequence[str], *, add_generation_prompt: bool = False,
    tools: list[dict] | None = None, style: Style = Style(),
) -> list[Span]:  # fmt: skip
    """The conversation cut at the control strings that the template (not a user) wrote and where training begins and ends.

    An answer starts a span of its own, so no token straddles prompt and answer: training sees exactly the prompt's ids
    that generation will see, even if the answer begins with a blank or a line break.
    """
    ready, tools = _prepared(template, messages, tools)
    safe, safe_tools = [broken_message(m, specials) for m in ready], broken(tools, tuple(specials))
    render = _renderer(template, safe_tools, style.names)
    text = render(safe, add_generation_prompt)
    touched = safe != ready or safe_tools != tools
    plain = _renderer(template, tools, style.names)(ready, add_generation_prompt) if touched else text
    if text.replace(BREAK, "") != plain:
        raise ValueError(
            "the chat template decides by text that spells a control token; reword the message that holds it"
        )
    if not add_generation_prompt:
        if BEGIN not in text and not re.search(r"{%[-+]?\s*generation\b", template):
            text = marked_turns(render, safe, text, specials, style.names)
        if left_out := lost(ready, re.sub(f"[{BEGIN}{END}]", "", plain)):
            raise ValueError(left_out)
    return _spans(text if style.train_thinking else _without_thinking(text), specials)


def _without_thinking(text: str) -> str:
    """Takes thoughts out of the marked parts. A part may begin inside one, where the prompt opens it."""
    cut = lambda part: part[1] + THINKING.sub(lambda thought: END + thought[0] + BEGIN, part[2]) + part[3]
    return re.sub(f"({BEGIN})([^{END}]*)({END})", cut, text)


def _spans(rendered: str, specials: Sequence[str]) -> list[Span]:
    longest_first = sorted(specials, key=lambda s: (-len(s), s))
    spans, inside = [], False
    for part in re.split("(" + "|".join([*map(re.escape, longest_first), BEGIN, END]) + ")", rendered):
        if part in (BEGIN, END):
            inside = part == BEGIN
        elif part:
            spans.append(Span(part.replace(BREAK, ""), part in specials, inside))
    return spans


def render_ids(
    template: str, messages: Sequence[Message], encode: Callable[[str], list[int]], specials: Mapping[str, int], *,
    add_generation_prompt: bool = False, tools: list[dict] | None = None, style: Style = Style(),
) -> tuple[list[int], list[int]]:  # fmt: skip
    """Token ids and loss mask of a conversation. ``specials``: control strings and their ids; ``encode`` knows none of them."""
    ids: list[int] = []
    mask: list[int] = []
    asked = {"add_generation_prompt": add_generation_prompt, "tools": tools, "style": style}
    for span in render_spans(template, messages, list(specials), **asked):
        part = [specials[span.text]] if span.special else encode(span.text)
        ids += part
        mask += [int(span.trained)] * len(part)
    return ids, mask
