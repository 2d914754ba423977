"""`zero2llm quickstart`: the whole life of a small model on a CPU, in minutes, with proof that each stage taught something.

    text -> tokenizer -> pretraining -> SFT -> DPO -> evaluation -> export -> report.html

Every part leaves its result on disk before the next begins; killed anywhere, the same command continues there.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from zero2llm.core.files import read_json, write_atomic
from zero2llm.evals.tasks.generate import EASY, conversation, generate
from zero2llm.evals.tasks.preferences import Pair, preference_pairs, sft_conversations
from zero2llm.lab.convert import export_checkpoint
from zero2llm.lab.journal import Journal
from zero2llm.lab.report import build_report
from zero2llm.lab.sets import build_tokenizer
from zero2llm.lab.stage import run_stage
from zero2llm.lab.story import collect, conclude, judge_base, judge_dpo, judge_sft


class Lifecycle(Journal):
    """The parts in order."""

    def tokenizer(self) -> dict:
        recipe = self.recipe("pretrain")
        tokenizer, _ = build_tokenizer(recipe.tokenizer, recipe.data, self.out)
        return {"vocab_size": tokenizer.vocab_size}

    def data(self) -> dict:
        """Task sets as files that a user can open, and use with the recipes."""
        size, folder = self.size, self.out / "data"
        held_out = [conversation(item) for item in generate(EASY, size.sft_valid, 3, "test")]
        for name, talks in (("sft", sft_conversations(size.sft, 1)), ("sft-valid", held_out)):
            _write_lines(folder / f"{name}.jsonl", [{"messages": talk} for talk in talks])
        for name, n, split in (("preferences", size.pairs, "train"), ("preferences-valid", size.pairs_valid, "test")):
            _write_lines(folder / f"{name}.jsonl", [_pair_record(pair) for pair in preference_pairs(n, 1, split)])
        return {"conversations": size.sft, "pairs": size.pairs}

    def train(self, stage: str) -> dict:
        result = run_stage(self.recipe(stage), resume=True)
        return {"checkpoint": str(result.checkpoint.relative_to(self.out)), **result.valid}

    def run(self) -> bool:
        """Every part in order; True if every threshold was met."""
        self.part("tokenizer", "learn a vocabulary of byte pairs from the text", self.tokenizer)
        self.part("data", "generate conversations and preferences with known answers", self.data)
        self.part("pretrain", "predict the next token of novels and classical Chinese", lambda: self.train("pretrain"))
        self.part("judge-pretrain", "n-gram marks, and what the base model answers", lambda: judge_base(self))
        self.part("sft", "learn to answer: loss on the assistant's tokens only", lambda: self.train("sft"))
        self.part("judge-sft", "held-out questions", lambda: judge_sft(self))
        self.part("dpo", "prefer the better of two replies", lambda: self.train("dpo"))
        self.part("judge-dpo", "held-out questions and preferences", lambda: judge_dpo(self))
        self.part("export", "a folder that transformers and vLLM open", self.export)
        results = collect(self)
        write_atomic(self.out / "results.json", json.dumps(results, ensure_ascii=False, indent=1))
        build_report(self.out, results)
        return conclude(self, results)

    def export(self) -> dict:
        folder = export_checkpoint(self.out / "dpo", self.out / "export", "hf", overwrite=True)
        return {"folder": folder.name, "bytes": sum(p.stat().st_size for p in folder.iterdir())}


def _write_lines(path: Path, records: list[dict]) -> None:
    write_atomic(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def _pair_record(pair: Pair) -> dict:
    return {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}


def run_lifecycle(out: Path, *, fast: bool = False, overwrite: bool = False) -> bool:
    """Run or continue the lifecycle in ``out``. Returns whether all thresholds were met (never asked of a fast run).

    Raises ValueError if ``out`` holds something else, or a run of the other size.
    """
    mark, kind = out / "quickstart.json", "fast" if fast else "full"
    if overwrite and mark.is_file():
        shutil.rmtree(out)
    if out.exists() and not mark.is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is no quickstart folder; choose another with --out")
    if mark.is_file() and read_json(mark)["kind"] != kind:
        raise ValueError(
            f"{out} holds a {read_json(mark)['kind']} run; pass --overwrite to replace it, or another --out"
        )
    write_atomic(mark, json.dumps({"kind": kind}))
    return Lifecycle(out, fast).run() or fast
