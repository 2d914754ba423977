"""Llama 1 to 3.3, SmolLM2, TinyLlama; and four that change one line of it.

Mistral   a sliding window in every layer, no biases
Qwen2     biases on q, k and v only
Qwen3     a norm on each query and key head, and a head width of its own
SmolLM3   no rotation in some layers: no_rope_layers[i] = 0
"""

from __future__ import annotations

from zero2llm.interop.families.decoder import (
    decoder_rules,
    divides,
    plain_head_dim,
    read_heads,
    read_model,
    refuse,
    write_dense,
)
from zero2llm.interop.families.family import Family
from zero2llm.interop.families.rope import read_rope
from zero2llm.layers.ffns.glu import GLUConfig
from zero2llm.layers.mixers.gqa import GQAConfig
from zero2llm.layers.norms.rms import RMSNormConfig
from zero2llm.layers.positions.none import NoPositionConfig
from zero2llm.layers.positions.rope import RoPEConfig
from zero2llm.model.spec import LayerSpec, ModelConfig


def spec_of(
    data: dict, base: float = 10_000.0, default_dim: int | None = None, eps: float = 1e-6, **mixer
) -> LayerSpec:
    """A block of Llama; ``mixer`` are further fields of its attention."""
    refuse(data, {"hidden_act": ("silu",), "mlp_bias": (False,)})
    if "position" not in mixer:
        mixer["position"] = read_rope(data, base)
    mixer = {**read_heads(data, default_dim), **mixer}
    norm = RMSNormConfig(eps=data.get("rms_norm_eps", eps))
    return LayerSpec(mixer=GQAConfig(**mixer), ffn=GLUConfig(hidden=data["intermediate_size"]), norm=norm)


def full_only(data: dict) -> None:
    refuse(data, {
        "layer_types": (None, ["full_attention"] * data["num_hidden_layers"]), "use_sliding_window": (False,),
    })  # fmt: skip


def write_llama(cfg: ModelConfig) -> dict:
    divides(cfg)
    return write_dense(cfg) | {"attention_bias": cfg.specs()[0].mixer.qkv_bias, "mlp_bias": False}


def read_llama(data: dict) -> ModelConfig:
    full_only(data)
    refuse(data, {"sliding_window": (None,)})
    bias = data.get("attention_bias", False)
    return read_model(data, [spec_of(data, qkv_bias=bias, out_bias=bias)] * data["num_hidden_layers"])


def write_mistral(cfg: ModelConfig) -> dict:
    return write_dense(cfg) | {"sliding_window": cfg.specs()[0].mixer.window}


def read_mistral(data: dict) -> ModelConfig:
    refuse(data, {"layer_types": (None,)})
    spec = spec_of(data, window=data.get("sliding_window", 4096))
    return read_model(data, [spec] * data["num_hidden_layers"], length=131_072)


def write_qwen2(cfg: ModelConfig) -> dict:
    plain_head_dim(cfg)
    return write_dense(cfg) | {"use_sliding_window": False, "sliding_window": None}


def read_qwen2(data: dict) -> ModelConfig:
    full_only(data)
    return read_model(data, [spec_of(data, qkv_bias=True)] * data["num_hidden_layers"], length=32_768)


def write_qwen3(cfg: ModelConfig) -> dict:
    bias = cfg.specs()[0].mixer.qkv_bias
    return write_dense(cfg) | {"attention_bias": bias, "use_sliding_window": False, "sliding_window": None}


def read_qwen3(data: dict) -> ModelConfig:
    full_only(data)
    bias, eps = data.get("attention_bias", False), data.get("rms_norm_eps", 1e-6)
    spec = spec_of(data, default_dim=128, qkv_bias=bias, out_bias=bias, qk_norm=True, norm_eps=eps)
    return read_model(data, [spec] * data["num_hidden_layers"], length=32_768)


def write_smollm3(cfg: ModelConfig) -> dict:
    plain_head_dim(cfg)
    specs = cfg.specs()
    turning = [isinstance(s.mixer.position, RoPEConfig) for s in specs]
    if not any(turning):
        raise ValueError(f"mixer.position: {specs[0].mixer.position.kind} in every layer (rope is needed in some)")
    keys = write_dense(ModelConfig(vocab_size=cfg.vocab_size, d_model=cfg.d_model, max_len=cfg.max_len, layers=cfg.layers,
                                   blocks=dict.fromkeys(cfg.blocks, specs[turning.index(True)])))  # fmt: skip
    bias = specs[0].mixer.qkv_bias
    return keys | {"no_rope_layers": [int(t) for t in turning], "attention_bias": bias, "mlp_bias": False,
                   "use_sliding_window": False, "sliding_window": None}  # fmt: skip


def read_smollm3(data: dict) -> ModelConfig:
    full_only(data)
    n, every = data["num_hidden_layers"], data.get("no_rope_layer_interval", 4)
    turning = data.get("no_rope_layers") or [int((i + 1) % every != 0) for i in range(n)]
    bias = data.get("attention_bias", False)
    pages = [
        spec_of(data, 2e6, qkv_bias=bias, out_bias=bias, **more) for more in ({"position": NoPositionConfig()}, {})
    ]
    return read_model(data, [pages[turns] for turns in turning], tied=True, length=32_768)


DENSE = ("gqa",), ("glu",), ("rms",)
LLAMA = Family("llama", "LlamaForCausalLM", *DENSE, write_llama, read_llama, decoder_rules)
MISTRAL = Family("mistral", "MistralForCausalLM", *DENSE, write_mistral, read_mistral, decoder_rules)
QWEN2 = Family("qwen2", "Qwen2ForCausalLM", *DENSE, write_qwen2, read_qwen2, decoder_rules)
QWEN3 = Family("qwen3", "Qwen3ForCausalLM", *DENSE, write_qwen3, read_qwen3, decoder_rules)
SMOLLM3 = Family("smollm3", "SmolLM3ForCausalLM", *DENSE, write_smollm3, read_smollm3, decoder_rules)
