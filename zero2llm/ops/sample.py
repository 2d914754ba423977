"""From logits to a token: penalties, temperature, truncations, and one uniform number per row.

Order: repetition penalty -> temperature -> top-k -> top-p -> min-p -> renormalise -> inverse CDF.
Sources: repetition penalty 1909.05858 section 4.1; top-p 1904.09751; min-p 2407.01082.
"""

from __future__ import annotations

import torch
from torch import Tensor


def repetition_penalty(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Divide positive and multiply negative logits of ``seen`` (B, V) bool tokens by ``penalty`` (B,)."""
    p = penalty[:, None]
    return torch.where(seen, torch.where(logits > 0, logits / p, logits * p), logits)


def truncate(logits: Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """(B, V) logits with everything outside the kept set at -inf; the most likely token is always kept.

    top_k: the k largest (0 = all). top_p: the smallest set of most likely tokens whose probability reaches p.
    min_p: tokens at least min_p times as likely as the likeliest.
    """
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    if top_p < 1.0:
        values, order = logits.sort(-1, descending=True)
        probs = values.softmax(-1)
        drop = probs.cumsum(-1) - probs >= top_p  # mass before this token already suffices
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -torch.inf)
    if min_p > 0.0:
        probs = logits.softmax(-1)
        logits = logits.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), -torch.inf)
    return logits


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """(B,) token ids by inverse CDF from (B, V) logits and (B,) numbers in [0, 1): one number decides one row."""
    cdf = logits.double().softmax(-1).cumsum(-1)
    picked = torch.searchsorted(cdf, (uniform.double() * cdf[:, -1])[:, None], right=True).squeeze(-1)
    return picked.clamp(max=logits.shape[-1] - 1)
