"""What Llama and its descendants share: the keys of config.json, and the names of attention, SwiGLU and norms."""

from __future__ import annotations

from collections.abc import Sequence

from zero2llm.interop.families.rope import rope_keys
from zero2llm.interop.hf_names import BOTH, WEIGHT, Rule, rotated, same
from zero2llm.layers.ffns.glu import GLUConfig
from zero2llm.layers.ffns.moe import MoEConfig
from zero2llm.layers.mixers.gqa import GQAConfig
from zero2llm.layers.positions.rope import RoPEConfig
from zero2llm.model.spec import LayerPattern, LayerSpec, ModelConfig

ACTIVATIONS = {"silu": "silu", "gelu": "gelu_pytorch_tanh"}


def refuse(data: dict, allowed: dict[str, tuple]) -> None:
    """Raise ValueError unless each key that is present has one of the values we can express."""
    for key, values in allowed.items():
        if key in data and data[key] not in values:
            only = " or ".join(map(repr, values))
            raise ValueError(f"config.json: {key} = {data[key]!r} is not supported (only {only})")


def head_dim(cfg: ModelConfig, mixer: GQAConfig) -> int:
    return mixer.head_dim or cfg.d_model // mixer.n_heads


def divides(cfg: ModelConfig) -> None:
    """Some of their configurations insist on it, though they have a head_dim."""
    mixer = cfg.specs()[0].mixer
    if cfg.d_model % mixer.n_heads:
        raise ValueError(f"d_model: {cfg.d_model} that n_heads: {mixer.n_heads} does not divide")


def plain_head_dim(cfg: ModelConfig) -> None:
    """Some have no head_dim of their own."""
    mixer = first(cfg, GQAConfig).mixer
    if head_dim(cfg, mixer) * mixer.n_heads != cfg.d_model:
        raise ValueError(f"mixer.head_dim: {head_dim(cfg, mixer)} (there d_model / n_heads)")


def first(cfg: ModelConfig, kind: type) -> LayerSpec:
    """The first layer whose mixer (or feed-forward) is a ``kind``."""
    for spec in cfg.specs():
        if isinstance(spec.mixer, kind) or isinstance(spec.ffn, kind):
            return spec
    raise ValueError(f"no layer with {kind.__name__.removesuffix('Config').lower()} (it is needed in some)")


def shares(moe: MoEConfig) -> int:
    """How many experts for all tokens, of the width of the others; some cannot be without."""
    if not moe.n_shared:
        raise ValueError(f"ffn.n_shared: {moe.n_shared} (there at least 1)")
    return moe.shared_width // moe.hidden


def write_sizes(cfg: ModelConfig) -> dict:
    """Widths and counts, from the first layer with attention; where others differ, reading back finds out."""
    spec = first(cfg, GQAConfig)
    return {
        "hidden_size": cfg.d_model, "num_hidden_layers": len(cfg.specs()), "num_attention_heads": spec.mixer.n_heads,
        "num_key_value_heads": spec.mixer.n_kv_heads or spec.mixer.n_heads, "head_dim": head_dim(cfg, spec.mixer),
        "max_position_embeddings": cfg.max_len, "rms_norm_eps": spec.norm.eps, "attention_dropout": 0.0,
    }  # fmt: skip


def write_dense(cfg: ModelConfig) -> dict:
    """`write_sizes`, the feed-forward network and one kind of rotation."""
    spec = cfg.specs()[0]
    ffn = {"intermediate_size": spec.ffn.hidden, "hidden_act": ACTIVATIONS.get(spec.ffn.act, spec.ffn.act)}
    return write_sizes(cfg) | ffn | rope_keys(spec.mixer.position)


def read_model(
    data: dict, specs: Sequence[LayerSpec], *, tied: bool = False, length: int = 2048, **more
) -> ModelConfig:
    """tied, length : the family's defaults of tie_word_embeddings and max_position_embeddings."""
    names = list(dict.fromkeys(specs))
    labels = {spec: data["model_type"] + ("" if len(names) == 1 else f"_{i + 1}") for i, spec in enumerate(names)}
    return ModelConfig(**{
        "vocab_size": data["vocab_size"], "d_model": data["hidden_size"],
        "max_len": data.get("max_position_embeddings", length), "layers": layers([labels[spec] for spec in specs]),
        "blocks": {labels[spec]: spec for spec in names}, "final_norm": specs[-1].norm,
        "tie_embeddings": data.get("tie_word_embeddings", tied), **more,
    })  # fmt: skip


def read_layer_types(data: dict, every: int) -> list[str]:
    """layer_types; where absent, each ``every``-th layer is "full_attention"."""
    n = data["num_hidden_layers"]
    plain = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(n)]
    return data.get("layer_types") or plain


def layers(names: list[str]) -> LayerPattern:
    """The shortest pattern that, repeated, is ``names``."""
    for n in range(1, len(names) + 1):
        if len(names) % n == 0 and names[:n] * (len(names) // n) == names:
            return LayerPattern(pattern=names[:n], repeat=len(names) // n)
    raise ValueError("config.json: num_hidden_layers must be at least 1")


def read_heads(data: dict, default_dim: int | None = None) -> dict:
    """n_heads, n_kv_heads, head_dim of a GQAConfig. default_dim : for an absent head_dim; None = d_model / n_heads."""
    heads = data["num_attention_heads"]
    kv = data.get("num_key_value_heads") or heads
    return {"n_heads": heads, "n_kv_heads": kv, "head_dim": data.get("head_dim") or default_dim}


def windows(data: dict, types: Sequence[str]) -> list[int | None]:
    """Window of each layer, from "sliding_attention" and "full_attention"."""
    if unknown := set(types) - {"sliding_attention", "full_attention"}:
        raise ValueError(f"config.json: layer_types {sorted(unknown)} are not supported")
    if len(types) != data["num_hidden_layers"]:
        raise ValueError(f"config.json: {len(types)} layer_types for num_hidden_layers = {data['num_hidden_layers']}")
    return [data.get("sliding_window") if t == "sliding_attention" else None for t in types]


def write_windows(cfg: ModelConfig) -> dict:
    """layer_types and sliding_window of layers that may differ in their window."""
    seen = [spec.mixer.window for spec in cfg.specs()]
    sizes = sorted({w for w in seen if w is not None})
    if len(sizes) > 1:
        raise ValueError(f"mixer.window: {sizes} (there one size for all layers)")
    types = ["full_attention" if w is None else "sliding_attention" for w in seen]
    return {"layer_types": types, "sliding_window": sizes[0] if sizes else None}


def attention_rules(cfg: ModelConfig, mixer: GQAConfig, theirs: str, ours: str) -> list[Rule]:
    """q, k, v, o and the QK-norms; an interleaved model has the rows of q and k reordered."""
    theirs += "self_attn."
    qkv, out = (BOTH if bias else WEIGHT for bias in (mixer.qkv_bias, mixer.out_bias))
    dim, position = head_dim(cfg, mixer), mixer.position
    turns = isinstance(position, RoPEConfig) and position.layout == "interleaved"
    rules = []
    for n in "qk":
        for part, endings in (("proj", qkv), ("norm", WEIGHT)) if mixer.qk_norm else (("proj", qkv),):
            names = f"{theirs}{n}_{part}", f"{ours}{n}_{part}"
            rules += rotated(*names, dim, position.rotary_dim, endings) if turns else same(*names, endings)
    return rules + same(theirs + "v_proj", ours + "v_proj", qkv) + same(theirs + "o_proj", ours + "o_proj", out)


def glu_rules(config: GLUConfig, theirs: str, ours: str) -> list[Rule]:
    return [rule for n in ("gate", "up", "down") for rule in same(f"{theirs}{n}_proj", f"{ours}{n}_proj")]


PRE_NORMS = {"input_layernorm": "mixer_norm", "post_attention_layernorm": "ffn_norm"}


def decoder_rules(cfg: ModelConfig, norms: dict[str, str] | None = None, attention=attention_rules, ffn=glu_rules,
                  final: str = "model.norm") -> list[Rule]:  # fmt: skip
    """The whole model. norms : their name -> ours, in each layer.  attention, ffn : rules of the two branches, from a
    configuration and the prefixes "model.layers.3." (attention) or "model.layers.3.mlp." (ffn), and ours."""
    rules = same("model.embed_tokens", "embed")
    for i, spec in enumerate(cfg.specs()):
        ours, theirs = f"blocks.{i}.", f"model.layers.{i}."
        rules += attention(cfg, spec.mixer, theirs, ours + "mixer.") + ffn(spec.ffn, theirs + "mlp.", ours + "ffn.")
        for other, mine in (norms or PRE_NORMS).items():
            rules += same(theirs + other, ours + mine)
    rules += same(final, "final_norm")
    return rules if cfg.tie_embeddings else rules + same("lm_head", "head")
