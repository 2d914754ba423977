"""One page that shows what a run taught and what it cost: a single HTML file, no network, no scripts.

Reads `results` (plain data, see `build_report`) and each stage's metrics.jsonl; a missing part is left out of the page.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from markupsafe import Markup

from zero2llm.core.files import write_atomic
from zero2llm.lab import charts
from zero2llm.lab.attention import attention_view
from zero2llm.lab.charts import Line, Mark
from zero2llm.train.telemetry import MEANING, read_metrics

SECTIONS = {  # id -> heading, and what it shows in Chinese; the order of the page
    "checks": ("Thresholds", "门槛：每一步都要拿出证据"),
    "answers": ("The same questions, before and after", "同样的问题，训练前后怎样回答"),
    "loss": ("Loss", "损失：模型对下一个词有多意外，越低越好"),
    "exact": ("Exact match", "完全匹配率：答案与标准答案一字不差的比例"),
    "preference": ("Preference", "偏好：模型是否觉得更好的回答更可能"),
    "runs": ("Inside the runs", "训练过程：学习率、梯度、速度与内存"),
    "tokenizer": ("Tokenizer", "分词器：文字怎样变成编号"),
    "attention": ("Attention", "注意力：每个词往前看哪里"),
    "cost": ("What the model costs", "代价：参数、计算量与内存"),
    "time": ("Where the time went", "时间花在哪里"),
    "conversation": ("A conversation", "一段对话"),
    "commands": ("Go on", "接下来可以做什么"),
    "machine": ("Machine", "运行环境"),
}
STAGES = {"pretrain": "Pretraining", "sft": "SFT", "dpo": "DPO"}
TRIALS = (("before", "pretrained only", "grey"), ("sft", "after SFT", "blue"), ("dpo", "after DPO", "clay"))
PAIR = {"chosen": "blue", "rejected": "clay"}
INSIDE = {"lr": "Learning rate", "grad_norm": "Gradient norm", "tokens_per_s": "Tokens per second", "memory_mb": "Memory, MiB"}  # fmt: skip
COST = {  # key of the model's summary -> name, unit, meaning
    "parameters": ("parameters", "", "numbers that training changes"),
    "embedding_parameters": ("in embeddings", "", "one row per token of the vocabulary"),
    "context": ("context", " tokens", "the longest text that the model reads at once"),
    "forward_flops_per_token": ("FLOPs per token, forward", "", "to read one token; mean over a full context"),
    "train_flops_per_token": ("FLOPs per token, training", "", "the same with the backward pass"),
    "weight_bytes": ("weights", "B", "in fp32, as they are trained"),
    "gradient_bytes": ("gradients", "B", "one per weight, during training"),
    "optimizer_bytes": ("optimizer state", "B", "what it remembers between steps, at two values per weight"),
    "activation_bytes_per_row": ("activations per row", "B", "kept from forward to backward, at full context"),
    "state_bytes_per_row": ("decoding state per row", "B", "what a full conversation keeps while served, bf16"),
}
Runs = list[tuple[str, list[dict], list[dict]]]  # title, train and valid records of each stage


def build_report(folder: Path, results: dict[str, Any]) -> Path:
    """Write ``folder/report.html``, whole or not at all, and return its path.

    Keys of ``results``, each optional: title, date, seconds, peak_rss_mb, fast, machine, stages, checks, marks,
    exact_match, preference, samples, continued, tokenizer, attention, cost, conversation, commands. A stage with
    ``run`` (a folder inside ``folder``) shows its metrics.jsonl. All text is escaped.
    """
    import jinja2

    runs: Runs = []
    for stage in results.get("stages") or []:
        records = read_metrics(folder / stage["run"] / "metrics.jsonl") if stage.get("run") else []
        if train := [r for r in records if r["kind"] == "train"]:
            title = STAGES.get(stage["name"], stage["name"])
            runs.append((title, train, [r for r in records if r["kind"] == "valid"]))
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    env.filters |= {"number": number, "duration": duration, "tidy": tidy, "percent": percent, "visible": charts.visible}
    parts = {"r": results, "v": view(results, runs), "sections": SECTIONS, "head": headline(results)}
    write_atomic(folder / "report.html", env.get_template("report.html").render(parts))
    return folder / "report.html"


def view(results: dict, runs: Runs) -> dict[str, Any]:
    """What each section of the page shows; an empty value leaves the section out."""
    found = {key: results.get(key) for key in ("checks", "tokenizer", "conversation", "commands", "machine")}
    found["answers"] = {key: results[key] for key in ("samples", "continued") if results.get(key)}
    found["loss"] = losses(runs, results.get("marks") or [])
    found["exact"] = exact(results.get("exact_match") or {})
    found["preference"] = preference(results.get("preference") or {}, runs)
    found["runs"] = inside(runs)
    found["attention"] = attention_view(results.get("attention") or {})
    found["cost"] = costs(results.get("cost") or {})
    found["time"] = times(results.get("stages") or [])
    return {key: found[key] for key in SECTIONS if found[key]}


def headline(results: dict) -> dict[str, Any]:
    """The verdict and its four or five numbers."""
    checks, cost = results.get("checks") or [], results.get("cost") or {}
    own = [mark["bpb"] for mark in results.get("marks") or [] if _own(mark)]
    tiles = [
        ("time", duration(results["seconds"]) if results.get("seconds") else None),
        ("peak memory", f"{number(results['peak_rss_mb'])} MiB" if results.get("peak_rss_mb") else None),
        ("parameters", charts.short(cost["parameters"]) if isinstance(cost.get("parameters"), int) else None),
        ("bits per byte, held out", number(own[0]) if own else None),
    ]
    passed = sum(bool(check.get("passed")) for check in checks)
    return {"passed": passed, "n": len(checks), "tiles": [tile for tile in tiles if tile[1]]}


def figure(svg: Markup, *keys: str, title: str = "", note: str = "") -> dict[str, Any]:
    """A chart with the meaning of each metric in it."""
    return {"svg": svg, "title": title, "note": note, "meaning": [(key, MEANING[key]) for key in keys]}


def curve(records: list[dict], key: str, scale: float = 1.0) -> tuple[list[float], list[float]]:
    """Steps and finite values of one metric; empty where no record holds it."""
    kept = [r for r in records if key in r]
    x, y = charts.finite([r["step"] for r in kept], [r[key] for r in kept])
    return x, [value * scale for value in y]


def losses(runs: Runs, marks: list[dict]) -> list[dict]:
    """One loss chart per stage, and the ladder of n-gram marks."""
    out = []
    for title, train, valid in runs:
        nats, bits = curve(valid, "valid_loss")[1], curve(valid, "valid_bpb")[1]
        in_bits = title == STAGES["pretrain"] and bool(nats and bits and nats[-1])
        x, y = curve(train, "loss", bits[-1] / nats[-1] if in_bits else 1.0)
        if not y:
            continue
        held_out = curve(valid, "valid_bpb" if in_bits else "valid_loss")
        mean = charts.thin(x, charts.smooth(y))
        lines = [Line(*charts.thin(x, y), "blue", faint=True), Line(*mean, "blue", "training, smoothed")]
        lines += [Line(*held_out, "clay", "held out", dots=True)] if held_out[1] else []
        beat = [Mark(m["bpb"], m["name"]) for m in marks if in_bits and not _own(m)]
        unit = "bits per byte" if in_bits else "nats per pair" if title == STAGES["dpo"] else "nats per target token"
        note = "Training is converted with the bytes per token of the held-out text." if in_bits else ""
        label = f"{title}: loss against step, {y[0]:.2f} at the start, {y[-1]:.2f} at the end, {unit}"
        keys = ("loss", "valid_bpb" if in_bits else "valid_loss")
        out.append(figure(charts.curves(lines, beat, unit, label=label), *keys, title=title, note=note))
    if ladder := sorted((m for m in marks if charts.finite([0], [m["bpb"]])[1]), key=lambda m: -m["bpb"]):
        colours, values = ["blue" if _own(m) else "grey" for m in ladder], [m["bpb"] for m in ladder]
        label = "Bits per byte: " + ", ".join(f"{m['name']} {m['bpb']:.2f}" for m in ladder)
        svg = charts.bars([m["name"] for m in ladder], [("", colours, values)], lambda v: f"{v:.2f}", label=label)
        out.append(figure(svg, "valid_bpb", title="Beside models that only count", note="Lower is better."))
    return out


def exact(result: dict) -> list[dict]:
    """Exact match per family before and after each stage; then the same per language."""
    out, n = [], result.get("n") or {}
    languages = {"en": "English", "zh": "Chinese"}
    groups = {"All questions": result} | {languages.get(k, k): g for k, g in (result.get("languages") or {}).items()}
    for title, group in groups.items():
        trials = [(name, colour, group[key]) for key, name, colour in TRIALS if group.get(key)]
        families = [f for f in result.get("families") or [] if any(f in rates for _, _, rates in trials)]
        series = [(name, colour, [rates.get(f) or 0.0 for f in families]) for name, colour, rates in trials]
        if not families:
            continue
        asked = ", ".join(f"{f} {n[f]}" for f in families if f in n and group is result)
        label = f"Exact match, {title}: " + "; ".join(f"{s} {', '.join(map(percent, v))}" for s, _, v in series)
        svg = charts.bars(families, series, percent, 1.0, label=label)
        out.append(figure(svg, title=title, note=f"Asked: {asked}." if asked else ""))
    return out


def preference(result: dict, runs: Runs) -> list[dict]:
    """Win rate before and after, and what moved during DPO."""
    out = []
    when = [key for key in ("before", "after") if isinstance(result.get(key), int | float)]
    if when:
        bar = ("", ["blue" if key == "before" else "clay" for key in when], [result[key] for key in when])
        label = "Preference win rate: " + ", ".join(f"{key} DPO {percent(result[key])}" for key in when)
        svg = charts.bars([f"{key} DPO" for key in when], [bar], percent, 1.0, Mark(0.5, "chance"), label=label)
        note = f"{result['n']} held-out pairs." if result.get("n") else ""
        out.append(figure(svg, "win_rate", title="Win rate", note=note))
    for title, train, _ in runs:
        pair = [_smoothed(train, f"logp_{name}", PAIR[name], name) for name in PAIR]
        rows = [("margin", [_smoothed(train, "margin", "blue")]), ("log-probability", pair)]
        if all(line.y for _, lines in rows for line in lines):
            label = f"{title}: reward margin, and log-probability of chosen and rejected answers, against step"
            keys = ("margin", "logp_chosen", "logp_rejected")
            out.append(figure(charts.panels(rows, zero=False, label=label), *keys, title=f"What {title} moved"))
    return out


def inside(runs: Runs) -> list[dict]:
    """Learning rate, gradient norm, throughput and memory of each stage, as small multiples."""
    out = []
    for key, name in INSIDE.items():
        rows = [(title, [_smoothed(train, key, "blue")]) for title, train, _ in runs]
        rows = [row for row in rows if row[1][0].y]
        if rows:
            label = f"{name} against step: {', '.join(title for title, _ in rows)}"
            out.append(figure(charts.panels(rows, label=label), key, title=name))
    if out and (skipped := sum(r.get("skipped") or 0 for _, train, _ in runs for r in train)):
        out[0]["note"] = f"Skipped steps: {skipped:.0f}."
    return out


def costs(cost: dict) -> dict[str, Any] | None:
    """Rows of the cost table (``table`` as given, or made from the known keys), and where the parameters are."""
    known = [key for key in COST if isinstance(cost.get(key), int | float)]
    row = lambda key, name, unit, why: {"name": name, "value": charts.short(cost[key]) + unit, "meaning": why}
    rows = [row(key, *COST[key]) for key in known]
    found: dict[str, Any] = {"table": cost.get("table") or rows}
    if parts := {name: n for name, n in (cost.get("by_component") or {}).items() if n}:
        label = "Parameters: " + ", ".join(f"{name} {n:,}" for name, n in parts.items())
        found["svg"] = charts.bars(list(parts), [("", "blue", list(parts.values()))], charts.short, label=label)
    return found if any(found.values()) else None


def times(stages: list[dict]) -> dict[str, Any] | None:
    if not stages:
        return None
    total = sum(stage.get("seconds") or 0 for stage in stages) or 1.0
    values, names = [stage.get("seconds") or 0.0 for stage in stages], [stage["name"] for stage in stages]
    text = lambda s: f"{duration(s)} · {percent(s / total)}"
    label = "Time per stage: " + ", ".join(f"{n} {duration(s)}" for n, s in zip(names, values, strict=True))
    svg = charts.bars(names, [("", "blue", values)], text, 1.4 * max(values) or 1.0, label=label)
    return {"svg": svg, "stages": stages}


def number(value: Any) -> str:
    """1234567 -> 1,234,567; 0.12345 -> 0.123; text stays as it is."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return "–" if value is None else str(value)
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.3g}"


def tidy(text: str) -> str:
    """Long runs of empty lines, which untrained models love, as a sign."""
    return re.sub(r"(?:[ \t]*\n){3,}", lambda m: f" ↵×{m[0].count(chr(10))} ", text.rstrip(" ")) or "–"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def percent(rate: float) -> str:
    return f"{100 * rate:.0f} %"


def _smoothed(records: list[dict], key: str, colour: str, name: str = "") -> Line:
    x, y = curve(records, key)
    return Line(*charts.thin(x, y if key in ("lr", "memory_mb") else charts.smooth(y, 0.02)), colour, name)


def _own(mark: dict) -> bool:  # the model itself among its marks
    return mark["name"].lower() in ("this model", "model")
