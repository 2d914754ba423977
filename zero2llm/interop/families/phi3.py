"""Phi-3: Llama with a window, part of a head may turn; q, k, v lie in one matrix, gate and up in another.

LongRoPE: transformers takes the short factors for a row within the length of training and the long ones beyond it;
ours (as servers that fix the length in advance do) always the long ones where max_len is beyond it. Rows longer than
original_max_position_embeddings agree.
"""

from __future__ import annotations

from dataclasses import replace

from zero2llm.interop.families.decoder import decoder_rules, head_dim, plain_head_dim, read_model, refuse, write_dense
from zero2llm.interop.families.family import Family
from zero2llm.interop.families.llama import full_only, spec_of
from zero2llm.interop.families.rope import LENGTH, half_split, read_rope, rope_keys
from zero2llm.interop.hf_names import Rule, joined, same
from zero2llm.layers.ffns.glu import GLUConfig
from zero2llm.layers.mixers.gqa import GQAConfig
from zero2llm.model.spec import ModelConfig


def write(cfg: ModelConfig) -> dict:
    plain_head_dim(cfg)
    mixer = cfg.specs()[0].mixer
    rope = rope_keys(mixer.position, head_dim(cfg, mixer))
    half_split(mixer.position)
    kind = rope["rope_parameters"]["rope_type"]
    if kind not in ("default", "longrope"):
        raise ValueError(f"mixer.position.scaling: {kind} (longrope is the only one there)")
    length = {LENGTH: rope["rope_parameters"].get(LENGTH, cfg.max_len)}
    pdrops = {"resid_pdrop": 0.0, "embd_pdrop": 0.0}
    return write_dense(cfg) | rope | length | pdrops | {"sliding_window": mixer.window}


def read(data: dict) -> ModelConfig:
    full_only(data)
    refuse(data, {"attention_bias": (False,)})
    data = {LENGTH: 4096} | data
    dim = data["hidden_size"] // data["num_attention_heads"]
    spec = spec_of(data, eps=1e-5, window=data.get("sliding_window"), position=read_rope(data, head_dim=dim))
    spec = replace(spec, mixer=replace(spec.mixer, head_dim=None))
    return read_model(data, [spec] * data["num_hidden_layers"], length=4096)


def attention(cfg: ModelConfig, mixer: GQAConfig, theirs: str, ours: str) -> list[Rule]:
    theirs += "self_attn."
    k, kv = head_dim(cfg, mixer), mixer.n_kv_heads or mixer.n_heads
    rows = [mixer.n_heads * k, kv * k, kv * k]
    return joined(theirs + "qkv_proj", [f"{ours}{n}_proj" for n in "qkv"], rows) + same(
        theirs + "o_proj", ours + "o_proj"
    )


def ffn(config: GLUConfig, theirs: str, ours: str) -> list[Rule]:
    both = joined(theirs + "gate_up_proj", [ours + "gate_proj", ours + "up_proj"], [config.hidden] * 2)
    return both + same(theirs + "down_proj", ours + "down_proj")


def rules(cfg: ModelConfig) -> list[Rule]:
    return decoder_rules(cfg, attention=attention, ffn=ffn)


PHI3 = Family("phi3", "Phi3ForCausalLM", ("gqa",), ("glu",), ("rms",), write, read, rules)
