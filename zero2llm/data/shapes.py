"""What one record is to each kind of training: a conversation, a pair, a judged answer, a prompt.

Source: the record formats of TRL ("Dataset formats and types"), LLaMA-Factory and minimind.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from zero2llm.data.tool_calls import same_tools
from zero2llm.data.turns import ANSWERING, MEDIA, Conversation, Message, conversation, question_of, spoken, turns_of

SINGLE = (("instruction", "output"), ("prompt", "response"), ("prompt", "completion"))


class SameAnswers(ValueError):
    """Chosen and rejected are one answer: nothing to correct, and nothing to learn."""


@dataclass(frozen=True)
class Preference:
    """The shared turns, and two assistant turns that could follow. ``margin``: how much better the chosen one is."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    where: str = field(default="", compare=False)
    tools: list[dict] | None = None
    margin: float = 0.0


@dataclass(frozen=True)
class Judged:
    """A prompt, an answer, and whether it is a good one: what KTO learns from."""

    prompt: Conversation
    completion: list[Message]
    label: bool
    where: str = field(default="", compare=False)


@dataclass(frozen=True)
class Prompt:
    """What a model is asked in RL. ``answer``: any JSON value that a reward may compare with; ``gt``: texts and numbers
    that must appear in the final answer."""

    messages: Conversation
    answer: Any = None
    gt: tuple[str | int | float, ...] = ()
    where: str = field(default="", compare=False)


def as_conversation(value: object) -> Conversation:
    """One record as messages that end with an assistant turn: what follows the last one has nothing to teach.

    Raises ValueError with the keys that the record has.
    """
    record = as_object(value)
    messages, singles = spoken(record), [pair for pair in SINGLE if set(pair) <= set(record)]
    if len(singles) + (messages is not None) > 1:
        fits = ["a list of messages"] * (messages is not None) + ["+".join(pair) for pair in singles]
        raise ValueError(f"it may be read in {len(fits)} ways ({', '.join(fits)}); name the schema or remove keys")
    if messages is None:
        messages = as_single_turn(record)
    _refuse_pictures(record)
    return until_answer(messages, record)


def as_spoken(value: object) -> Conversation:
    """The same from ``messages`` or ``conversations`` alone, whatever else the record holds."""
    _refuse_pictures(as_object(value))
    return until_answer(spoken(value), value)


def _refuse_pictures(record: dict) -> None:
    for key in MEDIA:
        if record.get(key):
            raise ValueError(f"{key!r} would be dropped unseen; records with pictures are of the schema image-text")


def until_answer(messages: Conversation | None, record: dict) -> Conversation:
    if messages is None:
        raise ValueError(f"messages or conversations are needed; {has(record)}")
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        raise ValueError("no assistant message to learn from")
    return messages


def as_object(value: object) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"an object was expected, this is a {type(value).__name__}")
    return value


def has(record: object) -> str:
    return (
        f"it has: {', '.join(map(str, record)) or 'nothing'}"
        if isinstance(record, dict)
        else f"it is a {type(record).__name__}"
    )


def as_single_turn(value: object) -> Conversation:
    record = as_object(value)
    pair = next((pair for pair in SINGLE if set(pair) <= set(record)), None)
    if pair is None:
        raise ValueError(
            "no conversation in it: messages, conversations, instruction+output, prompt+response or prompt+completion "
            f"are known; {has(record)}"
        )
    if record.get("label") is False:
        raise ValueError("label is false: this completion is an example of what not to say")
    asked = question_of(record, pair[0])
    said = _behind(asked, turns_of(record[pair[1]], "assistant", pair[1]))
    return conversation([*asked, *said], same_tools(asked.tools, said.tools))


def _same(a: list[Message], b: list[Message]) -> bool:
    strip = lambda turns: [{**m, "content": m["content"].strip()} for m in turns]
    return strip(a) == strip(b)


def _behind(prompt: Conversation, turns: Conversation) -> Conversation:
    """``turns`` without the prompt, where that stands in both."""
    inside = len(prompt) and _same(turns[: len(prompt)], prompt)
    return conversation(turns[len(prompt) :], turns.tools) if inside else turns


def as_preference(value: object) -> Preference:
    """One record with ``chosen`` and ``rejected``; a prompt that stands both apart and inside is not doubled."""
    if not isinstance(value, dict) or not {"chosen", "rejected"} <= set(value):
        raise ValueError(f"chosen and rejected are needed; {has(value)}")
    prompt = _prompt_of(value)
    whole = [turns_of(value[key], "assistant", key) for key in ("chosen", "rejected")]
    tools = same_tools(prompt.tools, *(turns.tools for turns in whole))
    chosen, rejected = (_behind(prompt, turns) for turns in whole)
    apart = chosen is whole[0] or rejected is whole[1]
    shared = 0
    while shared < min(len(chosen), len(rejected)) and _same([chosen[shared]], [rejected[shared]]):
        shared += 1
    inside, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if prompt and apart and _same(inside[-len(prompt) :], prompt):
        # the lists hold more than it: a system turn, history
        prompt = conversation([])
    if not chosen and not rejected:
        raise SameAnswers("chosen and rejected are the same; such a pair teaches nothing")
    if not chosen or not rejected:
        raise ValueError("one of chosen and rejected is the other's beginning; there is nothing to compare")
    if not [*prompt, *inside]:
        raise ValueError("no prompt: neither a field 'prompt' nor turns that chosen and rejected share")
    if any(turns[0]["role"] != "assistant" for turns in (chosen, rejected)):
        raise ValueError("chosen and rejected must part at an assistant message; here the prompts differ")
    return Preference([*prompt, *inside], chosen, rejected, tools=tools, margin=_margin(value))


def _margin(record: dict) -> float:
    margin = record.get("margin")
    if margin is not None and (isinstance(margin, bool) or not isinstance(margin, int | float) or not isfinite(margin)):
        raise ValueError(f"margin is {margin!r}; a number was expected: by how much the chosen answer is better")
    return float(margin or 0.0)


def _prompt_of(record: dict) -> Conversation:
    """The prompt where it stands apart: a field of that name, an instruction, or the turns before two single answers."""
    key = next((key for key in ("prompt", "instruction") if record.get(key)), None)
    if key:
        return question_of(record, key)
    if isinstance(record["chosen"], dict):
        return spoken(record) or conversation([])
    return conversation([])


def as_judged(value: object) -> Judged:
    """One record with ``prompt``, ``completion`` and ``label``, which is true or false (or 1 or 0)."""
    record = as_object(value)
    if not {"prompt", "completion", "label"} <= set(record):
        raise ValueError(f"prompt, completion and label are needed; {has(record)}")
    label = record["label"]
    if not isinstance(label, bool | int) or label not in (0, 1):
        raise ValueError(f"label is {label!r}; true or false was expected")
    prompt = question_of(record, "prompt")
    said = _behind(prompt, turns_of(record["completion"], "assistant", "completion"))
    if any(turn["role"] not in ("assistant", "tool") for turn in said) or not said or said[0]["role"] != "assistant":
        raise ValueError("the completion must begin with an assistant message and hold no other person's")
    asked = conversation(prompt, same_tools(prompt.tools, said.tools))
    return Judged(asked, list(said), bool(label))


def as_judged_sides(value: object) -> list[Judged]:
    """A judged answer, or the two of a pair: the chosen one good, the rejected one not."""
    if "completion" in as_object(value) or not {"chosen", "rejected"} <= set(value):
        return [as_judged(value)]
    pair = as_preference(value)
    asked = conversation(pair.prompt, pair.tools)
    return [Judged(asked, pair.chosen, True), Judged(asked, pair.rejected, False)]


def as_single_prompt(value: object) -> Prompt:
    """``prompt`` and perhaps ``answer``."""
    record = as_object(value)
    if record.get("prompt") is None:
        raise ValueError(f"prompt is needed; {has(record)}")
    return _asked(question_of(record, "prompt"), record)


def as_spoken_prompt(value: object) -> Prompt:
    """A conversation, whose last answer is dropped (the model gives its own), and perhaps ``gt``."""
    record = as_object(value)
    key = next((key for key in ("messages", "conversations") if isinstance(record.get(key), list)), None)
    if key is None:
        raise ValueError(f"messages or conversations are needed; {has(record)}")
    turns = record[key]
    last = turns[-1] if turns and isinstance(turns[-1], dict) else {}
    if last.get("role", last.get("from")) in ANSWERING:
        turns = turns[:-1]  # before it is looked at: in files for RL it may be empty
        if not turns:
            raise ValueError("no message is left to ask when the last answer is dropped")
    return _asked(spoken({**record, key: turns}), record)


def _asked(messages: Conversation, record: dict) -> Prompt:
    _refuse_pictures(record)
    if messages[-1]["role"] not in ("user", "tool"):
        raise ValueError(
            f"a prompt ends with a question or a tool's result; this one ends with {messages[-1]['role']!r}"
        )
    return Prompt(messages, record.get("answer"), _facts(record.get("gt")))


def _facts(gt: object) -> tuple[str | int | float, ...]:
    facts = [] if gt is None else gt if isinstance(gt, list) else [gt]
    for fact in facts:
        if isinstance(fact, bool) or not isinstance(fact, str | int | float) or fact == "":
            raise ValueError(f"gt holds {fact!r}; texts or numbers that must appear in the answer were expected")
    return tuple(facts)


def as_agent(value: object) -> Prompt:
    if "gt" not in as_object(value) or not _facts(value["gt"]):
        raise ValueError(f"gt is needed: what must appear in the final answer; {has(value)}")
    return as_spoken_prompt(value)
