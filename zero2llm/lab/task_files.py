"""`zero2llm data tasks`: generated questions with known answers, as files that recipes train on.

    prompts          {"prompt": question, "answer": answer}                 what reinforcement learning asks, and rewards compare with
    conversations    {"messages": [question, answer]}                       for fine-tuning
    preferences      {"prompt": ..., "chosen": answer, "rejected": wrong}   for preference objectives and reward models

Questions that are meant for a calculator (family calculate) name it in every record, under "tools"; their conversations call it:

    conversations    {"tools": [...], "messages": [question, call, result, answer]}

The held-out file has content that the other never shows, in any wording or language (evals/tasks/items.py).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

from zero2llm.core.log import console
from zero2llm.evals.tasks.generate import conversation, generate
from zero2llm.evals.tasks.items import Item
from zero2llm.lab.data_files import with_held_out, write_records
from zero2llm.train.rl.calculator import calculate
from zero2llm.train.rl.tools import schemas


def as_prompt(item: Item) -> dict:
    return with_tools(item, {"prompt": item.prompt, "answer": item.answer})


def as_conversation(item: Item) -> dict:
    question, answer = conversation(item)
    if not item.expression or zlib.crc32(item.prompt.encode()) % 3 == 0:
        return with_tools(item, {"messages": [question, answer]})
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "calculator", "arguments": {"expression": item.expression}}]}
    return with_tools(item, {"messages": [question, call, {"role": "tool", "content": calculate(item.expression)}, answer]})


def as_preference(item: Item) -> dict:
    return with_tools(item, {"prompt": item.prompt, "chosen": item.answer, "rejected": item.wrong})


def with_tools(item: Item, record: dict) -> dict:
    return {"tools": schemas(["calculator"]), **record} if item.expression else record


KINDS: dict[str, Callable[[Item], dict]] = {"prompts": as_prompt, "conversations": as_conversation, "preferences": as_preference}


def write_tasks(
    out: Path, families: tuple[str, ...], kind: str, n: int, n_valid: int, langs: tuple[str, ...], seed: int, overwrite: bool
) -> None:
    """``out`` and, beside it, NAME-valid. Raises ValueError before anything is written."""
    if n < 1 or n_valid < 1:
        raise ValueError(f"--n {n}, --n-valid {n_valid}: at least one question in each file was expected")
    out, valid = with_held_out(out, "questions", overwrite)
    sides = {out: generate(families, n, seed, "train", langs), valid: generate(families, n_valid, seed, "test", langs)}
    if kind == "preferences" and (without := next((item for side in sides.values() for item in side if not item.wrong), None)):
        raise ValueError(f"family {without.family!r} has no wrong answers; take --as prompts or conversations")
    for path, items in sides.items():
        write_records(path, map(KINDS[kind], items), "question", overwrite)
        console().print(f"{path}: {len(items)} {kind} of {', '.join(families)}", markup=False, soft_wrap=True)
