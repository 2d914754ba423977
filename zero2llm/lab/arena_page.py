"""What a comparison found: a Markdown table to keep in docs, a picture of it, and one page with charts."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from zero2llm.core.files import write_atomic
from zero2llm.lab import charts
from zero2llm.lab.recipe import Recipe

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Column:
    """One figure of a variant: how to get it from a run, and how to print mean and spread."""

    name: str
    get: Callable[[dict], float | None]
    show: Callable[[float], str]
    spread: bool = False


COLUMNS = (
    Column("bits/byte", lambda r: r["bpb"], lambda v: f"{v:.3f}", True),
    Column("at 2 x length", lambda r: r.get("bpb_2x"), lambda v: f"{v:.3f}", True),
    Column("recall", lambda r: r.get("recall"), lambda v: f"{v:.0%}"),
    Column("copy", lambda r: r.get("copy"), lambda v: f"{v:.0%}"),
    Column("tokens/s", lambda r: r["tokens_per_s"], lambda v: f"{v:,.0f}"),
    Column("peak MiB", lambda r: r["peak_mib"], lambda v: f"{v:,.0f}"),
    Column("state, KiB at 1,024", lambda r: r["state_bytes"]["1024"] / 1024, lambda v: f"{v:,.0f}"),
    Column("+ bytes a token", lambda r: (r["state_bytes"]["2048"] - r["state_bytes"]["1024"]) / 1024, lambda v: f"{v:,.0f}"),
    Column("parameters", lambda r: r["parameters"], lambda v: f"{v:,.0f}"),
)  # fmt: skip
MEANING = {
    "bits/byte": "bits for each byte of held-out text, lower is better; mean of the seeds ± standard deviation",
    "at 2 x length": "the same on rows twice as long as those of training: whether it extrapolates",
    "recall": "share of right answers in multi-query recall of 8 pairs (chance 3 %, one of the values shown 13 %), after a short training of its own with the first seed: how soon it is learned, not how much a mixer can hold",
    "copy": "share of right symbols when copying 16 (chance 2 %), likewise",
    "tokens/s": "of training, median step, median of the seeds, on the threads that one run had",
    "peak MiB": "most memory of the whole process (about 400 MiB of it Python and torch); on CUDA, of tensors there",
    "state, KiB at 1,024": "decoding state of one row after 1,024 tokens, 2 bytes a value (recurrent states 4)",
    "+ bytes a token": "by how much each further token lets the state grow; 0 = constant",
}


def write_pages(folder: Path, results: Sequence[dict], part: str, recipe: Recipe, failed: dict[str, str]) -> None:
    """``results.md``, ``chart.svg`` and ``report.html`` in ``folder``."""
    if not results:
        write_atomic(folder / "results.md", "".join(f"- {name} failed: {why}\n" for name, why in failed.items()))
        return
    groups = grouped(results)
    text = table(groups) + "".join(f"\n- {name} failed: {why}\n" for name, why in failed.items())
    write_atomic(folder / "results.md", text)
    label = f"held-out bits per byte of each {part}"
    picture = _loss_chart(groups, label=label)
    write_atomic(folder / "chart.svg", standalone(picture))
    sections = [("Loss", picture), ("Loss against speed", _speed_chart(groups, label="bits per byte against tokens/s")),
                ("Learning", _curve_chart(groups, label="held-out bits per byte during training"))]  # fmt: skip
    write_atomic(folder / "report.html", _html(part, recipe, groups, sections, failed))


def grouped(results: Sequence[dict]) -> dict[str, list[dict]]:
    """Runs of each variant, best mean loss first."""
    groups: dict[str, list[dict]] = {}
    for result in results:  # a variant that sees the future predicts what it was shown
        name = result["variant"] + (" (sees the future)" if result.get("leak", 0.0) > 1e-3 else "")
        groups.setdefault(name, []).append(result)
    return dict(sorted(groups.items(), key=lambda item: statistics.mean(r["bpb"] for r in item[1])))


def cell(column: Column, runs: Sequence[dict]) -> str:
    values = [value for value in map(column.get, runs) if value is not None]
    if not values:
        return "cannot" if column.name == "at 2 x length" else "not run"
    middle = statistics.mean if column.spread else statistics.median  # a busy minute slows one seed, not the median
    text = column.show(middle(values))
    return f"{text} ± {column.show(statistics.stdev(values))}" if column.spread and len(values) > 1 else text


def table(groups: dict[str, list[dict]]) -> str:
    """Markdown: one row a variant, then what the columns mean."""
    lines = ["| variant | " + " | ".join(c.name for c in COLUMNS) + " |", "|---|" + "---:|" * len(COLUMNS)]
    lines += [f"| {name} | " + " | ".join(cell(c, runs) for c in COLUMNS) + " |" for name, runs in groups.items()]
    return "\n".join([*lines, "", *(f"- **{name}**: {text}." for name, text in MEANING.items())]) + "\n"


def _spread(runs: Sequence[dict]) -> tuple[float, float]:
    values = [r["bpb"] for r in runs]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


@charts.drawn
def _loss_chart(groups: dict[str, list[dict]]) -> Figure:
    """One row a variant: every seed as a dot, mean and standard deviation."""
    fig, (ax,) = charts.figure(0.7 + 0.27 * len(groups))
    for row, runs in enumerate(groups.values()):
        mean, spread = _spread(runs)
        ax.plot([r["bpb"] for r in runs], [row] * len(runs), "o", ms=3.5, alpha=0.45, color=charts.PAINT["blue"])
        ax.errorbar(mean, row, xerr=spread, fmt="o", ms=5, capsize=3, color=charts.PAINT["clay"])
    ax.set_yticks(range(len(groups)), list(groups), color=charts.PAINT["ink"])
    ax.set_ylim(len(groups) - 0.5, -0.5)
    ax.grid(True, axis="x")
    ax.set_xlabel("bits per byte, mean ± deviation; pale = seeds")
    return fig


@charts.drawn
def _speed_chart(groups: dict[str, list[dict]]) -> Figure:
    fig, (ax,) = charts.figure(3.6)
    for name, runs in groups.items():
        x, y = statistics.median(r["tokens_per_s"] for r in runs), _spread(runs)[0]
        ax.plot(x, y, "o", ms=5, color=charts.PAINT["blue"])
        ax.annotate(name, (x, y), xytext=(4, 3), textcoords="offset points", fontsize=8, color=charts.PAINT["soft"])
    ax.set_xlabel("training tokens/s (right is faster)")
    ax.set_title("bits per byte (down is better)", color=charts.PAINT["soft"])
    return fig


@charts.drawn
def _curve_chart(groups: dict[str, list[dict]]) -> Figure:
    """Mean curve of the best four and the last; more lines than that tell nothing."""
    fig, (ax,) = charts.figure(3.4)
    names = list(groups)
    chosen = names if len(names) <= 5 else [*names[:4], names[-1]]
    for name, colour in zip(chosen, ("blue", "clay", "green", "plum", "grey"), strict=False):
        steps = [step for step, _ in groups[name][0]["curve"]]
        y = [statistics.mean(run["curve"][i][1] for run in groups[name]) for i in range(len(steps))]
        ax.plot(steps, y, marker="o", ms=3, color=charts.PAINT[colour], label=name)
    ax.set_xlabel("step")
    fig.legend(loc="outside upper left", ncols=3)
    return fig


def standalone(svg: str) -> str:
    """An inline chart as a file of its own: fixed colours on white, for pages that have no style sheet."""
    fixed = {"ink": "#1d2330", "soft": "#5d6675", "grid": "#dfe3ea", "grey": "#8a93a3", "blue": "#2f6db5",
             "clay": "#b5562f", "green": "#3f7f4f", "plum": "#7d4f8f"}  # fmt: skip
    text = re.sub(r"var\(--(\w+)\)", lambda m: fixed[m[1]], str(svg))
    style = 'xmlns="http://www.w3.org/2000/svg" style="background:#fff" font-family="sans-serif"'
    return text.replace("<svg ", f"<svg {style} ", 1) + "\n"


def _html(part: str, recipe: Recipe, groups: dict, sections: list, failed: dict[str, str]) -> str:
    import jinja2

    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    rows = [(name, [cell(c, runs) for c in COLUMNS]) for name, runs in groups.items()]
    n_seeds = max(len(runs) for runs in groups.values())
    return env.get_template("arena.html").render(
        part=part, columns=[c.name for c in COLUMNS], rows=rows, meaning=MEANING, sections=sections, failed=failed,
        tokens=recipe.fit.steps * recipe.batch_tokens, n_seeds=n_seeds, recipe=recipe,
    )  # fmt: skip
