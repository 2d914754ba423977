"""What a student of 0.29 x its teacher's size gains from it: against the same student without one, on the same tokens, several seeds.

    zero2llm quickstart
    python bench/distilled.py --out runs/distilled                      all of it; what is finished is not run again

    text       from nothing, on the teacher's pretraining text:   alone (labels), distill-pretrain (forward KL)
    answers    from nothing, on 1,000 labelled conversations:     alone (labels), distill (cached top 64), hidden (hidden states too),
               sequence (what the teacher answered to 12,000 questions, as labels)
    own        goes on from the student of `answers/distill`:     more (labels), gkd, minillm (what it writes itself, to 12,000 questions)

Held-out nats a token, distance from the teacher (KL, nats a token, of the same held-out rows for all), and of the last two groups
exact answers to held-out questions. Each run is `zero2llm train` in a process of its own; CPU seconds and peak memory are its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import statistics
import time
from pathlib import Path

from gains import Judge, spread, zero2llm
from results import machine

from zero2llm.core.files import read_json, write_atomic
from zero2llm.lab import charts
from zero2llm.lab.arena_page import standalone

LABELS = "objective.alpha=0"


@dataclasses.dataclass(frozen=True)
class Arm:
    recipe: str
    changes: tuple[str, ...] = ()


GROUPS = {
    "text": {"alone": Arm("distill-pretrain", (LABELS,)), "distill": Arm("distill-pretrain")},
    "answers": {"alone": Arm("distill", (LABELS, "teacher.cache=null")), "distill": Arm("distill"), "hidden": Arm("hidden"),
                "sequence": Arm("distill", (LABELS, "teacher.cache=null", "data.max_documents=null"))},  # fmt: skip
    "own": {
        "more": Arm("gkd", ("objective={kind: distill, alpha: 0.0}", "data.reads=conversations", "data.max_documents=1000", "rollout=null",
                            "batch_tokens=4096")),  # fmt: skip
        "gkd": Arm("gkd"),
        "minillm": Arm("minillm"),
    },
}
TITLES = {"text": "next tokens of text", "answers": "conversations, from nothing", "own": "conversations, going on"}


def changes_of(group: str, name: str, seed: int, args: argparse.Namespace) -> list[str]:
    arm, folder = GROUPS[group][name], args.out / group / f"{name}-{seed}"
    teacher = args.quickstart / ("pretrain" if group == "text" else "sft")
    changes = [f"out={folder}", f"seed={seed}", f"teacher.path={teacher}", "eval.prompts=[]", *arm.changes]
    if group != "text":
        data = args.quickstart / "data"
        train = args.out / "answers.jsonl" if name == "sequence" else data / "sft.jsonl"
        changes += [f"data.train=[{train}]", f"data.valid=[{data / 'sft-valid.jsonl'}]"]
    if arm.recipe == "distill" and name == "distill":
        changes.append(f"teacher.cache={args.out / 'teacher'}")
    if group == "own":
        changes.append(f"init={args.out / 'answers' / f'distill-{seed}'}")
    return changes


def distance(run: Path, teacher: Path, recipe: str, changes: list[str]) -> float:
    """Mean KL(teacher || student) over the recipe's held-out rows, at temperature 1."""
    from zero2llm.lab.recipe import load_recipe
    from zero2llm.lab.sets import build_sets
    from zero2llm.lab.talk import find_checkpoint
    from zero2llm.parallel.plan import World
    from zero2llm.tokenizers.tokenizer import Tokenizer
    from zero2llm.train.distill.logits import DistillConfig
    from zero2llm.train.distill.teacher import load_teacher
    from zero2llm.train.evaluate import evaluate

    found = find_checkpoint(run)
    tokenizer = Tokenizer.load(found.tokenizer_dir)
    sets = build_sets(load_recipe(recipe, changes), tokenizer, run, World())
    objective = DistillConfig(alpha=1.0, temperature=1.0).build(load_teacher(teacher, tokenizer)[0])
    return evaluate(found.load_model(), objective, sets.valid(), micro_rows=16)["divergence"]


def finish(group: str, name: str, seed: int, args: argparse.Namespace, judge: Judge) -> dict:
    """Train and measure one student, once. Checkpoints of `answers/distill` stay: `own` goes on from them."""
    arm, changes = GROUPS[group][name], changes_of(group, name, seed, args)
    run = args.out / group / f"{name}-{seed}"
    record = run.with_suffix(".json")
    if record.is_file():
        return read_json(record)
    if name == "sequence" and not (answers := args.out / "answers.jsonl").is_file():
        asked, log = args.quickstart / "data" / "sft.jsonl", args.out / "answers.log"
        spent, _ = zero2llm(["data", "answers", str(args.quickstart / "sft"), str(asked), "--out", str(answers), "--max-tokens", "64"], log)
        print(f"the teacher answered {asked}: {spent:.0f} CPU s", flush=True)
    began = time.perf_counter()
    cpu, peak = zero2llm(["train", arm.recipe, *changes, "--quiet", "--overwrite"], run.with_suffix(".log"))
    took = time.perf_counter() - began
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    curve = [(line["step"], line["valid_loss"]) for line in lines if line["kind"] == "valid"]
    made = {"group": group, "name": name, "seed": seed, "cpu_s": cpu, "peak_mb": peak, "wall_s": took, "curve": curve}
    teacher = args.quickstart / ("pretrain" if group == "text" else "sft")
    made |= {"loss": curve[-1][1], "distance": distance(run, teacher, arm.recipe, changes)}
    if group != "text":
        made["exact"] = judge.kept(run)
    write_atomic(record, json.dumps(made))
    if (group, name) != ("answers", "distill"):
        shutil.rmtree(run / "checkpoints")
    exact = f", {100 * made['exact']:.1f} % exact" if "exact" in made else ""
    print(f"{group} {name} seed {seed}: {made['loss']:.4f} nats, {made['distance']:.4f} from the teacher{exact}, {cpu:.0f} CPU s", flush=True)
    return made


def table(group: str, runs: dict[str, list[dict]]) -> str:
    lines = ["| student | held-out nats | from the teacher | exact answers (%) | CPU s | MB |", "|---|---:|---:|---:|---:|---:|"]
    for name, found in runs.items():
        exact = spread([100 * run["exact"] for run in found]) if "exact" in found[0] else ""
        mean = lambda key, found=found: f"{statistics.mean(run[key] for run in found):.0f}"
        cells = [name, spread([r["loss"] for r in found], 3), spread([r["distance"] for r in found], 3), exact, mean("cpu_s"), mean("peak_mb")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


@charts.drawn
def picture(groups: dict[str, dict[str, list[dict]]]):
    """One panel a group: mean of the seeds, and the band from the least to the most."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(2.9 * len(groups), 2.4))
    paints = [charts.PAINT[name] for name in ("grey", "blue", "clay", "green")]
    for ax, (group, runs) in zip(fig.subplots(1, len(groups), squeeze=False)[0], groups.items(), strict=True):
        for paint, (name, found) in zip(paints[: len(runs)], runs.items(), strict=True):
            points = [[point for point in run["curve"] if point[0]] for run in found] if group != "own" else [run["curve"] for run in found]
            steps = [step for step, _ in points[0]]
            values = [[one[at][1] for one in points] for at in range(len(steps))]
            ax.fill_between(steps, list(map(min, values)), list(map(max, values)), color=paint, alpha=0.25, lw=0)
            ax.plot(steps, list(map(statistics.mean, values)), color=paint, marker="o", ms=3, label=name)
        ax.set_title(TITLES[group])
        ax.legend(fontsize=8)
        ax.locator_params(axis="x", nbins=4, integer=True)
    seeds = len(next(iter(next(iter(groups.values())).values())))
    fig.supxlabel(f"optimizer step; line = mean of {seeds} seeds, band = least to most", fontsize=9.5, color=charts.PAINT["soft"])
    fig.supylabel("held-out nats a token", fontsize=9.5, color=charts.PAINT["soft"])
    return fig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quickstart", type=Path, default=Path("quickstart"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--groups", default=",".join(GROUPS))
    args = parser.parse_args()
    args.out, args.quickstart = args.out.resolve(), args.quickstart.resolve()
    if unknown := set(args.groups.split(",")) - set(GROUPS):
        parser.error(f"--groups: {', '.join(sorted(unknown))} is unknown; there are: {', '.join(GROUPS)}")
    judge, found = Judge(args), {}
    for seed in range(1, args.seeds + 1):
        for group in args.groups.split(","):
            for name in GROUPS[group]:
                found.setdefault(group, {}).setdefault(name, []).append(finish(group, name, seed, args, judge))
    about = ", ".join(f"{key} {value}" for key, value in machine().items())
    teacher = f"teacher: {100 * judge.kept(args.quickstart / 'sft'):.1f} % exact answers"
    text = [f"{args.seeds} seeds; {teacher}; {about}\n", *(f"## {group}\n\n{table(group, runs)}" for group, runs in found.items())]
    write_atomic(args.out / "distilled.svg", standalone(picture(found, label="held-out loss of students with and without a teacher")))
    write_atomic(args.out / "distilled.md", "\n".join(text))
    print((args.out / "distilled.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
