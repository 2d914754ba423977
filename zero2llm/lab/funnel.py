"""The account of a data pipeline as one page: what came in, what each step took and why, what is left. No network, no scripts.

Reads the dict that the pipeline writes as funnel.json; a missing part is left out of the page.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from zero2llm.lab import data_charts
from zero2llm.lab.data_charts import Kept, percent
from zero2llm.lab.data_view import count, figure, n_bytes, render, view

if TYPE_CHECKING:
    from zero2llm.tokenizers.tokenizer import Tokenizer

SECTIONS = {  # id -> heading, the order of the page
    "funnel": "The funnel",
    "steps": "What each step did",
    "duplicates": "Duplicates",
    "pile": "The text, before and after",
    "frequencies": "Words and tokens, before and after",
    "splits": "Splits",
    "sources": "Sources",
    "bad": "Bad records",
    "recipe": "Recipe",
}
UNITS = ("documents", "bytes", "tokens")
GROUPS = ((2, 2), (3, 3), (4, 5), (6, 10), (11, 30), (31, 100), (101, 1000), (1001, None))  # sizes of duplicate groups


def funnel_page(funnel: dict, tokenizer: Tokenizer | None = None) -> str:
    """The whole page as HTML. With the ``tokenizer`` that counted, tokens are shown as text, otherwise by number."""
    steps = [step_view(step) for step in funnel.get("steps") or []]
    parts = {
        "funnel": funnel_chart(funnel),
        "steps": steps,
        "duplicates": [d for step in funnel.get("steps") or [] if (d := duplicates(step))],
        "splits": splits(funnel.get("splits") or {}),
        "sources": funnel.get("sources"),
        "bad": {"listed": funnel.get("bad_records") or [], "total": funnel.get("bad_total") or 0},
        "recipe": {"text": as_yaml(funnel.get("recipe")), "versions": funnel.get("versions") or {}},
    }
    named = [(name, colour, funnel[name]) for name, colour in (("before", "grey"), ("after", "blue")) if funnel.get(name)]
    pile = view(named, tokenizer)
    parts["pile"] = parts["frequencies"] = pile
    shown = [key for key in SECTIONS if (any(parts[key].values()) if isinstance(parts[key], dict) else parts[key])]
    head = {key: funnel.get(key) for key in ("title", "made", "seconds")} | {"tiles": tiles(funnel), "faults": faults(funnel)}
    return render("funnel.html", {"v": parts, "shown": shown, "sections": SECTIONS, "head": head})


def ends(funnel: dict) -> tuple[dict, dict] | None:
    """Sizes of what entered the first step and left the last."""
    if steps := funnel.get("steps"):
        return steps[0]["in"], steps[-1]["out"]
    if funnel.get("before") and funnel.get("after"):
        return funnel["before"], funnel["after"]
    return None


def tiles(funnel: dict) -> list[tuple[str, str, str]]:
    """The few numbers to read first: name, value, small print."""
    out = []
    if both := ends(funnel):
        first, last = both
        for unit, show in (("documents", count), ("bytes", n_bytes), ("tokens", count)):
            if last.get(unit) is not None and first.get(unit):
                out.append((f"{unit} kept", percent(last[unit] / first[unit]), f"{show(last[unit])} of {show(first[unit])}"))
    worth = [(funnel.get(name) or {}).get("bytes_per_token") for name in ("before", "after")]
    if all(worth):
        out.append(("bytes per token", f"{worth[1]:.2f}", f"before {worth[0]:.2f}"))
    if funnel.get("bad_total"):
        out.append(("bad records", count(funnel["bad_total"]), "left out, listed below"))
    return out


def faults(funnel: dict) -> list[str]:
    """Where the account does not add up: documents that no step, source or split answers for."""
    out, steps = [], funnel.get("steps") or []
    for one, two in zip(steps, steps[1:], strict=False):
        if one["out"]["documents"] != two["in"]["documents"]:
            out.append(f"{one['name']} gave {count(one['out']['documents'])} documents, {two['name']} got {count(two['in']['documents'])}")
    if steps and funnel.get("sources"):
        given = sum(source["documents"] for source in funnel["sources"])
        if given != steps[0]["in"]["documents"]:
            out.append(f"the sources gave {count(given)} documents, {steps[0]['name']} got {count(steps[0]['in']['documents'])}")
    if steps and funnel.get("splits"):
        written = sum(split["documents"] for split in funnel["splits"].values())
        if written != steps[-1]["out"]["documents"]:
            out.append(f"{steps[-1]['name']} gave {count(steps[-1]['out']['documents'])} documents, the splits hold {count(written)}")
    return out


def funnel_chart(funnel: dict) -> list[dict]:
    steps = funnel.get("steps") or []
    if not steps:
        return []
    names = ["as it came", *(step["name"] for step in steps)]
    along = lambda unit: [steps[0]["in"].get(unit), *(step["out"].get(unit) for step in steps)]
    series = [Kept("documents", "blue", along("documents"), data_charts.short), Kept("bytes", "clay", along("bytes"), n_bytes)]
    if all(value is not None for value in along("tokens")):
        series.append(Kept("tokens", "green", along("tokens"), data_charts.short))
    text = "; ".join(f"{name} {n:,} documents" for name, n in zip(names, along("documents"), strict=True))
    svg = data_charts.funnel_bars(names, series, label=f"Kept after each step: {text}")
    note = "Strong: what is left after the step, in parts of the most there ever was. Pale: what the step took. Percent: of what came in."
    return [figure(svg, "Kept after each step", note)]


def change(step: dict, unit: str) -> dict | None:
    """in, out and their difference, as text; None where the quantity was not counted."""
    first, last = step["in"].get(unit), step["out"].get(unit)
    if first is None or last is None:
        return None
    show, moved = (n_bytes if unit == "bytes" else count), last - first
    text = f"{'+' if moved > 0 else '−'}{show(abs(moved))}" if moved else "unchanged"
    return {"in": show(first), "out": show(last), "moved": text, "share": percent(abs(moved) / first) if moved and first else ""}


def step_view(step: dict) -> dict[str, Any]:
    """A row of the table of steps, and its removals, the most frequent reason first."""
    entered, reasons = step["in"]["documents"] or 1, step.get("removed") or {}
    order = sorted(reasons, key=lambda r: (-reasons[r]["documents"], -reasons[r]["bytes"], r))
    removed = [
        {
            "reason": reason,
            "documents": reasons[reason]["documents"],
            "bytes": n_bytes(reasons[reason]["bytes"]),
            "tokens": reasons[reason].get("tokens"),
            "share": percent(reasons[reason]["documents"] / entered),
            "examples": (reasons[reason].get("examples") or [])[:10],
        }
        for reason in order
    ]
    notes = sorted((step.get("notes") or {}).items(), key=lambda item: (-item[1], item[0]))
    seconds = step.get("seconds")
    return {
        "name": step["name"],
        "kind": step["kind"] if step.get("kind") not in (None, step["name"]) else "",
        "change": {unit: change(step, unit) for unit in UNITS},
        "notes": notes,
        "removed": removed,
        "seconds": "" if seconds is None else f"{seconds:.1f} s",
    }


def duplicates(step: dict) -> dict | None:
    """Groups of documents that are alike: how many of which size, and the largest."""
    groups = step.get("groups")
    if not groups or not groups.get("sizes"):
        return None
    sizes = {int(size): n for size, n in groups["sizes"].items()}
    rows = []
    for low, high in GROUPS:
        n = sum(n for size, n in sizes.items() if low <= size <= (high or size))
        if n:
            rows.append((f"{low:,} or more" if high is None else f"{low}" if low == high else f"{low:,} to {high:,}", n))
    names, values = [f"{name} alike" for name, _ in rows], [n for _, n in rows]
    text = ", ".join(f"{n} groups of {name}" for name, n in rows)
    svg = data_charts.share_bars(names, [("", "blue", values)], lambda v: f"{v:,.0f}", label=f"Sizes of groups, {step['name']}: {text}")
    total, alike = sum(sizes.values()), sum(size * n for size, n in sizes.items())
    note = f"{total:,} groups hold {alike:,} members; one of each group suffices, {alike - total:,} are repeats."
    return {"name": step["name"], "figure": figure(svg, "How many groups of which size", note), "largest": groups.get("largest") or []}


def splits(found: dict) -> list[dict]:
    total = {unit: sum(split.get(unit) or 0 for split in found.values()) or 1 for unit in UNITS}
    return [
        {
            "name": name,
            "documents": f"{count(split['documents'])} ({percent(split['documents'] / total['documents'])})",
            "bytes": f"{n_bytes(split['bytes'])} ({percent(split['bytes'] / total['bytes'])})",
            "tokens": count(split.get("tokens")),
        }
        for name, split in found.items()
    ]


def as_yaml(recipe: Any) -> str:
    import yaml

    return yaml.safe_dump(recipe, allow_unicode=True, sort_keys=False, width=100) if recipe else ""


def funnel_table(funnel: dict) -> Table:
    """The same for a terminal: one row a step, the reasons of its removals below its name."""
    table = Table(title=Text(funnel.get("title") or "funnel"), title_justify="left")
    table.add_column("step", overflow="fold")
    for name in ("documents", "removed", "share", "bytes", "tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    steps = funnel.get("steps") or []
    if steps:
        first = steps[0]["in"]
        table.add_row("as it came", count(first["documents"]), "", "", n_bytes(first["bytes"]), count(first.get("tokens")), style="dim")
    for step in steps:
        row = step_view(step)
        documents, size, tokens = (row["change"][unit] for unit in UNITS)
        table.add_row(Text(row["name"], style="bold"), documents["out"], documents["moved"] if documents["share"] else "", documents["share"], size["out"],
                      tokens["out"] if tokens else "–")  # fmt: skip
        for reason in row["removed"]:
            table.add_row(Text("  " + reason["reason"]), "", f"−{count(reason['documents'])}", reason["share"], f"−{reason['bytes']}", "", style="dim")
        if row["notes"]:
            table.add_row(Text("  changed: " + ", ".join(f"{name} {n:,}" for name, n in row["notes"])), "", "", "", "", "", style="dim")
    for name, split in (funnel.get("splits") or {}).items():
        cells = count(split["documents"]), "", "", n_bytes(split["bytes"]), count(split.get("tokens"))
        table.add_row(Text(f"→ {name}", style="green"), *cells, style="green")
    return table
