"""Jamba: Mamba layers with an attention layer now and then (no positions at all), and experts in every other layer."""

from __future__ import annotations

from zero2llm.interop.families.decoder import (
    attention_rules,
    decoder_rules,
    first,
    glu_rules,
    plain_head_dim,
    read_heads,
    read_model,
    refuse,
    write_sizes,
)
from zero2llm.interop.families.family import Family
from zero2llm.interop.families.mamba import mamba1_rules
from zero2llm.interop.families.moe import expert_rules
from zero2llm.interop.hf_names import Rule, same
from zero2llm.layers.ffns.glu import GLUConfig
from zero2llm.layers.ffns.moe import MoEConfig
from zero2llm.layers.mixers.gqa import GQAConfig
from zero2llm.layers.mixers.mamba1 import Mamba1Config
from zero2llm.layers.norms.rms import RMSNormConfig
from zero2llm.model.spec import LayerSpec, ModelConfig


def rhythm(flags: list[bool], what: str) -> tuple[int, int]:
    """(period, offset) with flags[i] == (i % period == offset)."""
    for period in range(1, len(flags) + 1):
        for offset in range(period):
            if flags == [i % period == offset for i in range(len(flags))]:
                return period, offset
    raise ValueError(f"layers.pattern: {what} that do not come at a fixed distance")


def write(cfg: ModelConfig) -> dict:
    plain_head_dim(cfg)
    specs = cfg.specs()
    moe = next((s.ffn for s in specs if isinstance(s.ffn, MoEConfig)), None)
    mamba = first(cfg, Mamba1Config).mixer
    attends, routed = [isinstance(s.mixer, GQAConfig) for s in specs], [isinstance(s.ffn, MoEConfig) for s in specs]
    period, offset = rhythm(attends, "layers with attention")
    every, start = rhythm(routed, "layers with experts") if moe else (2, 1)
    return write_sizes(cfg) | {
        "intermediate_size": specs[0].ffn.hidden, "hidden_act": "silu", "attn_layer_period": period,
        "attn_layer_offset": offset, "expert_layer_period": every, "expert_layer_offset": start,
        "num_experts": moe.n_experts if moe else 1, "num_experts_per_tok": moe.top_k if moe else 1,
        "mamba_d_state": mamba.state_dim, "mamba_d_conv": mamba.conv_width, "mamba_expand": mamba.expand,
        "mamba_dt_rank": mamba.rank(cfg.d_model), "mamba_conv_bias": mamba.conv_bias, "mamba_proj_bias": mamba.proj_bias,
    }  # fmt: skip


def read(data: dict) -> ModelConfig:
    refuse(data, {"hidden_act": ("silu",), "sliding_window": (None,)})
    norm, rank = RMSNormConfig(eps=data.get("rms_norm_eps", 1e-6)), data.get("mamba_dt_rank", "auto")
    mamba = Mamba1Config(
        state_dim=data.get("mamba_d_state", 16), conv_width=data.get("mamba_d_conv", 4), expand=data.get("mamba_expand", 2),
        dt_rank=None if rank == "auto" else rank, conv_bias=data.get("mamba_conv_bias", True),
        proj_bias=data.get("mamba_proj_bias", False), dt_norms=True, norm_eps=norm.eps,
    )  # fmt: skip
    dense = GLUConfig(hidden=data["intermediate_size"])
    n_experts, top_k = data.get("num_experts", 16), data.get("num_experts_per_tok", 2)
    moe = dense
    if n_experts > 1:
        moe = MoEConfig(n_experts=n_experts, top_k=top_k, hidden=dense.hidden, renormalise=False)
    at = lambda i, name, period, offset: i % data.get(f"{name}_period", period) == data.get(f"{name}_offset", offset)
    specs = [
        LayerSpec(
            mixer=GQAConfig(**read_heads(data)) if at(i, "attn_layer", 8, 4) else mamba,
            ffn=moe if at(i, "expert_layer", 2, 1) else dense, norm=norm,
        )
        for i in range(data["num_hidden_layers"])
    ]  # fmt: skip
    return read_model(data, specs, length=262_144)


def attention(cfg: ModelConfig, mixer: GQAConfig | Mamba1Config, theirs: str, ours: str) -> list[Rule]:
    if isinstance(mixer, GQAConfig):
        return attention_rules(cfg, mixer, theirs, ours)
    norms = [same(f"{theirs}mamba.{n}_layernorm", f"{ours}norms.{i}") for i, n in enumerate(("dt", "b", "c"))]
    return mamba1_rules(mixer, theirs + "mamba.", ours) + [rule for pair in norms for rule in pair]


def ffn(config: MoEConfig | GLUConfig, theirs: str, ours: str) -> list[Rule]:
    theirs = theirs.removesuffix("mlp.") + "feed_forward."
    if isinstance(config, GLUConfig):
        return glu_rules(config, theirs, ours)
    return same(theirs + "router", ours + "router") + expert_rules(config, theirs, ours)


def rules(cfg: ModelConfig) -> list[Rule]:
    norms = {"input_layernorm": "mixer_norm", "pre_ff_layernorm": "ffn_norm"}
    return decoder_rules(cfg, norms, attention, ffn, "model.final_layernorm")


JAMBA = Family("jamba", "JambaForCausalLM", ("gqa", "mamba1"), ("glu", "moe"), ("rms",), write, read, rules)
