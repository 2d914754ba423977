"""The report page: whole from any subset of its parts, self-contained, and nothing in it runs or is fetched."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from zero2llm.core.seq import Seq
from zero2llm.lab import charts
from zero2llm.lab.attention import attention_maps, habits
from zero2llm.lab.report import SECTIONS, build_report
from zero2llm.layers.mixers.gqa import GQA
from zero2llm.model.lm import LM
from zero2llm.model.presets import llama

EVIL = '<script>alert(1)</script> & "it\'s" $x^2$'
FAMILIES = ["recall", "pick", "translate", "sort", "compare", "last"]
VOID = {"meta", "br", "link", "img", "hr"}


def write_metrics(folder: Path, name: str, steps: int, start: float, end: float) -> None:
    """A run whose loss falls from ``start`` to ``end``, with a NaN in it, as a real one may have."""
    wave = torch.Generator().manual_seed(len(name))
    lines = []
    for step in range(1, steps + 1):
        noise = float(torch.randn((), generator=wave))
        loss = end + (start - end) * math.exp(-6 * step / steps) + 0.03 * noise * start / 4
        lr = 0.01 * min(1, step / 10) * min(1, 2.2 * (1 - step / (steps + 1)))
        record = {"kind": "train", "step": step, "loss": loss, "lr": lr, "grad_norm": 0.4 + 3 * math.exp(-step / 8) + 0.1 * abs(noise),
                  "tokens_per_s": 11000 + 300 * noise, "step_s": 0.4, "memory_mb": 480 + step / 9, "skipped": 0.0, "tokens": step * 4096}  # fmt: skip
        if name == "dpo":
            record |= {
                "margin": 2 * step / steps,
                "win_rate": 0.9,
                "logp_chosen": -9 - step / 40,
                "logp_rejected": -12 - step / 6,
            }
        lines.append(record)
        if step % max(steps // 6, 1) == 0:
            valid = {"kind": "valid", "step": step, "valid_loss": loss + 0.05, "valid_ppl": math.exp(loss)}
            lines.append(valid | ({"valid_bpb": (loss + 0.05) / math.log(2) / 3.3} if name != "dpo" else {}))
    lines[2]["loss"] = math.nan
    (folder / name).mkdir(parents=True)
    (folder / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def heads(n: int, tokens: int) -> list:
    wave = torch.Generator().manual_seed(0)
    scores = (
        torch.randn(n, tokens, tokens, generator=wave) * 2
        + 3 * torch.eye(tokens).roll(-1, 1) * torch.arange(n)[:, None, None]
    )
    return scores.masked_fill(~torch.ones(tokens, tokens, dtype=torch.bool).tril(), -torch.inf).softmax(-1).tolist()


def synthetic(folder: Path) -> dict:
    """Results of a full run, and its metrics files below ``folder``."""
    for name, steps, start, end in (("pretrain", 300, 8.3, 4.5), ("sft", 250, 4.0, 0.12), ("dpo", 60, 0.69, 0.06)):
        write_metrics(folder, name, steps, start, end)
    rate = lambda *values: dict(zip(FAMILIES, values, strict=True))
    trials = {
        "before": rate(0, 0.02, 0, 0, 0.1, 0),
        "sft": rate(1, 0.97, 0.88, 0.52, 0.91, 1),
        "dpo": rate(0.99, 0.97, 0.9, 0.5, 0.93, 1),
    }
    words = [
        "Tom",
        " has",
        " the",
        " book",
        ".",
        " Who",
        " has",
        " the",
        " book",
        "?",
        "关",
        "雎",
        "鸠",
        "，",
        "在",
        "\n",
    ]
    show = lambda texts: [{"id": 300 + 7 * i, "show": t, "bytes": t.encode().hex(" ")} for i, t in enumerate(texts)]
    answers = {
        "pretrain": "The sea, and the sea was a great man of the sea; and he said, “I am not a man,” and",
        "sft": "Tom",
        "dpo": "Tom",
    }
    return {
        "title": "zero2llm quickstart", "date": "2025-11-21", "seconds": 431.2, "peak_rss_mb": 912.4, "fast": False,
        "machine": {"cpu": "Xeon", "cores": 2, "torch": "2.9.0", "python": "3.11.7", "platform": "Linux"},
        "stages": [
            {"name": "tokenizer", "seconds": 31.0, "what": "learn a vocabulary of byte pairs from the text"},
            {"name": "pretrain", "seconds": 171.0, "what": "predict the next token", "run": "pretrain", "tokens": 1228800},
            {"name": "judge-pretrain", "seconds": 21.0, "what": "n-gram marks, and what the base model answers"},
            {"name": "sft", "seconds": 140.0, "what": "learn to answer", "run": "sft", "tokens": 1024000},
            {"name": "dpo", "seconds": 60.0, "what": "prefer the better of two replies", "run": "dpo"},
            {"name": "export", "seconds": 2.0, "what": "a folder that transformers and vLLM open"},
        ],
        "checks": [
            {"stage": "pretrain", "name": "bits per byte on held-out text", "value": 1.99, "bound": 2.31, "direction": "max",
             "unit": "bits/byte", "passed": True, "why": "fewer than a Kneser-Ney bigram fitted on the same tokens"},
            {"stage": "sft", "name": "families learned", "value": 5, "bound": 3, "direction": "min", "unit": "families",
             "passed": True, "why": "held-out exact match from at most 20 % before to at least 85 % after"},
            {"stage": "dpo", "name": "preference win rate gained", "value": 12.5, "bound": 20.0, "direction": "min", "unit": "points",
             "passed": False, "why": "share of held-out pairs whose better reply is likelier, after minus before"},
        ],
        "marks": [{"name": "Kneser-Ney bigram", "bpb": 2.31}, {"name": "Kneser-Ney trigram", "bpb": 2.24}, {"name": "this model", "bpb": 1.99}],
        "exact_match": {"families": FAMILIES, **trials, "n": dict.fromkeys(FAMILIES, 107), "languages": {"en": trials, "zh": trials}},
        "preference": {"before": 0.62, "after": 0.93, "n": 400},
        "continued": [{"prompt": "It was a dark night, and ", "text": "the ship was in the sea, and the captain had been upon the deck."},
                      {"prompt": "《江城子》", "text": "\n春風吹盡江南路，不見人歸，何處是長安。"}],
        "samples": [
            {"lang": "en", "family": "chat", "prompt": "Who are you?", "answer": None, **answers, "dpo": "I am a small model. How may I help you?"},
            {"lang": "en", "family": "recall", "prompt": "Tom has the book. Mary has the lamp. Who has the book?", "answer": "Tom", **answers},
            {"lang": "zh", "family": "pick", "prompt": "王生在城里。李生在田里。谁在城里？", "answer": "王生",
             "pretrain": "，不可。\n\n其二：山中有人，人不可知。", "sft": "王生", "dpo": "王生"},
            {"lang": "en", "family": "chat", "prompt": EVIL, "answer": EVIL, "pretrain": EVIL, "sft": EVIL, "dpo": EVIL},
        ],
        "tokenizer": {"vocab_size": 4096, "bytes_per_token": {"en": 3.41, "zh": 2.92}, "longest": {"en": [" something"], "zh": ["不可以"]},
                      "examples": [{"text": "".join(words[:9]), "tokens": show(words[:9])},
                                   {"text": "关关雎鸠", "tokens": [*show(["关", "关", "\\xe9\\x9b", "\\x8e", "鸠"])]}]},
        "attention": {"tokens": words, "layers": [{"layer": i, "heads": heads(4, len(words))} for i in range(2)]},
        "cost": {"parameters": 1934080, "by_component": {"embed": 655360, "mixer": 409600, "ffn": 860160, "norm": 8960}, "table": [
            {"name": "parameters", "value": 1934080, "unit": "", "meaning": "numbers that training changes"},
            {"name": "FLOPs per token, training", "value": 1.31e7, "unit": "", "meaning": "about 6 per parameter that is multiplied"},
            {"name": "state per token", "value": 5120, "unit": "bytes", "meaning": "keys and values that a served conversation keeps"}]},
        "conversation": [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am a small model."},
                         {"role": "user", "content": "你好。你是谁？"}, {"role": "assistant", "content": "我是一個小模型。"}],
        "commands": [{"command": "zero2llm chat quickstart --temperature 0.7 --max-tokens 200 --and-a-long-line", "what": "talk to it"}],
    }  # fmt: skip


class Page(HTMLParser):
    """Checks that tags balance, and gathers what a browser would load or run, and the text."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(html)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing, at {self.getpos()}"

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> tuple[Path, dict, str]:
    folder = tmp_path_factory.mktemp("report")
    results = synthetic(folder)
    return folder, results, build_report(folder, results).read_text(encoding="utf-8")


def test_full_page_is_well_formed_and_holds_every_section(full):
    page = Page(full[2])
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)), "ids clash between charts"
    assert set(SECTIONS) <= set(ids)
    used = set(re.findall(r"url\(#([^)]+)\)", full[2])) | {
        v[1:] for _, n, v in page.attributes if n == "href" and v[:1] == "#"
    }
    assert used <= set(ids), "a chart or a link refers to nothing"
    for heading, chinese in SECTIONS.values():
        assert heading in page.text and chinese in page.text
    assert page.tags.count("svg") == 4 + 3 + 2 + 4 + 8 + 1 + 1  # loss, exact, preference, runs, heads, parameters, time


def test_nothing_is_fetched_and_nothing_runs(full):
    page = Page(full[2])
    assert "http://" not in full[2] and "https://" not in full[2] and "@import" not in full[2]
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    loads = [value for _, name, value in page.attributes if name in ("src", "href", "xlink:href", "srcset", "action")]
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in loads)
    assert ("meta", "name", "viewport") in page.attributes and "prefers-color-scheme: dark" in full[2]


def test_everything_from_outside_is_escaped(tmp_path):
    results = synthetic(tmp_path)

    def poison(value):
        if isinstance(value, dict):
            return {k: v if k in ("run", "lang", "direction", "families") else poison(v) for k, v in value.items()}
        return [poison(v) for v in value] if isinstance(value, list) else EVIL if isinstance(value, str) else value

    page = Page(build_report(tmp_path, poison(results)).read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert page.text.count(EVIL) > 30


def test_failed_threshold_is_seen_by_word_and_sign(full):
    text = Page(full[2]).text
    assert "✗ 2 of 3 thresholds passed" in text and "✗ fail" in text and text.count("✓ pass") == 2
    assert "12.5 points" in text and "≥ 20 points" in text and "≤ 2.31 bits/byte" in text


@pytest.mark.parametrize("part", ["stages", "checks", "marks", "exact_match", "preference", "continued", "samples", "tokenizer",
                                  "attention", "cost", "conversation", "commands", "machine", "title", "date", "seconds", "peak_rss_mb"])  # fmt: skip
def test_each_part_alone_and_none(tmp_path, part):
    source = synthetic(tmp_path) if part == "stages" else synthetic(tmp_path / "elsewhere")
    if part == "attention":
        source["attention"]["layers"] = source["attention"]["layers"][:1]
    page = Page(build_report(tmp_path, {part: source[part]}).read_text(encoding="utf-8"))
    sections = [value for tag, name, value in page.attributes if (tag, name) == ("section", "id")]
    shown = {"stages": ["loss", "preference", "runs", "time"], "checks": ["checks"], "marks": ["loss"], "exact_match": ["exact"],
             "continued": ["answers"], "samples": ["answers"]}  # fmt: skip
    assert sections == shown.get(part, [part] if part in SECTIONS else [])


def test_empty_results_and_a_run_without_metrics(tmp_path):
    for results in (
        {},
        {"stages": [{"name": "sft", "seconds": 0.0, "what": "", "run": "absent"}], "checks": [], "cost": {}},
    ):
        page = Page(build_report(tmp_path, results).read_text(encoding="utf-8"))
        assert not [v for t, n, v in page.attributes if (t, n) == ("section", "id") and v in ("loss", "runs", "checks")]


def test_a_run_of_one_step_that_broke(tmp_path):
    (tmp_path / "pretrain").mkdir()
    values = {
        "loss": math.nan,
        "lr": 0.0,
        "grad_norm": math.inf,
        "tokens_per_s": 10.0,
        "memory_mb": 1.0,
        "skipped": 1.0,
    }
    (tmp_path / "pretrain" / "metrics.jsonl").write_text(json.dumps({"kind": "train", "step": 1, **values}) + "\n")
    text = build_report(
        tmp_path, {"stages": [{"name": "pretrain", "seconds": 1.0, "what": "x", "run": "pretrain"}]}
    ).read_text("utf-8")
    assert "Skipped steps: 1." in Page(text).text


def test_same_results_make_the_same_page_and_leave_nothing_beside_it(full):
    folder, results, html = full
    assert build_report(folder, results).read_text(encoding="utf-8") == html
    assert sorted(p.name for p in folder.iterdir()) == ["dpo", "pretrain", "report.html", "sft"]


def test_the_models_own_summary_fills_the_cost_table(tmp_path):
    from zero2llm.model.cost import summary

    text = Page(
        build_report(tmp_path, {"cost": summary(llama(64, 16, 2, 2, 2, 24, 32, tied=True))}).read_text("utf-8")
    ).text
    assert "decoding state per row" in text and "Where the parameters are" in text


def test_labels_keep_chinese_and_show_blanks():
    assert charts.brief(" has") == "·has" and charts.brief("\n\t") == "↵⇥" and charts.brief("不可以") == "不可以"
    assert charts.brief("extraordinarily") == "extraord…" and charts.columns("关a") == 3
    svg = charts.bars(["关雎", "$x^2$"], [("", "blue", [0.5, 0.25])], str, label="a & b")
    assert re.search(r"<text[^>]*>关雎</text>", svg) and re.search(r"<text[^>]*>\$x\^2\$</text>", svg), (
        "text must stay text"
    )
    assert 'aria-label="a &amp; b"' in svg and "var(--blue)" in svg and "#0a0a" not in svg


def test_smoothing_keeps_lines_straight_and_thinning_keeps_means():
    line = [float(i) for i in range(100)]
    assert charts.smooth(line) == pytest.approx(line)
    assert charts.smooth([3.0]) == [3.0] and charts.smooth([]) == []
    x, y = charts.thin(range(1000), range(1000), 100)
    assert len(x) == 100 and y[0] == 4.5 and y[-1] == 994.5


def test_attention_maps_are_causal_distributions_and_equal_the_mixers():
    torch.manual_seed(0)
    model = LM(llama(32, 24, 3, 6, 2, 32, 16)).double()
    tokens = [3, 1, 4, 1, 5, 9, 2]
    maps = attention_maps(model, tokens)
    assert [layer for layer, _ in maps] == [0, 1, 2]
    for _, heads_ in maps:
        assert heads_.shape == (6, 7, 7)
        torch.testing.assert_close(heads_.sum(-1), torch.ones(6, 7))
        assert torch.equal(heads_.triu(1), torch.zeros_like(heads_))
    block = model.blocks[0]
    x = block.mixer_norm(model.embed(torch.tensor([tokens])))
    torch.testing.assert_close(maps[0][1], block.mixer.weights(x, Seq.rows(1, 7))[0].float())
    assert not block.mixer._forward_pre_hooks, "the hooks stayed"


def test_attention_maps_leave_other_mixers_out_and_refuse_no_text():
    model = LM(llama(32, 24, 2, 6, 2, 32, 16))
    with pytest.raises(ValueError, match="not 0"):
        attention_maps(model, [])
    with pytest.raises(ValueError, match="1 to 16 tokens, not 17"):
        attention_maps(model, [1] * 17)

    class Other(torch.nn.Module):
        def forward(self, x, seq, state=None):
            return x, {}

    model.blocks[0].mixer = Other()
    assert [layer for layer, _ in attention_maps(model, [1, 2, 3])] == [1]
    assert isinstance(model.blocks[1].mixer, GQA)


def test_habits_of_a_head_that_copies_the_previous_token():
    previous = torch.eye(5).roll(-1, 1).tolist()
    assert habits([[1.0, 0, 0, 0, 0], *torch.eye(5)[:4].tolist()]) == [
        ("itself", 0.0),
        ("previous", 1.0),
        ("first", 0.0),
    ]
    assert habits(previous[:2]) == []
