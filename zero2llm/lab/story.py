"""The quickstart's evidence: judge each stage on held-out data, set thresholds, and gather it for the report."""

from __future__ import annotations

import platform
from datetime import datetime
from typing import Any

import torch

from zero2llm.core.log import console
from zero2llm.engine.engine import Engine
from zero2llm.engine.sampling import Sampling
from zero2llm.evals.tasks.generate import EASY, generate
from zero2llm.lab.attention import attention_maps
from zero2llm.lab.journal import Journal
from zero2llm.lab.measure import answers, documents_of, ngram_marks, preference_rate, task_accuracy
from zero2llm.lab.sets import build_sets
from zero2llm.lab.talk import load_engine, stream_answer
from zero2llm.model.cost import summary
from zero2llm.parallel.plan import World

CHAT = ("Who are you?", "Tom is in the valley. Tom has the tea. What does Tom have?", "Can you help me find my coat?",
        "你好。你是谁？", "王生在城里。王生有马。王生在哪里？", "请帮我买这个琴。")  # fmt: skip
SHOWN = ("It was a dark night, and ", "The captain said", "《江城子》", "春")
SENTENCE = {"en": "Tom has the book. Who has the book?", "zh": "王生有书。谁有书？"}
LEARNED, TAUGHT, KEPT, TRAINED = (
    0.20,
    0.85,
    0.03,
    0.20,
)  # thresholds of the issue: before SFT, after SFT, EM loss, DPO gain
FAMILIES_NEEDED = 3


def _rates(engine: Engine, run: Journal) -> dict[str, dict]:
    return {
        name: {"rate": r.rate, "n": r.total, "interval": r.interval}
        for name, r in task_accuracy(engine, run.items()).items()
    }


def _samples(engine: Engine, run: Journal) -> list[str]:
    return answers(engine, [*CHAT, *(item.prompt for item in _shown_items())])


def _shown_items():
    """One held-out question of each family, for the side-by-side table."""
    return generate(EASY, len(EASY) * 2, 4, "test")[: len(EASY)]


def judge_base(run: Journal) -> dict[str, Any]:
    """The pretrained model: its loss beside n-gram models of the same tokens, and its (untaught) answers."""
    engine, recipe = load_engine(run.out / "pretrain", "cpu", max_batch=64), run.recipe("pretrain")
    sets = build_sets(recipe, engine.tokenizer, run.out / "pretrain", World())
    stream = iter(sets.train)
    seen = documents_of(next(stream) for _ in range(recipe.fit.steps))
    lengths = torch.tensor(engine.tokenizer.byte_lengths())
    marks = ngram_marks(seen, documents_of(sets.valid()), engine.tokenizer.vocab_size, lengths)
    prompts = [[engine.tokenizer.bos_id, *engine.tokenizer.encode(p)] for p in SHOWN]
    texts = engine.generate(prompts, Sampling(max_tokens=60, temperature=0.8, top_p=0.95, seed=1))
    continued = [{"prompt": p, "text": t.text} for p, t in zip(SHOWN, texts, strict=True)]
    return {"marks": marks, "rates": _rates(engine, run), "samples": _samples(engine, run), "continued": continued}


def judge_sft(run: Journal) -> dict[str, Any]:
    engine = load_engine(run.out / "sft", "cpu", max_batch=64)
    sets = build_sets(run.recipe("dpo"), engine.tokenizer, run.out / "sft", World())
    win = preference_rate(engine.model, sets.valid())
    return {"rates": _rates(engine, run), "samples": _samples(engine, run), "win_rate": win.rate, "pairs": win.total}


def judge_dpo(run: Journal) -> dict[str, Any]:
    engine = load_engine(run.out / "dpo", "cpu", max_batch=64)
    sets = build_sets(run.recipe("dpo"), engine.tokenizer, run.out / "dpo", World())
    win = preference_rate(engine.model, sets.valid())
    talk: list[dict[str, str]] = []
    for question in CHAT[:4]:
        talk.append({"role": "user", "content": question})
        talk.append(
            {
                "role": "assistant",
                "content": "".join(stream_answer(engine, talk[-1:], Sampling(max_tokens=40, temperature=0))),
            }
        )
    maps = {}
    for lang, text in SENTENCE.items():
        ids = engine.tokenizer.encode(text)
        layers = [
            {"layer": i, "heads": [h.tolist() for h in heads.round(decimals=4)]}
            for i, heads in attention_maps(engine.model, ids)
        ]
        maps[lang] = {"tokens": [engine.tokenizer.show(i) for i in ids], "layers": layers}
    found = {"rates": _rates(engine, run), "samples": _samples(engine, run), "win_rate": win.rate, "pairs": win.total}
    return found | {"conversation": talk, "attention": maps["en"]}


def checks(run: Journal) -> list[dict]:
    """Each threshold with its value: what must hold for the quickstart to have worked."""
    base, sft, dpo = (run.records[f"judge-{stage}"]["value"] for stage in ("pretrain", "sft", "dpo"))
    valid = run.records["pretrain"]["value"]
    out: list[dict] = []

    def check(stage: str, name: str, value: float, bound: float, direction: str, unit: str, why: str) -> None:
        passed = value >= bound if direction == "min" else value <= bound
        out.append(
            dict(
                stage=stage, name=name, value=value, bound=bound, direction=direction, unit=unit, passed=passed, why=why
            )
        )

    check("pretrain", "bits per byte on held-out text", valid["valid_bpb"], base["marks"]["Kneser-Ney bigram"], "max", "bits/byte",
          "fewer than a Kneser-Ney bigram fitted on the same tokens")  # fmt: skip
    grown = [f for f in EASY if base["rates"][f]["rate"] <= LEARNED and sft["rates"][f]["rate"] >= TAUGHT]
    check("sft", "families learned", len(grown), FAMILIES_NEEDED, "min", "families",
          "held-out exact match from at most 20 % before to at least 85 % after: " + (", ".join(grown) or "none"))  # fmt: skip
    check("dpo", "preference win rate gained", 100 * (dpo["win_rate"] - sft["win_rate"]), 100 * TRAINED, "min", "points",
          "share of held-out pairs whose better reply is likelier, after minus before")  # fmt: skip
    check("dpo", "exact match lost", 100 * (sft["rates"]["overall"]["rate"] - dpo["rates"]["overall"]["rate"]), 100 * KEPT, "max", "points",
          "preference training must not cost what SFT taught")  # fmt: skip
    return out


def collect(run: Journal) -> dict[str, Any]:
    """Everything the report shows."""
    engine = load_engine(run.out / "dpo", "cpu")
    base, sft, dpo = (run.records[f"judge-{stage}"]["value"] for stage in ("pretrain", "sft", "dpo"))
    held = _shown_items()
    asked = [("zh" if any(ord(c) > 255 for c in q) else "en", "chat", q, None) for q in CHAT]
    asked += [(item.lang, item.family, item.prompt, item.answer) for item in held]
    samples = [
        dict(lang=lang, family=family, prompt=q, answer=a, pretrain=x, sft=y, dpo=z)
        for (lang, family, q, a), x, y, z in zip(asked, base["samples"], sft["samples"], dpo["samples"], strict=True)
    ]
    pick = lambda found: {f: found["rates"][f]["rate"] for f in EASY}
    total = sum(record["seconds"] for record in run.records.values())
    return {
        "title": "zero2llm quickstart",
        "date": datetime.now().strftime("%Y-%m-%d %H:%M"),
        "seconds": total,
        "peak_rss_mb": max(record["peak_mb"] for record in run.records.values()),
        "fast": run.fast,
        "machine": machine(),
        "stages": [_stage(run, name, record) for name, record in run.records.items()],
        "checks": checks(run),
        "marks": [{"name": n, "bpb": b} for n, b in base["marks"].items()]
        + [{"name": "this model", "bpb": run.records["pretrain"]["value"]["valid_bpb"]}],
        "exact_match": {"families": list(EASY), "before": pick(base), "sft": pick(sft), "dpo": pick(dpo),
                        "n": {f: sft["rates"][f]["n"] for f in EASY}},
        "preference": {"before": sft["win_rate"], "after": dpo["win_rate"], "n": dpo["pairs"]},
        "continued": base["continued"],
        "samples": samples,
        "tokenizer": tokenizer_view(engine),
        "attention": dpo["attention"],
        "cost": summary(engine.model.cfg),
        "conversation": dpo["conversation"],
        "commands": commands(run),
    }  # fmt: skip


def _stage(run: Journal, name: str, record: dict) -> dict:
    stage = {"name": name, "seconds": record["seconds"], "what": record["what"]}
    return stage | ({"run": name} if (run.out / name / "metrics.jsonl").is_file() else {})


def machine() -> dict[str, Any]:
    return {"cpu": platform.processor() or platform.machine(), "cores": torch.get_num_threads(), "torch": torch.__version__,
            "python": platform.python_version(), "platform": platform.platform(terse=True)}  # fmt: skip


def tokenizer_view(engine: Engine) -> dict[str, Any]:
    """What the vocabulary does to English and Chinese text, readable."""
    t = engine.tokenizer
    texts = {"en": "Call me Ishmael. Some years ago, never mind how long precisely, I thought I would sail about a little.",
             "zh": "关关雎鸠，在河之洲。窈窕淑女，君子好逑。"}  # fmt: skip
    ratio = {lang: len(text.encode()) / len(t.encode(text)) for lang, text in texts.items()}
    show = lambda text: [{"id": i, "show": t.show(i), "bytes": t.token_bytes(i).hex(" ")} for i in t.encode(text)]
    words = [t.token_bytes(i).decode("utf-8", "ignore") for i in range(t.vocab_size) if i not in t.special_ids]
    long = lambda keep: sorted({w for w in words if keep(w)}, key=len, reverse=True)[:16]
    return {"vocab_size": t.vocab_size, "bytes_per_token": ratio, "examples": [{"text": x, "tokens": show(x)} for x in texts.values()],
            "longest": {"en": long(lambda w: w.strip().isascii()), "zh": long(lambda w: any(ord(c) > 0x2E80 for c in w))}}  # fmt: skip


def commands(run: Journal) -> list[dict[str, str]]:
    return [
        {"command": f"zero2llm chat {run.out}", "what": "talk to it"},
        {
            "command": f'zero2llm generate {run.out / "pretrain"} --prompt "It was a"',
            "what": "let the base model continue a text",
        },
        {
            "command": f"zero2llm inspect-batch {run.out / 'sft' / 'recipe.json'}",
            "what": "see tokens and loss mask as the model did",
        },
        {
            "command": f"transformers: AutoModelForCausalLM.from_pretrained('{run.out / 'export'}')",
            "what": "open it elsewhere",
        },
    ]


def conclude(run: Journal, results: dict) -> bool:
    """Print the outcome, a conversation and what to do next. Returns whether every threshold was met."""
    out = console()
    out.print()
    for check in results["checks"]:
        mark = "[green]pass[/green]" if check["passed"] else "[red]MISS[/red]"
        sign = ">=" if check["direction"] == "min" else "<="
        out.print(
            f"{mark}  {check['stage']}: {check['name']} {check['value']:.2f} ({sign} {check['bound']:.2f} {check['unit']})"
        )
    out.print()
    for message in results["conversation"]:
        out.print(f"  {'you' if message['role'] == 'user' else 'bot'}> {message['content']}", markup=False)
    out.print(f"\n{results['seconds'] / 60:.1f} minutes, peak memory {results['peak_rss_mb']:,.0f} MB", markup=False)
    for command in results["commands"][:2]:
        out.print(f"  {command['command']}    # {command['what']}", markup=False, soft_wrap=True)
    out.print(f"  report: {(run.out / 'report.html').resolve().as_uri()}", markup=False, soft_wrap=True)
    if run.fast:
        out.print("(--fast-dev-run: the path works; thresholds are for the full run)")
    return all(check["passed"] for check in results["checks"])
