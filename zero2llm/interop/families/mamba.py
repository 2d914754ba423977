"""Mamba and Mamba-2: every layer is its mixer alone. Neither has a longest text; max_position_embeddings keeps ours."""

from __future__ import annotations

import math

from zero2llm.interop.families.decoder import refuse
from zero2llm.interop.families.family import Family
from zero2llm.interop.hf_names import BOTH, WEIGHT, Rule, filters, same
from zero2llm.layers.mixers.mamba1 import Mamba1Config
from zero2llm.layers.mixers.mamba2 import Mamba2Config
from zero2llm.layers.norms.rms import RMSNormConfig
from zero2llm.model.spec import LayerPattern, LayerSpec, ModelConfig

INFINITE = {"__float__": "Infinity"}  # as transformers writes it, for JSON has no such number
ENDLESS = 1_048_576  # tokens, where a file does not say


def _write(cfg: ModelConfig) -> dict:
    """What both share."""
    spec = cfg.specs()[0]
    return {
        "hidden_size": cfg.d_model, "num_hidden_layers": len(cfg.specs()), "state_size": spec.mixer.state_dim,
        "conv_kernel": spec.mixer.conv_width, "use_bias": spec.mixer.proj_bias, "use_conv_bias": spec.mixer.conv_bias,
        "layer_norm_epsilon": spec.norm.eps, "max_position_embeddings": cfg.max_len, "hidden_act": "silu",
    }  # fmt: skip


def _read(data: dict, mixer: Mamba1Config | Mamba2Config, tied: bool) -> ModelConfig:
    refuse(data, {"hidden_act": ("silu",)})
    norm, name = RMSNormConfig(eps=data.get("layer_norm_epsilon", 1e-5)), data["model_type"]
    return ModelConfig(
        vocab_size=data["vocab_size"], d_model=data["hidden_size"], max_len=data.get("max_position_embeddings", ENDLESS),
        layers=LayerPattern(pattern=[name], repeat=data["num_hidden_layers"]), final_norm=norm,
        blocks={name: LayerSpec(mixer=mixer, ffn=None, norm=norm)}, tie_embeddings=data.get("tie_word_embeddings", tied),
    )  # fmt: skip


def write_mamba(cfg: ModelConfig) -> dict:
    mixer = cfg.specs()[0].mixer
    return _write(cfg) | {"expand": mixer.expand, "time_step_rank": mixer.rank(cfg.d_model)}


def read_mamba(data: dict) -> ModelConfig:
    rank = data.get("time_step_rank", "auto")
    mixer = Mamba1Config(
        state_dim=data.get("state_size", 16), conv_width=data.get("conv_kernel", 4), expand=data.get("expand", 2),
        dt_rank=None if rank == "auto" else rank, conv_bias=data.get("use_conv_bias", True), proj_bias=data.get("use_bias", False),
    )  # fmt: skip
    return _read(data, mixer, True)


def write_mamba2(cfg: ModelConfig) -> dict:
    mixer = cfg.specs()[0].mixer
    heads = mixer.heads(cfg.d_model)
    if heads * mixer.head_dim % cfg.d_model:
        raise ValueError(f"mixer.n_heads: {heads} of {mixer.head_dim} (there a multiple of d_model = {cfg.d_model})")
    limit = (
        {}
        if mixer.dt_limit is None
        else {"time_step_limit": [INFINITE if x == math.inf else x for x in mixer.dt_limit]}
    )
    return _write(cfg) | limit | {
        "num_heads": heads, "head_dim": mixer.head_dim, "n_groups": mixer.n_groups, "chunk_size": 256,
        "expand": heads * mixer.head_dim // cfg.d_model, "time_step_min": mixer.dt_range[0], "time_step_max": mixer.dt_range[1],
    }  # fmt: skip


def read_mamba2(data: dict) -> ModelConfig:
    limit = tuple(math.inf if x == INFINITE else x for x in data.get("time_step_limit") or (0.0, math.inf))
    mixer = Mamba2Config(
        n_heads=data.get("num_heads", 128), head_dim=data.get("head_dim", 64), state_dim=data.get("state_size", 128),
        n_groups=data.get("n_groups", 8), conv_width=data.get("conv_kernel", 4), conv_bias=data.get("use_conv_bias", True),
        proj_bias=data.get("use_bias", False), dt_limit=None if limit == (0.0, math.inf) else limit,
        norm_eps=data.get("layer_norm_epsilon", 1e-5),
    )  # fmt: skip
    return _read(data, mixer, False)


def mamba1_rules(mixer: Mamba1Config, theirs: str, ours: str) -> list[Rule]:
    rules = _shared_rules(mixer, theirs, ours) + same(theirs + "x_proj", ours + "x_proj")
    return rules + same(theirs + "dt_proj", ours + "dt_proj") + [Rule((theirs + "dt_proj.bias",), (ours + "dt_bias",))]


def mamba2_rules(mixer: Mamba2Config, theirs: str, ours: str) -> list[Rule]:
    own = [Rule((theirs + "dt_bias",), (ours + "dt_bias",)), Rule((theirs + "norm.weight",), (ours + "norm_weight",))]
    return _shared_rules(mixer, theirs, ours) + own


def _shared_rules(mixer: Mamba1Config | Mamba2Config, theirs: str, ours: str) -> list[Rule]:
    ends = BOTH if mixer.proj_bias else WEIGHT
    rules = [Rule((theirs + n,), (ours + n,)) for n in ("A_log", "D")]
    rules.append(filters(theirs + "conv1d.weight", ours + "conv_weight"))
    if mixer.conv_bias:
        rules.append(Rule((theirs + "conv1d.bias",), (ours + "conv_bias",)))
    return rules + same(theirs + "in_proj", ours + "in_proj", ends) + same(theirs + "out_proj", ours + "o_proj", ends)


def rules(cfg: ModelConfig) -> list[Rule]:
    out = same("backbone.embeddings", "embed")
    for i, spec in enumerate(cfg.specs()):
        theirs, ours = f"backbone.layers.{i}.", f"blocks.{i}."
        make = mamba1_rules if isinstance(spec.mixer, Mamba1Config) else mamba2_rules
        out += same(theirs + "norm", ours + "mixer_norm") + make(spec.mixer, theirs + "mixer.", ours + "mixer.")
    out += same("backbone.norm_f", "final_norm")
    return out if cfg.tie_embeddings else out + same("lm_head", "head")


MAMBA = Family("mamba", "MambaForCausalLM", ("mamba1",), ("none",), ("rms",), write_mamba, read_mamba, rules)
MAMBA2 = Family("mamba2", "Mamba2ForCausalLM", ("mamba2",), ("none",), ("rms",), write_mamba2, read_mamba2, rules)
