"""Adapters through the whole path: recipe, training, checkpoint, resume, merge, chat, export; and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import zero2llm
from tests.contract.stages import recipe, write_data
from zero2llm.core.seq import Seq
from zero2llm.lab.convert import export_checkpoint, merge_checkpoint
from zero2llm.train.checkpoint import Checkpoint, candidates
from zero2llm.train.telemetry import read_metrics

KINDS = {
    "lora": {"kind": "lora", "r": 4, "alpha": 8, "lr_ratio": 4.0},
    "dora": {"kind": "dora", "r": 4},
    "pissa": {"kind": "pissa", "r": 4},
    "adalora": {"kind": "adalora", "init_r": 4, "target_r": 2, "final": 2},
}
QUIET = {"every": 4, "prompts": []}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    write_data(root / "data")
    zero2llm.run(zero2llm.make_recipe(**recipe(root, "pretrain")), quiet=True)
    return root


def tuned(root: Path, out: Path, stage: str = "sft", **changes) -> dict:
    kind = {"optim": {"kind": "adamw", "lr": 0.01}, "eval": QUIET, "out": str(out), "init": str(root / "pretrain")}
    return recipe(root, stage) | kind | changes


def logits(model) -> torch.Tensor:
    tokens = torch.arange(4, 24).view(1, -1)
    with torch.no_grad():
        return model.logits(model(tokens, Seq.rows(1, 20))[0])


@pytest.mark.parametrize("kind", KINDS)
def test_learns_and_stays_small(root, tmp_path, kind):
    made = tuned(root, tmp_path / "run", adapter=KINDS[kind])
    done = zero2llm.run(zero2llm.make_recipe(**made), quiet=True)
    before, *_, after = [r["valid_loss"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl", "valid")]
    assert after < before
    stored = load_file(done.checkpoint / "model" / "model.safetensors")
    assert stored and all(".adapters.default." in name for name in stored)
    base = Checkpoint.open(root / "pretrain").load_model()
    assert base.state_dict().keys() == done.model.state_dict().keys()
    assert not torch.equal(logits(base), logits(done.model))
    loaded = Checkpoint.open(done.checkpoint)
    torch.testing.assert_close(logits(loaded.load_model()), logits(loaded.load_adapted()), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(loaded.load_model()), logits(done.model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "adalora"])
def test_resumes_to_the_bit(root, tmp_path, kind):
    made = tuned(root, tmp_path / "whole", adapter=KINDS[kind])
    whole = zero2llm.run(zero2llm.make_recipe(**made), quiet=True)
    cut = made | {"out": str(tmp_path / "cut")}
    zero2llm.run(zero2llm.make_recipe(**cut), quiet=True)
    for later in candidates(tmp_path / "cut")[1:]:
        shutil.rmtree(later)
    again = zero2llm.run(zero2llm.make_recipe(**cut), resume=True, quiet=True)
    a, b = (load_file(r.checkpoint / "model" / "model.safetensors") for r in (whole, again))
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_base_in_four_bits(root, tmp_path):
    made = tuned(root, tmp_path / "run", adapter=KINDS["lora"], quantize="nf4")
    done = zero2llm.run(zero2llm.make_recipe(**made), quiet=True)
    found = Checkpoint.open(done.checkpoint)
    assert found.adapter().quantize == "nf4"
    torch.testing.assert_close(logits(found.load_model()), logits(found.load_adapted()), atol=1e-5, rtol=1e-5)


def test_merged_and_exported(root, tmp_path):
    done = zero2llm.run(zero2llm.make_recipe(**tuned(root, tmp_path / "run", adapter=KINDS["lora"])), quiet=True)
    merge_checkpoint(tmp_path / "run", tmp_path / "whole")
    merged = Checkpoint.open(tmp_path / "whole")
    assert merged.adapter() is None and merged.manifest["parent"] == str(done.checkpoint)
    torch.testing.assert_close(logits(merged.load_model()), logits(done.model), atol=1e-5, rtol=1e-5)
    export_checkpoint(root / "pretrain", tmp_path / "base")
    export_checkpoint(tmp_path / "run", tmp_path / "hf")
    export_checkpoint(tmp_path / "run", tmp_path / "peft", "peft", base=str(tmp_path / "base"))
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["r"] == 4
    with pytest.raises(ValueError, match="whole model already"):
        merge_checkpoint(tmp_path / "whole", tmp_path / "x")
    with pytest.raises(ValueError, match="is a whole model, not an adapter"):
        export_checkpoint(tmp_path / "whole", tmp_path / "x", "peft", base="b")
    with pytest.raises(ValueError, match="needs --base"):
        export_checkpoint(tmp_path / "run", tmp_path / "x", "peft")
    again = tuned(root, tmp_path / "second", adapter=KINDS["lora"], init=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="is an adapter itself; merge it first"):
        zero2llm.run(zero2llm.make_recipe(**again), quiet=True)
    full = {key: value for key, value in again.items() if key != "adapter"} | {"out": str(tmp_path / "third")}
    zero2llm.run(zero2llm.make_recipe(**full), quiet=True)  # all weights, from the merged ones


def test_another_base_is_refused(root, tmp_path):
    shutil.copytree(root / "pretrain", tmp_path / "base")
    made = tuned(root, tmp_path / "run", adapter=KINDS["lora"], init=str(tmp_path / "base"))
    zero2llm.run(zero2llm.make_recipe(**made), quiet=True)
    found = Checkpoint.open(tmp_path / "run")
    shutil.move(tmp_path / "base", tmp_path / "moved")
    with pytest.raises(ValueError, match="which is not there; say where its base lies"):
        found.load_model()
    found.load_model(tmp_path / "moved")
    zero2llm.run(zero2llm.make_recipe(**tuned(root, tmp_path / "other")), quiet=True)
    with pytest.raises(ValueError, match="an adapter of other weights"):
        found.load_model(tmp_path / "other")


def test_reference_of_dpo_is_the_base(root, tmp_path):
    made = tuned(root, tmp_path / "dpo", "dpo", adapter=KINDS["lora"], optim={"kind": "adamw", "lr": 0.003})
    zero2llm.run(zero2llm.make_recipe(**made), quiet=True)
    whole = {key: value for key, value in made.items() if key != "adapter"} | {"out": str(tmp_path / "full")}
    zero2llm.run(zero2llm.make_recipe(**whole), quiet=True)
    first = [read_metrics(tmp_path / name / "metrics.jsonl", "train")[0] for name in ("dpo", "full")]
    assert first[0]["loss"] == pytest.approx(first[1]["loss"], rel=1e-5) and first[0]["margin"] == pytest.approx(0, abs=1e-6)
    last = read_metrics(tmp_path / "dpo" / "metrics.jsonl", "train")[-1]
    assert last["margin"] > 0.001  # the reference did not move along


@pytest.mark.parametrize(
    "changes,match",
    [
        ({"adapter": {"kind": "lora", "targets": ["q_prj"]}}, "did you mean 'q_proj'"),
        ({"adapter": {"kind": "lora", "targets": ["head"]}}, "head is tied"),
        ({"quantize": "nf4"}, "add the key adapter"),
        ({"adapter": {"kind": "adalora", "final": 8}}, "leave no step"),
        ({"adapter": {"kind": "lora", "r": 0}}, "r = 0"),
    ],
)
def test_refused_before_training(root, tmp_path, changes, match):
    with pytest.raises(ValueError, match=match):
        zero2llm.run(zero2llm.make_recipe(**tuned(root, tmp_path / "run", **changes)), quiet=True)
