"""Score heads on their way out: what is exported, merged, verified and taken in again, and what stays behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.contract.scores import LORA, prepared, run, values
from zero2llm.core.files import read_json
from zero2llm.core.seq import Seq
from zero2llm.lab import stage
from zero2llm.lab.bring import import_adapter, import_checkpoint
from zero2llm.lab.convert import export_checkpoint
from zero2llm.lab.verify import verify_export
from zero2llm.train import adapted
from zero2llm.train.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return prepared(tmp_path_factory.mktemp("scores"))


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


BUGS = {
    "a critic is taken for a reward model": (
        lambda m: m.setattr(stage, "critic", lambda model, wanted: adapted.add_score(model, "reward") if wanted else None), "critic",
    ),
    "dpo leaves a reward model": (
        lambda m: m.setattr(stage, "score_only", lambda model, wanted: adapted.add_score(model, "reward") if wanted or model.score else None), "later",
    ),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_bugs_are_caught(root, tmp_path, bug, monkeypatch, capsys):
    plant, check = BUGS[bug]
    checks = {
        "critic": lambda: test_a_critic_stays_behind_and_that_is_said(root, tmp_path, None, ("hf",), capsys),
        "later": lambda: test_trained_on_as_a_language_model_it_is_exported_as_one(root, tmp_path, capsys),
    }
    plant(monkeypatch)
    with pytest.raises((AssertionError, ValueError)):
        checks[check]()
