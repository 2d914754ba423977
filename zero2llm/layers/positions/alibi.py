"""ALiBi: no position vectors; each head lowers a score in proportion to the distance.

    s_ij = q_i . k_j / sqrt(K) - m_h (i - j)          m_h = 2^(-8 (h + 1) / H)

Source: 2108.12409 section 3; for H that is no power of 2, the slopes of the next lower power and every other slope of
the next higher one, as in the authors' code. Why: extrapolates beyond the training length; no parameters, H additions
per token and key. The bias needs the float mask of the fused kernel, (B, H, T, S). Shapes: q, k unchanged.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from zero2llm.core.config import config
from zero2llm.core.seq import Seq


@config
class ALiBiConfig:
    kind: Literal["alibi"] = "alibi"

    def build(self, head_dim: int, n_heads: int) -> ALiBi:
        return ALiBi(n_heads)

    def saved(self, head_dim: int) -> None:
        """Not modelled: the fused kernel keeps the bias, H values per token and key."""
        return None


class ALiBi(nn.Module):
    def __init__(self, n_heads: int):
        super().__init__()
        self.n_heads = n_heads

    def forward(self, q: Tensor, k: Tensor, seq: Seq) -> tuple[Tensor, Tensor]:
        return q, k

    def bias(self, q_pos: Tensor, k_pos: Tensor, seen: Tensor, dtype: torch.dtype) -> Tensor:
        """Positions (B, T) and (B, S), seen (B, 1, T, S) bool -> float mask (B, H, T, S); -inf where not seen."""
        distance = (q_pos[:, :, None] - k_pos[:, None, :])[:, None].to(torch.promote_types(dtype, torch.float32))
        return (-slopes(self.n_heads, distance) * distance).masked_fill(~seen, -torch.inf).to(dtype)


def slopes(n_heads: int, like: Tensor) -> Tensor:
    """(H, 1, 1) in the dtype and on the device of ``like``."""
    power = 2 ** math.floor(math.log2(n_heads))
    found = [2 ** (-8 * (h + 1) / power) for h in range(power)]
    found += [2 ** (-8 * (h + 1) / (2 * power)) for h in range(0, 2 * power, 2)][: n_heads - power]
    return torch.tensor(found, dtype=like.dtype, device=like.device).view(-1, 1, 1)
