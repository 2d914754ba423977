"""Which tensors of a GGUF file are which of transformers': rules, each with its inverse, and how they are applied.

    file  --unpack-->  transformers' names (families/)  --unpack-->  ours            import; packing goes the other way

A rule here has GGUF's names as `theirs` and transformers' as `ours`. Most rename; what is stored otherwise:

PAIRS       rows of q and k of the architectures that turn neighbours (llama, smollm3): half-split -> interleaved
PLUS_ONE    Gemma and Qwen3-Next scale by 1 + w; the file holds 1 + w
DECAY       Mamba's A_log; the file holds A = -exp(A_log)
CONV1D      GPT-2's matrices lie transposed
filters     a depthwise convolution (C, 1, W); the file holds (C, W)
experts     one matrix for each expert; the file holds all of them, (E, out, in)
latent      kv_b_proj of MLA; the file holds W_UK,h transposed (H, r, nope) and W_UV,h (H, v, r), as decoding absorbs them

Source: ggml-org/llama.cpp: conversion/ (what is turned), gguf-py constants.py (names), src/models/ (what is expected).
Why lazily: a tensor is read, turned and handed on when it is asked for; the result of the last rule alone is kept.
PLUS_ONE and DECAY are computed in fp32, and going there and back can change a last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from zero2llm.core.lazy import Lazy
from zero2llm.interop.foreign import some
from zero2llm.interop.hf_names import BOTH, Rule, same, to_half_split, to_interleaved

GLU = ("gate_proj", "up_proj", "down_proj")
STACKED = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
ATTENTION = {f"self_attn.{theirs}": file for theirs, file in {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm",
}.items()}  # fmt: skip
MLP = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
PRE_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


@dataclass(frozen=True)
class Turn:
    """transformers' tensor as the file holds it (pack), and back (unpack)."""

    pack: Callable[[Tensor], Tensor]
    unpack: Callable[[Tensor], Tensor]


PLUS_ONE = Turn(lambda w: w.float() + 1, lambda w: w.float() - 1)
DECAY = Turn(lambda a: -a.double().exp().float(), lambda a: (-a.double()).log().float())
TURNED = lambda t: t.t().contiguous() if t.ndim == 2 else t
CONV1D = Turn(TURNED, TURNED)
FILTERS = Turn(lambda w: w.squeeze(1), lambda w: w.reshape(-1, 1, w.shape[-1]))
FLAT = Turn(lambda w: w.flatten(), lambda w: w.reshape(1, -1))


def pairs(head_dim: int) -> Turn:
    return Turn(lambda w: to_interleaved(w, head_dim), lambda w: to_half_split(w, head_dim))


def renamed(file: str, theirs: str, table: Mapping[str, str], turns: Mapping[str, Turn] | None = None) -> list[Rule]:
    """Weights and biases of ``table`` (transformers' name -> the file's), with both prefixes.

    turns : by the file's name, what happens to the values.
    """
    rules = [rule for t, f in table.items() for rule in same(file + f, theirs + t, BOTH)]
    turns = {file + name + end: turn for name, turn in (turns or {}).items() for end in BOTH}
    return [turned_by(turns[r.theirs[0]], r.theirs[0], r.ours[0]) if r.theirs[0] in turns else r for r in rules]


def turned_by(turn: Turn, file: str, theirs: str) -> Rule:
    return Rule((file,), (theirs,), lambda parts: [turn.pack(parts[0])], lambda parts: [turn.unpack(parts[0])])


def experts(file: str, theirs: str, count: int, names: Iterable[str] = GLU) -> list[Rule]:
    """``theirs`` as in "model.layers.3.mlp.". Files that hold gate and up in one tensor are read too."""
    if not count:
        return []
    rules, each = [], {}
    for stacked, name in zip(STACKED, names, strict=True):
        each[stacked] = tuple(f"{theirs}experts.{e}.{name}.weight" for e in range(count))
        rules.append(Rule((f"{file}{stacked}.weight",), each[stacked], lambda parts: [torch.stack(parts)], _apart))
    both = each["ffn_gate_exps"] + each["ffn_up_exps"]
    pack = lambda parts: [torch.stack([torch.cat(pair) for pair in zip(parts[:count], parts[count:], strict=True)])]
    unpack = lambda whole: [part for half in whole[0].chunk(2, 1) for part in _apart([half])]
    return [*rules, Rule((file + "ffn_gate_up_exps.weight",), both, pack, unpack)]


def _apart(whole: list[Tensor]) -> list[Tensor]:
    return [part.contiguous() for part in whole[0].unbind()]


def latent(file: str, theirs: str, heads: int, nope: int) -> list[Rule]:
    """kv_b_proj; files of before 2025 hold it whole."""

    def pack(parts: list[Tensor]) -> list[Tensor]:
        by_head = parts[0].unflatten(0, (heads, -1))
        return [by_head[:, :nope].transpose(1, 2).contiguous(), by_head[:, nope:].contiguous()]

    def unpack(parts: list[Tensor]) -> list[Tensor]:
        return [torch.cat((parts[0].transpose(1, 2), parts[1]), 1).flatten(0, 1)]

    name = theirs + "self_attn.kv_b_proj.weight"
    split = Rule((file + "attn_k_b.weight", file + "attn_v_b.weight"), (name,), pack, unpack)
    return [split, Rule((file + "attn_kv_b.weight",), (name,))]


def choose(rules: Iterable[Rule], found: Iterable[str], reading: bool, what: str) -> list[Rule]:
    """The rules that apply to tensors of these names: the file's (``reading``), or transformers'.

    Of rules for the same tensors the first is taken. Raises ValueError listing names that no rule knows.
    """
    names, taken, chosen = list(found), set(), []
    known = set(names)
    for rule in rules:
        side = set(rule.theirs if reading else rule.ours)
        if side <= known and not side & taken:
            taken |= side
            chosen.append(rule)
    if left := [name for name in names if name not in taken]:
        raise ValueError(f"{what}: no counterpart for the tensors {some(left)}")
    return chosen


def turned(rules: Iterable[Rule], found: Mapping[str, Lazy], reading: bool) -> dict[str, Lazy]:
    """``found`` under the names of the rules' other side. What the last rule gave stays in memory until the next is asked."""
    last: list = [None, None]
    out = {}
    for rule in rules:
        sources, targets, turn = (rule.theirs, rule.ours, rule.unpack) if reading else (rule.ours, rule.theirs, rule.pack)

        def load(k: int, rule: Rule = rule, sources=sources, turn=turn) -> Tensor:
            if last[0] is not rule:
                last[:] = None, None  # before the next is read
                last[:] = rule, _apply(turn, [found[name].load() for name in sources])
            return last[1][k]

        for k, (name, value) in enumerate(zip(targets, _blank(turn, {n: found[n] for n in sources}, len(targets)), strict=True)):
            out[name] = Lazy(tuple(value.shape), value.dtype, lambda k=k, load=load: load(k))
    return out


def _blank(turn: Callable, sources: Mapping[str, Lazy], count: int) -> list[Tensor]:
    """Shapes and dtypes of what a rule gives. Raises ValueError if its sources are not of the shapes that it takes apart."""
    try:
        blank = _apply(turn, [torch.empty(t.shape, dtype=t.dtype, device="meta") for t in sources.values()])
        fits = len(blank) == count
    except (RuntimeError, IndexError, ValueError):
        fits = False
    if not fits:
        shapes = ", ".join(f"{name} {t.shape}" for name, t in sources.items())
        raise ValueError(f"tensors do not fit the heads, groups or experts of the metadata: {shapes}")
    return blank


def _apply(turn: Callable, parts: list[Tensor]) -> list[Tensor]:
    dtype = reduce(torch.promote_types, [part.dtype for part in parts])
    return list(turn([part.to(dtype) for part in parts]))
