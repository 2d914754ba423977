"""Distillation as a stage: every objective from a recipe, resumed to the bit after a crash, the same on two ranks, refused where it cannot work."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import yaml

import zero2llm
from tests.contract.stages import kill_and_resume, recipe, write_data
from tests.contract.test_resume import ENV
from zero2llm.core.files import load_tensors
from zero2llm.lab.look import inspect_recipe
from zero2llm.tokenizers.tokenizer import Tokenizer
from zero2llm.train.checkpoint import latest
from zero2llm.train.telemetry import MEANING, read_metrics

ROLLOUT = {"prompts": 4, "samples": 2, "max_tokens": 6}
KINDS = {
    "distill": {"objective": {"kind": "distill"}, "data.reads": "conversations"},
    "documents": {"objective": {"kind": "distill", "top_k": 8}, "data.reads": "documents"},
    "cached": {"objective": {"kind": "distill", "top_k": 8}, "data.reads": "conversations", "cache": True},
    "packed": {"objective": {"kind": "distill", "top_k": 8}, "data.reads": "documents", "data.packing": "best_fit", "cache": True},
    "hidden": {"objective": {"kind": "hidden"}, "data.reads": "conversations"},
    "gkd": {"objective": {"kind": "gkd", "share": 0.5}, "rollout": ROLLOUT},
    "minillm": {"objective": {"kind": "minillm"}, "rollout": ROLLOUT},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A tiny teacher that has seen a little text and a few conversations."""
    root = tmp_path_factory.mktemp("distill")
    write_data(root / "data")
    for stage in ("pretrain", "sft"):
        zero2llm.run(zero2llm.make_recipe(**recipe(root, stage) | {"fit": {"steps": 4, "micro_rows": 4}}), quiet=True)
    return root


def student(root, name: str, out, **changes) -> dict:
    """A student of half the width, from nothing."""
    asked = dict(KINDS[name])
    file = "text" if asked.get("data.reads") == "documents" else "chat"
    data = {"train": [str(root / "data" / f"{file}.jsonl")], "valid_fraction": 0.2}
    data |= {key.removeprefix("data."): value for key, value in asked.items() if key.startswith("data.")}
    mixer = {"n_heads": 1, "n_kv_heads": 1, "head_dim": 8}
    model = {"preset": "qwen3-nano", "vocab_size": 300, "d_model": 8, "max_len": 96}
    made = {
        "out": str(out),
        "model": model | {"layers": {"repeat": 2}, "blocks": {"qwen3": {"mixer": mixer, "ffn": {"hidden": 16}}}},
        "teacher": {"path": str(root / "sft")} | ({"cache": str(out.parent / "teacher")} if "cache" in asked else {}),
        "data": data,
        "objective": asked["objective"],
        "optim": {"kind": "adamw", "lr": 0.01},
        "fit": {"steps": 4, "micro_rows": 4},
        "seq_len": 48,
        "batch_tokens": 384,
        "device": "cpu",
        "eval": {"every": 2, "prompts": ["the sea"], "sample_tokens": 4},
        "save": {"every_s": 0.0, "keep": 9},
    }
    if "rollout" in asked:
        made["rollout"] = asked["rollout"]
    if name == "minillm":
        del made["batch_tokens"]
    return made | changes


@pytest.mark.parametrize("name", KINDS)
def test_every_objective_trains(root, tmp_path, name):
    done = zero2llm.run(zero2llm.make_recipe(**student(root, name, tmp_path / "run")), quiet=True)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl", "train")
    assert [r["step"] for r in rows] == [1, 2, 3, 4] and all(r["divergence"] > 0 for r in rows)
    assert done.valid["valid_divergence"] > 0 and done.valid["valid_bpb"] > 0, "what a teacher's cache holds is also of held-out rows"
    assert done.tokenizer.fingerprint() == Tokenizer.load(latest(root / "sft").tokenizer_dir).fingerprint()
    unknown = {key for row in rows for key in row} - set(MEANING) - {"kind", "step", "tokens", "seconds", "time"}
    assert not unknown, f"a metric without a meaning: {unknown}"
    if name == "minillm":
        assert all(r["own"] == 1 for r in rows)
    if name == "hidden":
        assert len(list((tmp_path / "run" / "data").glob("projections-*"))) == 1


def mixed(root, name: str, out, cache: bool) -> dict:
    """A student on two sources with weights."""
    text = [str(root / "data" / "text.jsonl")]
    parts = [{"name": "one", "train": text, "weight": 3.0}, {"name": "two", "train": [str(root / "data" / "more.jsonl")], "weight": 1.0}]
    lines = (root / "data" / "text.jsonl").read_text().splitlines()
    (root / "data" / "more.jsonl").write_text("\n".join(line.replace("the", "a") for line in lines) + "\n")
    made = student(root, name, out)
    made["data"] = {"mixture": parts, "valid_fraction": 0.2, "reads": "documents", "packing": made["data"].get("packing", "concat")}
    made["teacher"] = {key: value for key, value in made["teacher"].items() if cache or key != "cache"}
    return made


@pytest.mark.parametrize("name", ["documents", "hidden"])
def test_sources_with_weights(root, tmp_path, name):
    done = zero2llm.run(zero2llm.make_recipe(**mixed(root, name, tmp_path / "run", False)), quiet=True)
    assert done.valid["valid_divergence"] > 0
    assert all(r["divergence"] > 0 for r in read_metrics(tmp_path / "run" / "metrics.jsonl", "train"))


def test_a_cached_teacher_of_sources_with_weights(root, tmp_path):
    """Its steps are those of the running teacher, each source is kept by itself, and other weights ask the teacher nothing."""
    found = []
    for cache in (True, False):
        zero2llm.run(zero2llm.make_recipe(**mixed(root, "packed", tmp_path / f"run{cache}", cache)), quiet=True)
        found.append([r["divergence"] for r in read_metrics(tmp_path / f"run{cache}" / "metrics.jsonl", "train")])
    assert found[0] == pytest.approx(found[1], rel=2e-3)
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "teacher").rglob("*.safetensors")}
    assert len({p.parent for p in files}) == 3, "two sources, and the held-out rows"
    other = mixed(root, "packed", tmp_path / "other", True)
    other["data"]["mixture"][0]["weight"] = 1.0
    zero2llm.run(zero2llm.make_recipe(**other), quiet=True)
    assert files == {p: p.stat().st_mtime_ns for p in (tmp_path / "teacher").rglob("*.safetensors")}


def test_a_cached_teacher_makes_the_steps_of_the_running_one(root, tmp_path):
    """Up to fp16, in which its log-probabilities are kept; the second student asks nothing of the teacher."""
    found = []
    for which in ("running", "cached", "again"):
        made = student(root, "cached", tmp_path / which)
        if which == "running":
            del made["teacher"]["cache"]
        zero2llm.run(zero2llm.make_recipe(**made), quiet=True)
        found.append([r["divergence"] for r in read_metrics(tmp_path / which / "metrics.jsonl", "train")])
        if which == "cached":
            files = {p: p.stat().st_mtime_ns for p in (tmp_path / "teacher").rglob("*.safetensors")}
            assert files
    assert found[0] == pytest.approx(found[1], rel=2e-3) and found[1] == found[2]
    assert files == {p: p.stat().st_mtime_ns for p in (tmp_path / "teacher").rglob("*.safetensors")}


def test_a_student_that_begins_from_a_checkpoint(root, tmp_path):
    made = student(root, "gkd", tmp_path / "run", init=str(root / "pretrain"), adapter={"kind": "lora", "r": 2})
    del made["model"]
    done = zero2llm.run(zero2llm.make_recipe(**made), quiet=True)
    assert done.valid["valid_divergence"] > 0


@pytest.mark.parametrize("name", ["gkd", pytest.param("minillm", marks=pytest.mark.slow), pytest.param("cached", marks=pytest.mark.slow)])
def test_killed_and_resumed_to_the_bit(root, tmp_path, name):
    fit = {"steps": 8, "micro_rows": 8}
    want = zero2llm.run(zero2llm.make_recipe(**student(root, name, tmp_path / "whole", fit=fit)), quiet=True)
    path, out = tmp_path / "recipe.yaml", tmp_path / "killed"
    path.write_text(yaml.safe_dump(student(root, name, out, fit=fit)), encoding="utf-8")
    kill_and_resume(path, out, 8)
    a, b = load_tensors(want.checkpoint / "model"), load_tensors(latest(out).path / "model")
    assert all(a[key].equal(b[key]) for key in a)


def test_two_ranks_make_the_steps_of_one(root, tmp_path):
    weights = []
    for ranks in (1, 2):
        path, out = tmp_path / f"{ranks}.yaml", tmp_path / str(ranks)
        path.write_text(yaml.safe_dump(student(root, "gkd", out, fit={"steps": 3, "micro_rows": 2})), encoding="utf-8")
        start = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone", "-m", "zero2llm.cli", "train"]
        done = subprocess.run([*start, str(path), "--quiet"], env=ENV, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-2000:]
        weights.append(load_tensors(latest(out).path / "model"))
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("distill", {"teacher": None}, "needs teacher.path"),
        ("distill", {"objective": {"kind": "sft"}, "data.reads": None}, "teacher is for distillation"),
        ("distill", {"data.reads": None}, "documents .pretraining. or conversations"),
        ("gkd", {"data.reads": "conversations"}, "remove it"),
        ("distill", {"tokenizer": {}}, "the teacher's own"),
        ("distill", {"teacher": {"path": "no/such"}}, "no/such"),
        ("cached", {"objective": {"kind": "distill"}}, "objective.top_k"),
        ("cached", {"objective": {"kind": "distill", "top_k": 300}}, "top_k = 300 must be from 1 to 299"),
        ("cached", {"objective": {"kind": "distill", "top_k": 8, "alpha": 0.0}}, "never asks"),
        ("cached", {"objective": {"kind": "hidden"}}, "remove the key, or take distill"),
        ("packed", {"data.packing": "concat"}, "packing best_fit"),
        ("gkd", {"rollout": None}, "needs the key rollout"),
        ("gkd", {"reward": [{"kind": "exact"}]}, "no reward"),
        ("gkd", {"rollout": ROLLOUT | {"epochs": 2}}, "1 and 1"),
        ("gkd", {"rollout": {"max_tokens": 46}}, "student and teacher read"),
        ("minillm", {"batch_tokens": 96}, "remove the key"),
        ("minillm", {"rollout": ROLLOUT | {"temperature": 0.7}}, "take 1"),
        ("hidden", {"objective": {"kind": "hidden", "layers": [[0, 5]]}}, r"\[0, 5\]; the student has 2 blocks"),
        ("distill", {"seq_len": 80, "batch_tokens": 800}, "longer than the teacher"),
        ("distill", {"model": {"preset": "qwen3-nano", "vocab_size": 512}}, "make them equal"),
    ],
)
def test_mistakes_are_named(root, tmp_path, name, changes, words):
    made = student(root, name, tmp_path / "run")
    for key, value in changes.items():
        place, key = (made["data"], key.removeprefix("data.")) if key.startswith("data.") else (made, key)
        place[key] = value
    made["data"] = {key: value for key, value in made["data"].items() if value is not None}
    with pytest.raises(ValueError, match=words):
        zero2llm.run(zero2llm.make_recipe(**{key: value for key, value in made.items() if value is not None}), quiet=True)
    assert not list((tmp_path / "run").glob("checkpoints/*"))


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("distill", {"teacher": {"path": "no/such"}}, "no/such"),
        ("distill", {"seq_len": 80, "batch_tokens": 800}, "longer than the teacher"),
        ("hidden", {"objective": {"kind": "hidden", "layers": [[0, 5]]}}, r"\[0, 5\]; the student has 2 blocks"),
        ("minillm", {"rollout": ROLLOUT | {"temperature": 0.7}}, "take 1"),
    ],
)
def test_the_teacher_is_looked_at_before_the_data(root, tmp_path, name, changes, words):
    made = student(root, name, tmp_path / "run") | changes
    made["data"]["train"] = ["not/there.jsonl"]
    with pytest.raises(ValueError, match=words):
        zero2llm.run(zero2llm.make_recipe(**made), quiet=True)


def test_another_vocabulary_is_refused_before_training(root, tmp_path):
    other = recipe(root, "pretrain", out=str(tmp_path / "other"), seed=2, tokenizer={"vocab_size": 300, "split": "gpt2"})
    other["data"] = {"train": [str(root / "data" / "pairs.jsonl")], "valid_fraction": 0.2, "field": "chosen"}
    zero2llm.run(zero2llm.make_recipe(**other | {"fit": {"steps": 1, "micro_rows": 4}}), quiet=True)
    made = student(root, "distill", tmp_path / "run", init=str(tmp_path / "other"), seq_len=64, batch_tokens=512)
    del made["model"]
    with pytest.raises(ValueError, match="another vocabulary.*sequence-level"):
        zero2llm.run(zero2llm.make_recipe(**made), quiet=True)


def test_its_batches_can_be_looked_at(root, tmp_path, capsys):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(student(root, "gkd", tmp_path / "run")), encoding="utf-8")
    inspect_recipe(path, [], 1, None)
    assert "assistant" in capsys.readouterr().out
