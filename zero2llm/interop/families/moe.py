"""Llama with experts: Mixtral, Qwen2-MoE, Qwen3-MoE. A file holds one matrix for each expert, ours are one tensor.

Mixtral     every layer; experts named w1 (gate), w3 (up), w2 (down)
Qwen2-MoE   one more expert for all tokens, scaled by sigmoid(w . x); biases on q, k, v
Qwen3-MoE   no shared expert; QK-norm.  Both: mlp_only_layers are dense
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from zero2llm.interop.families.decoder import (
    decoder_rules,
    first,
    glu_rules,
    plain_head_dim,
    read_model,
    write_sizes,
)
from zero2llm.interop.families.family import Family
from zero2llm.interop.families.llama import full_only, spec_of
from zero2llm.interop.families.rope import rope_keys
from zero2llm.interop.hf_names import Rule, same
from zero2llm.layers.ffns.glu import GLUConfig
from zero2llm.layers.ffns.moe import MoEConfig
from zero2llm.layers.mixers.gqa import GQAConfig
from zero2llm.model.spec import LayerSpec, ModelConfig

GLU_NAMES = ("gate_proj", "up_proj", "down_proj")


def expert_rules(config: MoEConfig, theirs: str, ours: str, names: Sequence[str] = GLU_NAMES) -> list[Rule]:
    """Their experts.0.gate_proj.weight (out, in), ... as ours (E, out, in)."""
    return [
        Rule(
            tuple(f"{theirs}experts.{e}.{name}.weight" for e in range(config.n_experts)), (f"{ours}{mine}.weight",),
            lambda parts: [part.contiguous() for part in parts[0].unbind()], lambda parts: [torch.stack(parts)],
        )
        for name, mine in zip(names, GLU_NAMES, strict=True)
    ]  # fmt: skip


def write_attention(cfg: ModelConfig) -> dict:
    rope = rope_keys(first(cfg, GQAConfig).mixer.position)
    return write_sizes(cfg) | rope | {"hidden_act": "silu", "router_aux_loss_coef": 0.001}


def with_experts(spec: LayerSpec, dense: bool, **moe) -> LayerSpec:
    return spec if dense else replace(spec, ffn=MoEConfig(**moe))


def sparse_layers(data: dict) -> list[bool]:
    """Which layers have experts."""
    step, dense = data.get("decoder_sparse_step", 1), data.get("mlp_only_layers") or []
    return [i not in dense and (i + 1) % step == 0 for i in range(data["num_hidden_layers"])]


def write_sparse(cfg: ModelConfig) -> dict:
    """Keys of both Qwens; the sizes of dense and sparse layers come from the first of each."""
    ffns = [spec.ffn for spec in cfg.specs()]
    moe = first(cfg, MoEConfig).ffn
    dense = next((ffn.hidden for ffn in ffns if isinstance(ffn, GLUConfig)), moe.hidden)
    return write_attention(cfg) | {
        "intermediate_size": dense, "moe_intermediate_size": moe.hidden, "num_experts": moe.n_experts,
        "num_experts_per_tok": moe.top_k, "norm_topk_prob": moe.renormalise, "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, ffn in enumerate(ffns) if isinstance(ffn, GLUConfig)],
        "use_sliding_window": False, "sliding_window": None,
    }  # fmt: skip


def read_sparse(data: dict, spec: LayerSpec, **more) -> ModelConfig:
    full_only(data)
    moe = {"n_experts": data.get("num_experts", data.get("num_local_experts")), "top_k": data["num_experts_per_tok"],
           "hidden": data["moe_intermediate_size"], "renormalise": data.get("norm_topk_prob", False), **more}  # fmt: skip
    return read_model(data, [with_experts(spec, not s, **moe) for s in sparse_layers(data)], length=32_768)


def write_mixtral(cfg: ModelConfig) -> dict:
    spec = cfg.specs()[0]
    return write_attention(cfg) | {
        "intermediate_size": spec.ffn.hidden, "num_local_experts": spec.ffn.n_experts,
        "num_experts_per_tok": spec.ffn.top_k, "sliding_window": spec.mixer.window,
    }  # fmt: skip


def read_mixtral(data: dict) -> ModelConfig:
    moe = {"n_experts": data.get("num_local_experts", 8), "top_k": data.get("num_experts_per_tok", 2)}
    spec = spec_of(data, 1e6, eps=1e-5, window=data.get("sliding_window"))
    spec = with_experts(spec, False, hidden=data["intermediate_size"], **moe)
    return read_model(data, [spec] * data["num_hidden_layers"], length=131_072)


def mixtral_rules(cfg: ModelConfig) -> list[Rule]:
    def ffn(config: MoEConfig, theirs: str, ours: str) -> list[Rule]:
        theirs = theirs.removesuffix("mlp.") + "block_sparse_moe."
        return same(theirs + "gate", ours + "router") + expert_rules(config, theirs, ours, ("w1", "w3", "w2"))

    return decoder_rules(cfg, ffn=ffn)


def write_qwen2_moe(cfg: ModelConfig) -> dict:
    plain_head_dim(cfg)
    moe = first(cfg, MoEConfig).ffn
    return write_sparse(cfg) | {
        "qkv_bias": cfg.specs()[0].mixer.qkv_bias, "shared_expert_intermediate_size": moe.shared_width,
    }  # fmt: skip


def read_qwen2_moe(data: dict) -> ModelConfig:
    spec = spec_of(data, qkv_bias=data.get("qkv_bias", True))
    return read_sparse(data, spec, n_shared=1, shared_hidden=data["shared_expert_intermediate_size"], shared_gate=True)


def write_qwen3_moe(cfg: ModelConfig) -> dict:
    return write_sparse(cfg) | {"attention_bias": cfg.specs()[0].mixer.qkv_bias}


def read_qwen3_moe(data: dict) -> ModelConfig:
    bias, eps = data.get("attention_bias", False), data.get("rms_norm_eps", 1e-6)
    return read_sparse(data, spec_of(data, qkv_bias=bias, out_bias=bias, qk_norm=True, norm_eps=eps))


def qwen_ffn(config: MoEConfig | GLUConfig, theirs: str, ours: str) -> list[Rule]:
    if isinstance(config, GLUConfig):
        return glu_rules(config, theirs, ours)
    rules = same(theirs + "gate", ours + "router") + expert_rules(config, theirs, ours)
    if config.n_shared:
        rules += glu_rules(config, theirs + "shared_expert.", ours + "shared.")
        rules += same(theirs + "shared_expert_gate", ours + "shared_gate")
    return rules


def qwen_rules(cfg: ModelConfig) -> list[Rule]:
    return decoder_rules(cfg, ffn=qwen_ffn)


PARTS = ("gqa",), ("moe", "glu"), ("rms",)
MIXTRAL = Family(
    "mixtral", "MixtralForCausalLM", ("gqa",), ("moe",), ("rms",), write_mixtral, read_mixtral, mixtral_rules
)
QWEN2_MOE = Family("qwen2_moe", "Qwen2MoeForCausalLM", *PARTS, write_qwen2_moe, read_qwen2_moe, qwen_rules)
QWEN3_MOE = Family("qwen3_moe", "Qwen3MoeForCausalLM", *PARTS, write_qwen3_moe, read_qwen3_moe, qwen_rules)
