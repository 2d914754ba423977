"""A model configuration as transformers' config.json, and back; what has no counterpart is refused by name."""

from __future__ import annotations

from typing import Literal

from zero2llm.layers.ffns.glu import GLUConfig
from zero2llm.layers.ffns.mlp import MLPConfig
from zero2llm.layers.mixers.gqa import GQAConfig
from zero2llm.layers.norms.layer import LayerNormConfig
from zero2llm.layers.norms.rms import RMSNormConfig
from zero2llm.layers.positions.learned import LearnedConfig
from zero2llm.layers.positions.none import NoPositionConfig
from zero2llm.layers.positions.rope import RoPEConfig
from zero2llm.model.spec import LayerPattern, LayerSpec, ModelConfig

Family = Literal["gpt2", "llama", "qwen3"]
ARCHITECTURES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def family_of(cfg: ModelConfig) -> Family:
    """Which of their architectures computes the same function, decided by structure.

    Raises ValueError listing each part that has no counterpart there.
    """
    spec, mixer = cfg.specs()[0], cfg.specs()[0].mixer
    if not isinstance(mixer, GQAConfig):
        raise ValueError(f"no Hugging Face export: mixer {mixer.kind!r} has no counterpart in gpt2, llama or qwen3")
    gpt2_like = isinstance(spec.ffn, MLPConfig) + isinstance(spec.norm, LayerNormConfig) + (cfg.position is not None)
    family: Family = "gpt2" if gpt2_like >= 2 else "qwen3" if mixer.qk_norm else "llama"
    faults = _common_faults(cfg) + (_gpt2_faults(cfg) if family == "gpt2" else _llama_faults(cfg))
    if faults:
        raise ValueError(
            f"no Hugging Face export: nearest is {family}, which has no counterpart of {'; '.join(faults)}"
        )
    return family


def _common_faults(cfg: ModelConfig) -> list[str]:
    spec = cfg.specs()[0]
    faults = []
    if any(other != spec for other in cfg.specs()):
        faults.append(f"hybrid pattern: blocks {', '.join(cfg.blocks)} differ")
    if spec.wiring != "pre":
        faults.append(f"wiring: {spec.wiring}")
    if spec.mixer.window is not None:
        faults.append(f"sliding window: {spec.mixer.window}")
    if cfg.final_norm != spec.norm:
        faults.append("final_norm: differs from the blocks' norm (kind and eps are one setting there)")
    return faults


def _gpt2_faults(cfg: ModelConfig) -> list[str]:
    spec, mixer = cfg.specs()[0], cfg.specs()[0].mixer
    norm, ffn = spec.norm, spec.ffn
    has_norm, has_mlp = isinstance(norm, LayerNormConfig) and norm.bias, isinstance(ffn, MLPConfig) and ffn.bias
    checks = {
        f"position: {cfg.position.kind if cfg.position else 'none'} (learned is needed)": isinstance(
            cfg.position, LearnedConfig
        ),
        f"mixer.position: {mixer.position.kind}": isinstance(mixer.position, NoPositionConfig),
        f"norm: {norm.kind} (layer with bias is needed)": has_norm,
        f"ffn: {ffn.kind} (mlp with bias is needed)": has_mlp,
        f"activation: {ffn.act} (gelu is needed)": ffn.act == "gelu",
        "qk_norm": not mixer.qk_norm,
        "projections without bias": mixer.qkv_bias and mixer.out_bias,
        f"n_kv_heads: {mixer.n_kv_heads}": mixer.n_kv_heads in (None, mixer.n_heads),
        f"head_dim: {mixer.head_dim}": (mixer.head_dim or 0) * mixer.n_heads in (0, cfg.d_model),
        "untied embeddings": cfg.tie_embeddings,
    }
    return [name for name, holds in checks.items() if not holds]


def _llama_faults(cfg: ModelConfig) -> list[str]:
    spec, mixer = cfg.specs()[0], cfg.specs()[0].mixer
    rms, rotary = isinstance(spec.norm, RMSNormConfig), isinstance(mixer.position, RoPEConfig)
    checks = {
        f"position: {cfg.position.kind if cfg.position else 'none'}": cfg.position is None,
        f"mixer.position: {mixer.position.kind} (rope is needed)": rotary,
        f"norm: {spec.norm.kind} (rms is needed)": rms,
        f"ffn: {spec.ffn.kind} (glu is needed)": isinstance(spec.ffn, GLUConfig),
        f"activation: {spec.ffn.act} (silu is needed)": spec.ffn.act == "silu",
        f"d_model: {cfg.d_model} that n_heads: {mixer.n_heads} does not divide": mixer.qk_norm
        or cfg.d_model % mixer.n_heads == 0,
        "bias on only one of qkv and out": mixer.qkv_bias == mixer.out_bias,
        f"norm_eps: {mixer.norm_eps} of the QK-norm (the blocks' eps is needed)": not mixer.qk_norm
        or not rms
        or mixer.norm_eps == spec.norm.eps,
    }
    return [name for name, holds in checks.items() if not holds]


def to_hf_config(cfg: ModelConfig, *, bos: int | None = None, eos: list[int] | None = None, pad: int | None = None,
                 dtype: str = "float32") -> dict:  # fmt: skip
    """Content of config.json. dtype and rope stand there twice: as transformers 5 reads them and as version 4 does."""
    family = family_of(cfg)
    spec, mixer = cfg.specs()[0], cfg.specs()[0].mixer
    ids = {"bos_token_id": bos, "eos_token_id": eos[0] if eos and len(eos) == 1 else eos, "pad_token_id": pad}
    shared = {
        "architectures": [ARCHITECTURES[family]], "model_type": family, "dtype": dtype, "torch_dtype": dtype,
        "vocab_size": cfg.vocab_size, "tie_word_embeddings": cfg.tie_embeddings,
        "initializer_range": cfg.init.std, "use_cache": True, **ids,
    }  # fmt: skip
    if family == "gpt2":
        return shared | {
            "n_embd": cfg.d_model, "n_layer": len(cfg.specs()), "n_head": mixer.n_heads, "n_positions": cfg.max_len,
            "n_ctx": cfg.max_len, "n_inner": spec.ffn.hidden, "activation_function": "gelu_new",
            "layer_norm_epsilon": spec.norm.eps, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
        }  # fmt: skip
    base = mixer.position.base
    return shared | {
        "hidden_size": cfg.d_model, "num_hidden_layers": len(cfg.specs()), "num_attention_heads": mixer.n_heads,
        "num_key_value_heads": mixer.n_kv_heads or mixer.n_heads, "head_dim": mixer.head_dim or cfg.d_model // mixer.n_heads,
        "intermediate_size": spec.ffn.hidden, "hidden_act": "silu", "max_position_embeddings": cfg.max_len,
        "rms_norm_eps": spec.norm.eps, "attention_bias": mixer.qkv_bias, "attention_dropout": 0.0, "rope_theta": base,
        "rope_parameters": {"rope_type": "default", "rope_theta": base},
    } | ({"mlp_bias": False} if family == "llama" else {"use_sliding_window": False, "sliding_window": None})  # fmt: skip


def from_hf_config(data: dict) -> ModelConfig:
    """The same model as ours; absent keys mean transformers' defaults.

    Raises ValueError naming the setting that is not supported.
    """
    family = data.get("model_type")
    if family not in ARCHITECTURES:
        raise ValueError(f"config.json: model_type {family!r} is not supported; there are: {', '.join(ARCHITECTURES)}")
    if data.get("quantization_config"):
        raise ValueError("config.json: quantization_config: load the unquantised weights")
    try:
        return _from_gpt2(data) if family == "gpt2" else _from_llama(data, family)
    except KeyError as error:
        raise ValueError(f"config.json: key {error} is required for model_type {family!r}") from None


def _refuse(data: dict, allowed: dict[str, tuple]) -> None:
    """Raise unless each key that is present has one of the values we can express."""
    for key, values in allowed.items():
        if key in data and data[key] not in values:
            raise ValueError(
                f"config.json: {key} = {data[key]!r} is not supported (only {' or '.join(map(repr, values))})"
            )


def _from_gpt2(data: dict) -> ModelConfig:
    _refuse(data, {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,), "tie_word_embeddings": (True,), "add_cross_attention": (False,),
    })  # fmt: skip
    d, norm = data["n_embd"], LayerNormConfig(eps=data.get("layer_norm_epsilon", 1e-5))
    mixer = GQAConfig(n_heads=data["n_head"], qkv_bias=True, out_bias=True)
    spec = LayerSpec(mixer=mixer, ffn=MLPConfig(hidden=data.get("n_inner") or 4 * d), norm=norm)
    return ModelConfig(
        vocab_size=data["vocab_size"], d_model=d, max_len=data.get("n_positions", 1024), blocks={"gpt2": spec},
        layers=LayerPattern(pattern=["gpt2"], repeat=data["n_layer"]), position=LearnedConfig(), final_norm=norm, tie_embeddings=True,
    )  # fmt: skip


def _from_llama(data: dict, family: str) -> ModelConfig:
    _refuse(data, {
        "hidden_act": ("silu",), "mlp_bias": (False,), "use_sliding_window": (False,), "rope_scaling": (None, {}),
        "partial_rotary_factor": (None, 1.0), "layer_types": (None, ["full_attention"] * data["num_hidden_layers"]),
    })  # fmt: skip
    if family == "llama":
        _refuse(data, {"sliding_window": (None,)})
    rope = data.get("rope_parameters") or {}
    if set(rope) - {"rope_theta", "rope_type"} or rope.get("rope_type", "default") != "default":
        raise ValueError(
            f"config.json: rope_parameters = {rope}: rotary scaling is not supported (only rope_type 'default')"
        )
    norm, bias = RMSNormConfig(eps=data.get("rms_norm_eps", 1e-6)), data.get("attention_bias", False)
    position = RoPEConfig(base=rope.get("rope_theta", data.get("rope_theta", 10_000.0)))
    heads = data["num_attention_heads"]
    mixer = GQAConfig(
        n_heads=heads, n_kv_heads=data.get("num_key_value_heads") or heads, qkv_bias=bias, out_bias=bias,
        head_dim=data.get("head_dim") or (128 if family == "qwen3" else None),
        qk_norm=family == "qwen3", norm_eps=norm.eps if family == "qwen3" else 1e-6, position=position,
    )  # fmt: skip
    spec = LayerSpec(mixer=mixer, ffn=GLUConfig(hidden=data["intermediate_size"]), norm=norm)
    layers = LayerPattern(pattern=[family], repeat=data["num_hidden_layers"])
    return ModelConfig(
        vocab_size=data["vocab_size"], d_model=data["hidden_size"], max_len=data.get("max_position_embeddings", 2048),
        layers=layers, blocks={family: spec}, final_norm=norm, tie_embeddings=data.get("tie_word_embeddings", False),
    )  # fmt: skip
