"""Which tensor of a transformers file is which of ours: one rule per tensor, each with its exact inverse.

gpt2          Conv1D stores (in, out): transposed; q, k, v are one matrix c_attn
llama, qwen3  half-split rotary pairs: an interleaved model has the rows of each query and key head reordered,
              theirs[m] = ours[2m], theirs[m + K/2] = ours[2m + 1], q and k norm weights likewise (2104.09864)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from zero2llm.layers.positions.rope import RoPEConfig
from zero2llm.model.spec import ModelConfig


@dataclass(frozen=True)
class Rule:
    """One tensor of theirs from one or more of ours (without the `.weight` / `.bias` ending)."""

    theirs: str
    ours: tuple[str, ...]
    pack: Callable[[list[Tensor]], Tensor] = lambda parts: parts[0]
    unpack: Callable[[Tensor], list[Tensor]] = lambda tensor: [tensor]
    bias: bool = False


def transpose(parts: list[Tensor]) -> Tensor:
    """Ours, side by side along the output, as one Conv1D weight (in, out); a bias just joins."""
    joined = torch.cat(parts)
    return joined.t().contiguous() if joined.ndim == 2 else joined


def split_transposed(tensor: Tensor, parts: int) -> list[Tensor]:
    joined = tensor.t() if tensor.ndim == 2 else tensor
    return [part.contiguous() for part in joined.chunk(parts)]


def to_half_split(x: Tensor, head_dim: int) -> Tensor:
    """Rows (H * K, ...) of interleaved pairs (2m, 2m + 1) to pairs (m, m + K/2), head by head."""
    return x.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def to_interleaved(x: Tensor, head_dim: int) -> Tensor:
    """The inverse of `to_half_split`."""
    return x.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def gpt2_rules(cfg: ModelConfig) -> list[Rule]:
    rules = [Rule("transformer.wte", ("embed",)), Rule("transformer.wpe", ("position.table",))]
    for i in range(len(cfg.specs())):
        ours, theirs = f"blocks.{i}.", f"transformer.h.{i}."
        qkv = tuple(f"{ours}mixer.{n}_proj" for n in "qkv")
        rules += [
            Rule(theirs + "ln_1", (ours + "mixer_norm",), bias=True),
            Rule(theirs + "attn.c_attn", qkv, transpose, partial(split_transposed, parts=3), bias=True),
            _conv(theirs + "attn.c_proj", ours + "mixer.o_proj"),
            Rule(theirs + "ln_2", (ours + "ffn_norm",), bias=True),
            _conv(theirs + "mlp.c_fc", ours + "ffn.up_proj"),
            _conv(theirs + "mlp.c_proj", ours + "ffn.down_proj"),
        ]
    return [*rules, Rule("transformer.ln_f", ("final_norm",), bias=True)]


def _conv(theirs: str, ours: str) -> Rule:
    return Rule(theirs, (ours,), transpose, partial(split_transposed, parts=1), bias=True)


def llama_rules(cfg: ModelConfig) -> list[Rule]:
    mixer = cfg.specs()[0].mixer
    head_dim = mixer.head_dim or cfg.d_model // mixer.n_heads
    interleaved = isinstance(mixer.position, RoPEConfig) and mixer.position.layout == "interleaved"
    pack = (lambda parts: to_half_split(parts[0], head_dim)) if interleaved else (lambda parts: parts[0])
    unpack = (lambda x: [to_interleaved(x, head_dim)]) if interleaved else (lambda x: [x])
    rules = [Rule("model.embed_tokens", ("embed",))]
    for i in range(len(cfg.specs())):
        ours, theirs = f"blocks.{i}.", f"model.layers.{i}."
        attn = theirs + "self_attn."
        rules.append(Rule(theirs + "input_layernorm", (ours + "mixer_norm",)))
        for n in "qk":
            rules.append(Rule(f"{attn}{n}_proj", (f"{ours}mixer.{n}_proj",), pack, unpack, mixer.qkv_bias))
            if mixer.qk_norm:
                rules.append(Rule(f"{attn}{n}_norm", (f"{ours}mixer.{n}_norm",), pack, unpack))
        rules.append(Rule(attn + "v_proj", (ours + "mixer.v_proj",), bias=mixer.qkv_bias))
        rules.append(Rule(attn + "o_proj", (ours + "mixer.o_proj",), bias=mixer.out_bias))
        rules.append(Rule(theirs + "post_attention_layernorm", (ours + "ffn_norm",)))
        rules += [Rule(f"{theirs}mlp.{n}_proj", (f"{ours}ffn.{n}_proj",)) for n in ("gate", "up", "down")]
    rules.append(Rule("model.norm", ("final_norm",)))
    return rules if cfg.tie_embeddings else [*rules, Rule("lm_head", ("head",))]


RULES = {"gpt2": gpt2_rules, "llama": llama_rules, "qwen3": llama_rules}


def pairs(rules: list[Rule]) -> list[tuple[str, tuple[str, ...], Rule]]:
    """Every tensor by its full name: (theirs, ours, rule)."""
    out = []
    for rule in rules:
        for ending in (".weight", ".bias") if rule.bias else (".weight",):
            out.append((rule.theirs + ending, tuple(name + ending for name in rule.ours), rule))
    return out
