"""What a model costs, from its configuration alone: parameters, FLOPs, decoding state, memory of training.

A multiply-add counts as 2 FLOPs; norms, activations and rotations (under 1 % from D = 512 on) are left out. One small
function per mechanism says what one layer of it costs; a new mechanism adds a function and a line in the tables.
Sources: 6 N per trained token, 2001.08361 section 2.1; attention over the keys that are really seen, not all T.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from zero2llm.layers.ffns.glu import GLUConfig
from zero2llm.layers.ffns.mlp import MLPConfig
from zero2llm.layers.mixers.gqa import GQAConfig
from zero2llm.layers.norms.layer import LayerNormConfig
from zero2llm.layers.norms.rms import RMSNormConfig
from zero2llm.layers.positions.learned import LearnedConfig
from zero2llm.layers.positions.none import NoPositionConfig
from zero2llm.layers.positions.rope import RoPEConfig
from zero2llm.layers.positions.sinusoidal import SinusoidalConfig
from zero2llm.model.spec import LayerSpec, ModelConfig


@dataclass(frozen=True)
class Cost:
    """One layer of one mechanism. Counts of values, not bytes.

    params : parameters.  flops : per token, whatever the context.  flops_per_key : per token and token that it sees.
    window : tokens seen and stored at most, None = all.  state : values kept per stored token while decoding.
    fixed_state : values kept per row whatever its length.  saved : values per token that autograd keeps for backward.
    """

    params: int
    flops: int = 0
    flops_per_key: int = 0
    window: int | None = None
    state: int = 0
    fixed_state: int = 0
    saved: int = 0


def gqa(cfg: GQAConfig, d: int) -> Cost:
    """Saved: the input, q and k around the QK-norm with a scale each, cos and sin, q k v, output, logsumexp."""
    h, g, k = cfg.n_heads, cfg.n_kv_heads or cfg.n_heads, cfg.head_dim or d // cfg.n_heads
    weights = d * k * (2 * h + 2 * g)
    biases = cfg.qkv_bias * k * (h + 2 * g) + cfg.out_bias * d
    normed = 2 * (h + g) * k + h + g if cfg.qk_norm else 0
    saved = d + normed + _of(ROTARY, cfg.position)(k) + 2 * h * k + 2 * g * k + h
    return Cost(weights + biases + cfg.qk_norm * 2 * k, 2 * weights, 4 * h * k, cfg.window, 2 * g * k, saved=saved)


def glu(cfg: GLUConfig, d: int) -> Cost:
    """Saved: the input, gate, act(gate), up and their product."""
    return Cost(3 * d * cfg.hidden, 6 * d * cfg.hidden, saved=d + 4 * cfg.hidden)


def mlp(cfg: MLPConfig, d: int) -> Cost:
    """Saved: the input, up and act(up); relu keeps its result alone."""
    weights = 2 * d * cfg.hidden
    hidden = cfg.hidden if cfg.act == "relu" else 2 * cfg.hidden
    return Cost(weights + cfg.bias * (cfg.hidden + d), 2 * weights, saved=d + hidden)


def rms_norm(cfg: RMSNormConfig, d: int) -> Cost:
    """Saved: the input, its root mean square and their quotient."""
    return Cost(d, saved=2 * d + 1)


def layer_norm(cfg: LayerNormConfig, d: int) -> Cost:
    """Saved: the input, mean and deviation."""
    return Cost(d + cfg.bias * d, saved=d + 2)


MIXERS: dict[type, Callable[[Any, int], Cost]] = {GQAConfig: gqa}
FFNS: dict[type, Callable[[Any, int], Cost]] = {GLUConfig: glu, MLPConfig: mlp}
NORMS: dict[type, Callable[[Any, int], Cost]] = {RMSNormConfig: rms_norm, LayerNormConfig: layer_norm}
ROTARY: dict[type, Callable[[int], int]] = {NoPositionConfig: lambda k: 0, RoPEConfig: lambda k: k}  # cos and sin
ADDED: dict[type, Callable[[ModelConfig], int]] = {
    type(None): lambda cfg: 0,
    LearnedConfig: lambda cfg: cfg.max_len * cfg.d_model,
    SinusoidalConfig: lambda cfg: 0,
}
N_NORMS = {"pre": 2, "post": 2, "sandwich": 4, "parallel": 1}


def _of(table: dict[type, Callable], cfg: Any) -> Callable:
    if type(cfg) not in table:
        raise ValueError(f"no cost is known for {type(cfg).__name__}; add it to model/cost.py")
    return table[type(cfg)]


def layer_costs(spec: LayerSpec, d: int) -> tuple[Cost, Cost, Cost, int]:
    """(mixer, feed-forward, one norm, how many norms) of a block."""
    mixer, ffn = _of(MIXERS, spec.mixer)(spec.mixer, d), _of(FFNS, spec.ffn)(spec.ffn, d)
    return mixer, ffn, _of(NORMS, spec.norm)(spec.norm, d), N_NORMS[spec.wiring]


def parameters(cfg: ModelConfig) -> dict:
    """total, embedding (tokens, learned positions, untied head), non_embedding, by_component. A tied head counts once."""
    d, vocab = cfg.d_model, cfg.vocab_size * cfg.d_model
    layers = [layer_costs(spec, d) for spec in cfg.specs()]
    parts = {
        "embed": vocab,
        "position": _of(ADDED, cfg.position)(cfg),
        "mixer": sum(mixer.params for mixer, _, _, _ in layers),
        "ffn": sum(ffn.params for _, ffn, _, _ in layers),
        "norm": sum(norm.params * n for _, _, norm, n in layers),
        "head": 0 if cfg.tie_embeddings else vocab,
    }
    if cfg.final_norm is not None:
        parts["norm"] += _of(NORMS, cfg.final_norm)(cfg.final_norm, d).params
    total, embedding = sum(parts.values()), parts["embed"] + parts["position"] + parts["head"]
    return {"total": total, "embedding": embedding, "non_embedding": total - embedding, "by_component": parts}


def keys_seen(length: int, window: int | None) -> int:
    """Query-key pairs of one causal row: the sum of min(i, window) for i = 1 .. length."""
    w = length if window is None else min(window, length)
    return w * (w + 1) // 2 + (length - w) * w


def row_flops(cfg: ModelConfig, length: int, *, causal: bool = True) -> int:
    """FLOPs of one forward pass over a row of ``length`` tokens with logits at each. causal=False counts all
    length^2 pairs, as a profiler does that does not look into the mask."""
    return _block_flops(cfg, length, causal) + 2 * cfg.vocab_size * cfg.d_model * length


def _block_flops(cfg: ModelConfig, length: int, causal: bool = True) -> int:
    total = 0
    for mixer, ffn, _, _ in (layer_costs(spec, cfg.d_model) for spec in cfg.specs()):
        pairs = keys_seen(length, mixer.window) if causal else length * length
        total += (mixer.flops + ffn.flops) * length + mixer.flops_per_key * pairs
    return total


def flops_per_token(cfg: ModelConfig, context: int) -> float:
    """Forward FLOPs, averaged over a causal row of ``context`` tokens."""
    return row_flops(cfg, context) / context


def train_flops_per_token(cfg: ModelConfig, context: int, *, recompute: bool = False) -> float:
    """Forward and backward (3 forwards); with recompute, the blocks once more."""
    again = _block_flops(cfg, context) if recompute else 0
    return (3 * row_flops(cfg, context) + again) / context


def decode_flops(cfg: ModelConfig, position: int) -> int:
    """FLOPs of one new token that has ``position`` tokens before it."""
    total = 2 * cfg.vocab_size * cfg.d_model
    for mixer, ffn, _, _ in (layer_costs(spec, cfg.d_model) for spec in cfg.specs()):
        seen = position + 1 if mixer.window is None else min(position + 1, mixer.window)
        total += mixer.flops + ffn.flops + mixer.flops_per_key * seen
    return total


def state_bytes_per_token(cfg: ModelConfig, bytes_per_value: int = 2) -> list[tuple[int, int | None]]:
    """For each layer: bytes that a stored token takes, and how many tokens are stored at most (None = all)."""
    mixers = [layer_costs(spec, cfg.d_model)[0] for spec in cfg.specs()]
    return [(m.state * bytes_per_value, m.window) for m in mixers]


def state_bytes(cfg: ModelConfig, tokens: int, bytes_per_value: int = 2) -> int:
    """Decoding state of one row that may grow to ``tokens`` tokens."""
    fixed = sum(layer_costs(spec, cfg.d_model)[0].fixed_state for spec in cfg.specs()) * bytes_per_value
    return fixed + sum(
        b * (tokens if w is None else min(w, tokens)) for b, w in state_bytes_per_token(cfg, bytes_per_value)
    )


def activation_bytes(
    cfg: ModelConfig,
    batch: int,
    length: int,
    bytes_per_value: int = 4,
    *,
    packed: bool = False,
    recompute: bool = False,
) -> int:
    """What autograd keeps between forward and backward, at one number format (measured on eager torch, CPU).

    Counted: every tensor saved in the blocks and the final norm, the hidden states that the loss reads, the token ids
    (int64), and length^2 values a row for the mask of each layer with a window, or of all when ``packed``.
    Not counted: logits (ops/xent never holds them all), weights, gradients. With recompute: the input of each block,
    plus the inside of the largest.
    """
    d, inside = cfg.d_model, []
    for spec in cfg.specs():
        mixer, ffn, norm, n = layer_costs(spec, d)
        mask = length if packed or mixer.window is not None else 0
        inside.append(mixer.saved + ffn.saved + norm.saved * n - _shared(spec, d) + mask)
    blocks = len(inside) * d + max(inside) if recompute else sum(inside)
    final = d + (_of(NORMS, cfg.final_norm)(cfg.final_norm, d).saved if cfg.final_norm else 0)
    return batch * length * ((blocks + final) * bytes_per_value + 8)


def _shared(spec: LayerSpec, d: int) -> int:
    """Values counted twice: in a parallel block both branches keep the same normalised input."""
    return d if spec.wiring == "parallel" else 0


def optimizer_bytes(cfg: ModelConfig, values_per_parameter: int = 2, bytes_per_value: int = 4) -> int:
    """Optimizer state: 2 values per parameter for AdamW, 1 for Muon or momentum."""
    return parameters(cfg)["total"] * values_per_parameter * bytes_per_value


def summary(cfg: ModelConfig) -> dict:
    """The numbers that a report shows, at a context of max_len. Bytes for fp32 training, a bf16 decoding state."""
    count = parameters(cfg)
    return {
        "layers": len(cfg.specs()), "parameters": count["total"], "embedding_parameters": count["embedding"],
        "non_embedding_parameters": count["non_embedding"], "by_component": count["by_component"],
        "context": cfg.max_len, "forward_flops_per_token": flops_per_token(cfg, cfg.max_len),
        "train_flops_per_token": train_flops_per_token(cfg, cfg.max_len),
        "weight_bytes": 4 * count["total"], "gradient_bytes": 4 * count["total"], "optimizer_bytes": optimizer_bytes(cfg),
        "activation_bytes_per_row": activation_bytes(cfg, 1, cfg.max_len), "state_bytes_per_row": state_bytes(cfg, cfg.max_len),
    }  # fmt: skip
