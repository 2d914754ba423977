"""Causal attention over packed, padded and cached rows: one visibility rule, one fused and one plain form.

A query sees a key when both belong to the same document, the key is not later, and it is fewer than ``window``
tokens back. Layout in this file: q (B, H, T, K), k and v (B, G, S, K) with H a multiple of G heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zero2llm.core.seq import Seq


def visible(seq: Seq, window: int | None = None) -> Tensor | None:
    """(B, 1, T, T) bool, True = may see; None where plain causal order says it all.

    Padding (document 0) sees padding, so that no row of the softmax is empty; nobody else sees it.
    """
    if seq.seg is None and window is None:
        return None
    pos, T = seq.pos, seq.pos.shape[1]
    mask = torch.ones(T, T, dtype=torch.bool, device=pos.device).tril()
    if window is not None:
        mask = mask.triu(1 - window)
    mask = mask.expand(len(pos), T, T)
    if seq.seg is not None:
        mask = mask & (seq.seg[:, :, None] == seq.seg[:, None, :])
    return mask[:, None]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """softmax(q k^T * scale) v with torch's fused kernel. (B, H, T, K), (B, G, S, K), (B, G, S, V) -> (B, H, T, V).

    mask None = plain causal, only for T == S: torch aligns ``is_causal`` to the top left, so a cached query
    would see key 0 alone.
    """
    assert mask is not None or q.shape[2] == k.shape[2], "cached attention needs an explicit mask"
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=grouped)


def attend_plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """The formula itself: the reference twin of `attend`, and the one that can show its weights."""
    weights = attention_weights(q, k, mask, scale)
    return weights @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """(B, H, T, S) attention probabilities. Query head h reads key head h // (H / G)."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    return scores.masked_fill(~mask, -torch.inf).softmax(-1)
