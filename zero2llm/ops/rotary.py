"""Rotate pairs of channels by an angle that grows with the position (RoFormer, arXiv 2104.09864)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def angles(pos: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of pos * inv_freq, (B, T, 1, K/2) in fp32: half precision loses whole turns at large positions."""
    theta = pos[..., None, None].float() * inv_freq.float()
    return theta.cos(), theta.sin()


def rotate_half_split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (m, m + K/2): Llama in the Hugging Face layout, Qwen, Gemma. x (B, T, H, K)."""
    a, b = x.chunk(2, -1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def rotate_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (2m, 2m + 1): the original paper, Meta's Llama files, GPT-J, DeepSeek. x (B, T, H, K)."""
    a, b = x[..., ::2], x[..., 1::2]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)


def rotate_first(rotate: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``rotate`` as many of the first channels as there are angles for; the others pass. x (B, T, H, K)."""
    width = 2 * cos.shape[-1]
    if width == x.shape[-1]:
        return rotate(x, cos, sin)
    return torch.cat((rotate(x[..., :width], cos, sin), x[..., width:]), -1)
