"""OLMo 2: Llama whose norms stand behind each branch instead of before it, and one norm over all query (key) heads."""

from __future__ import annotations

from dataclasses import replace

from zero2llm.interop.families.decoder import decoder_rules, plain_head_dim, read_model, write_dense
from zero2llm.interop.families.family import Family
from zero2llm.interop.families.llama import full_only, spec_of
from zero2llm.model.spec import ModelConfig

NORMS = {"post_attention_layernorm": "mixer_norm", "post_feedforward_layernorm": "ffn_norm"}


def write(cfg: ModelConfig) -> dict:
    plain_head_dim(cfg)
    return write_dense(cfg) | {"attention_bias": cfg.specs()[0].mixer.qkv_bias}


def read(data: dict) -> ModelConfig:
    full_only(data)
    bias, eps = data.get("attention_bias", False), data.get("rms_norm_eps", 1e-5)
    spec = spec_of(data, eps=eps, qkv_bias=bias, out_bias=bias, qk_norm=True, qk_norm_span="all", norm_eps=eps)
    return read_model(data, [replace(spec, wiring="branch")] * data["num_hidden_layers"])


def rules(cfg: ModelConfig) -> list:
    return decoder_rules(cfg, NORMS)


OLMO2 = Family("olmo2", "Olmo2ForCausalLM", ("gqa",), ("glu",), ("rms",), write, read, rules)
