"""Which tensors of a transformers file are which of ours: rules, each with its exact inverse.

A rule names tensors in full on both sides and says how one side becomes the other; a family page lists its rules. Kinds
of rule that several families need:

same      the same tensor under another name
joined    ours, one below the other, are one of theirs: q, k, v of Phi-3; gate and up
by_head   the same head by head: queries and gate of Qwen3-Next
filters   taps of a depthwise convolution
conv1d    GPT-2's Conv1D stores (in, out): joined, then transposed
rotated   half-split rotary pairs: an interleaved model has the rows of each query and key head reordered,
          theirs[m] = ours[2m], theirs[m + K/2] = ours[2m + 1], q and k norm weights likewise (2104.09864)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = list[Tensor]
WEIGHT, BOTH = (".weight",), (".weight", ".bias")


@dataclass(frozen=True)
class Rule:
    """Tensors of theirs from tensors of ours (pack), and back (unpack)."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    pack: Callable[[Tensors], Tensors] = list
    unpack: Callable[[Tensors], Tensors] = list


def same(theirs: str, ours: str, endings: Sequence[str] = WEIGHT) -> list[Rule]:
    return [Rule((theirs + end,), (ours + end,)) for end in endings]


def joined(theirs: str, ours: Sequence[str], rows: Sequence[int], endings: Sequence[str] = WEIGHT) -> list[Rule]:
    """``rows`` of each of ours."""
    return [
        Rule(
            (theirs + end,), tuple(name + end for name in ours), lambda parts: [torch.cat(parts)],
            lambda whole: [part.contiguous() for part in whole[0].split(list(rows))],
        )
        for end in endings
    ]  # fmt: skip


def by_head(theirs: str, ours: Sequence[str], heads: int, rows: Sequence[int]) -> list[Rule]:
    """As `joined`, but within each of ``heads`` groups of rows: q_0 g_0 q_1 g_1 .. in one matrix."""
    per_head = [n // heads for n in rows]

    def pack(parts: Tensors) -> Tensors:
        return [torch.cat([part.unflatten(0, (heads, -1)) for part in parts], 1).flatten(0, 1)]

    def unpack(whole: Tensors) -> Tensors:
        return [part.flatten(0, 1).contiguous() for part in whole[0].unflatten(0, (heads, -1)).split(per_head, 1)]

    return [Rule((theirs + ".weight",), tuple(name + ".weight" for name in ours), pack, unpack)]


def filters(theirs: str, ours: str) -> Rule:
    """A depthwise convolution: theirs (C, 1, W), ours (C, W)."""
    return Rule((theirs,), (ours,), lambda parts: [parts[0].unsqueeze(1)], lambda parts: [parts[0].squeeze(1)])


def conv1d(theirs: str, ours: Sequence[str]) -> list[Rule]:
    """Ours, of equal size, side by side along the output; biases just join."""
    turn = lambda t: t.t().contiguous() if t.ndim == 2 else t
    return [
        Rule(
            (theirs + end,), tuple(name + end for name in ours), lambda parts: [turn(torch.cat(parts))],
            lambda whole: [part.contiguous() for part in turn(whole[0]).chunk(len(ours))],
        )
        for end in BOTH
    ]  # fmt: skip


def rotated(theirs: str, ours: str, head_dim: int, rotary_dim: int | None = None,
            endings: Sequence[str] = WEIGHT) -> list[Rule]:  # fmt: skip
    """rotary_dim : the first channels of a head, which alone turn; None = all."""
    n = rotary_dim or head_dim
    return [
        Rule(
            (theirs + end,), (ours + end,), lambda parts: [_first(parts[0], head_dim, n, to_half_split)],
            lambda parts: [_first(parts[0], head_dim, n, to_interleaved)],
        )
        for end in endings
    ]  # fmt: skip


def _first(x: Tensor, head_dim: int, n: int, turn: Callable[[Tensor, int], Tensor]) -> Tensor:
    """``turn`` the first ``n`` rows of each head of ``head_dim`` rows."""
    heads = x.unflatten(0, (-1, head_dim))
    first = turn(heads[:, :n].flatten(0, 1), n).unflatten(0, (-1, n))
    return torch.cat((first, heads[:, n:]), 1).flatten(0, 1)


def to_half_split(x: Tensor, head_dim: int) -> Tensor:
    """Rows (H * K, ...) of interleaved pairs (2m, 2m + 1) to pairs (m, m + K/2), head by head."""
    return x.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def to_interleaved(x: Tensor, head_dim: int) -> Tensor:
    """The inverse of `to_half_split`."""
    return x.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)
