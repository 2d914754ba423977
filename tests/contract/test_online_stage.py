"""Reinforcement learning as a stage: every method from a recipe, resumed to the bit after a crash, refused where it cannot work."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

import zero2llm
from tests.contract.stages import kill_and_resume, recipe, write_data
from zero2llm.core.files import load_tensors
from zero2llm.train.checkpoint import latest
from zero2llm.train.telemetry import MEANING, read_metrics

KINDS = ("grpo", "ppo", "trpo", "online_dpo", "rft", "dapo", "bapo", "rloo", "reinforce_pp", "reinforce", "dr_grpo", "gspo", "gmpo", "cispo", "sapo")
SLOW = KINDS[7:]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A tiny model that has seen a little text, and prompts."""
    root = tmp_path_factory.mktemp("online")
    write_data(root / "data")
    made = recipe(root, "pretrain") | {"fit": {"steps": 2, "micro_rows": 4}}
    zero2llm.run(zero2llm.make_recipe(**made), quiet=True)
    lines = [json.dumps({"prompt": f"the sea {'and the ship ' * (i % 3)}{i}", "answer": "the"}) for i in range(40)]
    (root / "data" / "prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return root


def rl(root, kind: str, out, **changes) -> dict:
    data = {
        "out": str(out),
        "init": str(root / "pretrain"),
        "data": {"train": [str(root / "data" / "prompts.jsonl")], "valid_fraction": 0.2},
        "objective": {"kind": kind},
        "rollout": {"prompts": 4, "samples": 4, "max_tokens": 6, "minibatches": 2},
        "reward": [{"kind": "overlong", "limit": 6, "buffer": 6}, {"kind": "regex", "pattern": ".*e.*", "weight": 0.5}],
        "optim": {"kind": "adamw", "lr": 0.01},
        "fit": {"steps": 4, "micro_rows": 8},
        "seq_len": 64,
        "device": "cpu",
        "eval": {"every": 2},
        "save": {"every_s": 0.0, "keep": 9},
    }
    return data | changes


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.slow) if kind in SLOW else kind for kind in KINDS])
def test_every_method_trains(root, tmp_path, kind):
    right = {"reward": [{"kind": "regex", "pattern": ".+"}]} if kind == "rft" else {}  # it learns from right answers alone
    right |= {"objective": {"kind": kind, "length": 6}} if kind == "dr_grpo" else {}
    done = zero2llm.run(zero2llm.make_recipe(**rl(root, kind, tmp_path / "run", **right)), quiet=True)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl", "train")
    assert [r["step"] for r in rows] == [1, 2, 3, 4] and "valid_reward" in done.valid
    start, end = (load_tensors(latest(path).path / "model") for path in (root / "pretrain", tmp_path / "run"))
    assert any(not start[name].equal(end[name]) for name in start), "something was learned"
    assert all(torch.isfinite(t).all() for t in end.values())
    if kind not in ("online_dpo", "rft"):
        first = rows[0]
        assert first["ratio"] == pytest.approx(1, abs=1e-4) and first["clip_fraction"] == 0 and first["logp_gap"] < 1e-4
    unknown = {name for row in rows for name in row} - set(MEANING) - {"kind", "step", "tokens", "seconds", "time"}
    assert not {name for name in unknown if not name.startswith("moe_")}, f"a metric without a meaning: {unknown}"


@pytest.mark.parametrize("kind", ["grpo", pytest.param("ppo", marks=pytest.mark.slow)])
def test_killed_and_resumed_to_the_bit(root, tmp_path, kind):
    """kill -9 at any moment: in sampling, in an update, in saving."""
    want = zero2llm.run(zero2llm.make_recipe(**rl(root, kind, tmp_path / "whole", fit={"steps": 8, "micro_rows": 8})), quiet=True)
    path, out = tmp_path / "recipe.yaml", tmp_path / "killed"
    path.write_text(yaml.safe_dump(rl(root, kind, out, fit={"steps": 8, "micro_rows": 8})), encoding="utf-8")
    kill_and_resume(path, out, 8)
    a, b = load_tensors(want.checkpoint / "model"), load_tensors(latest(out).path / "model")
    assert all(a[name].equal(b[name]) for name in a)


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"rollout": None}, "needs the keys rollout and reward"),
        ({"reward": []}, "needs the keys rollout and reward"),
        ({"batch_tokens": 4096}, "remove the key"),
        ({"init": None, "model": {"preset": "llama-nano"}, "tokenizer": {}}, "needs init"),
        ({"objective": {"kind": "clm"}}, "samples nothing"),
        ({"rollout": {"max_tokens": 64}}, "no room for a prompt"),
        ({"rollout": {"samples": 1, "max_tokens": 6}}, "at least 2"),
        ({"reward": [{"kind": "regex", "pattern": "("}]}, "no regular expression"),
        ({"reward": [{"kind": "exakt"}]}, "exakt"),
    ],
)
def test_mistakes_are_named(root, tmp_path, changes, words):
    data = {key: value for key, value in (rl(root, "grpo", tmp_path / "run") | changes).items() if value is not None}
    with pytest.raises(ValueError, match=words):
        zero2llm.run(zero2llm.make_recipe(**data), quiet=True)


def test_a_prompt_without_an_answer_teaches_nothing_and_is_counted(root, tmp_path):
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"prompt": f"say {i}"}) for i in range(30)), encoding="utf-8")
    made = rl(root, "grpo", tmp_path / "run", reward=[{"kind": "exact"}], fit={"steps": 2, "micro_rows": 8})
    made["data"] = {"train": [str(tmp_path / "p.jsonl")], "valid_fraction": 0.2}
    done = zero2llm.run(zero2llm.make_recipe(**made), quiet=True)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl", "train")
    assert all(r["failed"] == 1 and r["skipped"] == 1 and math_ok(r) for r in rows) and done.valid["valid_failed"] == 1


def math_ok(row: dict) -> bool:
    return all(value == value for value in row.values() if isinstance(value, float))
