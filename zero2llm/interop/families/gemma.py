"""Gemma 1, 2 and 3: embeddings times sqrt(d_model), norms that scale by 1 + w, GeGLU, tied.

Gemma 2   sandwich norms, soft-capped scores and logits, every other layer sees a window
Gemma 3   QK-norm instead of soft-caps, five windows to one full layer, another rotary base for each kind
"""

from __future__ import annotations

from zero2llm.interop.families.decoder import (
    decoder_rules,
    divides,
    read_heads,
    read_layer_types,
    read_model,
    refuse,
    windows,
    write_dense,
    write_sizes,
    write_windows,
)
from zero2llm.interop.families.family import Family
from zero2llm.interop.families.rope import read_rope, rope_parameters
from zero2llm.layers.ffns.glu import GLUConfig
from zero2llm.layers.mixers.gqa import GQAConfig
from zero2llm.layers.norms.rms import RMSNormConfig
from zero2llm.model.spec import LayerSpec, ModelConfig

TANH = ("gelu_pytorch_tanh",)
SANDWICH = {
    "input_layernorm": "mixer_norm", "post_attention_layernorm": "mixer_out_norm",
    "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "ffn_out_norm",
}  # fmt: skip


def _spec(data: dict, wiring: str, **mixer) -> LayerSpec:
    refuse(data, {"attention_bias": (False,), "use_bidirectional_attention": (None, False)})
    norm = RMSNormConfig(eps=data.get("rms_norm_eps", 1e-6), plus_one=True)
    if "position" not in mixer:
        mixer["position"] = read_rope(data)
    attention = GQAConfig(**read_heads(data, 256) | mixer)
    return LayerSpec(
        mixer=attention, ffn=GLUConfig(hidden=data["intermediate_size"], act="gelu"), norm=norm, wiring=wiring
    )


def _model(data: dict, specs: list[LayerSpec], length: int = 8192) -> ModelConfig:
    cap, scale = data.get("final_logit_softcapping"), data["hidden_size"] ** 0.5
    return read_model(data, specs, tied=True, length=length, embed_scale=scale, logit_softcap=cap)


def write_gemma(cfg: ModelConfig) -> dict:
    return write_dense(cfg) | {"attention_bias": False}


def read_gemma(data: dict) -> ModelConfig:
    refuse(data, {"hidden_act": (*TANH, "gelu")})  # "gelu" in old files means the tanh form
    return _model(data, [_spec(data, "pre")] * data["num_hidden_layers"])


def _write_capped(cfg: ModelConfig) -> dict:
    """What Gemma 2 and 3 share."""
    divides(cfg)
    mixer = cfg.specs()[0].mixer
    scalar = (mixer.head_dim or cfg.d_model // mixer.n_heads) if mixer.scale is None else mixer.scale**-2
    whole = round(scalar) if abs(scalar - round(scalar)) < 1e-6 else scalar
    return write_windows(cfg) | {
        "hidden_activation": write_dense(cfg)["hidden_act"], "attention_bias": False, "query_pre_attn_scalar": whole,
        "attn_logit_softcapping": mixer.softcap, "final_logit_softcapping": cfg.logit_softcap,
    }  # fmt: skip


def write_gemma2(cfg: ModelConfig) -> dict:
    return {k: v for k, v in write_dense(cfg).items() if k != "hidden_act"} | _write_capped(cfg)


def read_gemma2(data: dict) -> ModelConfig:
    refuse(data, {"hidden_activation": TANH})
    data = {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0, "sliding_window": 4096} | data
    same = {"scale": data.get("query_pre_attn_scalar", 256) ** -0.5, "softcap": data["attn_logit_softcapping"]}
    types = read_layer_types(data, 2)
    return _model(data, [_spec(data, "sandwich", window=w, **same) for w in windows(data, types)])


def write_gemma3(cfg: ModelConfig) -> dict:
    """Both generations of keys: rope_parameters for each type of layer, and rope_theta with rope_local_base_freq."""
    specs = cfg.specs()
    kinds = {w is not None: s.mixer.position for s in specs for w in (s.mixer.window,)}
    full, local = kinds.get(False, kinds.get(True)), kinds.get(True, kinds.get(False))
    rope = {"full_attention": rope_parameters(full), "sliding_attention": rope_parameters(local)}
    scaling = {k: v for k, v in rope["full_attention"].items() if k != "rope_theta"} if full.scaling else None
    return write_sizes(cfg) | {"intermediate_size": specs[0].ffn.hidden} | _write_capped(cfg) | {
        "rope_parameters": rope, "rope_theta": full.base, "rope_local_base_freq": local.base, "rope_scaling": scaling,
    }  # fmt: skip


def read_gemma3(data: dict) -> ModelConfig:
    refuse(data, {"hidden_activation": TANH})
    data = {"sliding_window": 4096} | data
    same = {"qk_norm": True, "qk_norm_plus_one": True, "norm_eps": data.get("rms_norm_eps", 1e-6),
            "scale": data.get("query_pre_attn_scalar", 256) ** -0.5, "softcap": data.get("attn_logit_softcapping")}  # fmt: skip
    types = read_layer_types(data, data.get("sliding_window_pattern", 6))
    local = read_rope({**data, "rope_theta": data.get("rope_local_base_freq", 1e4)}, layer_type="sliding_attention")
    full = read_rope(data, 1e6, layer_type="full_attention")
    rope = lambda window: full if window is None else local
    specs = [_spec(data, "sandwich", window=w, position=rope(w), **same) for w in windows(data, types)]
    return _model(data, specs, length=131_072)


def rules(cfg: ModelConfig) -> list:
    return decoder_rules(cfg, SANDWICH)


DENSE = ("gqa",), ("glu",), ("rms",)
GEMMA = Family("gemma", "GemmaForCausalLM", *DENSE, write_gemma, read_gemma, decoder_rules)
GEMMA2 = Family("gemma2", "Gemma2ForCausalLM", *DENSE, write_gemma2, read_gemma2, rules)
GEMMA3 = Family("gemma3_text", "Gemma3ForCausalLM", *DENSE, write_gemma3, read_gemma3, rules)
