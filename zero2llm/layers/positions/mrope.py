"""M-RoPE: rotary positions in three dimensions, so that the patches of a picture know row and column.

    pair m turns by  grid[axis(m)] * base^(-2m / K)          grid = (t, h, w): time, height, width

    sections (a, b, c), a + b + c = K/2: the first a pairs follow t, the next b follow h, the last c follow w;
    interleaved: t h w t h w ..., and t alone once 3 b and 3 c are used up, so that every axis has fast and slow pairs

Source: Qwen2-VL 2409.12191 section 2.1; interleaved as Qwen3-VL (2511.21631). Text has t = h = w = pos, which is RoPE exactly.
`seq.grid` (B, T, 3) gives the ids; None means that all is text. The text behind a picture continues at the largest id
so far + 1, so ids and `seq.pos` (the clock of the cache) part there: the caller keeps the difference while decoding.
No parameters; 3 H K FLOPs per token. Shapes: q (B, T, H, K), k (B, T, G, K), same out.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from zero2llm.core.config import config
from zero2llm.core.seq import Seq
from zero2llm.layers.positions.interpolation import plain
from zero2llm.ops.rotary import angles, rotate_half_split


@config
class MRoPEConfig:
    kind: Literal["mrope"] = "mrope"
    base: float = 1_000_000.0
    sections: tuple[int, int, int] = (16, 24, 24)
    interleaved: bool = False

    def build(self, head_dim: int, n_heads: int = 1) -> MRoPE:
        t, h, w = self.sections
        if min(self.sections) < 0 or 2 * (t + h + w) != head_dim:
            raise ValueError(
                f"mrope sections = {list(self.sections)} must sum to head_dim / 2 = {head_dim / 2:g} pairs"
            )
        axis = axes(self.sections, self.interleaved)
        if (axis.count(1), axis.count(2)) != (h, w):
            raise ValueError(
                f"mrope sections = {list(self.sections)}: interleaved needs 3 h and 3 w within {len(axis)} pairs"
            )
        if self.base <= 1:
            raise ValueError(f"mrope base = {self.base} must be above 1, or the pairs do not turn ever slower")
        return MRoPE(head_dim, self.base, axis)

    def saved(self, head_dim: int) -> int:
        """Cosines and sines per token."""
        return head_dim


class MRoPE(nn.Module):
    def __init__(self, dim: int, base: float, axis: tuple[int, ...]):
        super().__init__()
        self.dim, self.base, self.axis = dim, base, axis

    def forward(self, q: Tensor, k: Tensor, seq: Seq) -> tuple[Tensor, Tensor]:
        cos, sin = seq.once(("mrope", self.base, self.axis), lambda: self.angles(seq))
        return rotate_half_split(q, cos, sin), rotate_half_split(k, cos, sin)

    def angles(self, seq: Seq) -> tuple[Tensor, Tensor]:
        """cos and sin, (B, T, 1, K/2) fp32."""
        freq = plain(self.base, self.dim, seq.pos.device)
        if seq.grid is None:
            return angles(seq.pos, freq)
        theta = seq.grid[..., torch.tensor(self.axis, device=freq.device)].float() * freq  # (B, T, K/2)
        return theta.cos()[:, :, None], theta.sin()[:, :, None]


def axes(sections: tuple[int, int, int], interleaved: bool) -> tuple[int, ...]:
    """For each pair of channels the axis that it follows: 0 = t, 1 = h, 2 = w."""
    t, h, w = sections
    if not interleaved:
        return (0,) * t + (1,) * h + (2,) * w
    turn = lambda m: m % 3 if m < 3 * sections[m % 3] else 0
    return tuple(turn(m) for m in range(t + h + w))
