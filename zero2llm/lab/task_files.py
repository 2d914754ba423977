"""`zero2llm data tasks`: generated questions with known answers, as files that recipes train on.

    prompts          {"prompt": question, "answer": answer}                 what reinforcement learning asks, and rewards compare with
    conversations    {"messages": [question, answer]}                       for fine-tuning
    preferences      {"prompt": ..., "chosen": answer, "rejected": wrong}   for preference objectives and reward models

The held-out file has content that the other never shows, in any wording or language (evals/tasks/items.py).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from zero2llm.core.log import console
from zero2llm.evals.tasks.generate import conversation, generate
from zero2llm.evals.tasks.items import Item
from zero2llm.lab.data_files import format_of, refuse_existing, writer


def as_prompt(item: Item) -> dict:
    return {"prompt": item.prompt, "answer": item.answer}


def as_conversation(item: Item) -> dict:
    return {"messages": conversation(item)}


def as_preference(item: Item) -> dict:
    return {"prompt": item.prompt, "chosen": item.answer, "rejected": item.wrong}


KINDS: dict[str, Callable[[Item], dict]] = {"prompts": as_prompt, "conversations": as_conversation, "preferences": as_preference}


def write_tasks(
    out: Path, families: tuple[str, ...], kind: str, n: int, n_valid: int, langs: tuple[str, ...], seed: int, overwrite: bool
) -> None:
    """``out`` and, beside it, NAME-valid. Raises ValueError before anything is written."""
    suffix, outer = format_of(out)
    if suffix != ".jsonl":
        raise ValueError(f"{out}: questions are written as .jsonl")
    valid = out.with_name(f"{out.name.removesuffix(suffix + outer)}-valid{suffix}{outer}")
    for path in (out, valid):
        refuse_existing(path, overwrite)
    sides = {out: generate(families, n, seed, "train", langs), valid: generate(families, n_valid, seed, "test", langs)}
    if kind == "preferences" and (without := next((item for side in sides.values() for item in side if not item.wrong), None)):
        raise ValueError(f"family {without.family!r} has no wrong answers; take --as prompts or conversations")
    for path, items in sides.items():
        with writer(path, overwrite) as write:
            for number, item in enumerate(items, 1):
                write(KINDS[kind](item), f"question {number}")
        console().print(f"{path}: {len(items)} {kind} of {', '.join(families)}", markup=False, soft_wrap=True)
