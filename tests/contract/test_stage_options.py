"""Options of the model that reach training through a recipe: muP's learning rates, predictions several tokens ahead."""

from __future__ import annotations

import pytest
import torch

import zero2llm
from tests.contract.stages import recipe, write_data
from zero2llm.lab import stage
from zero2llm.lab.recipe import make_recipe
from zero2llm.optim.build import build_optim
from zero2llm.train.checkpoint import Checkpoint, latest
from zero2llm.train.telemetry import MEANING, read_metrics


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("options")
    write_data(root / "data")
    return root


@pytest.fixture(scope="module")
def ahead(root):
    """A run with two depths."""
    keys = recipe(root, "pretrain")
    keys["model"] |= {"mtp": {"depth": 2}}
    keys["objective"] |= {"mtp_weight": 0.3}
    return zero2llm.run(make_recipe(**keys), quiet=True).run


def test_depths_train_are_logged_and_saved(ahead):
    metrics = read_metrics(ahead / "metrics.jsonl", kind="train")
    assert all(r["mtp"] > 0 for r in metrics) and metrics[-1]["mtp"] < metrics[0]["mtp"] and "mtp" in MEANING
    valid = read_metrics(ahead / "metrics.jsonl", kind="valid")
    assert valid[-1]["valid_mtp"] > 0 and "valid_ppl" in valid[-1]
    names = latest(ahead).load_model().state_dict()
    assert any(n.startswith("mtp.depths.1.") for n in names)


def test_a_later_stage_leaves_idle_depths_as_they_are(root, ahead):
    before = latest(ahead).load_model().state_dict()
    later = zero2llm.run(make_recipe(**recipe(root, "sft", init=str(ahead))), quiet=True).run
    after = latest(later).load_model().state_dict()
    assert all(torch.equal(before[n], after[n]) for n in before if n.startswith("mtp."))
    assert not torch.equal(before["embed.weight"], after["embed.weight"])


def test_fine_tuning_may_train_the_depths_too(root, ahead):
    keys = recipe(root, "sft", init=str(ahead), out=str(root / "sft_ahead"))
    keys["objective"] |= {"mtp_weight": 0.1}
    run = zero2llm.run(make_recipe(**keys), quiet=True).run
    before, after = latest(ahead).load_model(), latest(run).load_model()
    assert not torch.equal(before.mtp.depths[0].join_proj.weight, after.mtp.depths[0].join_proj.weight)


def test_a_checkpoint_without_depths_cannot_train_them(root):
    plain = zero2llm.run(make_recipe(**recipe(root, "pretrain", out=str(root / "plain"))), quiet=True).run
    keys = recipe(root, "sft", init=str(plain), out=str(root / "refused"))
    keys["objective"] |= {"mtp_weight": 0.1}
    with pytest.raises(ValueError, match="was trained without `mtp`"):
        zero2llm.run(make_recipe(**keys), quiet=True)


def test_mup_reaches_the_optimizer_of_a_stage(root, monkeypatch):
    keys = recipe(root, "pretrain", out=str(root / "mup"), optim={"kind": "adamw", "lr": 0.01})
    keys["model"] |= {"init": {"kind": "mup", "base_width": 4, "base_head_dim": 8}}
    keys["fit"] |= {"steps": 2}
    made = []

    def seen(*args):
        made.append(build_optim(*args))
        return made[-1]

    monkeypatch.setattr(stage, "build_optim", seen)
    run = zero2llm.run(make_recipe(**keys), quiet=True).run
    assert [g["peak_lr"] for g in made[0].groups] == [0.0025, 0.01, 0.01]
    model = Checkpoint.open(run).load_model()
    assert model.width_ratio == 0.25 and model.cfg.init.kind == "mup"
