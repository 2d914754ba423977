"""What a model costs, from its configuration alone: parameters, FLOPs, decoding state, memory of training.

A multiply-add counts as 2 FLOPs; norms, activations and rotations (under 1 % from D = 512 on) are left out. What one
layer of a mechanism costs stands on its page, in its config's ``cost``; here it is added up.
Sources: 6 N per trained token, 2001.08361 section 2.1; attention over the keys that are really seen, not all T.
"""

from __future__ import annotations

from zero2llm.layers.contract import Cost
from zero2llm.model.spec import LayerSpec, ModelConfig

N_NORMS = {"pre": 1, "post": 1, "branch": 1, "deepnorm": 1, "sandwich": 2}  # for each of the two branches


def layer_costs(spec: LayerSpec, d: int) -> tuple[Cost, Cost, Cost, int]:
    """(mixer, feed-forward, one norm, how many norms) of a block."""
    ffn = spec.ffn.cost(d) if spec.ffn else Cost(0, saved=0)
    norms = 1 if spec.wiring == "parallel" else N_NORMS[spec.wiring] * (1 + (spec.ffn is not None))
    return spec.mixer.cost(d), ffn, spec.norm.cost(d), norms


def parameters(cfg: ModelConfig) -> dict:
    """total, active (what one token meets: no prediction beyond the next), embedding (tokens, learned positions, untied head), non_embedding,
    by_component. A tied head counts once."""
    d, vocab = cfg.d_model, cfg.vocab_size * cfg.d_model
    layers = [layer_costs(spec, d) for spec in cfg.specs()]
    parts = {
        "embed": vocab,
        "position": cfg.position.cost(cfg.d_model, cfg.max_len).params if cfg.position else 0,
        "mixer": sum(mixer.params for mixer, _, _, _ in layers),
        "ffn": sum(ffn.params for _, ffn, _, _ in layers),
        "norm": sum(norm.params * n for _, _, norm, n in layers),
        "head": 0 if cfg.tie_embeddings else vocab,
        "mtp": _ahead(cfg)[0],
        "score": (d + 1) * bool(cfg.score_head),
    }
    parts["norm"] += sum(norm.cost(d).params for norm in (cfg.embed_norm, cfg.final_norm) if norm)
    total, embedding = sum(parts.values()), parts["embed"] + parts["position"] + parts["head"]
    idle = parts["mtp"] + sum(ffn.params - ffn.active for _, ffn, _, _ in layers if ffn.active is not None)
    return {
        "total": total, "active": total - idle, "embedding": embedding, "non_embedding": total - embedding,
        "by_component": parts,
    }  # fmt: skip


def _ahead(cfg: ModelConfig, length: int = 1) -> tuple[int, int]:
    """(parameters, forward FLOPs of a row) of multi-token prediction: per depth a join, a block and a product with V."""
    if cfg.mtp is None:
        return 0, 0
    d = cfg.d_model
    mixer, ffn, norm, n = layer_costs(cfg.mtp.block or cfg.specs()[-1], d)
    final = cfg.final_norm.cost(d).params if cfg.final_norm else 0
    params = 2 * d * d + mixer.params + ffn.params + norm.params * (n + 2) + final
    flops = (4 * d * d + mixer.flops + ffn.flops + 2 * cfg.vocab_size * d) * length
    flops += mixer.flops_per_key * keys_seen(length, mixer.window)
    return cfg.mtp.depth * params, cfg.mtp.depth * flops


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
    return (3 * (row_flops(cfg, context) + _ahead(cfg, context)[1]) + again) / context


def decode_flops(cfg: ModelConfig, position: int) -> int:
    """FLOPs of one new token that has ``position`` tokens before it, by the training form's figures, which sum to the
    row's. The step form of a recurrence takes fewer, and so does gathering few keys; MLA's absorbed form takes more."""
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
    parts = [part for spec in cfg.specs() for part in layer_costs(spec, cfg.d_model)[:2]]  # RWKV's two halves have one
    fixed = sum(p.fixed_state + p.block_state * (tokens // p.block) for p in parts) * max(4, bytes_per_value)
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
) -> int | None:
    """What autograd keeps between forward and backward, at one number format (measured on eager torch, CPU); None where
    a mechanism has no model of it.

    Counted: every tensor saved in the blocks and the final norm, the hidden states that the loss reads, the token ids
    (int64), and length^2 values a row for the mask of each layer with a window, or of all when ``packed``.
    Not counted: logits (ops/xent never holds them all), weights, gradients. With recompute: the input of each block,
    plus the inside of the largest.
    """
    d, inside = cfg.d_model, []
    if cfg.mtp is not None:
        return None
    for spec in cfg.specs():
        mixer, ffn, norm, n = layer_costs(spec, d)
        if None in (mixer.saved, ffn.saved, norm.saved):
            return None
        mask = length if packed or mixer.window is not None else 0
        inside.append(mixer.saved + ffn.saved + norm.saved * n - _shared(spec, d) + mask)
    blocks = len(inside) * d + max(inside) if recompute else sum(inside)
    final = d + (cfg.final_norm.cost(d).saved if cfg.final_norm else 0)
    return batch * length * ((blocks + final) * bytes_per_value + 8)


def _shared(spec: LayerSpec, d: int) -> int:
    """Values counted twice: in a parallel block both branches keep the same normalised input."""
    return d if spec.wiring == "parallel" and spec.ffn else 0


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
