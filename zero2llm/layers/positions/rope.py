"""Rotary position embedding: turn pair m of each query and key by pos * base^(-2m / K).

    score(i, j) = (R_i q) . (R_j k) = q . R_(j-i) k          only the distance counts

Source: 2104.09864 section 3.4.2. `layout` names which channels form a pair: half_split (m, m + K/2), as Hugging Face
stores Llama and Qwen, or interleaved (2m, 2m+1), as the paper and Meta's files do; a permutation of q and k rows
turns one into the other. No parameters; 3 H K FLOPs per token. Shapes: q (B, T, H, K), k (B, T, G, K), same out.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from zero2llm.core.config import config
from zero2llm.core.seq import Seq
from zero2llm.ops.rotary import angles, rotate_half_split, rotate_interleaved


@config
class RoPEConfig:
    kind: Literal["rope"] = "rope"
    base: float = 10_000.0
    layout: Literal["half_split", "interleaved"] = "half_split"

    def build(self, head_dim: int, n_heads: int = 1) -> RoPE:
        if head_dim % 2:
            raise ValueError(f"rope rotates pairs of channels: head_dim = {head_dim} must be even")
        return RoPE(head_dim, self.base, self.layout)


class RoPE(nn.Module):
    def __init__(self, head_dim: int, base: float, layout: str):
        super().__init__()
        self.head_dim, self.base = head_dim, base
        self.rotate = rotate_half_split if layout == "half_split" else rotate_interleaved

    def forward(self, q: Tensor, k: Tensor, seq: Seq) -> tuple[Tensor, Tensor]:
        cos, sin = seq.once(("rope", self.base, self.head_dim), lambda: self.angles(seq))
        return self.rotate(q, cos, sin), self.rotate(k, cos, sin)

    def angles(self, seq: Seq) -> tuple[Tensor, Tensor]:
        channel = torch.arange(0, self.head_dim, 2, device=seq.pos.device, dtype=torch.float32)
        return angles(seq.pos, self.base ** -(channel / self.head_dim))
