"""A conversation that is longer than a row: what goes, so that what stays is a conversation with an answer to learn.

    turns    whole turns go from the end, up to an answer               what stays is how it began
    start    the oldest exchanges go, behind the system turns in front  what stays is how it ended, the last answer with it
    refuse   nothing goes: the record is a bad one

An exchange is a question and all that follows it before the next one (calls, results, answers). Turns go one after the
other until the rest fits and something in it is trained; where none does, the conversation is refused, with its length.

Why: a row cut at its last token, as many tools do it, teaches to stop in mid-sentence where the answer was longer, and
trains nothing at all where the question was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, takewhile
from typing import Literal

from zero2llm.data.turns import Message

TooLong = Literal["turns", "start", "refuse"]
Marked = tuple[list[int], list[int]]  # ids, and 1 where one is trained


def fitted(
    messages: list[Message], render: Callable[[list[Message]], Marked], max_len: int, too_long: TooLong = "turns"
) -> tuple[list[Message], Marked]:
    """The messages that stay, with their ids and mask. Raises ValueError if nothing trained fits into ``max_len`` tokens."""
    found = None
    for turns in chain([list(messages)], shorter(list(messages), too_long)):
        ids, mask = found = render(turns)
        trains = any(mask[1:])  # nothing stands before the first token that could predict it
        if not trains and len(turns) == len(messages):
            raise ValueError(
                "nothing in it is trained: no assistant message, every answer left out by its record, or a template "
                "without {% generation %} that shows answers otherwise than they were given"
            )
        if trains and len(ids) <= max_len:
            return turns, (ids, mask)
    n = len(found[0])
    if n <= max_len:
        raise ValueError(f"what fits into {max_len} tokens holds no answer that is trained; raise seq_len")
    if too_long == "turns":
        raise ValueError(f"no answer fits into {max_len} tokens (the first ends at {n}); raise seq_len")
    if too_long == "start":
        raise ValueError(f"the last question and its answer have {n} tokens, a row {max_len}; raise seq_len")
    raise ValueError(f"{n} tokens do not fit into {max_len}; raise seq_len, or choose what goes: data.too_long = turns or start")


def shorter(messages: list[Message], too_long: TooLong) -> Iterator[list[Message]]:
    """What may be left of a conversation, the longest first."""
    if too_long == "turns":
        for n in range(len(messages) - 1, 0, -1):
            if messages[n - 1]["role"] == "assistant":
                yield messages[:n]
    elif too_long == "start":
        front = list(takewhile(lambda m: m["role"] == "system", messages))
        questions = [i for i, m in enumerate(messages) if m["role"] == "user" and i > len(front)]
        for first in questions:
            yield front + messages[first:]
