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

EVIL = "<script>alert(1)</script> & \"it's\" $x^2$"
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
            record |= {"margin": 2 * step / steps, "win_rate": 0.9, "logp_chosen": -9 - step / 40, "logp_rejected": -12 - step / 6}
        lines.append(record)
        if step % max(steps // 6, 1) == 0:
            valid = {"kind": "valid", "step": step, "valid_loss": loss + 0.05, "valid_ppl": math.exp(loss)}
            lines.append(valid | ({"valid_bpb": (loss + 0.05) / math.log(2) / 3.3} if name != "dpo" else {}))
    lines[2]["loss"] = math.nan
    (folder / name).mkdir(parents=True)
    (folder / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def heads(n: int, tokens: int) -> list:
    wave = torch.Generator().manual_seed(0)
    scores = torch.randn(n, tokens, tokens, generator=wave) * 2 + 3 * torch.eye(tokens).roll(-1, 1) * torch.arange(n)[:, None, None]
    return scores.masked_fill(~torch.ones(tokens, tokens, dtype=torch.bool).tril(), -torch.inf).softmax(-1).tolist()


def synthetic(folder: Path) -> dict:
    """Results of a full run, and its metrics files below ``folder``."""
    for name, steps, start, end in (("pretrain", 300, 8.3, 4.5), ("sft", 250, 4.0, 0.12), ("dpo", 60, 0.69, 0.06)):
        write_metrics(folder, name, steps, start, end)
    rate = lambda *values: dict(zip(FAMILIES, values, strict=True))
    trials = {"before": rate(0, 0.02, 0, 0, 0.1, 0), "sft": rate(1, 0.97, 0.88, 0.52, 0.91, 1), "dpo": rate(0.99, 0.97, 0.9, 0.5, 0.93, 1)}
    words = ["Tom", " has", " the", " book", ".", " Who", " has", " the", " book", "?", "关", "雎", "鸠", "，", "在", "\n"]
    show = lambda texts: [{"id": 300 + 7 * i, "show": t, "bytes": t.encode().hex(" ")} for i, t in enumerate(texts)]
    answers = {"pretrain": "The sea, and the sea was a great man of the sea; and he said, “I am not a man,” and", "sft": "Tom", "dpo": "Tom"}
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
        "cost": {"parameters": 1934080, "table": [
            {"name": "parameters", "value": 1934080, "unit": "", "meaning": "numbers that training changes"},
            {"name": "FLOPs per token, training", "value": 1.31e7, "unit": "", "meaning": "about 6 per parameter that is multiplied"},
            {"name": "state per token", "value": 5120, "unit": "bytes", "meaning": "keys and values that a served conversation keeps"}]},
        "conversation": [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am a small model."},
                         {"role": "user", "content": "你好。你是谁？"}, {"role": "assistant", "content": "我是一個小模型。"}],
        "commands": [{"command": "zero2llm chat quickstart --temperature 0.7 --max-tokens 200 --and-a-long-line", "what": "talk to it"}],
    }  # fmt: skip
