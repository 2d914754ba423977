"""Which answers of a conversation carry loss: every one, the last, or all tokens; and those that their record leaves out.

    assistant   every answer with its end of turn, as the chat template marks it
    last        the last answer alone
    all         every token, what system, users and tools say included

An answer with "train": false keeps its place in the text and is not trained (others never are). Where one answer ends and the next begins is
read off the conversation's beginnings: as ids, render(messages[:i]) must be the beginning of the whole.

Why: "weight": 0 (OpenAI), "train": false and histories that are not to be learned (`mask_history`) all say the same.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Literal

from zero2llm.data.fitting import Marked
from zero2llm.data.turns import LEFT_OUT, Message

TrainOn = Literal["assistant", "last", "all"]


def left_out(message: Message) -> bool:
    return message.get(LEFT_OUT) is False


def marked(messages: list[Message], render: Callable[[list[Message]], Marked], train_on: TrainOn) -> Marked:
    """Ids and mask. Raises ValueError where the template does not let answers be told apart that are to be."""
    out = {i for i, m in enumerate(messages) if left_out(m)}
    if out and train_on == "all":
        i = min(out)
        raise ValueError(f"message {i} ({messages[i]['role']}): train is false, and data.train_on = all trains every token; keep one")
    ids, mask = render(messages)
    if train_on == "all":
        return ids, [1] * len(ids)
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if train_on == "last":
        out |= set(answers[:-1])
    if not out.intersection(answers):
        return ids, mask
    runs = [(gone, list(run)) for gone, run in groupby(answers, key=out.__contains__)]
    borders = [_border(messages, a[-1], b[0], ids, render) for (_, a), (_, b) in zip(runs, runs[1:], strict=False)]
    kept = list(mask)
    for (gone, _), first, end in zip(runs, [0, *borders], [*borders, len(ids)], strict=True):
        if gone:
            kept[first:end] = [0] * (end - first)
    return ids, kept


def _border(messages: list[Message], before: int, after: int, ids: list[int], render: Callable) -> int:
    """A place in ``ids`` behind the answer ``before`` and in front of the answer ``after``."""
    for n in range(after, before, -1):
        try:
            part = render(messages[:n])[0]
        except ValueError:  # the template refuses this beginning
            continue
        if ids[: len(part)] == part:
            return len(part)
    raise ValueError(
        f"message {after} (assistant): the chat template shows what stands before it otherwise when more follows, so it "
        "cannot be told from the answers that are not trained"
    )
