"""Causal attention over packed, padded and cached rows: one visibility rule, one fused and one plain form.

A query sees a key when both belong to the same document, the key is not later, and it is fewer than ``window``
tokens back. Layout in this file: q (B, H, T, K), k and v (B, G, S, K) with H a multiple of G heads.

    w_ij = softmax_j( cap(q_i . k_j * scale) + bias_ij )        cap(s) = c tanh(s / c), or s
    with a sink: w_ij = exp(s_ij) / (exp(sink_h) + sum_j exp(s_ij))       what is left goes nowhere
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zero2llm.core.seq import Seq


def visible(seq: Seq, window: int | None = None, explicit: bool = False) -> Tensor | None:
    """(B, 1, T, T) bool, True = may see; None where plain causal order says it all (unless ``explicit``).

    Padding (document 0) sees padding, so that no row of the softmax is empty; nobody else sees it.
    """
    if seq.seg is None and window is None and not explicit:
        return None
    pos, T = seq.pos, seq.pos.shape[1]
    mask = torch.ones(T, T, dtype=torch.bool, device=pos.device).tril()
    if window is not None:
        mask = mask.triu(1 - window)
    mask = mask.expand(len(pos), T, T)
    if seq.seg is not None:
        mask = mask & (seq.seg[:, :, None] == seq.seg[:, None, :])
    return mask[:, None]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """(B, H, T, K), (B, G, S, K), (B, G, S, V) -> (B, H, T, V), with torch's fused kernel.

    mask : bool (True = may see) or float (added to the scores); None = plain causal, only for T == S: torch aligns
    ``is_causal`` to the top left, so a cached query would see key 0 alone. A soft-cap or a sink takes the plain form,
    since the fused one has neither.
    """
    assert mask is not None or q.shape[2] == k.shape[2], "cached attention needs an explicit mask"
    if softcap is not None or sinks is not None:
        return attend_plain(q, k, v, mask, scale, softcap, sinks)
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=grouped)


def attend_plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The formula itself: the reference twin of `attend`, and the one that can show its weights."""
    weights = attention_weights(q, k, mask, scale, softcap, sinks)
    return weights @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)


def attention_weights(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """(B, H, T, S) attention probabilities; ``sinks`` (H,) takes its share of each row. Head h reads key head h // (H / G)."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if sinks is None:
        return scores.softmax(-1)
    sink = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat((sink, scores), -1).softmax(-1)[..., 1:]
