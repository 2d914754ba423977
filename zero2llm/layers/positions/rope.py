"""Rotary position embedding: turn pair m of each query and key by pos * base^(-2m / K).

    score(i, j) = (R_i q) . (R_j k) = q . R_(j-i) k          only the distance counts

Source: 2104.09864 section 3.4.2. `layout` names which channels form a pair: half_split (m, m + K/2), as Hugging Face
stores Llama and Qwen, or interleaved (2m, 2m+1), as the paper and Meta's files do; a permutation of q and k rows
turns one into the other. `rotary_dim`: only the first channels turn (GPT-NeoX, Qwen3-Next: a quarter), and K above is
their number; the rest carries no position. `scaling` slows the turns for longer texts (interpolation.py).
No parameters; 3 H K FLOPs per token. Shapes: q (B, T, H, K), k (B, T, G, K), same out.
"""

from __future__ import annotations

from dataclasses import astuple
from typing import Literal

from torch import Tensor, nn

from zero2llm.core.config import config
from zero2llm.core.seq import Seq
from zero2llm.layers.positions.interpolation import ScalingConfig, YaRNConfig, plain
from zero2llm.ops.rotary import angles, rotate_first, rotate_half_split, rotate_interleaved


@config
class RoPEConfig:
    kind: Literal["rope"] = "rope"
    base: float = 10_000.0
    layout: Literal["half_split", "interleaved"] = "half_split"
    rotary_dim: int | None = None  # None = all channels of a head
    scaling: ScalingConfig | None = None

    def build(self, head_dim: int, n_heads: int = 1) -> RoPE:
        dim = head_dim if self.rotary_dim is None else self.rotary_dim
        if self.rotary_dim is not None and not 2 <= dim <= head_dim:
            raise ValueError(f"rotary_dim = {dim} must be between 2 and head_dim = {head_dim}")
        if dim % 2:
            name = "head_dim" if self.rotary_dim is None else "rotary_dim"
            raise ValueError(f"rope rotates pairs of channels: {name} = {dim} must be even")
        if self.base <= 1:
            raise ValueError(f"rope base = {self.base} must be above 1, or the pairs do not turn ever slower")
        if self.scaling is not None:
            self.scaling.check(dim)
        return RoPE(dim, self.base, self.layout, self.scaling)

    def saved(self, head_dim: int) -> int:
        """Cosines and sines per token."""
        return head_dim if self.rotary_dim is None else self.rotary_dim

    @property
    def score_factor(self) -> float:
        """What a mixer multiplies all its scores by; not 1 only for YaRN with ``mscale_all_dim``."""
        return self.scaling.score_factor() if isinstance(self.scaling, YaRNConfig) else 1.0


def check_unscaled(position: object) -> None:
    """For mixers that do not read `score_factor`: raises ValueError where it would be lost."""
    if isinstance(position, RoPEConfig) and position.score_factor != 1:
        raise ValueError(
            f"mscale_all_dim = {position.scaling.mscale_all_dim} multiplies all scores, which only mla does; "
            "leave it out (gqa: give `scale` instead)"
        )


class RoPE(nn.Module):
    def __init__(self, dim: int, base: float, layout: str, scaling: ScalingConfig | None = None):
        super().__init__()
        self.dim, self.base, self.scaling = dim, base, scaling
        self.rotate = rotate_half_split if layout == "half_split" else rotate_interleaved
        self.key = ("rope", base, dim, scaling and astuple(scaling))  # all that the angles depend on, besides pos

    def forward(self, q: Tensor, k: Tensor, seq: Seq) -> tuple[Tensor, Tensor]:
        cos, sin = seq.once(self.key, lambda: self.angles(seq))
        return rotate_first(self.rotate, q, cos, sin), rotate_first(self.rotate, k, cos, sin)

    def angles(self, seq: Seq) -> tuple[Tensor, Tensor]:
        """cos and sin, (B, T, 1, dim/2) fp32."""
        if self.scaling is None:
            return angles(seq.pos, plain(self.base, self.dim, seq.pos.device))
        cos, sin = angles(seq.pos, self.scaling.frequencies(self.base, self.dim, seq.pos.device))
        return cos * self.scaling.amplitude(), sin * self.scaling.amplitude()
