"""A pile of documents as a page shows it: charts and tables of one `Stats` dict, or of two side by side."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zero2llm.data.stats import UNKNOWN
from zero2llm.lab import charts, data_charts
from zero2llm.lab.data_charts import percent

if TYPE_CHECKING:
    from zero2llm.tokenizers.tokenizer import Tokenizer

LISTED = 30  # words, pairs and tokens of each table
LANGUAGES = 12  # with bars of their own; the rest together
NAMES = {"en": "English", "zh": "Chinese", UNKNOWN: "not identified"}
ZIPF = (
    "Words fall roughly along the dashed line; characters and tokens, of which there are few, hold up longer and then drop. "
    "A long shelf at the top is text that repeats."
)
Pile = tuple[str, str, dict]  # name ("before"), colour, Stats dict


def n_bytes(n: float) -> str:
    """1234567 -> 1.23 MB"""
    text = charts.short(n)
    return f"{text} B" if text[-1].isdigit() else f"{text[:-1]} {text[-1]}B"


def count(n: float | None) -> str:
    return "–" if n is None else f"{n:,}"


def ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def figure(svg: Any, title: str, note: str = "") -> dict:
    return {"svg": svg, "title": title, "note": note}


def view(piles: Sequence[Pile], tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Charts and tables; an empty value is a part that the counts do not hold."""
    piles = [pile for pile in piles if pile[2].get("documents")]
    if not piles:
        return {}
    return {
        "sizes": sizes(piles),
        "lengths": lengths(piles),
        "languages": languages(piles),
        "zipf": zipf(piles),
        "words": words(piles, "words"),
        "pairs": words(piles, "pairs"),
        "tokens": tokens(piles, tokenizer),
        "notes": notes(piles),
        "names": [name for name, _, _ in piles],
    }


def sizes(piles: Sequence[Pile]) -> list[tuple[str, list[str]]]:
    """Rows of the table of totals: what, and its value in each pile."""
    rows = {
        "documents": lambda s: count(s["documents"]),
        "bytes (UTF-8)": lambda s: f"{n_bytes(s['bytes'])} ({count(s['bytes'])})",
        "characters": lambda s: count(s["characters"]),
        "characters a document, mean": lambda s: count(round(s["characters"] / s["documents"])),
        "median, between": lambda s: "{} and {}".format(*map(count, median(s["lengths"]))),
        "tokens": lambda s: count(s["tokens"]),
        "bytes per token": lambda s: ratio(s["bytes_per_token"]),
        "different words": lambda s: count(s["distinct"]["words"]) + (" or more" if s["undercount"]["words"] else ""),
    }
    if all(s["tokens"] is None for _, _, s in piles):
        del rows["tokens"], rows["bytes per token"]
    return [(name, [show(s) for _, _, s in piles]) for name, show in rows.items()]


def median(lengths: dict) -> tuple[int, int]:
    """Edges of the bin that holds the median document."""
    seen = list(accumulate(lengths["counts"]))
    i = bisect_left(seen, max(seen[-1] / 2, 1))
    edges = lengths["edges"]
    return edges[i], edges[i + 1] if i + 1 < len(edges) else 10 * edges[i]


def lengths(piles: Sequence[Pile]) -> dict:
    series = [(name, colour, s["lengths"]["counts"]) for name, colour, s in piles]
    text = "; ".join(f"{name} half the documents are {median(s['lengths'])[0]:,} characters or longer" for name, _, s in piles)
    svg = data_charts.length_lines(piles[0][2]["lengths"]["edges"], series, label=f"Lengths of documents: {text}")
    return figure(svg, "How long the documents are", "Share of documents in each of five bins a decade.")


def languages(piles: Sequence[Pile]) -> list[dict]:
    """Share of the bytes in each language, and what a token is worth in it."""
    blind = [name for name, _, s in piles if not set(s["languages"]) - {UNKNOWN}]
    piles = [pile for pile in piles if pile[0] not in blind]
    total: dict[str, int] = {}
    for _, _, s in piles:
        for code, size in s["languages"].items():
            total[code] = total.get(code, 0) + size["bytes"]
    codes = sorted(total, key=lambda code: (-total[code], code))
    if not codes:
        return []
    top, rest = codes[:LANGUAGES], codes[LANGUAGES:]
    part = lambda s, some: sum(s["languages"].get(c, {"bytes": 0})["bytes"] for c in some) / (s["bytes"] or 1)
    names = [NAMES.get(c, c) for c in top] + ([f"{len(rest)} others"] if rest else [])
    series = [(name, colour, [part(s, [c]) for c in top] + ([part(s, rest)] if rest else [])) for name, colour, s in piles]
    text = "; ".join(f"{name} {', '.join(f'{n} {percent(v)}' for n, v in zip(names, values, strict=True))}" for name, _, values in series)
    svg = data_charts.share_bars(names, series, percent, label=f"Languages, share of bytes: {text}")
    note = f"Of the text {' and '.join(blind)} the languages were not identified." if blind else ""
    out = [figure(svg, "Languages, by share of bytes", note)]
    worth = lambda s, c: (size := s["languages"].get(c)) and size.get("tokens") and size["bytes"] / size["tokens"] or 0.0
    known = [c for c in top if any(worth(s, c) for _, _, s in piles)]
    if known:
        series = [(name, colour, [worth(s, c) for c in known]) for name, colour, s in piles]
        names = [NAMES.get(c, c) for c in known]
        text = "; ".join(f"{name} {', '.join(f'{n} {v:.2f}' for n, v in zip(names, vs, strict=True))}" for name, _, vs in series)
        svg = data_charts.share_bars(names, series, lambda v: f"{v:.2f}", label=f"Bytes per token: {text}")
        out.append(figure(svg, "Bytes per token", "More bytes in a token: shorter sequences for the same text."))
    return out


def zipf(piles: Sequence[Pile]) -> list[dict]:
    out = []
    for key, title in (("zipf", "Words and Chinese characters"), ("token_zipf", "Tokens")):
        series = [(name, colour, s[key]) for name, colour, s in piles if s.get(key, {}).get("rank")]
        if series:
            text = "; ".join(f"{name} the most frequent {line['count'][0]:,} times, {line['rank'][-1]:,} different" for name, _, line in series)
            svg = data_charts.zipf_lines(series, label=f"{title}, frequency against rank: {text}")
            out.append(figure(svg, title, ZIPF))
    return out


def words(piles: Sequence[Pile], key: str) -> list[list[tuple[str, int] | None]]:
    """Row r: the r-th most frequent of each pile."""
    return _side_by_side([[(word, n) for word, n in s.get(key, [])] for _, _, s in piles])


def tokens(piles: Sequence[Pile], tokenizer: Tokenizer | None) -> list[list[tuple[str, int] | None]]:
    show = (lambda i: f"token {i}") if tokenizer is None else (lambda i: f"{tokenizer.show(i)} ({i})")
    return _side_by_side([[(show(i), n) for i, n in s.get("token_counts", [])[:LISTED]] for _, _, s in piles])


def _side_by_side(lists: list[list[tuple[str, int]]]) -> list[list[tuple[str, int] | None]]:
    longest = min(max(map(len, lists)), LISTED)
    return [[found[r] if r < len(found) else None for found in lists] for r in range(longest)]


def notes(piles: Sequence[Pile]) -> list[str]:
    """What a reader must know to trust the counts."""
    out = [
        "Words are runs of letters, lower-cased; in Chinese and Japanese every character counts as one, and pairs are two "
        "characters that stand side by side, words or not."
    ]
    for name, _, s in piles:
        for kind, most in s["undercount"].items():
            if most:
                out.append(f"{name}: more different {kind} than are remembered; counts of rare ones are too low by at most {most:,}.".strip(": "))
    return out


def render(template: str, parts: dict[str, Any]) -> str:
    """A page of this folder, everything from outside escaped."""
    import jinja2

    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    env.filters |= {"n_bytes": n_bytes, "count": count, "percent": percent}
    return env.get_template(template).render(parts)
