"""One page that shows what a run taught and what it cost: a single HTML file, no network, no scripts.

Reads `results` (plain data, see `build_report`) and each stage's metrics.jsonl; a missing part is left out of the page.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from markupsafe import Markup

from zero2llm.core.files import write_atomic
from zero2llm.lab import charts
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
MAX_LAYERS, MAX_HEADS, MAX_TOKENS = 6, 8, 24  # of the attention maps: a page, not an atlas
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
    env.filters |= {"number": number, "duration": duration, "percent": percent, "visible": visible}
    page = env.get_template("report.html").render(
        r=results, v=view(results, runs), sections=SECTIONS, head=headline(results)
    )
    write_atomic(folder / "report.html", page)
    return folder / "report.html"


def view(results: dict, runs: Runs) -> dict[str, Any]:
    """What each section of the page shows; an empty value leaves the section out."""
    found = {key: results.get(key) for key in ("checks", "tokenizer", "conversation", "commands", "machine")}
    found["answers"] = {"samples": results.get("samples"), "continued": results.get("continued")}
    found["loss"] = losses(runs, results.get("marks") or [])
    found["exact"] = exact(results.get("exact_match") or {})
    found["preference"] = preference(results.get("preference") or {}, runs)
    found["runs"] = inside(runs)
    found["attention"] = attention(results.get("attention") or {})
    found["cost"] = (results.get("cost") or {}).get("table")
    found["time"] = times(results.get("stages") or [])
    if not any(found["answers"].values()):
        found["answers"] = None
    return {key: found[key] for key in SECTIONS if found[key]}


def headline(results: dict) -> dict[str, Any]:
    """The verdict and its four or five numbers."""
    checks, cost = results.get("checks") or [], results.get("cost") or {}
    passed = sum(bool(check["passed"]) for check in checks)
    parameters = cost.get("parameters", cost.get("parameters_total"))
    if isinstance(parameters, dict):
        parameters = parameters.get("total")
    own = [mark["bpb"] for mark in results.get("marks") or [] if _own(mark)]
    tiles = [
        ("time", duration(results["seconds"]) if results.get("seconds") else None),
        ("peak memory", f"{number(results['peak_rss_mb'])} MiB" if results.get("peak_rss_mb") else None),
        ("parameters", charts.short(parameters) if parameters else None),
        ("bits per byte, held out", number(own[0]) if own else None),
    ]
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
        lines = [
            Line(*charts.thin(x, y), "blue", faint=True),
            Line(*charts.thin(x, charts.smooth(y)), "blue", "training, smoothed"),
        ]
        lines += [Line(*held_out, "clay", "held out", dots=True)] if held_out[1] else []
        beat = [Mark(m["bpb"], m["name"]) for m in marks if in_bits and not _own(m)]
        unit = "bits per byte" if in_bits else "nats per pair" if title == STAGES["dpo"] else "nats per target token"
        note = (
            "Training loss is shown in bits per byte too, with the bytes per token of the held-out text."
            if in_bits
            else ""
        )
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
    groups = [("All", result)] + [(languages.get(k, k), g) for k, g in (result.get("languages") or {}).items()]
    for title, group in groups:
        families = [f for f in result.get("families") or [] if any(f in (group.get(key) or {}) for key, *_ in TRIALS)]
        series = [
            (name, colour, [group[key].get(f) or 0.0 for f in families])
            for key, name, colour in TRIALS
            if group.get(key)
        ]
        if not families or not series:
            continue
        names = [f"{f}\n{n[f]} asked" if group is result and f in n else f for f in families]
        label = f"Exact match, {title}: " + "; ".join(f"{s} {', '.join(map(percent, v))}" for s, _, v in series)
        out.append({"title": title, "svg": charts.bars(names, series, percent, 1.0, label=label)})
    return out


def preference(result: dict, runs: Runs) -> list[dict]:
    """Win rate before and after, and what moved during DPO."""
    out = []
    rates = [(name, result[key], colour) for key, name, colour in (("before", "before DPO", "blue"), ("after", "after DPO", "clay"))
             if isinstance(result.get(key), int | float)]  # fmt: skip
    if rates:
        names, values, colours = map(list, zip(*rates, strict=True))
        label = "Preference win rate: " + ", ".join(f"{name} {percent(value)}" for name, value, _ in rates)
        svg = charts.bars(names, [("", colours, values)], percent, 1.0, Mark(0.5, "chance"), label=label)
        note = f"{result['n']} held-out pairs." if result.get("n") else ""
        out.append(figure(svg, "win_rate", title="Win rate", note=note))
    for title, train, valid in runs:
        rows = []
        for name, keys in (("margin", ["margin"]), ("log-probability", ["logp_chosen", "logp_rejected"])):
            lines = [
                _smoothed(train, key, colour, len(keys) > 1)
                for key, colour in zip(keys, ("blue", "clay"), strict=False)
            ]
            if all(line.y for line in lines):
                rows.append((name, lines))
        if rows:
            label = f"{title}: reward margin, and log-probability of chosen and rejected answers, against step"
            keys = ("margin", "logp_chosen", "logp_rejected")
            out.append(figure(charts.panels(rows, zero=False, label=label), *keys, title=f"What {title} moved"))
    return out


def inside(runs: Runs) -> list[dict]:
    """Learning rate, gradient norm, throughput and memory of each stage, as small multiples."""
    out = []
    names = {
        "lr": "Learning rate",
        "grad_norm": "Gradient norm",
        "tokens_per_s": "Tokens per second",
        "memory_mb": "Memory, MiB",
    }
    for key, name in names.items():
        rows = [(title, [_smoothed(train, key, "blue")]) for title, train, _ in runs]
        rows = [row for row in rows if row[1][0].y]
        if rows:
            out.append(
                figure(
                    charts.panels(rows, label=f"{name} against step: {', '.join(t for t, _ in rows)}"), key, title=name
                )
            )
    skipped = sum(r.get("skipped") or 0 for _, train, _ in runs for r in train)
    if skipped:
        out[0]["note"] = f"{skipped:.0f} steps were skipped."
    return out


def attention(result: dict) -> list[dict]:
    """Maps of some heads of some layers, each with what it mostly looks at."""
    tokens, layers = (result.get("tokens") or [])[:MAX_TOKENS], result.get("layers") or []
    out = []
    for layer in _spread(layers, MAX_LAYERS):
        heads = []
        for i, whole in _spread(list(enumerate(layer["heads"])), MAX_HEADS):
            weights = [row[: len(tokens)] for row in whole[: len(tokens)]]
            label = f"Attention of layer {layer['layer']}, head {i}, over {len(tokens)} tokens"
            heads.append(
                {"head": i, "svg": charts.attention_map(weights, tokens, label=label), "habits": habits(weights)}
            )
        out.append({"layer": layer["layer"], "heads": heads, "of": len(layer["heads"])})
    return out


def habits(weights: list[list[float]]) -> list[tuple[str, float]]:
    """How much of a head's attention goes to itself, the previous and the first token; means over tokens 2 and later."""
    rows = range(2, len(weights))
    mean = lambda column: sum(weights[i][column(i)] for i in rows) / len(rows)
    if not rows:
        return []
    return [("itself", mean(lambda i: i)), ("previous", mean(lambda i: i - 1)), ("first", mean(lambda i: 0))]


def times(stages: list[dict]) -> dict[str, Any] | None:
    if not stages:
        return None
    total = sum(stage.get("seconds") or 0 for stage in stages) or 1.0
    values, names = [stage.get("seconds") or 0.0 for stage in stages], [stage["name"] for stage in stages]
    text = lambda s: f"{duration(s)}  {percent(s / total)}"
    label = "Time per stage: " + ", ".join(f"{n} {duration(s)}" for n, s in zip(names, values, strict=True))
    return {
        "svg": charts.bars(names, [("", "blue", values)], text, 1.25 * max(values) or 1.0, label=label),
        "stages": stages,
    }


def number(value: Any) -> str:
    """1234567 -> 1,234,567; 0.12345 -> 0.123; text stays as it is."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return "\u2013" if value is None else str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.3g}"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def percent(rate: float) -> str:
    return f"{100 * rate:.0f} %"


def visible(text: Any) -> str:
    """Spaces and line ends of a token as signs."""
    return str(text).replace(" ", "\u00b7").replace("\n", "\u21b5").replace("\t", "\u21e5")


def _smoothed(records: list[dict], key: str, colour: str, named: bool = False) -> Line:
    x, y = curve(records, key)
    noisy = key != "lr" and key != "memory_mb"
    return Line(*charts.thin(x, charts.smooth(y) if noisy else y), colour, key.removeprefix("logp_") if named else "")


def _spread(items: list, most: int) -> list:
    """At most ``most`` items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _own(mark: dict) -> bool:
    """The model itself among its marks."""
    return mark["name"].lower() in ("this model", "model")
