"""Charts of a report: matplotlib figures as inline SVG that takes its colours and fonts from the page around it.

Each drawing function takes plain numbers and `label` (what a screen reader says) and returns markup. Colours are drawn
as placeholders and replaced by CSS variables, so one picture serves light and dark; text stays text, in the reader's
fonts. matplotlib is imported when the first chart is drawn.
"""

from __future__ import annotations

import functools
import hashlib
import io
import math
import re
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAINT = {"ink": "#0a0a01", "soft": "#0a0a02", "grid": "#0a0a03", "grey": "#0a0a04", "blue": "#0a0a05",
         "clay": "#0a0a06", "green": "#0a0a07", "plum": "#0a0a08"}  # fmt: skip
MAP_RGB = (0.27, 0.49, 0.73)  # of attention maps: a blue that reads on white and on near-black; weight = opacity
WIDTH = 4.6  # inches: a phone's width in points, so that text keeps its size there
POINTS = 240  # most points that a line keeps


@dataclass(frozen=True)
class Line:
    """One curve. `faint` = the raw values behind a smoothed line; `dots` = few points, each marked."""

    x: Sequence[float]
    y: Sequence[float]
    colour: str = "blue"
    name: str = ""
    faint: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Mark:
    """A horizontal line to compare with: the score of a simpler model, or chance."""

    y: float
    name: str


def finite(x: Sequence, y: Sequence) -> tuple[list[float], list[float]]:
    """The points whose value is a finite number."""
    kept = [(a, b) for a, b in zip(x, y, strict=True) if isinstance(b, int | float) and math.isfinite(b)]
    return [float(a) for a, _ in kept], [float(b) for _, b in kept]


def thin(x: Sequence[float], y: Sequence[float], most: int = POINTS) -> tuple[list[float], list[float]]:
    """At most ``most`` points, each the mean of an equal share of the originals."""
    step = math.ceil(len(x) / most) or 1
    mean = lambda values: [
        sum(part) / len(part) for part in (values[i : i + step] for i in range(0, len(values), step))
    ]
    return mean(x), mean(y)


def smooth(y: Sequence[float], share: float = 0.04) -> list[float]:
    """Mean over a window of ``share`` of the run on either side, shorter near the ends: no lag behind the curve."""
    reach = [min(int(share * len(y)), i, len(y) - 1 - i) for i in range(len(y))]
    return [sum(y[i - r : i + r + 1]) / (2 * r + 1) for i, r in enumerate(reach)]


def drawn(draw: Callable[..., Figure]) -> Callable[..., Markup]:
    """Run a drawing function inside the report's style; its figure becomes inline SVG."""

    @functools.wraps(draw)
    def chart(*args, label: str, **options) -> Markup:
        import matplotlib

        with matplotlib.rc_context(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")  # measured only: the reader's font draws it
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(_style())
            file = io.StringIO()
            draw(*args, **options).savefig(file, format="svg", transparent=True)
        return _inline(file.getvalue(), label)

    return chart


def _style() -> dict:
    ink, soft, grid = PAINT["ink"], PAINT["soft"], PAINT["grid"]
    return {
        "svg.fonttype": "none", "svg.hashsalt": "zero2llm", "text.parse_math": False, "axes.unicode_minus": False,
        "font.size": 10.5, "axes.titlesize": 10.5, "axes.titlelocation": "left", "axes.titlecolor": ink, "axes.titlepad": 8,
        "text.color": ink, "axes.labelcolor": soft, "xtick.labelcolor": soft, "ytick.labelcolor": soft,
        "xtick.color": grid, "ytick.color": grid, "axes.edgecolor": grid, "axes.linewidth": 0.8,
        "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "ytick.major.size": 0,
        "axes.grid": True, "axes.grid.axis": "y", "grid.color": grid, "grid.linewidth": 0.8, "axes.axisbelow": True,
        "legend.frameon": False, "legend.fontsize": 10.5, "legend.handlelength": 1.4, "legend.borderaxespad": 0,
        "lines.linewidth": 1.9, "lines.solid_capstyle": "round", "figure.constrained_layout.use": True,
    }  # fmt: skip


def _inline(svg: str, label: str) -> Markup:
    """A standalone SVG file as part of a page: no addresses, no fixed size, unique ids, the page's colours and fonts."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL).replace(
        "xlink:href", "href"
    )
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    prefix = "c" + hashlib.sha256((label + svg).encode()).hexdigest()[:8]
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="{prefix}{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    for name, colour in PAINT.items():
        svg = svg.replace(colour, f"var(--{name})")
    name, box = escape(label), re.search(r'viewBox="[^"]+"', svg).group()
    head = f'<svg class="chart" role="img" aria-label="{name}" {box}><title>{name}</title>'
    return Markup(re.sub(r"\s*\n\s*", "\n", re.sub(r"<svg[^>]*>", lambda _: head, svg, count=1)))


@drawn
def curves(lines: Sequence[Line], marks: Sequence[Mark] = (), unit: str = "") -> Figure:
    """Loss of one stage: raw and smoothed training, validation, and marks to beat."""
    fig, (ax,) = figure(3.0 + 0.25 * math.ceil(len(marks) / 2))
    for line in lines:
        _plot(ax, line)
    for i, mark in enumerate(sorted(marks, key=lambda m: -m.y)):  # named in the legend: close lines leave no room
        dash = (0, ((5, 3), (1.5, 2), (8, 2, 1.5, 2))[i % 3])
        ax.axhline(mark.y, color=PAINT["plum"], lw=1.2, ls=dash, label=f"{mark.name} {mark.y:.2f}")
    ax.set_xlabel("step")
    ax.locator_params(axis="x", integer=True)
    ax.set_title(unit, color=PAINT["soft"])
    fig.legend(loc="outside upper left", ncols=2)
    return fig


@drawn
def panels(rows: Sequence[tuple[str, Sequence[Line]]], zero: bool = True) -> Figure:
    """Small multiples: one panel per stage (title, lines), each with its own scale."""
    fig, axes = figure(1.9, len(rows))
    for ax, (title, lines) in zip(axes, rows, strict=True):
        for line in lines:
            _plot(ax, line)
        ax.set_title(title)
        if zero:
            ax.set_ylim(0, 1.08 * max(v for line in lines for v in line.y) or 1)
        ax.locator_params(axis="x", nbins=3, integer=True)
        ax.locator_params(axis="y", nbins=4)
        ax.yaxis.set_major_formatter(lambda value, _: short(value))
        if any(line.name for line in lines):
            ax.legend(fontsize=9.5, labelspacing=0.2)
    return fig


@drawn
def bars(labels: Sequence[str], series: Sequence[tuple[str, str, Sequence[float]]], text: Callable[[float], str],
         most: float | None = None, mark: Mark | None = None) -> Figure:  # fmt: skip
    """Horizontal bars, the first label on top; ``series`` = (name, colour or one colour per bar, values) side by side."""
    n, thick = len(series), 0.8 / len(series)
    fig, (ax,) = figure(0.5 + len(labels) * (0.12 + 0.2 * max(n, 1.4)) + (0.25 if n > 1 else 0))
    top = most or max([v for _, _, values in series for v in values], default=0.0) or 1.0
    for i, (name, colour, values) in enumerate(series):
        at = [row + (i - (n - 1) / 2) * thick for row in range(len(labels))]
        paint = [PAINT[c] for c in ([colour] * len(values) if isinstance(colour, str) else colour)]
        ax.barh(at, values, height=thick * 0.84, color=paint, label=name)
        for y, value in zip(at, values, strict=True):
            ax.text(value + 0.012 * top, y, text(value), va="center", fontsize=9.5, color=PAINT["soft"])
    if mark:
        ax.axvline(mark.y, color=PAINT["plum"], lw=1.1, ls=(0, (4, 3)))
        ax.set_xlabel(mark.name, color=PAINT["plum"])
    ax.set_yticks(range(len(labels)), labels, color=PAINT["ink"])
    ax.set(xlim=(0, top * 1.16), ylim=(len(labels) - 0.45, -0.55), xticks=[])
    ax.grid(False)
    ax.spines.left.set_visible(True)
    ax.spines.bottom.set_visible(False)
    if n > 1:
        fig.legend(loc="outside upper left", ncols=n)
    return fig


@drawn
def attention_map(weights: Sequence[Sequence[float]], tokens: Sequence[str]) -> Figure:
    """One head: row = the token that looks, column = where it looks; opacity = square root of the weight."""
    import numpy as np
    from matplotlib.figure import Figure

    n, names = len(tokens), [brief(token) for token in tokens]
    size = min(9.5, 160 / n)
    edge = 0.05 + max(map(columns, names)) * 0.6 * size / 245  # 245 points = 3.4 inches
    fig = Figure(figsize=(3.4, 3.4), layout="none")
    ax = fig.add_axes((edge, 0.01, 0.99 - edge, 0.99 - edge))
    image = np.empty((n, n, 4))
    image[..., :3], image[..., 3] = MAP_RGB, np.sqrt(np.clip(np.asarray(weights, float), 0, 1))
    ax.imshow(image, interpolation="none", aspect="auto")
    ax.xaxis.tick_top()
    ax.set_xticks(range(n), names, rotation=90, rotation_mode="anchor", ha="left", va="center", fontsize=size)
    ax.set_yticks(range(n), names, fontsize=size)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_ticks([i - 0.5 for i in range(n + 1)], minor=True)  # the lines between squares
    ax.tick_params(which="both", length=0, pad=4)
    ax.grid(False)
    ax.grid(which="minor", axis="both", linewidth=0.5)
    ax.spines[:].set(visible=True, linewidth=0.5)
    return fig


def visible(text: str) -> str:
    """Spaces and line ends as signs, other control characters escaped."""
    signs = text.replace(" ", "·").replace("\n", "↵").replace("\t", "⇥")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in signs)


def columns(text: str) -> int:
    """Width in Latin letters; a Chinese character is two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def brief(token: str, most: int = 9) -> str:
    """A token as an axis label, at most ``most`` letters wide."""
    text = visible(token)
    while columns(text) > most:
        text = text.removesuffix("…")[:-1] + "…"
    return text


def short(value: float) -> str:
    """A tick label in few characters: 12000 -> 12k, 0.0003 -> 3e-4."""
    if value and abs(value) < 0.001:
        return re.sub(r"e-0?", "e-", f"{value:.2g}")
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def figure(height: float, n: int = 1) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    fig = Figure(figsize=(WIDTH, height))
    return fig, list(fig.subplots(1, n, squeeze=False)[0])


def _plot(ax: Axes, line: Line) -> None:
    style = {"lw": 0.8, "alpha": 0.35} if line.faint else {}
    if line.dots or len(line.x) < 8:
        style |= {"marker": "o", "ms": 3.5}
    ax.plot(line.x, line.y, color=PAINT[line.colour], label=line.name or None, **style)
