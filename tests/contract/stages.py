"""Small recipes of every stage on generated text, for tests that run the real path."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from zero2llm.train.checkpoint import candidates, latest

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}  # of processes
WORDS = "the a whale sea ship captain sailed over dark water and saw 海 船 月 风 花 雪 山 水 人 天".split()


def write_data(folder: Path) -> None:
    """Text, conversations and preferences that differ from record to record."""
    rng = random.Random(0)
    say = lambda n: " ".join(rng.choice(WORDS) for _ in range(n))
    folder.mkdir(parents=True, exist_ok=True)
    lines = lambda records: "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    text = [{"text": say(rng.randint(5, 60))} for _ in range(200)]
    chat = [{"messages": [{"role": "user", "content": say(5)}, {"role": "assistant", "content": say(4)}]} for _ in range(120)]
    pairs = [{"prompt": say(4), "chosen": say(4), "rejected": say(5)} for _ in range(60)]
    for name, records in (("text", text), ("chat", chat), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text(lines(records), encoding="utf-8")


def recipe(root: Path, stage: str, **changes) -> dict:
    """The recipe of ``stage`` (pretrain, sft, dpo), each starting from the one before, below ``root``."""
    file = {"pretrain": "text", "sft": "chat", "dpo": "pairs"}[stage]
    data = {
        "out": str(root / stage),
        "data": {"train": [str(root / "data" / f"{file}.jsonl")], "valid_fraction": 0.2},
        "objective": {"kind": {"pretrain": "clm", "sft": "sft", "dpo": "dpo"}[stage]},
        "optim": {"kind": "muon" if stage != "dpo" else "adamw", "lr": 0.003},
        "fit": {"steps": 8, "micro_rows": 4},
        "batch_tokens": 256,
        "seq_len": 32,
        "device": "cpu",
        "eval": {"every": 4, "prompts": ["the sea"], "sample_tokens": 4},
        "save": {"every_s": 0.0, "keep": 3},
    }
    if stage == "pretrain":
        mixer = {"n_heads": 2, "n_kv_heads": 1, "head_dim": 8}
        model = {"preset": "qwen3-nano", "vocab_size": 300, "d_model": 16, "max_len": 64}
        data["model"] = model | {"layers": {"repeat": 2}, "blocks": {"qwen3": {"mixer": mixer, "ffn": {"hidden": 24}}}}
        data["tokenizer"] = {"vocab_size": 300}
    else:
        data["init"] = str(root / {"sft": "pretrain", "dpo": "sft"}[stage])
        data["seq_len"], data["batch_tokens"] = 64, 512
    return data | changes


def write_recipe(root: Path, stage: str, **changes) -> Path:
    path = root / f"{stage}.yaml"
    path.write_text(yaml.safe_dump(recipe(root, stage, **changes), allow_unicode=True), encoding="utf-8")
    return path


def kill_and_resume(path: Path, out: Path, steps: int) -> None:
    """Start the recipe at ``path`` as a process, kill it after two checkpoints of ``steps``, and let it go on to its end."""
    command = [sys.executable, "-m", "zero2llm.cli", "train", str(path)]
    process = subprocess.Popen(command, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(candidates(out)) < 3 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert latest(out).step < steps, "it was killed on the way"
    done = subprocess.run([*command, "--resume"], env=ENV, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
