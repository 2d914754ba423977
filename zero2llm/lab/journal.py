"""What a quickstart has done so far: each part once, its result, seconds and memory on disk before the next begins."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from zero2llm.core.files import read_json, write_atomic
from zero2llm.core.log import console
from zero2llm.evals.tasks.generate import EASY, generate
from zero2llm.evals.tasks.items import Item
from zero2llm.lab.measure import peak_rss_mb
from zero2llm.lab.recipe import Recipe, load_recipe


@dataclass(frozen=True)
class Size:
    """How much of everything: the real run, or the same path in seconds."""

    sft: int
    sft_valid: int
    pairs: int
    pairs_valid: int
    test_items: int
    overrides: dict[str, list[str]]


FULL = Size(12_000, 200, 1_500, 400, 600, {"pretrain": [], "sft": [], "dpo": []})
FAST = Size(400, 40, 200, 40, 48, {
    "pretrain": ["fit.steps=4", "batch_tokens=2048", "eval.every=4", "data.max_documents=400", "tokenizer.sample_bytes=60000", "tokenizer.vocab_size=600",
                 "model.vocab_size=600", "data.valid_fraction=0.05"],
    "sft": ["fit.steps=3", "eval.every=3", "batch_tokens=1024"],
    "dpo": ["fit.steps=2", "eval.every=2", "batch_tokens=2048"],
})  # fmt: skip


class Journal:
    """One output folder. `part` does a piece of work once and remembers its result, seconds and peak memory."""

    def __init__(self, out: Path, fast: bool):
        self.out, self.fast, self.size = out, fast, FAST if fast else FULL
        self.records: dict[str, dict] = {}

    def part(self, name: str, what: str, work: Callable[[], Any]) -> Any:
        done = self.out / "parts" / f"{name}.json"
        if done.is_file():
            record = read_json(done)
        else:
            console().print(f"\n[bold]{name}[/bold]  {what}")
            began = time.perf_counter()
            value = work()
            record = {"what": what, "value": value, "seconds": time.perf_counter() - began, "peak_mb": peak_rss_mb()}
            write_atomic(done, json.dumps(record, ensure_ascii=False, indent=1))
        self.records[name] = record
        return record["value"]

    def recipe(self, stage: str) -> Recipe:
        """The stage's recipe from the package, with its paths set to this output folder."""
        path = lambda *parts: json.dumps(str(self.out.joinpath(*parts)))
        changes = [f"out={path(stage)}", *self.size.overrides[stage]]
        if stage == "pretrain":
            changes += [f"tokenizer={{path: {path('tokenizer')}}}"] if (self.out / "tokenizer").is_dir() else []
        else:
            before, data = {"sft": ("pretrain", "sft"), "dpo": ("sft", "preferences")}[stage]
            changes += [f"init={path(before)}", f"data.train=[{path('data', data + '.jsonl')}]"]
            changes += [f"data.valid=[{path('data', data + '-valid.jsonl')}]"]
        with resources.as_file(resources.files("zero2llm") / "recipes" / f"quickstart-{stage}.yaml") as file:
            return load_recipe(file, changes)

    def items(self) -> list[Item]:
        return generate(EASY, self.size.test_items, 2, "test")
