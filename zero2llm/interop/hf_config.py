"""config.json of transformers from our configuration, and back."""

from __future__ import annotations

from typing import Any

from zero2llm.core.config import parse, to_dict
from zero2llm.model.presets import gpt2, llama, qwen3
from zero2llm.model.spec import LayerSpec, ModelConfig


def family_of(cfg: ModelConfig) -> str:
    """``gpt2``, ``llama`` or ``qwen3``. Raises ValueError naming every part that no family of transformers has."""
    specs = cfg.specs()
    if any(spec != specs[0] for spec in specs):
        raise ValueError(
            "cannot export: the layers differ from each other, and no supported architecture of transformers mixes them so"
        )
    spec = specs[0]
    family = (
        "gpt2" if cfg.position is not None or spec.norm.kind == "layer" else "qwen3" if spec.mixer.qk_norm else "llama"
    )
    faults = _gpt2_faults(cfg, spec) if family == "gpt2" else _llama_faults(cfg, spec)
    if faults:
        raise ValueError(
            f"cannot export: nearest to {family} in transformers, which has no counterpart for: {'; '.join(faults)}"
        )
    return family


def _common_faults(cfg: ModelConfig, spec: LayerSpec) -> dict[str, bool]:
    return {
        f"wiring {spec.wiring}": spec.wiring != "pre",
        "a sliding window": spec.mixer.window is not None,
        f"norm {spec.norm.kind} in blocks but another at the end": cfg.final_norm is None
        or cfg.final_norm != spec.norm,
    }


def _gpt2_faults(cfg: ModelConfig, spec: LayerSpec) -> list[str]:
    mixer, ffn = spec.mixer, spec.ffn
    checks = _common_faults(cfg, spec) | {
        "positions other than learned": cfg.position is None or cfg.position.kind != "learned",
        "rotary positions": mixer.position.kind != "none",
        f"norm {spec.norm.kind}": spec.norm.kind != "layer" or not spec.norm.bias,
        "grouped key/value heads": mixer.n_kv_heads not in (None, mixer.n_heads),
        "QK-norm": mixer.qk_norm,
        "head_dim apart from d_model / n_heads": mixer.head_dim not in (None, cfg.d_model // mixer.n_heads),
        "projections without bias": not (mixer.qkv_bias and mixer.out_bias),
        "an untied head": not cfg.tie_embeddings,
        f"feed-forward {ffn.kind} with {ffn.act}": ffn.kind != "mlp" or ffn.act not in ("gelu", "relu") or not ffn.bias,
    }
    return [name for name, fault in checks.items() if fault]


def _llama_faults(cfg: ModelConfig, spec: LayerSpec) -> list[str]:
    mixer, ffn = spec.mixer, spec.ffn
    checks = _common_faults(cfg, spec) | {
        f"position {mixer.position.kind}": mixer.position.kind != "rope",
        f"norm {spec.norm.kind}": spec.norm.kind != "rms",
        "biases in attention": mixer.qkv_bias or mixer.out_bias,
        f"feed-forward {ffn.kind} with {ffn.act}": ffn.kind != "glu" or ffn.act not in ("silu", "gelu"),
        "a QK-norm whose eps differs": mixer.qk_norm and mixer.norm_eps != spec.norm.eps,
    }
    return [name for name, fault in checks.items() if fault]


def to_hf_config(cfg: ModelConfig) -> dict[str, Any]:
    """The content of config.json, without token ids. Raises ValueError where there is no counterpart."""
    family, spec = family_of(cfg), cfg.specs()[0]
    common = {
        "model_type": family,
        "vocab_size": cfg.vocab_size,
        "initializer_range": cfg.init.std,
        "tie_word_embeddings": cfg.tie_embeddings,
        "torch_dtype": "float32",
    }
    if family == "gpt2":
        act = {"gelu": "gelu_new", "relu": "relu"}[spec.ffn.act]
        return common | {
            "architectures": ["GPT2LMHeadModel"], "n_embd": cfg.d_model, "n_layer": len(cfg.specs()), "n_head": spec.mixer.n_heads,
            "n_positions": cfg.max_len, "n_inner": spec.ffn.hidden, "layer_norm_epsilon": spec.norm.eps, "activation_function": act,
            "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
        }  # fmt: skip
    mixer, base = spec.mixer, spec.mixer.position.base
    return common | {
        "architectures": [{"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[family]],
        "hidden_size": cfg.d_model, "num_hidden_layers": len(cfg.specs()), "num_attention_heads": mixer.n_heads,
        "num_key_value_heads": mixer.n_kv_heads or mixer.n_heads, "head_dim": mixer.head_dim or cfg.d_model // mixer.n_heads,
        "intermediate_size": spec.ffn.hidden, "hidden_act": {"silu": "silu", "gelu": "gelu_pytorch_tanh"}[spec.ffn.act],
        "max_position_embeddings": cfg.max_len, "rms_norm_eps": spec.norm.eps, "attention_bias": False, "mlp_bias": False,
        "rope_theta": base, "rope_parameters": {"rope_type": "default", "rope_theta": base},
    }  # fmt: skip


def from_hf_config(data: dict[str, Any]) -> ModelConfig:
    """Our configuration of a config.json. Raises ValueError for another family or a part that we do not have."""
    family = data.get("model_type")
    if family not in ("gpt2", "llama", "qwen3"):
        raise ValueError(f"model_type {family!r} is not supported; this version reads gpt2, llama and qwen3")
    rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
    hidden_act = data.get("hidden_act", "silu")
    unsupported = {
        f"rope scaling {rope.get('rope_type', rope.get('type'))!r}": rope.get("rope_type", rope.get("type", "default"))
        != "default",
        "attention_bias": bool(data.get("attention_bias")),
        "mlp_bias": bool(data.get("mlp_bias")),
        "use_sliding_window": bool(data.get("use_sliding_window")),
        "scale_attn_by_inverse_layer_idx": bool(data.get("scale_attn_by_inverse_layer_idx")),
        f"hidden_act {hidden_act!r}": family != "gpt2" and hidden_act != "silu",
        f"activation_function {data.get('activation_function')!r}": data.get("activation_function", "gelu_new")
        != "gelu_new",
        f"pretraining_tp {data.get('pretraining_tp')}": data.get("pretraining_tp", 1) != 1,
    }
    found = [name for name, there in unsupported.items() if there]
    if found:
        raise ValueError(f"config.json ({family}) has parts that are not supported: {', '.join(found)}")
    if family == "gpt2":
        return _gpt2(data)
    heads, d = data["num_attention_heads"], data["hidden_size"]
    shape = (data["vocab_size"], d, data["num_hidden_layers"], heads, data.get("num_key_value_heads") or heads)
    base = float(rope.get("rope_theta", data.get("rope_theta", 1e4)))
    cfg = (llama if family == "llama" else qwen3)(
        *shape, data["intermediate_size"], data["max_position_embeddings"], tied=data.get("tie_word_embeddings", False)
    )
    return _with_mixer(
        cfg,
        base=base,
        head_dim=data.get("head_dim") or d // heads,
        eps=data.get("rms_norm_eps", 1e-6),
        std=data.get("initializer_range", 0.02),
    )


def _gpt2(data: dict[str, Any]) -> ModelConfig:
    cfg = to_dict(gpt2(data["vocab_size"], data["n_embd"], data["n_layer"], data["n_head"], data["n_positions"]))
    block, eps = cfg["blocks"]["gpt2"], data.get("layer_norm_epsilon", 1e-5)
    block["ffn"]["hidden"] = data.get("n_inner") or 4 * data["n_embd"]
    block["norm"]["eps"] = cfg["final_norm"]["eps"] = eps
    cfg["init"]["std"] = data.get("initializer_range", 0.02)
    return parse(ModelConfig, cfg)


def _with_mixer(cfg: ModelConfig, *, base: float, head_dim: int, eps: float, std: float) -> ModelConfig:
    data = to_dict(cfg)
    for block in data["blocks"].values():
        block["mixer"] |= {"head_dim": head_dim, "norm_eps": eps}
        block["mixer"]["position"]["base"] = base
        block["norm"]["eps"] = eps
    data["final_norm"]["eps"], data["init"]["std"] = eps, std
    return parse(ModelConfig, data)
