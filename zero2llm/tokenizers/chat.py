"""Conversations as text: one Jinja template, and the loss mask that comes from the template itself.

The template marks what the assistant says with `{% generation %}` ... `{% endgeneration %}` (the same convention as
transformers). Rendering leaves a private character at each border, so the mask needs no search for token patterns;
control strings that a user typed are broken by another private character and stay ordinary text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = dict[str, str]
ROLES = ("system", "user", "assistant", "tool")
BEGIN, END, BREAK = "\U0010fff0", "\U0010fff1", "\U0010fff2"  # private use; refused in messages


def chatml() -> str:
    """The default template."""
    return (resources.files("zero2llm") / "tokenizers" / "chatml.jinja").read_text(encoding="utf-8")


class _Generation(Extension):
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [
            nodes.Output([nodes.TemplateData(BEGIN)], lineno=line),
            *body,
            nodes.Output([nodes.TemplateData(END)], lineno=line),
        ]


@cache
def _compile(template: str):
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation])

    def raise_exception(message: str):
        raise TemplateError(message)

    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(template)


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
        if not isinstance(message.get("content"), str):
            raise ValueError(
                f"message {i} ({message['role']}): content must be a string, not {message.get('content')!r}"
            )
        if any(mark in v for v in message.values() if isinstance(v, str) for mark in (BEGIN, END, BREAK)):
            raise ValueError(f"message {i} ({message['role']}): holds a character reserved for rendering (U+10FFF0..2)")


def _render(template: str, messages: Sequence[Message], specials: Sequence[str], add_generation_prompt: bool) -> str:
    check(messages)
    broken = [{k: _break(v, specials) if isinstance(v, str) else v for k, v in m.items()} for m in messages]
    try:
        return _compile(template).render(messages=broken, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        raise ValueError(f"chat template: {error}") from error


def _break(text: str, specials: Sequence[str]) -> str:
    """Typed control strings taken apart, also one whose end the template would add (every default one begins with <|)."""
    for special in (*specials, "<|"):
        text = text.replace(special, special[0] + BREAK + special[1:]) if specials else text
    return text


def render_text(template: str, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
    """The conversation as one string."""
    return re.sub(f"[{BEGIN}{END}]", "", _render(template, messages, (), add_generation_prompt))


def render_spans(template: str, messages: Sequence[Message], specials: Sequence[str], *, add_generation_prompt: bool = False) -> list[Span]:
    """The conversation cut at the control strings that the template (not a user) wrote and where training begins and ends.

    An answer starts a span of its own, so no token straddles prompt and answer: training sees exactly the prompt's ids
    that generation will see, even if the answer begins with a blank or a line break.
    """
    rendered = _render(template, messages, specials, add_generation_prompt)
    spans, inside = [], False
    for part in re.split("(" + "|".join([*map(re.escape, specials), BEGIN, END]) + ")", rendered):
        if part in (BEGIN, END):
            inside = part == BEGIN
        elif part:
            spans.append(Span(part.replace(BREAK, ""), part in specials, inside))
    return spans
