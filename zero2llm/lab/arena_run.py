"""One run of a comparison, in a process of its own, so that its peak memory is its own: train, measure, write a file.

    python -m zero2llm.lab.arena_run FOLDER JOB        (what `zero2llm compare` starts; JOB is a file in FOLDER/jobs)
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch

from zero2llm.core.batch import Batch
from zero2llm.core.config import parse
from zero2llm.core.device import pick_device
from zero2llm.core.files import read_json, write_atomic
from zero2llm.core.seeds import seed_all
from zero2llm.core.seq import Seq
from zero2llm.data.loader import Loader
from zero2llm.data.rows import DocumentRows
from zero2llm.data.shards import TokenShards
from zero2llm.evals import synthetic
from zero2llm.lab.measure import peak_rss_mb
from zero2llm.lab.recipe import Recipe
from zero2llm.model.cost import parameters, state_bytes
from zero2llm.model.lm import LM
from zero2llm.model.spec import ModelConfig
from zero2llm.optim.build import build_optim
from zero2llm.tokenizers.tokenizer import Tokenizer
from zero2llm.train.evaluate import evaluate
from zero2llm.train.fit import FitConfig, FitState, fit
from zero2llm.train.objectives.clm import CLM

TASKS = {  # name -> how to draw rows of it: 8 pairs in 31 tokens, 16 symbols in 32
    "recall": lambda rows, generator: synthetic.recall(rows, 8, generator),
    "copy": lambda rows, generator: synthetic.copying(rows, 16, generator),
}


def run(folder: Path, job: dict) -> dict:
    """All figures of one variant and seed."""
    recipe, cfg = parse(Recipe, job["recipe"]), parse(ModelConfig, job["model"])
    device, began = pick_device(recipe.device), time.perf_counter()
    count = parameters(cfg)
    found = {"key": job["key"], "variant": job["variant"], "seed": job["seed"], "parameters": count["total"], "active": count["active"]}  # fmt: skip
    found["leak"] = leak(cfg)
    found |= language(folder, recipe, cfg, job["seed"], device)
    found["state_bytes"] = {str(n): state_bytes(cfg, n, 2) for n in (1024, 2048)}
    for name in TASKS if job["task_steps"] else ():
        found[name] = task(name, recipe, job, device)
    return found | {"seconds": time.perf_counter() - began}


@torch.no_grad()
def leak(cfg: ModelConfig) -> float:
    """Change of earlier outputs by the last token: above rounding, bits per byte are not comparable."""
    seed_all(0)
    model, x = LM(cfg).eval(), torch.randint(0, cfg.vocab_size, (4, 32))
    other = x.clone()
    other[:, -1] = (x[:, -1] + 1) % cfg.vocab_size
    seq = Seq.rows(4, 32)
    return float((model(x, seq)[0] - model(other, seq)[0])[:, :-1].abs().max())


def language(folder: Path, recipe: Recipe, cfg: ModelConfig, seed: int, device: torch.device) -> dict:
    """Train on the text; bits per byte on held-out rows during training, at the end, and at twice the length."""
    tokenizer = Tokenizer.load(folder / "tokenizer")
    train, valid = (TokenShards.open(folder / "data" / side) for side in ("train", "valid"))
    rows = lambda shards, length, s: DocumentRows(shards, length, tokenizer.pad_id, tokenizer.eos_id, s)
    lengths = torch.tensor(tokenizer.byte_lengths())
    seed_all(seed)
    model = LM(cfg).to(device)
    optim, objective = build_optim(model, recipe.optim, model.width_ratio), recipe.objective.build()

    def bits(length: int) -> float:
        n = max(recipe.batch_tokens // length, 1)
        loader = Loader(rows(valid, length, recipe.seed), n, seed=recipe.seed, repeat=False)
        some = islice(loader, -(-(recipe.data.valid_rows or 10**9) * recipe.seq_len // (n * length)))
        return evaluate(model, objective, some, micro_rows=recipe.fit.micro_rows, byte_lengths=lengths)["bpb"]

    curve, speeds = [], []

    def look(state: FitState) -> None:
        speeds.append(state.metrics["tokens_per_s"])
        if state.step % recipe.eval.every == 0 and state.step < recipe.fit.steps:
            curve.append((state.step, bits(recipe.seq_len)))

    loader = Loader(rows(train, recipe.seq_len, recipe.seed), recipe.rows, seed=seed)
    fit(model, objective, loader, optim, recipe.fit, hooks=(look,))
    final = bits(recipe.seq_len)
    report = {"bpb": final, "curve": [*curve, (recipe.fit.steps, final)], "tokens_per_s": statistics.median(speeds)}
    report["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else peak_rss_mb()
    if cfg.position is None or cfg.position.kind != "learned" or 2 * recipe.seq_len <= cfg.max_len:
        report["bpb_2x"] = bits(2 * recipe.seq_len)
    return report


def task(name: str, recipe: Recipe, job: dict, device: torch.device) -> float:
    """Accuracy on fresh items of a made-up task, after learning it from nothing."""
    cfg = parse(ModelConfig, job["model"] | {"vocab_size": synthetic.VOCAB})
    seed_all(job["seed"])
    model, draw = LM(cfg).to(device), torch.Generator().manual_seed(job["seed"])

    def batches() -> Iterator[Batch]:
        while True:
            yield TASKS[name](64, draw)

    settings = FitConfig(steps=job["task_steps"], schedule=recipe.fit.schedule, micro_rows=64, dtype=recipe.fit.dtype)
    fit(model, CLM(), batches(), build_optim(model, recipe.optim, model.width_ratio), settings)
    fresh = TASKS[name](256, torch.Generator().manual_seed(10**6 + job["seed"]))
    return synthetic.accuracy(model.eval(), fresh.to(device))


def main() -> None:
    folder, path = Path(sys.argv[1]), Path(sys.argv[2])
    job = read_json(path)
    write_atomic(folder / "results" / path.name, json.dumps(run(folder, job), indent=1) + "\n")


if __name__ == "__main__":
    main()
