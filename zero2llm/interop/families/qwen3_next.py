"""Qwen3-Next: three layers of the gated delta rule to one of gated attention that turns a quarter of a head; experts.

Norms scale by 1 + w, but the one inside the delta rule by w. q, k, v, z of a key head and its value heads lie together
in one matrix, b and a in another; queries and gate of attention alternate head by head. Published files also hold
layers for multi-token prediction (mtp.), which are passed over.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zero2llm.interop.families.decoder import (
    decoder_rules,
    first,
    head_dim,
    read_heads,
    read_model,
    refuse,
)
from zero2llm.interop.families.family import Family
from zero2llm.interop.families.moe import qwen_ffn, sparse_layers, write_sparse
from zero2llm.interop.families.rope import half_split, read_rope, rope_keys
from zero2llm.interop.hf_names import Rule, by_head, same
from zero2llm.layers.ffns.glu import GLUConfig
from zero2llm.layers.ffns.moe import MoEConfig
from zero2llm.layers.mixers.gated_delta import GatedDeltaConfig
from zero2llm.layers.mixers.gqa import GQAConfig
from zero2llm.layers.norms.rms import RMSNormConfig
from zero2llm.model.spec import LayerSpec, ModelConfig


def write(cfg: ModelConfig) -> dict:
    attention, moe = first(cfg, GQAConfig).mixer, first(cfg, MoEConfig).ffn
    h_k, h_v, k, v = first(cfg, GatedDeltaConfig).mixer.widths(cfg.d_model)
    half_split(attention.position)
    types = ["full_attention" if isinstance(s.mixer, GQAConfig) else "linear_attention" for s in cfg.specs()]
    keys = {n: value for n, value in write_sparse(cfg).items() if "sliding" not in n}
    return keys | rope_keys(attention.position, head_dim(cfg, attention)) | {
        "layer_types": types, "attention_bias": False, "shared_expert_intermediate_size": moe.shared_width,
        "linear_num_key_heads": h_k, "linear_num_value_heads": h_v, "linear_key_head_dim": k, "linear_value_head_dim": v,
        "linear_conv_kernel_dim": first(cfg, GatedDeltaConfig).mixer.conv_width,
    }  # fmt: skip


def read(data: dict) -> ModelConfig:
    refuse(data, {"attention_bias": (False,), "hidden_act": ("silu",)})
    data = {"partial_rotary_factor": 0.25} | data
    eps, heads = data.get("rms_norm_eps", 1e-6), read_heads(data, 256)
    attention = GQAConfig(**heads, position=read_rope(data, head_dim=heads["head_dim"]), qk_norm=True, qk_norm_plus_one=True,
                          norm_eps=eps, gate=True)  # fmt: skip
    delta = GatedDeltaConfig(
        n_v_heads=data.get("linear_num_value_heads", 32), n_k_heads=data.get("linear_num_key_heads", 16), norm_eps=eps,
        head_dim=data.get("linear_key_head_dim", 128), value_dim=data.get("linear_value_head_dim", 128),
        conv_width=data.get("linear_conv_kernel_dim", 4),
    )  # fmt: skip
    moe = MoEConfig(
        n_experts=data.get("num_experts", data.get("num_local_experts")), top_k=data["num_experts_per_tok"],
        hidden=data["moe_intermediate_size"], renormalise=data.get("norm_topk_prob", True), n_shared=1,
        shared_hidden=data["shared_expert_intermediate_size"], shared_gate=True,
    )  # fmt: skip
    dense, norm = GLUConfig(hidden=data["intermediate_size"]), RMSNormConfig(eps=eps, plus_one=True)
    every = data.get("full_attention_interval", 4)
    n = data["num_hidden_layers"]
    types = data.get("layer_types") or ["linear_attention" if (i + 1) % every else "full_attention" for i in range(n)]
    specs = [
        LayerSpec(mixer=attention if t == "full_attention" else delta, ffn=moe if sparse else dense, norm=norm)
        for t, sparse in zip(types, sparse_layers(data), strict=True)
    ]
    return read_model(data, specs, length=32_768)


def attention(cfg: ModelConfig, mixer: GQAConfig | GatedDeltaConfig, theirs: str, ours: str) -> list[Rule]:
    if isinstance(mixer, GatedDeltaConfig):
        return delta(mixer, cfg.d_model, theirs + "linear_attn.", ours)
    theirs, rows = theirs + "self_attn.", mixer.n_heads * head_dim(cfg, mixer)
    rules = by_head(theirs + "q_proj", [ours + "q_proj", ours + "g_proj"], mixer.n_heads, [rows, rows])
    return rules + [r for n in ("k_proj", "v_proj", "o_proj", "q_norm", "k_norm") for r in same(theirs + n, ours + n)]


def delta(mixer: GatedDeltaConfig, d_model: int, theirs: str, ours: str) -> list[Rule]:
    h_k, h_v, k, v = mixer.widths(d_model)
    rows, taps = [h_k * k, h_k * k, h_v * v], tuple(f"{ours}{n}_conv" for n in "qkv")
    rules = by_head(theirs + "in_proj_qkvz", [f"{ours}{n}_proj" for n in "qkvg"], h_k, [*rows, h_v * v])
    rules += by_head(theirs + "in_proj_ba", [ours + "b_proj", ours + "a_proj"], h_k, [h_v, h_v])
    rules += [Rule((theirs + n,), (ours + n,)) for n in ("A_log", "dt_bias")]
    rules.append(Rule(
        (theirs + "conv1d.weight",), taps, lambda parts: [torch.cat(parts).unsqueeze(1)],
        lambda whole: [part.contiguous() for part in whole[0].squeeze(1).split(rows)],
    ))  # fmt: skip
    return rules + same(theirs + "norm", ours + "norm") + same(theirs + "out_proj", ours + "o_proj")


def rules(cfg: ModelConfig) -> list[Rule]:
    return decoder_rules(cfg, attention=attention, ffn=qwen_ffn)


def clean(tensors: dict[str, Tensor], cfg: ModelConfig) -> dict[str, Tensor]:
    return {name: t for name, t in tensors.items() if not name.startswith("mtp.")}


PARTS = ("gqa", "gated_delta"), ("moe", "glu"), ("rms",)
QWEN3_NEXT = Family("qwen3_next", "Qwen3NextForCausalLM", *PARTS, write, read, rules, clean)
