"""Where the assistant speaks in a rendered conversation, for templates that do not mark it.

For the assistant's message i:
    prompt = render(messages[:i], generation prompt)       what stands before the answer when it is generated,
                                                           also with thinking switched on or off
    turn   = render(messages[:i + 1])                      the same with the answer
    answer = turn[len(prompt) : end of turn's last control string]
It counts only if prompt is the beginning of turn, and turn up to there the beginning of the whole text: some templates
drop the thoughts of earlier turns, so what stands there now is not what was generated.

Why: what cannot be located for certain is not trained; training the wrong characters is worse than training fewer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from zero2llm.tokenizers.breaks import ASSISTANT_MARKS
from zero2llm.tokenizers.sandbox import BEGIN, BREAK, END

Render = Callable[..., str]  # (messages, add_generation_prompt, names = those given) -> text
THINK, THINK_NOT = ({"enable_thinking": on, "open_thinking": on} for on in (True, False))


def marked_turns(
    render: Render, messages: list[dict[str, Any]], whole: str, specials: Sequence[str], names: Mapping[str, Any]
) -> str:
    """``whole`` with a mark at each border of what the assistant generated.

    Raises ValueError if the conversation ends with an answer and not one can be located.
    """
    control = re.compile("|".join(map(re.escape, sorted(specials, key=len, reverse=True))) or "(?!)")
    found, reason, end = [], "", 0
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            try:
                place = _place(render, messages[: i + 1], whole, control, names)
            except ValueError as error:  # the template refuses a beginning of the conversation
                reason = str(error)
                continue
            if place[0] >= end:
                found.append(place)
                end = place[1]
    if not found and messages[-1]["role"] == "assistant":
        raise ValueError(f"no answer can be located in what the chat template makes of the conversation: {reason}")
    for begin, end in reversed(found):
        whole = whole[:begin] + BEGIN + whole[begin:end] + END + whole[end:]
    return whole


def _place(
    render: Render, messages: list[dict[str, Any]], whole: str, control: re.Pattern, names: Mapping[str, Any]
) -> tuple[int, int]:
    """Where the last message's answer begins and ends. Raises ValueError saying why that is uncertain."""
    turn = render(messages, False)
    prompts = (render(messages[:-1], True, {**names, **switch}) for switch in ({}, THINK, THINK_NOT))
    prompt = next((p for p in prompts if turn.startswith(p)), None)
    if prompt is None:
        raise ValueError("it renders a prompt otherwise when the answer follows")
    ends = [m for m in control.finditer(turn, len(prompt))]
    if not ends or ends[-1].group() in ASSISTANT_MARKS:
        raise ValueError("it writes no control token at the end of an answer, so a model could not learn to stop")
    begin, end = len(prompt), ends[-1].end()
    if not whole.startswith(turn[:end]):
        raise ValueError("it renders an answer otherwise when more follows")
    answer = turn[begin:end].replace(BREAK, "")
    said = (messages[-1].get("content") or "").replace(BREAK, "").strip()
    if not _holds(_squeezed(answer), said.removeprefix("<think>")):  # the prompt may have opened it
        raise ValueError("it changes the answer's text")
    return begin, end


def lost(messages: Sequence[dict[str, Any]], text: str) -> str:
    """Names the first message whose content does not stand in ``text``; empty if all do.

    Line breaks and blanks do not count, nor what stands before </think>: templates trim the first and drop the second.
    A system message may be rewritten (switches like /no_think are taken out of it).
    """
    squeezed = _squeezed(text)
    for i, message in enumerate(messages):
        said = message.get("content") or ""
        if message["role"] != "system" and not _holds(squeezed, said.rpartition("</think>")[2]):
            return f"message {i} ({message['role']}): the chat template leaves its content out"
    return ""


def _holds(squeezed: str, said: str) -> bool:
    return _squeezed(said) in squeezed or _squeezed(json.dumps(said, ensure_ascii=False)[1:-1]) in squeezed


def _squeezed(text: str) -> str:
    return "".join(text.split())
