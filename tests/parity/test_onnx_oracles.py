"""The ONNX export run by onnxruntime, for every part that it says it can express; the others are refused by name.

Each model is run at batch sizes and lengths that tracing never saw, and compared row by row with our own forward pass.
Export traces and converts, which takes seconds a layer: one model with nearly every part stands for all by default.
"""

from __future__ import annotations

import builtins
import json
from typing import get_args

import pytest
import torch

from tests.parity.test_hf import randomise
from zero2llm.core.config import parse
from zero2llm.interop import onnx as onnx_export
from zero2llm.interop.checks import logits_of
from zero2llm.interop.onnx import FFNS, MIXERS, NORMS, OnnxRuntime, PlainMoE, export_onnx, onnx_faults
from zero2llm.model.catalog import FfnConfig, MixerConfig, NormConfig
from zero2llm.model.lm import LM
from zero2llm.model.spec import ModelConfig
from zero2llm.tokenizers.tokenizer import Tokenizer

pytest.importorskip("onnxruntime")
V = 272
ROPE = {"kind": "rope"}
GQA = {"kind": "gqa", "n_heads": 4, "n_kv_heads": 2, "position": ROPE}
MLA = {"kind": "mla", "n_heads": 2, "kv_rank": 8, "q_rank": 6, "nope_dim": 6, "rope_dim": 4, "v_dim": 5}
GLU, MLP = {"kind": "glu", "hidden": 24}, {"kind": "mlp", "hidden": 24}
MOE = {"kind": "moe", "n_experts": 4, "top_k": 2, "hidden": 12}
CHOICES = {"router": "sigmoid", "n_groups": 2, "top_groups": 1, "bias_rate": 0.0, "routed_scaling": 2.5, "n_shared": 2}
RMS, LAYER, DYT = {"kind": "rms"}, {"kind": "layer"}, {"kind": "dyt"}


def model_of(*blocks: dict, **more) -> LM:
    """One layer for each block; what a block does not say is that of Llama."""
    names = [f"b{i}" for i in range(len(blocks))]
    specs = {name: {"mixer": GQA, "ffn": GLU, "norm": RMS} | block for name, block in zip(names, blocks, strict=True)}
    data = {"vocab_size": V, "d_model": 16, "max_len": 64, "layers": {"pattern": names}, "blocks": specs} | more
    return randomise(LM(parse(ModelConfig, data)))


def yarn(kind: str, **more) -> dict:
    return {"mixer": GQA | {"position": {"kind": "rope", "scaling": {"kind": kind, "factor": 4.0} | more}}}


EVERYTHING = (
    {"mixer": GQA | {"window": 5, "sink": True, "softcap": 3.0, "qk_norm": True, "gate": True}, "ffn": MOE | {"n_shared": 1, "shared_gate": True}, "norm": LAYER},
    {"mixer": MLA, "ffn": MLP, "norm": DYT, "wiring": "sandwich"},
)  # fmt: skip
CASES = {
    "llama": lambda: model_of({}),
    "window": lambda: model_of({"mixer": GQA | {"window": 5}}),
    "sinks": lambda: model_of({"mixer": GQA | {"sink": True}}),
    "soft-caps": lambda: model_of({"mixer": GQA | {"softcap": 3.0}}, logit_softcap=4.0, embed_scale=4.0),
    "qk-norm": lambda: model_of({"mixer": GQA | {"qk_norm": True, "qk_norm_plus_one": True}}),
    "qk-norm over all heads, biases": lambda: model_of({"mixer": GQA | {"qk_norm": True, "qk_norm_span": "all", "qkv_bias": True, "out_bias": True}}),
    "gate": lambda: model_of({"mixer": GQA | {"gate": True}}),
    "many heads, no position": lambda: model_of({"mixer": {"kind": "gqa", "n_heads": 4}}),
    "one head of keys, interleaved": lambda: model_of({"mixer": GQA | {"n_kv_heads": 1, "position": {"kind": "rope", "layout": "interleaved"}}}),
    "mla": lambda: model_of({"mixer": MLA}),
    "mla without rank": lambda: model_of({"mixer": {k: v for k, v in MLA.items() if k != "q_rank"}}),
    "learned": lambda: model_of({"mixer": GQA | {"position": {"kind": "none"}}}, position={"kind": "learned"}),
    "sinusoidal": lambda: model_of({"mixer": GQA | {"position": {"kind": "none"}}}, position={"kind": "sinusoidal"}),
    "mrope": lambda: model_of({"mixer": GQA | {"head_dim": 8, "position": {"kind": "mrope", "sections": [2, 1, 1]}}}),
    "linear": lambda: model_of(yarn("linear")),
    "ntk": lambda: model_of(yarn("ntk")),
    "yarn": lambda: model_of(yarn("yarn", original_max_len=16)),
    "llama3": lambda: model_of(yarn("llama3", original_max_len=16)),
    "mlp": lambda: model_of({"ffn": MLP}),
    "no ffn": lambda: model_of({"ffn": None}),
    "moe": lambda: model_of({"ffn": MOE}),
    "moe, groups, shared": lambda: model_of({"ffn": MOE | CHOICES}),
    "moe, gate over the shared": lambda: model_of({"ffn": MOE | {"n_shared": 1, "shared_gate": True, "renormalise": False}}),
    "moe of gpt-oss": lambda: model_of({"ffn": MOE | {"act": "gptoss", "bias": True}}),
    "rwkv_channel": lambda: model_of({"ffn": {"kind": "rwkv_channel", "hidden": 24}}),
    "layer": lambda: model_of({"norm": LAYER}, embed_norm=LAYER, final_norm=LAYER),
    "dyt": lambda: model_of({"norm": DYT}, final_norm=DYT),
    **{wiring: lambda w=wiring: model_of({"wiring": w, "norm": LAYER}) for wiring in ("post", "sandwich", "parallel", "branch", "deepnorm")},
    "untied": lambda: model_of({}, tie_embeddings=False),
    "muP": lambda: model_of({}, init={"kind": "mup", "base_width": 8, "base_head_dim": 4}),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    Tokenizer.train(["the cat sat on the mat; the dog sat on the cat. " * 9], V).save(folder)
    return folder


@torch.no_grad()
def agree(reader: OnnxRuntime, model: LM) -> bool:
    """Every row against itself alone: one token, the longest row, batches of other sizes than the two that are traced."""
    draw = torch.Generator().manual_seed(0)
    for batch, length in ((1, 1), (5, 1), (1, 64), (3, 17), (2, 40)):
        rows = torch.randint(V, (batch, length), generator=draw)
        ours, theirs = torch.stack([logits_of(model, row.tolist()) for row in rows]), reader.run(rows)
        if theirs.shape != ours.shape or (ours - theirs).abs().max() > 1e-4 * ours.std():
            return False
    return reader.check_shapes(model).passed


def test_nearly_everything_at_once(tokenizer, tmp_path):
    """And the model is left as it was, the folder complete, nothing of another's overwritten."""
    model = model_of(*EVERYTHING, tie_embeddings=False, logit_softcap=9.0)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    out = export_onnx(model, model.cfg, tokenizer, tmp_path / "out")
    reader = OnnxRuntime(out)
    assert agree(reader, model)
    assert [tuple(x.shape[i] for i in (0, 1)) for x in reader.session.get_inputs()] == [("batch", "length")]
    assert not any(isinstance(block.ffn, PlainMoE) for block in model.blocks)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items()) and next(model.parameters()).requires_grad
    assert {"model.onnx", "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} == {p.name for p in out.iterdir()}
    assert parse(ModelConfig, json.loads((out / "config.json").read_text())["model"]) == model.cfg
    for plant in BUGS.values():
        assert not agree(reader, plant(LM.clone(model)))
    with pytest.raises(ValueError, match="not empty"):
        export_onnx(model, model.cfg, tokenizer, out)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def reversed_rows(name: str):
    def plant(model: LM) -> LM:
        weight = model.get_parameter(name).data
        weight.copy_(weight.flip(0).clone())
        return model

    return plant


def settings(block: int, **changes):
    def plant(model: LM) -> LM:
        for key, value in changes.items():
            assert getattr(model.blocks[block].mixer, key) != value
            setattr(model.blocks[block].mixer, key, value)
        return model

    return plant


BUGS = {  # our model made another than the file: the comparison must tell
    "window one wider": settings(0, window=6),
    "no soft-cap": settings(0, softcap=None),
    "keys": reversed_rows("blocks.0.mixer.k_proj.weight"),
    "sinks": reversed_rows("blocks.0.mixer.sinks"),
    "experts": reversed_rows("blocks.0.ffn.down_proj.weight"),
    "shared expert": reversed_rows("blocks.0.ffn.shared.up_proj.weight"),
    "latent keys": reversed_rows("blocks.1.mixer.kv_b_proj.weight"),
    "head": reversed_rows("head.weight"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_each_part(tokenizer, tmp_path, name):
    model = CASES[name]()
    assert agree(OnnxRuntime(export_onnx(model, model.cfg, tokenizer, tmp_path / "out")), model)


@pytest.mark.slow
def test_weights_beside_a_large_file(tokenizer, tmp_path, monkeypatch):
    """Beyond what one protobuf holds; and half precision is written in full."""
    monkeypatch.setattr(onnx_export, "LARGE", 1000)
    model = model_of({})
    small = LM.clone(model).bfloat16()
    out = export_onnx(small, small.cfg, tokenizer, tmp_path / "out")
    assert (out / "model.onnx.data").is_file()
    assert agree(OnnxRuntime(out), small.float().eval())


def test_what_cannot_be_exported_is_named(tokenizer, tmp_path):
    for union, known in ((MixerConfig, MIXERS), (FfnConfig, FFNS), (NormConfig, NORMS)):
        assert {part.kind for part in get_args(get_args(union)[0])} > set(known)
    for model, match in (
        (lambda: model_of({"norm": {"kind": "batch"}}), "norm: batch"),
        (lambda: model_of({}, final_norm={"kind": "batch"}), "final_norm: batch"),
        (lambda: model_of({"ffn": {"kind": "expert_choice", "n_experts": 2, "hidden": 8}}), "ffn: expert_choice"),
        (lambda: model_of({"mixer": GQA | {"position": {"kind": "alibi"}}}), "position: alibi"),
        (lambda: model_of({}, score_head=True), "score_head"),
        (lambda: model_of({}, mtp={"depth": 1}), "mtp"),
        (lambda: model_of({"mixer": {"kind": "retnet", "n_heads": 2}}), "mixer: retnet"),
        (lambda: model_of({"mixer": {"kind": "mamba2", "head_dim": 8}}, {}), "mixer: mamba2"),
    ):
        made = model()
        with pytest.raises(ValueError, match=f"no ONNX export.*{match}"):
            export_onnx(made, made.cfg, tokenizer, tmp_path / "out")
        assert onnx_faults(made.cfg)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_and_a_missing_tokenizer(tokenizer, tmp_path, monkeypatch):
    model = model_of({})
    with pytest.raises(ValueError, match="tokenizer.json: no such file"):
        export_onnx(model, model.cfg, tmp_path, tmp_path / "out")
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name == "onnxscript":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ValueError, match=r"pip install 'zero2llm\[onnx\]' \(onnxscript is missing\)"):
        export_onnx(model, model.cfg, tokenizer, tmp_path / "out")
    assert not list(tmp_path.iterdir())
