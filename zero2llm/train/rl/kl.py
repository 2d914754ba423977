"""How far the policy is from a reference, estimated from the tokens that were sampled. l = log pi - log pi_ref.

    k1 = l        k2 = l^2 / 2        k3 = exp(-l) - 1 + l

as a *value*, E[k1] = E[k3] = KL(pi || ref), k3 never negative and of less variance; E[k2] is not the KL.
as a *loss* (its expected gradient):
    k1            0: useless                         k2            grad KL(pi || ref)
    k3            grad KL(ref || pi), the forward    r k1, r k3    grad KL(pi || ref), r = pi / stop(pi)
so k1 belongs into the reward (PPO, RLOO, REINFORCE++), and in a loss k3 needs the ratio, which GRPO's paper leaves out.

Source: Schulman, "Approximating KL divergence" (2020); the gradients: 2512.21852, and enumerated by our tests.
Shapes: (B, T).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from zero2llm.core.config import config
from zero2llm.train.rl.ratios import LARGE

Estimator = Literal["k1", "k2", "k3", "ratio_k3"]


@config
class KLConfig:
    """weight : of the penalty.  estimator : as a loss; ratio_k3 is the unbiased one, k3 that of GRPO's paper."""

    weight: float = 0.04
    estimator: Estimator = "ratio_k3"

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise ValueError(f"kl.weight = {self.weight} must be positive; null = no reference")
        if self.estimator == "k1":
            raise ValueError("kl.estimator: k1 has no gradient as a loss; take ratio_k3, or k2")


def k1(logp: Tensor, ref: Tensor) -> Tensor:
    return logp - ref


def k2(logp: Tensor, ref: Tensor) -> Tensor:
    return (logp - ref).clamp(-LARGE, LARGE).square() / 2


def k3(logp: Tensor, ref: Tensor) -> Tensor:
    away = (ref - logp).clamp(-LARGE, LARGE)
    return torch.expm1(away) - away


def penalty(estimator: Estimator, logp: Tensor, old: Tensor, ref: Tensor) -> Tensor:
    """(B, T) to be added to a loss. ``old`` sampled the tokens: with it the ratio also corrects for being off-policy."""
    if estimator == "ratio_k3":
        return (logp - old).clamp(-LARGE, LARGE).exp() * k3(logp, ref)
    return {"k2": k2, "k3": k3}[estimator](logp, ref)
