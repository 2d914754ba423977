"""Short causal convolution, one filter a channel, that stops at document boundaries; the token shift is its W = 2.

    y_t = sum_(j < W) w_j * x_(t-j)          x_(t-j) = 0 before the document begins

Source: Mamba 2312.00752 section 3.4; token shift RWKV 2305.13048 section 3.1. Costs 2 W D FLOPs per token; the tail that
decoding keeps is (W - 1) D values, however long the text.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zero2llm.ops.marks import Marks


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None, marks: Marks, tail: Tensor | None):
    """x (B, T, D), weight (D, W) with the current token's tap last (as torch and Mamba store it), tail (B, W - 1, D).

    Returns (y (B, T, D), the new tail): the last real tokens of the last document, zeros where it is shorter.
    """
    W = weight.shape[1]
    taps, tail = shifted(x, W, marks, tail)
    weight = weight.to(x.dtype)
    y = sum(tap * weight[:, W - 1 - j] for j, tap in enumerate(taps))
    return y if bias is None else y + bias.to(x.dtype), tail


def token_shift(x: Tensor, marks: Marks, tail: Tensor | None):
    """(x_(t-1) (B, T, D), zeros at a document's first token; new tail (B, 1, D))."""
    taps, tail = shifted(x, 2, marks, tail)
    return taps[1], tail


def shifted(x: Tensor, W: int, marks: Marks, tail: Tensor | None) -> tuple[list[Tensor], Tensor]:
    """[x_t, x_(t-1), ... x_(t-W+1)], each (B, T, D) and cut at document starts, and the new tail (B, W - 1, D)."""
    B, T, D = x.shape
    long = torch.cat((x.new_zeros(B, W - 1, D) if tail is None else tail.to(x.dtype), x), 1)
    if marks.doc is None:
        return [long[:, W - 1 - j : W - 1 - j + T] for j in range(W)], long[:, T:]
    doc = F.pad(marks.doc, (W - 1, 0))  # the tail belongs to document 0, the one that is carried in
    taps = [x]
    for j in range(1, W):
        there = slice(W - 1 - j, W - 1 - j + T)
        taps.append(long[:, there] * (doc[:, there] == marks.doc)[..., None])
    end = torch.full((B, 1), T, device=x.device)
    if marks.real is not None:  # behind the last real token; 0 = none, the tail stays as it is
        end = (marks.real * torch.arange(1, T + 1, device=x.device)).amax(1, keepdim=True)
    index = end + torch.arange(W - 1, device=x.device)  # (B, W - 1) columns of `long`
    same = doc.gather(1, index) == marks.doc[:, -1:]
    return taps, long.gather(1, index[..., None].expand(-1, -1, D)) * same[..., None]
