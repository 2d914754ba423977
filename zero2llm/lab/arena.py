"""The arena: one recipe, one part swapped, same tokens, same parameters, several seeds. Which mechanism is better?

Each run is a process of its own that leaves one file; a comparison that was stopped goes on where it was, and one that
is repeated with more names or seeds only does what is missing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from zero2llm.core.config import to_dict
from zero2llm.core.files import read_json, write_atomic
from zero2llm.core.log import console
from zero2llm.lab.arena_page import write_pages
from zero2llm.lab.recipe import Recipe
from zero2llm.lab.sets import build_sets, build_tokenizer
from zero2llm.lab.variants import matched, parse_swap, swapped
from zero2llm.model.cost import parameters
from zero2llm.parallel.plan import World


@dataclass
class Job:
    """One run: ``path`` says what to do, ``result`` is there when it is done."""

    variant: str
    seed: int
    path: Path
    result: Path
    failed: str = ""

    def done(self) -> dict | None:
        """The result, if it belongs to the job as it stands now."""
        if not self.result.is_file():
            return None
        found = read_json(self.result)
        return found if found["key"] == read_json(self.path)["key"] else None


def compare(recipe: Recipe, swap: str, seeds: int, jobs: int = 1, task_steps: int = 200, overwrite: bool = False) -> list[dict]:  # fmt: skip
    """Run what is missing of ``swap`` x ``seeds`` in ``recipe.out`` and write its pages. Returns the results. The made-up
    tasks are learned once, with the first seed.

    Raises ValueError for a swap, size or folder that cannot work, before anything is trained.
    """
    if recipe.model is None or recipe.objective.kind != "clm":
        raise ValueError("compare needs a recipe with `model` and objective clm: it trains from nothing")
    if seeds < 1 or jobs < 1 or task_steps < 0:
        raise ValueError(f"seeds = {seeds} and jobs = {jobs} must be positive, task_steps = {task_steps} not negative")
    part, names = parse_swap(swap)
    base, folder = to_dict(recipe.model), Path(recipe.out)
    target = parameters(recipe.model)["total"]
    models = {name: to_dict(matched(swapped(base, part, name), target)) for name in names}
    _claim(folder, overwrite)
    tokenizer, _ = build_tokenizer(recipe.tokenizer, recipe.data, folder)
    if tokenizer.vocab_size != recipe.model.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, model.vocab_size is {recipe.model.vocab_size}")
    build_sets(recipe, tokenizer, folder, World.current())
    plain = to_dict(dataclasses.replace(recipe, out=""))
    todo = [_job(folder, plain, models[name], part, name, seed, task_steps if seed == 1 else 0) for seed in range(1, seeds + 1) for name in names]
    _run_all([job for job in todo if job.done() is None], folder, jobs)
    results = [result for job in todo if (result := job.done())]
    write_pages(folder, results, part, recipe, {job.variant: job.failed for job in todo if job.failed})
    return results


def _claim(folder: Path, overwrite: bool) -> None:
    """The folder of an earlier comparison is continued; anything else in it is not ours to touch."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "jobs").is_dir():
        raise ValueError(f"{folder} is not empty and holds no comparison; give another folder with out=...")
    if overwrite:
        for file in (folder / "results").glob("*.json"):
            file.unlink()
    for name in ("jobs", "results", "logs"):
        (folder / name).mkdir(parents=True, exist_ok=True)


def _job(folder: Path, recipe: dict, model: dict, part: str, name: str, seed: int, task_steps: int) -> Job:
    what = {"recipe": recipe, "model": model, "variant": name, "seed": seed, "task_steps": task_steps}
    key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
    file = f"{part}-{name.replace('/', '_')}-{seed}.json"
    path = folder / "jobs" / file
    write_atomic(path, json.dumps(what | {"key": key}, indent=1) + "\n")
    return Job(name, seed, path, folder / "results" / file)


def _run_all(todo: list[Job], folder: Path, jobs: int) -> None:
    """At most ``jobs`` processes at a time, the cores shared among them; a failed run is named and the rest goes on."""
    threads = str(max((os.cpu_count() or 1) // jobs, 1))
    env = os.environ | {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE"}
    waiting, running, began, n_done = list(todo), {}, time.perf_counter(), 0
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                job = waiting.pop(0)
                log = (folder / "logs" / job.path.with_suffix(".txt").name).open("w")
                command = [sys.executable, "-m", "zero2llm.lab.arena_run", str(folder), str(job.path)]
                running[subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)] = (job, log)
            time.sleep(0.2)
            for process in [p for p in running if p.poll() is not None]:
                job, log = running.pop(process)
                log.close()
                n_done += 1
                left = (time.perf_counter() - began) / n_done * (len(todo) - n_done) / 60
                _say(job, process.returncode, Path(log.name), f"{n_done}/{len(todo)}, about {left:.0f} min left")
    finally:
        for process, (_, log) in running.items():
            process.terminate()
            log.close()


def _say(job: Job, code: int, log: Path, progress: str) -> None:
    result = job.done()
    if code == 0 and result is not None:
        told = f"{result['bpb']:.3f} bits/byte, {result['tokens_per_s']:,.0f} tokens/s"
        console().print(f"[{progress}] {job.variant}, seed {job.seed}: {told}", markup=False, highlight=False)
        return
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    job.failed = (lines[-1] if lines else f"exit code {code}")[:200]
    console().print(f"[{progress}] {job.variant}, seed {job.seed} failed: {job.failed} ({log})", style="red", markup=False)
