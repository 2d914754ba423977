"""gpt-oss: a sink per head, every other layer sees a window, YaRN, experts with biases and a clamped gate.

Published weights are MXFP4; transformers turns them into plain ones, and those are read here. All experts lie in one
tensor (E, in, out), the columns of gate and up alternating.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zero2llm.interop.families.decoder import (
    attention_rules,
    decoder_rules,
    read_heads,
    read_layer_types,
    read_model,
    refuse,
    windows,
    write_sizes,
    write_windows,
)
from zero2llm.interop.families.family import Family
from zero2llm.interop.families.rope import LENGTH, read_rope, rope_keys
from zero2llm.interop.hf_names import BOTH, Rule, same
from zero2llm.layers.ffns.moe import MoEConfig
from zero2llm.layers.mixers.gqa import GQAConfig
from zero2llm.layers.norms.rms import RMSNormConfig
from zero2llm.model.spec import LayerSpec, ModelConfig

YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False, LENGTH: 4096}


def write(cfg: ModelConfig) -> dict:
    spec = cfg.specs()[0]
    return write_sizes(cfg) | rope_keys(spec.mixer.position) | write_windows(cfg) | {
        "intermediate_size": spec.ffn.hidden, "num_local_experts": spec.ffn.n_experts, "hidden_act": "silu",
        "num_experts_per_tok": spec.ffn.top_k, "attention_bias": True, "swiglu_limit": 7.0, "swiglu_alpha": 1.702,
    }  # fmt: skip


def read(data: dict) -> ModelConfig:
    refuse(data, {"attention_bias": (True,), "swiglu_limit": (7.0,), "swiglu_alpha": (1.702,), "hidden_act": ("silu",)})
    if not data.get("rope_parameters") and not data.get("rope_scaling"):
        data = data | {"rope_scaling": YARN}
    data = {"sliding_window": 128} | data
    norm, position = RMSNormConfig(eps=data.get("rms_norm_eps", 1e-5)), read_rope(data, 150_000.0)
    heads = read_heads(data, 64) | {"qkv_bias": True, "out_bias": True, "sink": True, "position": position}
    moe = MoEConfig(n_experts=data.get("num_local_experts", data.get("num_experts")), top_k=data["num_experts_per_tok"],
                    hidden=data["intermediate_size"], act="gptoss", bias=True)  # fmt: skip
    seen = windows(data, read_layer_types(data, 2))
    specs = [LayerSpec(mixer=GQAConfig(**heads, window=w), ffn=moe, norm=norm) for w in seen]
    return read_model(data, specs, length=131_072)


def interleave(parts: list[Tensor]) -> list[Tensor]:
    """gate and up (E, H, D) -> (E, D, 2 H); biases (E, H) -> (E, 2 H)."""
    return [torch.stack(parts, 2).flatten(1, 2).transpose(1, -1).contiguous()]


def separate(whole: list[Tensor]) -> list[Tensor]:
    joined = whole[0].transpose(1, -1)
    return [joined[:, 0::2].contiguous(), joined[:, 1::2].contiguous()]


def turned(parts: list[Tensor]) -> list[Tensor]:
    return [parts[0].transpose(1, -1).contiguous()]


def ffn(config: MoEConfig, theirs: str, ours: str) -> list[Rule]:
    rules = same(theirs + "router", ours + "router", BOTH)
    for end, mine in (("", ".weight"), ("_bias", ".bias")):
        both = (f"{ours}gate_proj{mine}", f"{ours}up_proj{mine}")
        rules.append(Rule((f"{theirs}experts.gate_up_proj{end}",), both, interleave, separate))
        rules.append(Rule((f"{theirs}experts.down_proj{end}",), (f"{ours}down_proj{mine}",), turned, turned))
    return rules


def attention(cfg: ModelConfig, mixer: GQAConfig, theirs: str, ours: str) -> list[Rule]:
    return attention_rules(cfg, mixer, theirs, ours) + [Rule((theirs + "self_attn.sinks",), (ours + "sinks",))]


def rules(cfg: ModelConfig) -> list[Rule]:
    return decoder_rules(cfg, attention=attention, ffn=ffn)


GPT_OSS = Family("gpt_oss", "GptOssForCausalLM", ("gqa",), ("moe",), ("rms",), write, read, rules)
