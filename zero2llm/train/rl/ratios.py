"""How much likelier an answer has become since it was sampled: per token, or once for the whole answer.

    token       r_t = pi(y_t) / pi_old(y_t) = exp(l_t)          l_t = log pi(y_t) - log pi_old(y_t)
    mean        s   = exp(mean_t l_t)                           GSPO: the geometric mean of the token ratios
    sum         R   = exp(sum_t l_t)                            RLOO: the ratio of the whole answer's probabilities

Source: PPO 1707.06347 eq. 6; GSPO 2507.18071 eq. 7. At the first update after sampling pi = pi_old: every ratio is 1.
Why the bound: a log ratio of 80 is e^80 in fp32's range, its square is not; beyond +-LARGE a ratio is a constant, as
clipping makes it anyway.
Shapes: logp, old, mask (B, T); mask is 1 on the tokens that the policy sampled.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGE = 20.0


def log_ratio(logp: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    """(B, T) l_t, 0 off the mask."""
    return ((logp - old) * mask).clamp(-LARGE, LARGE)


def token_ratio(logp: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    """(B, T)"""
    return log_ratio(logp, old, mask).exp()


def mean_ratio(logp: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    """(B, 1)"""
    return (log_ratio(logp, old, mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)).exp()


def whole_ratio(logp: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    """(B, 1)"""
    return ((logp - old) * mask).sum(1, keepdim=True).clamp(-LARGE, LARGE).exp()


def clipped_gain(ratio: Tensor, advantage: Tensor, low: float | Tensor, high: float | Tensor) -> tuple[Tensor, Tensor]:
    """min(r A, clip(r, low, high) A): what is gained, and where the clip took the gradient away (bool)."""
    free, bound = ratio * advantage, ratio.clamp(low, high) * advantage
    return torch.minimum(free, bound), (bound < free).detach()


def dual_clipped(gain: Tensor, clipped: Tensor, advantage: Tensor, bound: float | None) -> tuple[Tensor, Tensor]:
    """A gain of ``clipped_gain`` is held above bound * A where A < 0 (1912.09729 eq. 5): a bad token that has become very
    likely pulls no harder than that. None = it is not."""
    if bound is None:
        return gain, clipped
    floor = bound * advantage
    below = (advantage < 0) & (gain < floor)
    return torch.where(below, floor.expand_as(gain), gain), clipped | below.detach()
