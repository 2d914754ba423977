"""Pictures of a pile of documents: what each step keeps, lengths, shares, Zipf's line. Drawn as `charts` draws all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zero2llm.lab.charts import PAINT, columns, drawn, figure, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABEL = 22  # letters of a step's or language's name beside its bar


@dataclass(frozen=True)
class Kept:
    """One quantity along the funnel: what is there at the start and after each step."""

    name: str
    colour: str
    values: Sequence[float]
    text: Callable[[float], str]


def label(text: str, most: int = LABEL) -> str:
    """On one line and cut to fit beside a chart."""
    text = " ".join(text.split())
    cut = text
    while columns(cut) > most:
        cut = cut.removesuffix("…")[:-1] + "…"
    return cut


@drawn
def funnel_bars(names: Sequence[str], series: Sequence[Kept]) -> Figure:
    """A group of bars for each step: what is left in colour, what the step took pale beside it."""
    n, thick = len(series), 0.84 / len(series)
    fig, (ax,) = figure(0.55 + len(names) * (0.14 + 0.2 * n))
    for i, kept in enumerate(series):
        top = max(kept.values, default=0) or 1
        at = [row + (i - (n - 1) / 2) * thick for row in range(len(names))]
        shares = [value / top for value in kept.values]
        before = [shares[0], *shares[:-1]] if shares else []
        ax.barh(at, before, height=thick * 0.86, color=PAINT[kept.colour], alpha=0.22)
        ax.barh(at, shares, height=thick * 0.86, color=PAINT[kept.colour], label=kept.name)
        for y, value, share, was in zip(at, kept.values, shares, before, strict=True):
            text = f"{kept.text(value)} · {percent(value / (kept.values[0] or 1))}"
            ax.text(max(share, was) + 0.012, y, text, va="center", fontsize=9, color=PAINT["soft"])
    _rows(ax, names, 1.42)
    fig.legend(loc="outside upper left", ncols=n)
    return fig


@drawn
def share_bars(names: Sequence[str], series: Sequence[tuple[str, str, Sequence[float]]], text: Callable[[float], str]) -> Figure:
    """Horizontal bars, one group a name: (name, colour, values) side by side."""
    n, thick = len(series), 0.8 / len(series)
    fig, (ax,) = figure(0.5 + len(names) * (0.14 + 0.2 * n) + (0.25 if n > 1 else 0))
    top = max((v for _, _, values in series for v in values), default=0.0) or 1.0
    for i, (name, colour, values) in enumerate(series):
        at = [row + (i - (n - 1) / 2) * thick for row in range(len(names))]
        ax.barh(at, values, height=thick * 0.84, color=PAINT[colour], label=name)
        for y, value in zip(at, values, strict=True):
            ax.text(value + 0.012 * top, y, text(value), va="center", fontsize=9, color=PAINT["soft"])
    _rows(ax, names, 1.28 * top)
    if n > 1:
        fig.legend(loc="outside upper left", ncols=n)
    return fig


def _rows(ax: Axes, names: Sequence[str], right: float) -> None:
    ax.set_yticks(range(len(names)), [label(name) for name in names], color=PAINT["ink"])
    ax.set(xlim=(0, right), ylim=(len(names) - 0.45, -0.55), xticks=[])
    ax.grid(False)
    ax.spines.left.set_visible(True)
    ax.spines.bottom.set_visible(False)


@drawn
def length_lines(edges: Sequence[float], series: Sequence[tuple[str, str, Sequence[float]]]) -> Figure:
    """Share of documents in each bin of length, on a logarithmic axis; the first of several is drawn as an area."""
    fig, (ax,) = figure(2.7)
    used = [i for _, _, counts in series for i, n in enumerate(counts) if n] or [1]
    first, last = max(min(used), 1), max(used)
    left = [max(e, 0.7) for e in edges[first : last + 1]]  # the bin of empty texts has no place on such an axis
    right = [*edges[first + 1 : last + 1], edges[last + 1] if last + 1 < len(edges) else 2 * edges[-1]]
    for i, (name, colour, counts) in enumerate(series):
        total = sum(counts) or 1
        y = [n / total for n in counts[first : last + 1]]
        if i == 0:
            ax.stairs(y, [*left, right[-1]], fill=True, color=PAINT[colour], alpha=0.35 if len(series) > 1 else 0.9, label=name)
        else:
            ax.stairs(y, [*left, right[-1]], color=PAINT[colour], lw=1.9, label=name)
    ax.set_xscale("log")
    ax.minorticks_off()
    ax.xaxis.set_major_formatter(lambda value, _: short(value))
    ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    ax.set_ylim(bottom=0)
    ax.set_xlabel("characters in a document")
    if len(series) > 1:
        fig.legend(loc="outside upper left", ncols=2)
    return fig


@drawn
def zipf_lines(series: Sequence[tuple[str, str, dict]]) -> Figure:
    """Count against rank, both logarithmic; dashed: Zipf's law through the most frequent of the last."""
    fig, (ax,) = figure(3.1)
    for name, colour, line in series:
        ax.plot(line["rank"], line["count"], color=PAINT[colour], label=name)
    rank, top = series[-1][2]["rank"], series[-1][2]["count"][0]
    ax.plot([1, min(rank[-1], top)], [top, max(top / rank[-1], 1)], color=PAINT["grey"], lw=1.1, ls=(0, (4, 3)), label="Zipf's law")
    ax.set(xscale="log", yscale="log", xlabel="rank")
    ax.set_title("times that it stands there", color=PAINT["soft"])
    ax.minorticks_off()
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(lambda value, _: short(value))
    fig.legend(loc="outside upper left", ncols=3)
    return fig


def percent(rate: float) -> str:
    """Short, and never a rounded lie: what is not all is not 100 %, what is something is not 0 %."""
    if 0 < abs(rate) < 0.0005:
        return "< 0.1 %"
    if 0.9995 <= rate < 1:
        return "> 99.9 %"
    return f"{100 * rate:.1f} %" if rate != round(rate, 2) or 0.99 < rate < 1 else f"{100 * rate:.0f} %"
