"""What a configuration costs, from the numbers alone: parameters, FLOPs, state and activation bytes.

FLOPs count a multiply-add as two and matrix products only (what torch's flop counter sees); norms and activations are
a few per cent on top. Training costs three times the forward pass, four times with recomputation.
"""

from __future__ import annotations

from typing import Any

from zero2llm.layers.ffns.glu import GLUConfig
from zero2llm.layers.ffns.mlp import MLPConfig
from zero2llm.layers.mixers.gqa import GQAConfig
from zero2llm.layers.norms.layer import LayerNormConfig
from zero2llm.model.spec import LayerSpec, ModelConfig


def _shape(mixer: GQAConfig, d: int) -> tuple[int, int, int]:
    """(query heads, key/value heads, head width)."""
    return mixer.n_heads, mixer.n_kv_heads or mixer.n_heads, mixer.head_dim or d // mixer.n_heads


def mixer_parameters(mixer: GQAConfig, d: int) -> int:
    h, g, k = _shape(mixer, d)
    bias = (h + 2 * g) * k * mixer.qkv_bias + d * mixer.out_bias
    return mixer_matrices(mixer, d) + bias + 2 * k * mixer.qk_norm


def mixer_matrices(mixer: GQAConfig, d: int) -> int:
    h, g, k = _shape(mixer, d)
    return d * k * (2 * h + 2 * g)


def ffn_matrices(ffn: GLUConfig | MLPConfig, d: int) -> int:
    return (3 if isinstance(ffn, GLUConfig) else 2) * d * ffn.hidden


def ffn_parameters(ffn: GLUConfig | MLPConfig, d: int) -> int:
    bias = ffn.hidden + d if isinstance(ffn, MLPConfig) and ffn.bias else 0
    return ffn_matrices(ffn, d) + bias


def norm_parameters(norm: Any, d: int) -> int:
    return 2 * d if isinstance(norm, LayerNormConfig) and norm.bias else d


def layer_norms(spec: LayerSpec) -> int:
    """How many norms a block has."""
    return {"pre": 2, "post": 2, "sandwich": 4, "parallel": 1}[spec.wiring]


def parameters(cfg: ModelConfig) -> dict[str, int]:
    """Parameter counts: total, and by component. A tied head is counted with the embedding, once."""
    d, specs = cfg.d_model, cfg.specs()
    parts = {
        "embedding": cfg.vocab_size * d,
        "position": cfg.max_len * d if cfg.position is not None and cfg.position.kind == "learned" else 0,
        "mixers": sum(mixer_parameters(s.mixer, d) for s in specs),
        "feed-forwards": sum(ffn_parameters(s.ffn, d) for s in specs),
        "norms": sum(layer_norms(s) * norm_parameters(s.norm, d) for s in specs)
        + (norm_parameters(cfg.final_norm, d) if cfg.final_norm is not None else 0),
        "head": 0 if cfg.tie_embeddings else cfg.vocab_size * d,
    }
    return {"total": sum(parts.values()), **parts}


def flops(cfg: ModelConfig, batch: int, length: int) -> int:
    """FLOPs of a forward pass with logits over ``batch`` rows of ``length`` tokens, attention computed in full squares."""
    d, tokens, total = cfg.d_model, batch * length, 0
    for spec in cfg.specs():
        h, _, k = _shape(spec.mixer, d)
        total += 2 * tokens * (mixer_matrices(spec.mixer, d) + ffn_matrices(spec.ffn, d))
        total += 4 * tokens * length * h * k
    return total + 2 * tokens * cfg.vocab_size * d


def flops_per_token(cfg: ModelConfig, length: int) -> float:
    """Useful FLOPs of the forward pass per token in a text of ``length``: a token sees half of it on average, or its window."""
    d, total = cfg.d_model, 2.0 * cfg.vocab_size * cfg.d_model
    for spec in cfg.specs():
        h, _, k = _shape(spec.mixer, d)
        total += 2 * (mixer_matrices(spec.mixer, d) + ffn_matrices(spec.ffn, d))
        total += 4 * h * k * average_seen(length, spec.mixer.window)
    return total


def average_seen(length: int, window: int | None) -> float:
    """Keys that a query sees on average, itself included: causal order, at most ``window``."""
    w = min(window or length, length)
    return (w * (w + 1) / 2 + (length - w) * w) / length


def state_bytes(cfg: ModelConfig, tokens: int, value_bytes: int = 4) -> int:
    """Bytes that decoding keeps for one row of ``tokens``."""
    total = 0
    for spec in cfg.specs():
        _, g, k = _shape(spec.mixer, cfg.d_model)
        total += 2 * g * k * min(tokens, spec.mixer.window or tokens) * value_bytes
    return total


def activation_bytes(cfg: ModelConfig, tokens: int, value_bytes: int = 4) -> int:
    """Bytes that autograd keeps for ``tokens`` of a training pass without recomputation (fused attention, chunked loss).

    Per layer and token: the inputs of norms and projections, rotated and unrotated queries and keys, the attention's
    output, and for a feed-forward what its activation needs. Labels, masks and the loss's chunk are left out.
    """
    d, values = cfg.d_model, 0
    for spec in cfg.specs():
        h, g, k = _shape(spec.mixer, d)
        values += 2 * layer_norms(spec) * d  # each norm keeps its input; the projections keep its output
        values += (h + 2 * g) * k + h * k  # attention keeps q, k, v and its output, which o_proj shares
        values += 2 * (h + g) * k * spec.mixer.qk_norm // 1 if spec.mixer.qk_norm else 0
        values += 4 * spec.ffn.hidden if isinstance(spec.ffn, GLUConfig) else 2 * spec.ffn.hidden
    return (values + 2 * d) * tokens * value_bytes


def summary(cfg: ModelConfig, length: int = 256) -> dict[str, Any]:
    """Numbers and a table with a meaning for each, for reports."""
    count = parameters(cfg)
    rows = [
        ("parameters", count["total"], "", "all trainable numbers"),
        (
            "  of which embedding",
            count["embedding"] + count["position"],
            "",
            "one row per vocabulary entry (and per learned position)",
        ),
        (
            "  of which blocks",
            count["mixers"] + count["feed-forwards"] + count["norms"],
            "",
            "attention, feed-forward and norms",
        ),
        ("weights in fp32", 4 * count["total"], "bytes", "size of the checkpoint's model file"),
        ("forward", flops_per_token(cfg, length), "FLOPs/token", f"at {length} tokens of context"),
        ("training", 3 * flops_per_token(cfg, length), "FLOPs/token", "forward and backward"),
        ("decoding state", state_bytes(cfg, 1), "bytes/token", "keys and values remembered per token of context"),
        (
            "activations",
            activation_bytes(cfg, length),
            "bytes/row",
            f"kept for the backward pass of one row of {length} tokens",
        ),
    ]
    return {
        "parameters": count,
        "table": [dict(zip(("name", "value", "unit", "meaning"), row, strict=True)) for row in rows],
    }
