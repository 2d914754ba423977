"""Score heads in training: reward models and critics beside an adapter, their checkpoints and what comes back."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from tests.contract.scores import HEAD, KINDS, OFTEN, close, made, prepared, run
from tests.contract.stages import kill_and_resume
from tests.contract.test_resume import ENV
from zero2llm.core.files import load_tensors
from zero2llm.lab import stage
from zero2llm.lab.convert import merge_checkpoint
from zero2llm.model.heads import ScoreHead
from zero2llm.train import adapted, checkpoint
from zero2llm.train.checkpoint import Checkpoint, candidates, latest
from zero2llm.train.telemetry import read_metrics


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return prepared(tmp_path_factory.mktemp("scores"))


@pytest.mark.parametrize("objective", ["reward", "ppo"])
@pytest.mark.parametrize("kind", ["lora", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("dora", "pissa", "adalora"))])
def test_the_head_learns_beside_the_adapter_and_is_kept(root, tmp_path, objective, kind):
    done = run(root, tmp_path / "run", objective, KINDS[kind])
    stored = load_tensors(done.checkpoint / "model")
    assert set(stored) > HEAD and all(name in HEAD or ".adapters.default." in name for name in stored)
    assert stored["score.weight"].norm() > 0.01 and stored["score.weight"].shape == (16,)
    found = Checkpoint.open(done.checkpoint)
    purpose = "reward" if objective == "reward" else True
    assert found.adapter().score and found.load_adapted().cfg.score_head == found.load_model().cfg.score_head == purpose
    close(found.load_model(), done.model)
    close(found.load_model(), found.load_adapted())
    merge_checkpoint(tmp_path / "run", tmp_path / "whole")
    merged = Checkpoint.open(tmp_path / "whole")
    assert merged.adapter() is None and merged.model_config().score_head == purpose
    close(merged.load_model(), done.model)


def test_a_reward_model_learns(root, tmp_path):
    fit = {"steps": 24, "micro_rows": 16}
    more = {"fit": fit, "eval": {"every": 24}, "optim": {"kind": "adamw", "lr": 0.03}, "batch_tokens": 512}
    done = run(root, tmp_path / "run", "reward", {"kind": "lora", "r": 8}, **more)
    before, after = read_metrics(tmp_path / "run" / "metrics.jsonl", "valid")
    assert before["valid_accuracy"] == 0 and after["valid_accuracy"] > 0.8 and after["valid_loss"] < 0.69 < before["valid_loss"] + 0.01
    more = run(root, tmp_path / "more", "reward", None, init=str(tmp_path / "run"), fit={"steps": 1, "micro_rows": 16})  # all weights, from there
    first = read_metrics(tmp_path / "more" / "metrics.jsonl", "valid")[0]
    assert first["valid_accuracy"] == pytest.approx(after["valid_accuracy"]) and more.model.cfg.score_head == "reward"
    assert done.model.score.weight.norm() > 0


def test_base_in_four_bits(root, tmp_path):
    for objective in ("reward", "ppo"):
        done = run(root, tmp_path / objective, objective, quantize="nf4", fit={"steps": 2, "micro_rows": 8})
        found = Checkpoint.open(done.checkpoint)
        assert found.adapter().quantize == "nf4"
        close(found.load_model(), done.model)


def test_the_reference_of_ppo_is_the_base_and_stays(root, tmp_path):
    fit = {"steps": 4, "micro_rows": 8}
    run(root, tmp_path / "lora", "ppo", {"kind": "lora", "r": 8, "alpha": 64}, fit=fit)
    run(root, tmp_path / "full", "ppo", None, fit=fit)
    lora, full = (read_metrics(tmp_path / name / "metrics.jsonl", "train") for name in ("lora", "full"))
    for name in ("reward", "value_loss", "ratio"):
        assert lora[0][name] == pytest.approx(full[0][name], rel=1e-4), "both begin as the base"
    assert lora[0]["kl"] == pytest.approx(0, abs=1e-6), "both are the base"
    assert lora[2]["kl"] > 1e-3, "a fresh rollout, whose policy is what sampled it: the reference did not move along"


def test_a_head_that_the_base_has_goes_on_and_the_base_keeps_its_own(root, tmp_path):
    """A critic that begins as the reward model."""
    first = run(root, tmp_path / "reward", "reward", None, fit={"steps": 3, "micro_rows": 8})
    before = load_tensors(first.checkpoint / "model")["score.weight"]
    done = run(root, tmp_path / "ppo", "ppo", init=str(tmp_path / "reward"), fit={"steps": 2, "micro_rows": 8}, optim={"kind": "adamw", "lr": 0.001})
    after = load_tensors(done.checkpoint / "model")["score.weight"]
    assert 0 < (after - before).norm() < 0.2 * before.norm() and done.model.cfg.score_head is True
    close(Checkpoint.open(done.checkpoint).load_model(), done.model)
    assert load_tensors(first.checkpoint / "model")["score.weight"].equal(before)
    tuned = run(root, tmp_path / "dpo", "dpo", init=str(tmp_path / "reward"), fit={"steps": 2, "micro_rows": 8})
    assert not HEAD & set(load_tensors(tuned.checkpoint / "model")), "dpo trains no head, so its adapter holds none"
    assert tuned.model.cfg.score_head is True and tuned.model.score.weight.equal(before)
    close(Checkpoint.open(tuned.checkpoint).load_model(), tuned.model)


def same(a: Path, b: Path) -> bool:
    ours, theirs = load_tensors(a / "model"), load_tensors(b / "model")
    return ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


@pytest.mark.parametrize("objective", ["reward", pytest.param("ppo", marks=pytest.mark.slow)])
def test_resumes_to_the_bit(root, tmp_path, objective):
    whole = run(root, tmp_path / "whole", objective, save=OFTEN)
    assert len(candidates(whole.run)) == 3
    run(root, tmp_path / "cut", objective, save=OFTEN)
    for later in candidates(tmp_path / "cut")[1:]:
        shutil.rmtree(later)
    again = run(root, tmp_path / "cut", objective, resume=True, save=OFTEN)
    assert same(whole.checkpoint, again.checkpoint)


@pytest.mark.slow
@pytest.mark.parametrize("objective,quantize", [("reward", None), ("ppo", None), ("ppo", "nf4")])
def test_killed_and_resumed_to_the_bit(root, tmp_path, objective, quantize):
    long = {"fit": {"steps": 10, "micro_rows": 8}, "quantize": quantize, "save": OFTEN}
    want = run(root, tmp_path / "whole", objective, **long)
    path, out = tmp_path / "recipe.yaml", tmp_path / "killed"
    path.write_text(yaml.safe_dump(made(root, out, objective, **long)), encoding="utf-8")
    kill_and_resume(path, out, 10)
    assert same(want.checkpoint, latest(out).path)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["reward", "ppo"])
def test_two_ranks_are_one_process(root, tmp_path, objective):
    alone = run(root, tmp_path / "alone", objective)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(made(root, tmp_path / "ranks", objective), allow_unicode=True), "utf-8")
    call = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port", str(28500 + os.getpid() % 400)]
    done = subprocess.run([*call, "-m", "zero2llm.cli", "train", str(tmp_path / "r.yaml"), "--quiet"], env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    want, got = load_tensors(alone.checkpoint / "model"), load_tensors(latest(tmp_path / "ranks").path / "model")
    for name in want:
        torch.testing.assert_close(got[name], want[name], atol=5e-5, rtol=0)


def test_a_damaged_head_is_named(root, tmp_path):
    done = run(root, tmp_path / "run", "reward", fit={"steps": 1, "micro_rows": 8})
    found = Checkpoint.open(done.checkpoint)
    tensors = load_tensors(found.path / "model")
    model = found.load_adapted()
    for wrong in ({"score.weight": torch.zeros(17)}, {"score.bias": None}):
        bad = {name: t for name, t in (tensors | wrong).items() if t is not None}
        with pytest.raises(ValueError, match="score head does not fit: score.weight, score.bias are needed for d_model = 16"):
            adapted.load_learned(model, found.adapter(), bad)


def frozen_head(m):
    right = adapted.dress
    m.setattr(stage, "dress", lambda model, r: (right(model, r), model.score is None or model.score.requires_grad_(False))[0])


def head_not_stored(m):
    right = adapted.learned
    m.setattr(checkpoint, "learned", lambda model, r: right(model, replace(r, score=False)))


def head_not_loaded(m):
    right = adapted.load_learned

    def load(model, r, tensors):
        right(model, replace(r, score=False), {name: t for name, t in tensors.items() if name not in HEAD})

    m.setattr(checkpoint, "load_learned", load)


def head_not_resumed(m):
    right = Checkpoint.restore

    def restore(self, model, optim, batches):
        kept = {name: t.clone() for name, t in model.score.state_dict().items()}
        state = right(self, model, optim, batches)
        model.score.load_state_dict(kept)
        return state

    m.setattr(Checkpoint, "restore", restore)


def drawn(m):
    right = ScoreHead.__init__

    def init(self, d_model):
        right(self, d_model)
        torch.nn.init.normal_(self.weight)

    m.setattr(ScoreHead, "__init__", init)


BUGS = {
    "the adapter freezes the head": (frozen_head, "learns"),
    "the head is not in the checkpoint": (head_not_stored, "learns"),
    "the head is stored, not loaded": (head_not_loaded, "learns"),
    "the head begins anew on resuming": (head_not_resumed, "resumes"),
    "a new head is drawn, not 0": (drawn, "accuracy"),
    "the reference wears the adapter": (lambda m: m.setattr("zero2llm.train.adapted.disabled", lambda model: torch.no_grad()), "reference"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_bugs_are_caught(root, tmp_path, bug, monkeypatch):
    plant, check = BUGS[bug]
    checks = {
        "learns": lambda: test_the_head_learns_beside_the_adapter_and_is_kept(root, tmp_path, "reward", "lora"),
        "resumes": lambda: test_resumes_to_the_bit(root, tmp_path, "reward"),
        "accuracy": lambda: test_a_reward_model_learns(root, tmp_path),
        "reference": lambda: test_the_reference_of_ppo_is_the_base_and_stays(root, tmp_path),
    }
    plant(monkeypatch)
    with pytest.raises((AssertionError, ValueError)):
        checks[check]()
