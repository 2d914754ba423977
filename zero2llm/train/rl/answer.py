"""An answer as a reward sees it, and the two shapes of a rule: one answer at a time, or all of them together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zero2llm.train.rl.tools import Call


@dataclass(frozen=True)
class Answer:
    """text : of the last turn, without its end token.  finish : stop or length.  tokens : that the policy wrote in all turns.
    ids : the whole conversation, prompt included, as it was sampled.  calls : of tools, that were answered."""

    text: str
    finish: str
    tokens: int
    record: Mapping[str, Any]
    ids: Sequence[int] = ()
    calls: tuple[Call, ...] = ()


Rule = Callable[[Answer], float]


@dataclass(frozen=True)
class Together:
    """A rule for which many answers at once are cheaper (a model, processes). ``score`` : one value each, in order; a text says why
    an answer has none, and the others keep theirs."""

    score: Callable[[Sequence[Answer]], Sequence[float | str]]


def right_answers(record: Mapping[str, Any]) -> list[str]:
    """Raises ValueError if the prompt came without one."""
    found = [record["answer"]] if "answer" in record else list(record.get("gt", ()))
    if not found:
        raise ValueError("the prompt's record has neither answer nor gt")
    return [str(one) for one in found]
