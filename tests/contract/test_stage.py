"""What a stage does beside training: TensorBoard, best checkpoints, samples, chat that can be interrupted, the Python API."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tokenizers import Tokenizer as Library
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoTokenizer

import zero2llm
from tests.contract.stages import recipe, write_data, write_recipe
from tests.contract.test_fit import Repeat, ragged, tiny
from zero2llm.core.device import pick_device, pick_dtype
from zero2llm.lab import talk
from zero2llm.lab.data_config import DataConfig
from zero2llm.lab.look import inspect_recipe
from zero2llm.lab.recipe import TokenizerConfig
from zero2llm.lab.sets import build_tokenizer
from zero2llm.optim.adamw import AdamWConfig
from zero2llm.optim.build import build_optim
from zero2llm.tokenizers.tokenizer import Tokenizer
from zero2llm.train.checkpoint import best, candidates
from zero2llm.train.evaluate import evaluate
from zero2llm.train.fit import FitConfig, fit
from zero2llm.train.objectives.clm import CLM
from zero2llm.train.telemetry import MEANING, read_metrics


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("stage")
    write_data(root / "data")
    made = zero2llm.make_recipe(**recipe(root, "pretrain", log={"tensorboard": True}))
    return zero2llm.run(made, quiet=True).run


def test_metrics_hold_every_promise(run):
    train, valid, samples = (read_metrics(run / "metrics.jsonl", kind) for kind in ("train", "valid", "sample"))
    assert [r["step"] for r in train] == list(range(1, 9)) and [r["step"] for r in valid] == [4, 8]
    assert {"loss", "lr", "grad_norm", "tokens_per_s", "memory_mb", "tokens", "skipped"} <= set(train[0])
    assert {"valid_loss", "valid_ppl", "valid_bpb"} <= set(valid[0]) and samples[0]["prompt"] == "the sea"
    unexplained = (set(train[0]) | set(valid[0])) - set(MEANING) - {"kind", "step", "tokens", "seconds", "bpb"}
    assert not unexplained
    assert valid[0]["valid_ppl"] == pytest.approx(math.exp(valid[0]["valid_loss"]))
    assert list((run / "tensorboard").glob("events*"))


def test_best_is_the_lowest_validation_loss(run):
    losses = {p: json.loads((p / "manifest.json").read_text())["metrics"].get("valid_loss", math.inf) for p in candidates(run)}
    assert best(run) == min(losses, key=losses.get)


def test_bits_per_byte_by_hand():
    """Uniform predictions over 8 tokens of 1, 2, 3 and 0 bytes: log2(8) bits each, over the bytes of the targets."""

    class Uniform(torch.nn.Module):
        head_weight, logit_softcap = torch.zeros(8, 2), None
        unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, tokens, seq):
            return torch.ones(*tokens.shape, 2), {}

    model = Uniform()
    model.register_parameter("p", torch.nn.Parameter(torch.zeros(1)))
    from zero2llm.core.batch import Batch
    from zero2llm.core.seq import Seq

    labels = torch.tensor([[1, 2, 3, -100]])
    batch = Batch(torch.zeros(1, 4, dtype=torch.long), labels, Seq.rows(1, 4))
    found = evaluate(model, CLM(), [batch], byte_lengths=torch.tensor([9, 1, 2, 0, 9, 9, 9, 9]))
    assert found["bpb"] == pytest.approx(3 * 3 / 3) and found["ppl"] == pytest.approx(8)


def test_ctrl_c_stops_the_answer_not_the_program(run, monkeypatch, capsys):
    engine = zero2llm.load(run)

    def interrupted(*args):
        yield "half an ans"
        raise KeyboardInterrupt

    monkeypatch.setattr(talk, "stream_answer", interrupted)
    assert talk._answer(engine, [{"role": "user", "content": "x"}], zero2llm.Sampling()) == "half an ans"
    assert "[stopped]" in capsys.readouterr().out


def test_python_does_what_the_commands_do(run, tmp_path):
    assert sum(p.numel() for p in zero2llm.build("llama-nano").parameters()) == 1_574_016
    engine = zero2llm.load(run)
    assert engine.generate(["the sea"], zero2llm.Sampling(max_tokens=3, temperature=0, ignore_eos=True))[0].n_prompt > 0
    assert isinstance("".join(zero2llm.chat(engine, [{"role": "user", "content": "x"}], zero2llm.Sampling(max_tokens=3))), str)
    assert (zero2llm.export(run, tmp_path / "hf") / "config.json").is_file()
    with pytest.raises(AttributeError, match="has no attribute .rnu."):
        zero2llm.rnu  # noqa: B018


def test_inspecting_leaves_no_trace(run, tmp_path, capsys):
    write_data(tmp_path / "data")
    path = write_recipe(tmp_path, "pretrain")
    before = sorted(p.name for p in tmp_path.iterdir())
    inspect_recipe(path, [], 1, None)
    assert sorted(p.name for p in tmp_path.iterdir()) == before and "targets" in capsys.readouterr().out


def test_devices_and_formats():
    cpu = torch.device("cpu")
    assert pick_dtype("auto", cpu) == torch.float32 and pick_dtype("bf16", cpu) == torch.bfloat16
    for call, match in ((lambda: pick_dtype("fp16", cpu), "cannot train on a CPU"), (lambda: pick_dtype("int4", cpu), "unknown"),
                        (lambda: pick_device("gpu"), "not a device name")):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            call()


def test_bf16_training_moves_the_loss():
    model, batch, seen = tiny(), ragged(), []
    cfg = FitConfig(steps=10, dtype="bf16")
    fit(model, CLM(), Repeat(batch), build_optim(model, AdamWConfig(lr=1e-2)), cfg, hooks=[lambda s: seen.append(s.metrics["loss"])])
    assert seen[-1] < seen[0] and next(model.parameters()).dtype == torch.float32


@pytest.mark.slow
def test_compiled_training_equals_eager():
    model, batch = tiny(), ragged()
    twin = zero2llm.LM.clone(model)
    for m, compiled in ((model, False), (twin, True)):
        fit(m, CLM(), Repeat(batch), build_optim(m, AdamWConfig(lr=1e-3)), FitConfig(steps=3, compile=compiled, micro_rows=2))
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_tokenizer_without_bytes_and_another_chat_template(tmp_path):
    write_data(tmp_path / "data")
    words = {"kind": "wordpiece", "engine": "library", "vocab_size": 77}
    made = recipe(tmp_path, "pretrain", tokenizer=words)
    made["model"]["vocab_size"] = 77
    first = zero2llm.run(zero2llm.make_recipe(**made), quiet=True)
    assert "valid_ppl" not in first.valid and math.isfinite(first.valid["valid_loss"])
    sft = recipe(tmp_path, "sft", chat_template="roleless", fit={"steps": 2, "micro_rows": 4})
    done = zero2llm.run(zero2llm.make_recipe(**sft), quiet=True)
    assert done.tokenizer.template != first.tokenizer.template and (done.checkpoint / "tokenizer").is_dir()
    with pytest.raises(ValueError, match="qwen3.*needs the control tokens"):
        zero2llm.run(zero2llm.make_recipe(**sft | {"chat_template": "qwen3"}), overwrite=True, quiet=True)


def test_a_text_begins_in_decoding_as_in_training(tmp_path):
    """Somebody's tokenizer puts nothing before a text; our training puts its start token there, and then prompts have it too."""
    words = Library(WordLevel({w: i for i, w in enumerate(["<unk>", "<s>", "</s>", "the", "sea", "ship"])}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    words.add_special_tokens(["<s>", "</s>", "<unk>"])
    (tmp_path / "theirs").mkdir()
    words.save(str(tmp_path / "theirs" / "tokenizer.json"))
    theirs = Tokenizer.load(tmp_path / "theirs")
    assert theirs.start_ids == [] and theirs.encode("the sea") == [3, 4]
    found, _ = build_tokenizer(TokenizerConfig(path=str(tmp_path / "theirs")), DataConfig(train=("unused",)), tmp_path / "run")
    assert found.start_ids == [1] == [found.bos_id] and found.encode("the sea") == [3, 4]
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "tokenizer")("the sea").input_ids == [1, 3, 4]
