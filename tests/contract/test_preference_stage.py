"""Preference objectives through the whole path: recipe, data, training, stored references, resume, ranks, a reward model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import zero2llm
from tests.contract.stages import recipe, write_data
from zero2llm.lab import preference
from zero2llm.lab.convert import export_checkpoint
from zero2llm.train.checkpoint import Checkpoint, candidates
from zero2llm.train.objectives import reference as module
from zero2llm.train.objectives.reference import nothing, precompute, stored
from zero2llm.train.telemetry import MEANING, read_metrics

KINDS = {
    "dpo": {"label_smoothing": 0.1, "sft_weight": 0.5}, "ipo": {}, "kto": {"undesirable_weight": 0.8}, "orpo": {}, "simpo": {},
    "cpo": {}, "reward": {"center": 0.01},
}  # fmt: skip
NOTHING = {"init": None, "model": {"preset": "llama-nano"}, "tokenizer": {"vocab_size": 4096}}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("preference")
    write_data(root / "data")
    lines = [json.loads(line) for line in (root / "data" / "pairs.jsonl").read_text("utf-8").splitlines()]
    good = [r | {"chosen": r["chosen"] + " 海", "margin": 0.5} for r in lines]  # a difference that can be learned
    (root / "data" / "good.jsonl").write_text("".join(json.dumps(r) + "\n" for r in good), "utf-8")
    zero2llm.run(zero2llm.make_recipe(**recipe(root, "pretrain")), quiet=True)
    return root


def made(root: Path, out: Path, kind: str, keys: dict | None = None, **changes) -> dict:
    start = {"out": str(out), "init": str(root / "pretrain"), "objective": {"kind": kind, **KINDS[kind], **(keys or {})}}
    data = {"train": [str(root / "data" / "good.jsonl")], "valid_fraction": 0.2}
    quiet = {"eval": {"every": 2}, "fit": {"steps": 4, "micro_rows": 4}, "data": data, "save": {"every_s": 60.0, "keep": 3}}
    return recipe(root, "dpo") | start | quiet | changes


def run(*args, resume: bool = False, **changes):
    return zero2llm.run(zero2llm.make_recipe(**made(*args, **changes)), resume=resume, quiet=True)


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model" / "model.safetensors")


def records(folder: Path, kind: str) -> list[dict]:
    return read_metrics(folder / "metrics.jsonl", kind)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns_and_explains_its_metrics(root, tmp_path, kind):
    done = run(root, tmp_path, kind, optim={"kind": "adamw", "lr": 0.02})
    train, valid = (records(tmp_path, k) for k in ("train", "valid"))
    told = set(train[0]) | {name.removeprefix("valid_") for name in valid[0]}
    assert not told - set(MEANING) - {"kind", "step", "tokens", "seconds"}
    assert [r["step"] for r in valid] == [0, 2, 4] and valid[-1]["valid_loss"] == done.valid["valid_loss"]
    margins = [r["valid_reward_chosen"] - r["valid_reward_rejected"] if kind == "kto" else r["valid_margin"] for r in valid]
    assert margins[-1] > margins[0]


@pytest.mark.parametrize("kind", ["dpo", "kto"])
@pytest.mark.parametrize("adapter", [None, pytest.param({"kind": "lora", "r": 4}, marks=pytest.mark.slow)], ids=["full", "lora"])
def test_a_stored_reference_trains_alike(root, tmp_path, kind, adapter, monkeypatch):
    run(root, tmp_path / "model", kind, adapter=adapter)
    built = []
    right = preference.referred
    monkeypatch.setattr("zero2llm.lab.stage.referred", lambda *a: (built.append(right(*a)), built[-1])[1])
    run(root, tmp_path / "file", kind, {"reference": "precomputed"}, adapter=adapter)
    assert built[0][0].reference is stored
    assert len(list((tmp_path / "file" / "data").glob("reference-*.safetensors"))) == 2
    for ours, theirs in zip(*(records(tmp_path / name, "train") for name in ("file", "model")), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
    ours, theirs = (records(tmp_path / name, "valid")[-1] for name in ("file", "model"))
    assert ours["valid_loss"] == pytest.approx(theirs["valid_loss"], abs=1e-4)


@pytest.mark.parametrize("kind", [pytest.param("dpo", marks=pytest.mark.slow), "kto"])
def test_resumes_to_the_bit_even_without_the_stored_reference(root, tmp_path, kind):
    keys, often = {"reference": "precomputed"}, {"save": {"every_s": 0.0, "keep": 4}}
    whole = run(root, tmp_path / "whole", kind, keys, **often)
    run(root, tmp_path / "cut", kind, keys, **often)
    assert len(candidates(tmp_path / "cut")) >= 3
    for later in candidates(tmp_path / "cut")[1:]:
        shutil.rmtree(later)
    for file in (tmp_path / "cut" / "data").glob("reference-*"):
        file.unlink()
    again = run(root, tmp_path / "cut", kind, keys, resume=True, **often)
    a, b = weights(whole.checkpoint), weights(again.checkpoint)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert [r["step"] for r in records(tmp_path / "cut", "train")] == list(range(1, 5))


class Five:
    """Five pairs of which nothing is known."""

    unit, identity, reference = 2, {"data": "five"}, None

    def __len__(self):
        return 5

    def numbered(self, units):
        from zero2llm.core.batch import Batch
        from zero2llm.core.seq import Seq

        tokens = torch.tensor(units).repeat_interleave(2)[:, None] + torch.zeros(1, 3, dtype=torch.long)
        return Batch(tokens, tokens, Seq.rows(len(tokens), 3), group=2)


def test_stale_and_damaged_references_are_made_anew(tmp_path, monkeypatch):
    asked = []

    def numbers(batch):
        asked.append(len(batch))
        return batch.tokens[:, 0].float() + torch.arange(len(batch)) % 2 / 10

    def get(weights="w", rows=None, dtype=torch.float32, micro_rows=4):
        rows = rows or Five()
        asked.clear()
        path = precompute(numbers, rows, tmp_path, weights, micro_rows=micro_rows, device=torch.device("cpu"), dtype=dtype)
        torch.testing.assert_close(rows.reference, torch.arange(5.0)[:, None] + torch.tensor([0.0, 0.1]))
        return path, sum(asked)

    path, n = get()
    assert n == 10 and asked == [4, 4, 2] and get() == (path, 0) and get(micro_rows=1) == (path, 0)
    other, n = get("other weights")
    assert other != path and n == 10
    changed = Five()
    changed.identity = {"data": "other"}
    assert get(rows=changed)[1] == 10 and get(dtype=torch.bfloat16)[1] == 10
    path.write_bytes(path.read_bytes()[:-3])
    assert get() == (path, 10) and get() == (path, 0)
    shutil.copy(other, path)  # another's numbers under this name
    assert get() == (path, 10)
    path.unlink()
    assert get() == (path, 10)
    assert nothing(Five().numbered([1, 2])).tolist() == [0.0] * 4
    monkeypatch.setattr(module.os, "replace", lambda a, b: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    path.unlink()
    with pytest.raises(ValueError, match="no space left while writing"):
        get()
    assert not [p for p in tmp_path.iterdir() if "part" in p.name]


@pytest.mark.slow
def test_another_start_makes_another_reference(root, tmp_path):
    """The recipe is the same, the checkpoint at its path is not: a run that goes on makes its files anew."""
    shutil.copytree(root / "pretrain", tmp_path / "init")
    changes = {"init": str(tmp_path / "init")}
    run(root, tmp_path / "run", "dpo", {"reference": "precomputed"}, **changes)
    before = {p.name for p in (tmp_path / "run" / "data").glob("reference-*")}
    shutil.rmtree(tmp_path / "init" / "checkpoints" / "step-00000008")
    run(root, tmp_path / "run", "dpo", {"reference": "precomputed"}, resume=True, **changes)
    after = {p.name for p in (tmp_path / "run" / "data").glob("reference-*")}
    assert len(after) == 2 and not before & after


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{}, {"reference": "precomputed"}], ids=["model", "precomputed"])
def test_two_ranks_are_one_process(root, tmp_path, keys):
    """KTO's z is that of the global batch; rank 0 makes the stored reference, the other reads it."""
    alone = run(root, tmp_path / "alone", "kto", keys)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(made(root, tmp_path / "ranks", "kto", keys), allow_unicode=True), "utf-8")
    call = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port", str(29000 + os.getpid() % 400)]
    done = subprocess.run([*call, "-m", "zero2llm.cli", "train", str(tmp_path / "r.yaml"), "--quiet"], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    want, got = weights(alone.checkpoint), weights(candidates(tmp_path / "ranks")[-1])
    for name in want:
        torch.testing.assert_close(got[name], want[name], atol=2e-5, rtol=0)
    for ours, theirs in zip(*(records(tmp_path / name, "train") for name in ("ranks", "alone")), strict=True):
        assert ours["z"] == pytest.approx(theirs["z"], abs=1e-5) and ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)


def test_kto_begins_at_half_and_says_how_answers_balance(root, tmp_path, capsys):
    run(root, tmp_path / "pairs", "kto", {"undesirable_weight": 2.0})
    shown = " ".join(capsys.readouterr().out.split())
    assert "pairs read as two judged answers each: 60" in shown and "= 0.50 lies outside 1 to 4/3" in shown
    first = records(tmp_path / "pairs", "valid")[0]
    assert first["valid_loss"] == pytest.approx(0.75), "as many good ones, 0.5 each, as bad ones, twice that"
    assert first["valid_z"] == first["valid_moved_right"] == 0
    lines = [{"prompt": f"the sea {i}", "completion": "a ship", "label": i % 7 > 2} for i in range(70)]
    (tmp_path / "judged.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines), "utf-8")
    data = {"train": [str(tmp_path / "judged.jsonl")], "valid_fraction": 0.2}
    run(root, tmp_path / "judged", "kto", {"undesirable_weight": 1.0, "desirable_weight": 0.85}, data=data)
    shown = capsys.readouterr().out
    assert "pairs read as" not in shown and "lies outside" not in shown


def test_a_run_counts_pairs_of_one_answer(root, tmp_path, capsys):
    lines = (root / "data" / "good.jsonl").read_text("utf-8").splitlines()
    same = json.dumps({"prompt": "the sea", "chosen": "a ship", "rejected": "a ship"})
    (tmp_path / "pairs.jsonl").write_text("\n".join([*lines[:3], same, *lines[3:]]) + "\n", "utf-8")
    run(root, tmp_path / "run", "simpo", data={"train": [str(tmp_path / "pairs.jsonl")], "valid_fraction": 0.2})
    shown = " ".join(capsys.readouterr().out.split())
    assert "1 bad records left out" in shown and "line 4: chosen and rejected are the same" in shown


def test_a_reward_model(root, tmp_path):
    fit = {"steps": 24, "micro_rows": 16}
    done = run(root, tmp_path / "run", "reward", fit=fit, optim={"kind": "adamw", "lr": 0.01}, eval={"every": 24})
    before, after = records(tmp_path / "run", "valid")
    assert before["valid_accuracy"] == 0 and before["valid_calibration"] == pytest.approx(0.5)  # all scores are 0: no pair is right
    assert after["valid_accuracy"] > 0.8 and after["valid_calibration"] < 0.4 and 0 <= after["valid_longer_chosen"] <= 1
    stored = Checkpoint.open(done.checkpoint).load_model()
    assert stored.cfg.score_head and stored.score.weight.abs().sum() > 0
    again = run(root, tmp_path / "more", "reward", init=str(tmp_path / "run"))
    first = records(tmp_path / "more", "valid")[0]
    assert first["valid_accuracy"] == pytest.approx(after["valid_accuracy"]) and again.model.cfg.score_head
    left = run(root, tmp_path / "dpo", "dpo", init=str(tmp_path / "run"))
    assert torch.equal(left.model.score.weight, stored.score.weight)
    export_checkpoint(tmp_path / "run", tmp_path / "hf")
    export_checkpoint(tmp_path / "dpo", tmp_path / "lm")
    kinds = [json.loads((tmp_path / name / "config.json").read_text())["architectures"] for name in ("hf", "lm")]
    assert kinds == [["Qwen3ForSequenceClassification"], ["Qwen3ForCausalLM"]]


@pytest.mark.parametrize(
    "kind,changes,match",
    [
        ("dpo", NOTHING, "objective dpo needs init: the checkpoint is also its reference"),
        ("ipo", NOTHING, "objective ipo needs init"),
        ("kto", NOTHING, "objective kto needs init"),
        ("reward", NOTHING, "objective reward needs init.*score head"),
        ("reward", {"eval": {"prompts": ["x"]}}, "scores answers and writes none"),
        ("kto", {"objective": {"kind": "kto", "label_smoothing": 0.1}}, "unknown key 'objective.label_smoothing'"),
        ("dpo", {"objective": {"kind": "dpo", "reference": "copy"}}, "'model', 'precomputed' or 'none'"),
        ("simpo", {"objective": {"kind": "simpo", "reference": "none"}}, "unknown key 'objective.reference'"),
        ("orpo", {"objective": {"kind": "orpo", "beta": -1}}, "needs beta > 0, not -1"),
        ("cpo", {"data": {"train": ["x"], "train_on": "all"}}, "are for conversations"),
    ],
)
def test_recipes_that_cannot_be_trained(root, tmp_path, kind, changes, match):
    with pytest.raises(ValueError, match=match):
        run(root, tmp_path / "run", kind, **changes)


@pytest.mark.parametrize("kind", KINDS)
def test_the_shipped_recipe_is_whole(kind):
    found = zero2llm.load_recipe(kind)
    assert found.objective.kind == kind and found.out == f"runs/mine-{kind}"


def test_the_schema_knows_them():
    from zero2llm.lab.recipe import recipe_schema

    known = json.loads(recipe_schema())["$defs"]
    assert {"DPOConfig", "IPOConfig", "KTOConfig", "ORPOConfig", "SimPOConfig", "CPOConfig", "RewardConfig"} <= set(known)
