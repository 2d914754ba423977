"""Score heads through the whole path: reward models and critics beside an adapter, their checkpoints, exports and what comes back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import zero2llm
from tests.contract.stages import kill_and_resume, recipe, write_data
from tests.contract.test_resume import ENV
from zero2llm.core.files import load_tensors, read_json
from zero2llm.core.seq import Seq
from zero2llm.lab import stage
from zero2llm.lab.bring import import_adapter, import_checkpoint
from zero2llm.lab.convert import export_checkpoint, merge_checkpoint
from zero2llm.lab.verify import verify_export
from zero2llm.model.heads import ScoreHead
from zero2llm.train import adapted, checkpoint
from zero2llm.train.checkpoint import Checkpoint, candidates, latest
from zero2llm.train.telemetry import read_metrics

OFTEN = {"every_s": 0.0, "keep": 20}
LORA = {"kind": "lora", "r": 4, "alpha": 8}
KINDS = {"lora": LORA, "dora": {"kind": "dora", "r": 4}, "pissa": {"kind": "pissa", "r": 4}, "adalora": {"kind": "adalora", "init_r": 4, "target_r": 2, "final": 1}}
HEAD = {"score.weight", "score.bias"}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("scores")
    write_data(root / "data")
    lines = [json.loads(line) for line in (root / "data" / "pairs.jsonl").read_text("utf-8").splitlines()]
    good = [r | {"chosen": r["chosen"] + " 海"} for r in lines]  # a difference that can be learned
    (root / "data" / "good.jsonl").write_text("".join(json.dumps(r) + "\n" for r in good), "utf-8")
    prompts = [json.dumps({"prompt": f"the sea {'and the ship ' * (i % 3)}{i}", "answer": "the"}) for i in range(40)]
    (root / "data" / "prompts.jsonl").write_text("\n".join(prompts), encoding="utf-8")
    zero2llm.run(zero2llm.make_recipe(**recipe(root, "pretrain")), quiet=True)
    return root


def made(root: Path, out: Path, kind: str, adapter: dict | None = LORA, **changes) -> dict:
    data = {
        "out": str(out), "init": str(root / "pretrain"), "objective": {"kind": kind}, "optim": {"kind": "adamw", "lr": 0.02},
        "fit": {"steps": 3, "micro_rows": 8}, "seq_len": 64, "device": "cpu", "eval": {"every": 9}, "save": {"every_s": 60.0, "keep": 9},
    } | ({"adapter": adapter} if adapter else {})  # fmt: skip
    if kind == "ppo":
        data |= {
            "data": {"train": [str(root / "data" / "prompts.jsonl")], "valid_fraction": 0.2},
            "rollout": {"prompts": 4, "samples": 4, "max_tokens": 6, "minibatches": 2},
            "reward": [{"kind": "overlong", "limit": 6, "buffer": 6}, {"kind": "regex", "pattern": ".*e.*", "weight": 0.5}],
        }
    else:
        data |= {"data": {"train": [str(root / "data" / "good.jsonl")], "valid_fraction": 0.2}, "batch_tokens": 256}
    return data | changes


def run(*args, resume: bool = False, **changes):
    return zero2llm.run(zero2llm.make_recipe(**made(*args, **changes)), resume=resume, quiet=True)


@torch.no_grad()
def values(model) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = model.eval()(torch.arange(4, 24).view(1, -1), Seq.rows(1, 20))[0]
    return model.score(hidden), model.logits(hidden)


def close(a, b) -> None:
    for x, y in zip(values(a), values(b), strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


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


def said(capsys) -> str:
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("adapter,formats", [(None, ("hf",)), (LORA, ("hf", "gguf")), pytest.param(None, ("hf", "gguf", "onnx"), marks=pytest.mark.slow)])
def test_a_critic_stays_behind_and_that_is_said(root, tmp_path, adapter, formats, capsys):
    from transformers import AutoModelForCausalLM

    done = run(root, tmp_path / "run", "ppo", adapter, fit={"steps": 2, "micro_rows": 8})
    capsys.readouterr()
    for to in formats:
        export_checkpoint(tmp_path / "run", tmp_path / ("m.gguf" if to == "gguf" else to), to)
        assert "left out: the score head (17 values)" in said(capsys), to
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokens = torch.arange(4, 24).view(1, -1)
    torch.testing.assert_close(theirs(tokens).logits, values(done.model)[1], atol=1e-4, rtol=1e-4)
    if adapter is not None:
        export_checkpoint(root / "pretrain", tmp_path / "base")
        export_checkpoint(tmp_path / "run", tmp_path / "peft", "peft", base=str(tmp_path / "base"))
        assert "left out: the score head" in said(capsys)
        settings = read_json(tmp_path / "peft" / "adapter_config.json")
        assert settings["task_type"] == "CAUSAL_LM" and settings["modules_to_save"] is None


@torch.no_grad()
def their_scores(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(folder).eval()(tokens).logits[:, 0]


def score_of(model, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.score(model(tokens, Seq.rows(*tokens.shape))[0])[:, -1] - model.score.bias


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_a_reward_model_goes_out_as_a_classifier_and_comes_back(root, tmp_path, adapter, capsys):
    done = run(root, tmp_path / "run", "reward", adapter, objective={"kind": "reward", "center": 0.01})
    capsys.readouterr()
    export_checkpoint(tmp_path / "run", tmp_path / "hf")
    shown = said(capsys)
    assert "AutoModelForSequenceClassification" in shown and f"the bias {float(done.model.score.bias.detach()):g} of the score head" in shown
    tokens = torch.arange(4, 24).view(2, -1)
    torch.testing.assert_close(their_scores(tmp_path / "hf", tokens), score_of(done.model, tokens), atol=1e-5, rtol=1e-4)
    import_checkpoint(str(tmp_path / "hf"), tmp_path / "again")
    assert "a reward model" in said(capsys)
    back = Checkpoint.open(tmp_path / "again").load_model()
    torch.testing.assert_close(score_of(back, tokens), score_of(done.model, tokens), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="no GGUF export of a reward model"):
        export_checkpoint(tmp_path / "run", tmp_path / "m.gguf", "gguf")
    with pytest.raises(ValueError, match="score_head: it gives scores, not logits; a reward model is written for transformers"):
        export_checkpoint(tmp_path / "run", tmp_path / "onnx", "onnx")
    assert not (tmp_path / "m.gguf").exists() and not (tmp_path / "onnx").exists()
    more = run(root, tmp_path / "more", "reward", None, init=str(tmp_path / "again"), fit={"steps": 1, "micro_rows": 8})
    assert more.model.cfg.score_head == "reward", "what was imported trains on"


def test_an_adapter_goes_to_peft_with_its_head_and_comes_back(root, tmp_path, capsys):
    done = run(root, tmp_path / "run", "reward")
    export_checkpoint(root / "pretrain", tmp_path / "base")
    capsys.readouterr()
    export_checkpoint(tmp_path / "run", tmp_path / "peft", "peft", base=str(tmp_path / "base"))
    assert "num_labels=1 and pad_token_id=1" in said(capsys)
    assert read_json(tmp_path / "peft" / "adapter_config.json")["task_type"] == "SEQ_CLS"
    import_adapter(tmp_path / "peft", root / "pretrain", tmp_path / "again")
    tokens = torch.arange(4, 24).view(2, -1)
    back = Checkpoint.open(tmp_path / "again").load_model()
    assert back.cfg.score_head == "reward"
    torch.testing.assert_close(score_of(back, tokens), score_of(done.model, tokens), atol=1e-5, rtol=1e-4)


def test_verify_export_compares_scores_and_notices(root, tmp_path, capsys):
    run(root, tmp_path / "reward", "reward")
    run(root, tmp_path / "ppo", "ppo", None, fit={"steps": 1, "micro_rows": 8})
    for name in ("reward", "ppo"):
        export_checkpoint(tmp_path / name, tmp_path / f"{name}-hf")
        assert verify_export(tmp_path / f"{name}-hf", tmp_path / name, tokens=4), said(capsys)
    file = tmp_path / "reward-hf" / "model.safetensors"
    state = load_file(file)
    save_file(state | {"score.weight": state["score.weight"] * 1.01}, file, {"format": "pt"})
    assert not verify_export(tmp_path / "reward-hf", tmp_path / "reward") and "FAILED: weights read back, scores" in said(capsys)
    with pytest.raises(ValueError, match="of a reward model only a folder of transformers can be checked, not peft"):
        export_checkpoint(root / "pretrain", tmp_path / "base")
        export_checkpoint(tmp_path / "reward", tmp_path / "peft", "peft", base=str(tmp_path / "base"))
        verify_export(tmp_path / "peft", tmp_path / "reward")


def test_trained_on_as_a_language_model_it_is_exported_as_one(root, tmp_path, capsys):
    run(root, tmp_path / "reward", "reward", None, fit={"steps": 2, "micro_rows": 8})
    run(root, tmp_path / "dpo", "dpo", None, init=str(tmp_path / "reward"), fit={"steps": 2, "micro_rows": 8})
    export_checkpoint(tmp_path / "dpo", tmp_path / "hf")
    assert "left out: the score head" in said(capsys)
    assert read_json(tmp_path / "hf" / "config.json")["architectures"] == ["Qwen3ForCausalLM"]


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
    "a critic is taken for a reward model": (
        lambda m: m.setattr(stage, "critic", lambda model, wanted: adapted.add_score(model, "reward") if wanted else None), "critic",
    ),
    "the reference wears the adapter": (lambda m: m.setattr("zero2llm.train.adapted.disabled", lambda model: torch.no_grad()), "reference"),
    "dpo leaves a reward model": (
        lambda m: m.setattr(stage, "score_only", lambda model, wanted: adapted.add_score(model, "reward") if wanted or model.score else None), "later",
    ),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_bugs_are_caught(root, tmp_path, bug, monkeypatch, capsys):
    plant, check = BUGS[bug]
    checks = {
        "learns": lambda: test_the_head_learns_beside_the_adapter_and_is_kept(root, tmp_path, "reward", "lora"),
        "resumes": lambda: test_resumes_to_the_bit(root, tmp_path, "reward"),
        "accuracy": lambda: test_a_reward_model_learns(root, tmp_path),
        "critic": lambda: test_a_critic_stays_behind_and_that_is_said(root, tmp_path, None, ("hf",), capsys),
        "reference": lambda: test_the_reference_of_ppo_is_the_base_and_stays(root, tmp_path),
        "later": lambda: test_trained_on_as_a_language_model_it_is_exported_as_one(root, tmp_path, capsys),
    }
    plant(monkeypatch)
    with pytest.raises((AssertionError, ValueError)):
        checks[check]()
