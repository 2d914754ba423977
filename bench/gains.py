"""What alignment recipes gain from the quickstart's SFT checkpoint: several seeds each, one table and one picture a group.

    zero2llm quickstart
    python bench/gains.py --out runs/gains                              all of them; what is finished is not run again
    python bench/gains.py --out runs/gains --recipes grpo,ppo --seeds 1

Each run is a process of its own, started as a user would start it (`zero2llm train NAME`), with the data of the quickstart or of
`zero2llm data tasks`. CPU seconds and peak memory are of that whole process: imports, training, and the held-out curve. Measured
afterwards, on the last checkpoint: exact answers to held-out questions of the quickstart's five families, which no recipe trains on
(what the training cost), and for preferences the share of held-out pairs whose chosen answer is the likelier one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from results import machine

from zero2llm.core.files import read_json, write_atomic
from zero2llm.lab import charts
from zero2llm.lab.arena_page import standalone
from zero2llm.lab.recipe import load_recipe

POINTS = 2  # of a preference recipe's curve, beside the start
KEPT_ITEMS = 200  # held-out questions of the quickstart's families


@dataclasses.dataclass(frozen=True)
class Group:
    """Recipes that are measured alike. measure : the metric of the curve, in percent.  tasks : family, language and numbers of questions."""

    title: str
    measure: str
    needs: dict[str, str]
    tasks: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()


PAIRS = "prompt, chosen, rejected"
PROMPTS = "prompts, a rule"
GROUP = f"{PROMPTS}, 2 or more answers to each"
GROUPS = {
    "preferences": Group("pairs won (%)", "valid_win_rate", {
        "dpo": f"{PAIRS}; a reference", "ipo": f"{PAIRS}; a reference", "kto": "single answers, good or bad; a reference",
        "orpo": PAIRS, "simpo": PAIRS, "cpo": PAIRS,
    }, changes=("data.valid_rows=200",)),
    "reward-model": Group("pairs scored right (%)", "valid_accuracy", {"reward": PAIRS}),
    "online": Group("exact answers (%)", "valid_reward", {
        "reinforce": PROMPTS, "reinforce_pp": f"{PROMPTS}; a reference", "rloo": f"{GROUP}; a reference",
        "ppo": f"{PROMPTS}; a reference, a critic", "trpo": f"{GROUP}; second derivatives", "grpo": GROUP, "dr_grpo": GROUP,
        "dapo": GROUP, "gspo": GROUP, "gmpo": GROUP, "cispo": GROUP, "sapo": GROUP, "bapo": GROUP, "rft": PROMPTS,
        "online_dpo": f"{GROUP}; a reference",
    }, tasks=("--family", "help")),
    "reading": Group("exact answers (%)", "valid_reward", {"grpo": GROUP, "ppo": f"{PROMPTS}; a reference, a critic"},
        tasks=("--family", "older", "--lang", "en", "--n", "2000", "--n-valid", "300"),
        changes=("rollout.prompts=16", "rollout.max_tokens=8", "fit.steps=60", "eval.every=12", "eval.prompts=[]")),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
    group: str
    recipe: str
    seed: int
    folder: Path

    @property
    def record(self) -> Path:
        return self.folder.with_suffix(".json")


# ------------------------------------------------------------------------------------------------------ one run


def zero2llm(words: list[str], log: Path) -> tuple[float, float]:
    """Run the command line as a process; its CPU seconds and peak MiB. Raises RuntimeError with the end of its log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as out:
        child = subprocess.Popen([sys.executable, "-m", "zero2llm.cli", *words], stdout=out, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(child.pid, 0)
    if status:
        raise RuntimeError(f"zero2llm {' '.join(words)} failed:\n{log.read_text()[-2000:]}")
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def files_of(group: str, args: argparse.Namespace) -> tuple[Path, Path]:
    """Training and held-out data of a group."""
    tasks = GROUPS[group].tasks
    if not tasks:
        return args.quickstart / "data" / "preferences.jsonl", args.quickstart / "data" / "preferences-valid.jsonl"
    path = args.out / "data" / f"{group}.jsonl"
    if not path.is_file():
        zero2llm(["data", "tasks", *tasks, "--out", str(path)], args.out / "data" / f"{group}.log")
    return path, path.with_name(f"{group}-valid.jsonl")


def train(run: Run, args: argparse.Namespace) -> dict:
    group, (data, valid) = GROUPS[run.group], files_of(run.group, args)
    changes = [f"out={run.folder}", f"init={args.quickstart / 'sft'}", f"data.train=[{data}]", f"data.valid=[{valid}]", f"seed={run.seed}"]
    changes += group.changes
    if not group.tasks:
        changes.append(f"eval.every={load_recipe(run.recipe).fit.steps // POINTS}")
    if run.recipe == "kto":  # its own metrics know no pairs: each step is kept, and some are measured
        changes.append("save={every_s: 0, keep: 1000}")
    began = time.perf_counter()
    cpu, peak = zero2llm(["train", run.recipe, *changes, "--quiet", "--overwrite"], run.folder.with_suffix(".log"))
    return {"cpu_s": cpu, "peak_mb": peak, "wall_s": time.perf_counter() - began}


def curve(run: Run, pairs) -> list[tuple[int, float]]:
    """(step, share) of the held-out set."""
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    found = [(line["step"], line) for line in lines if line["kind"] == "valid"]
    if run.recipe != "kto":
        return [(step, line[GROUPS[run.group].measure]) for step, line in found]
    from zero2llm.train.checkpoint import candidates

    saved = {int(read_json(path / "manifest.json")["step"]): path for path in candidates(run.folder)}
    return [(step, pairs(saved[step] if step else None)) for step, _ in found]


# ------------------------------------------------------------------------------------------------- checkpoints


class Judge:
    """What a checkpoint can do, measured on the same held-out questions and pairs for all."""

    def __init__(self, args: argparse.Namespace):
        from zero2llm.evals.tasks.generate import EASY, generate

        self.args, self.items = args, generate(EASY, KEPT_ITEMS, 2, "test")

    def kept(self, path: Path) -> float:
        from zero2llm.lab.measure import task_accuracy
        from zero2llm.lab.talk import load_engine

        return task_accuracy(load_engine(path, "cpu", max_batch=256), self.items)["overall"].rate

    def pairs(self, path: Path | None) -> float:
        """Of None: the checkpoint that all began from."""
        from zero2llm.lab.measure import preference_rate
        from zero2llm.lab.sets import build_sets
        from zero2llm.lab.talk import load_engine
        from zero2llm.parallel.plan import World

        if path is None:
            return self.before("pairs", lambda: self.pairs(self.args.quickstart / "sft"))
        data, valid = files_of("preferences", self.args)
        recipe = load_recipe("dpo", [f"init={self.args.quickstart / 'sft'}", f"data.train=[{data}]", f"data.valid=[{valid}]"])
        engine = load_engine(path, "cpu")
        sets = build_sets(recipe, engine.tokenizer, self.args.out / "pairs", World())
        return preference_rate(engine.model, sets.valid(), micro_rows=64).rate

    def before(self, name: str, measure) -> float:
        path = self.args.out / f"before-{name}.json"
        if not path.is_file():
            write_atomic(path, json.dumps(measure()))
        return read_json(path)


def finish(run: Run, args: argparse.Namespace, judge: Judge) -> dict:
    """Train and measure one run, once."""
    if run.record.is_file():
        return read_json(run.record)
    used = train(run, args)
    record = {"group": run.group, "recipe": run.recipe, "seed": run.seed, **used, "curve": curve(run, judge.pairs)}
    if run.group != "reward-model":  # it writes no answers
        record["kept"] = judge.kept(run.folder)
    write_atomic(run.record, json.dumps(record))
    shutil.rmtree(run.folder / "checkpoints")
    print(f"{run.group} {run.recipe} seed {run.seed}: {100 * record['curve'][0][1]:.1f} % -> {100 * record['curve'][-1][1]:.1f} %, "
          f"{used['cpu_s']:.0f} CPU s", flush=True)  # fmt: skip
    return record


# ---------------------------------------------------------------------------------------------- table, pictures


def spread(values: list[float], digits: int = 1) -> str:
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(group: str, runs: dict[str, list[dict]], kept_before: float) -> str:
    """Markdown; percentages are means over the seeds, with the least and the most."""
    head = ["recipe", "needs", f"{GROUPS[group].title}: before", "after", "gain", f"other families (%), {100 * kept_before:.1f} before", "CPU s", "MB"]
    lines = ["| " + " | ".join(head) + " |", "|---|---|---:|---:|---:|---:|---:|---:|"]
    for recipe, found in runs.items():
        before, after = ([100 * run["curve"][at][1] for run in found] for at in (0, -1))
        kept = spread([100 * run["kept"] for run in found]) if "kept" in found[0] else ""
        gain = statistics.mean(after) - statistics.mean(before)
        cost = [f"{statistics.mean(run[key] for run in found):.0f}" for key in ("cpu_s", "peak_mb")]
        cells = [f"`{recipe}`", GROUPS[group].needs[recipe], f"{statistics.mean(before):.1f}", spread(after), f"{gain:+.1f}", kept, *cost]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


@charts.drawn
def picture(runs: dict[str, list[dict]], title: str):
    """One panel a recipe: the mean of the seeds, and the band from the least to the most. Of online recipes over the answers that a
    rollout keeps, since some make two steps of one rollout."""
    from matplotlib.figure import Figure

    across = min(len(runs), 3)
    down = -(-len(runs) // across)
    fig = Figure(figsize=(max(2.3 * across, 3.4), 1.55 * down + 0.35))
    axes = fig.subplots(down, across, squeeze=False, sharey=True).flatten()
    floor = 50 if all(value >= 0.5 for found in runs.values() for run in found for _, value in run["curve"]) else 0
    for ax, (recipe, found) in zip(axes[: len(runs)], runs.items(), strict=True):
        steps = [step * found[0]["answers"] for step, _ in found[0]["curve"]]
        values = [[100 * run["curve"][at][1] for run in found] for at in range(len(steps))]
        paint = charts.PAINT["blue"]
        ax.fill_between(steps, list(map(min, values)), list(map(max, values)), color=paint, alpha=0.25, lw=0)
        ax.plot(steps, list(map(statistics.mean, values)), color=paint, marker="o", ms=3)
        ax.set_title(recipe)
        ax.set_ylim(floor - 3, 103)
        ax.set_yticks((floor, (floor + 100) / 2, 100))
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.locator_params(axis="x", nbins=4, integer=True)
    for ax in axes[len(runs) :]:
        ax.set_visible(False)
    unit = "optimizer step" if found[0]["answers"] == 1 else "answers sampled"
    fig.supxlabel(f"{unit}{chr(10) if across == 1 else '; '}line = mean of {len(next(iter(runs.values())))} seeds, band = least to most", fontsize=9.5, color=charts.PAINT["soft"])
    fig.supylabel(title, fontsize=9.5, color=charts.PAINT["soft"])
    return fig


def answers(recipe: str, group: Group) -> int:
    """Answers sampled for one optimizer step; 1 where nothing is sampled."""
    cfg = load_recipe(recipe, list(group.changes)).rollout
    return 1 if cfg is None else cfg.prompts * cfg.samples // (cfg.minibatches * cfg.epochs)


def write(args: argparse.Namespace, records: list[dict], judge: Judge) -> None:
    kept = judge.before("kept", lambda: judge.kept(args.quickstart / "sft"))
    about = ", ".join(f"{key} {value}" for key, value in machine().items())
    text = [f"{args.seeds} seeds; {about}\n"]
    for group, kind in GROUPS.items():
        per_step = {name: answers(name, kind) for name in kind.needs}
        runs = {name: [{**r, "answers": per_step[name]} for r in records if (r["group"], r["recipe"]) == (group, name)] for name in kind.needs}
        runs = {name: found for name, found in runs.items() if found}
        if not runs:
            continue
        text.append(f"## {group}\n\n{table(group, runs, kept)}")
        label = f"{kind.title} of {group} recipes during training"
        write_atomic(args.out / f"{group}.svg", standalone(picture(runs, kind.title, label=label)))
    write_atomic(args.out / "gains.json", json.dumps({"kept_before": kept, "runs": records}, indent=1))
    write_atomic(args.out / "gains.md", "\n".join(text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quickstart", type=Path, default=Path("quickstart"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--groups", default=",".join(GROUPS))
    parser.add_argument("--recipes", help="names, separated by commas; all if left out")
    args = parser.parse_args()
    args.out, args.quickstart = args.out.resolve(), args.quickstart.resolve()
    if unknown := set(args.groups.split(",")) - set(GROUPS):
        parser.error(f"--groups: {', '.join(sorted(unknown))} is unknown; there are: {', '.join(GROUPS)}")
    wanted = None if args.recipes is None else args.recipes.split(",")
    judge, records = Judge(args), []
    for group in args.groups.split(","):
        for recipe in GROUPS[group].needs:
            for seed in range(1, args.seeds + 1):
                if wanted is None or recipe in wanted:
                    records.append(finish(Run(group, recipe, seed, args.out / group / f"{recipe}-{seed}"), args, judge))
    write(args, records, judge)
    print((args.out / "gains.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
