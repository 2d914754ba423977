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


@config
class RewardKLConfig:
    """-beta k1 as a part of the reward.

    beta : where it begins.  target : nats per answer to be held by moving beta; null = beta stays.  gain : how fast it moves.
    """

    beta: float = 0.05
    target: float | None = None
    gain: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise ValueError(f"reward_kl.beta = {self.beta} must be positive; reward_kl: null = no reference")
        if not (0 < self.gain < math.inf and (self.target is None or 0 < self.target < math.inf)):
            raise ValueError(f"reward_kl: target = {self.target} and gain = {self.gain} must be positive; target null = beta stays")

    def build(self) -> RewardKL:
        return RewardKL(self)


class RewardKL:
    """beta <- beta (1 + gain clip(KL / target - 1, -0.2, 0.2)) after each rollout (1909.08593 section 2.2, gain 0.1)."""

    def __init__(self, cfg: RewardKLConfig):
        self.beta, self.target, self.gain = cfg.beta, cfg.target, cfg.gain

    def __call__(self, old: Tensor, ref: Tensor, mask: Tensor) -> Tensor:
        """(B, T) rewards."""
        return -self.beta * k1(old, ref) * mask

    def adapt(self, per_answer: float) -> None:
        """``per_answer`` : mean over answers of sum_t k1, in nats."""
        if self.target is not None:
            self.beta *= 1 + self.gain * min(max(per_answer / self.target - 1, -0.2), 0.2)


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
