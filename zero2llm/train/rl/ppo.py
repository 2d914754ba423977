"""Proximal policy optimisation: a critic says what was to be expected at each token, and the clip keeps updates near.

    r_t = -beta k1_t  (+ R at the last token),      d_t = r_t + gamma V_(t+1) - V_t,      A_t = d_t + gamma lambda A_(t+1)
    L   = mean_t max(-A r, -A clip(r, 1 - c, 1 + c))                                      A whitened over the rollout
          + coefficient * 1/2 mean_t max((V - G)^2, (V_old + clip(V - V_old, -v, v) - G)^2)               G = A + V_old

Source: 1707.06347 eqs. 7, 9; for language models 1909.08593 (KL in the reward, adaptive beta: kl.py) and 2403.17031 (details);
dual clip 1912.09729 eq. 5. Defaults of TRL: c = v = 0.2, coefficient 0.1, beta 0.05, lambda 0.95.
Why: an advantage per token instead of one per answer; four epochs on the same answers are safe.
Here the critic is one more vector, the score head, on the policy's own trunk; the paper shares it too (InstructGPT does not).
V_t is read where token t is predicted, before it is known.
Cost: the score head's pass while sampling; a reference, unless reward_kl is null.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from zero2llm.core.config import config
from zero2llm.train.rl.advantages import at_last, gae, whitened
from zero2llm.train.rl.aggregate import per_token
from zero2llm.train.rl.kl import RewardKL, RewardKLConfig
from zero2llm.train.rl.policy import Also, Played, Sums, Surrogate
from zero2llm.train.rl.ratios import clipped_gain, dual_clipped, token_ratio


@config
class PPOConfig:
    """value_clip, dual : null = off."""

    kind: Literal["ppo"] = "ppo"
    clip: float = 0.2
    dual: float | None = None
    value_clip: float | None = 0.2
    value_weight: float = 0.1
    gamma: float = 1.0
    lam: float = 0.95
    reward_kl: RewardKLConfig | None = RewardKLConfig()

    def __post_init__(self) -> None:
        if not 0 < self.clip < 1 or (self.dual is not None and self.dual <= 1):
            raise ValueError(f"ppo: clip = {self.clip} must lie between 0 and 1, and dual = {self.dual} above 1 or null")
        if self.value_weight <= 0 or (self.value_clip is not None and self.value_clip <= 0):
            raise ValueError(f"ppo: value_weight = {self.value_weight} must be positive, value_clip = {self.value_clip} positive or null")
        if not (0 < self.gamma <= 1 and 0 <= self.lam <= 1):
            raise ValueError(f"ppo: gamma = {self.gamma} must be in (0, 1], lam = {self.lam} in [0, 1]")

    def build(self) -> PPO:
        return PPO(self)


def value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """(B, T) half the squared error, the larger of that of the value and of the value held near the old one."""
    error = (values - returns).square()
    if clip is not None:
        error = torch.maximum(error, (old + (values - old).clamp(-clip, clip) - returns).square())
    return error / 2


class ScoreCritic:
    """The model's score head as the critic."""

    def __init__(self, cfg: PPOConfig, reward_kl: RewardKL | None):
        self.gamma, self.lam, self.clip, self.weight, self.reward_kl = cfg.gamma, cfg.lam, cfg.value_clip, cfg.value_weight, reward_kl

    def estimate(self, played: Played) -> tuple[Tensor, Tensor]:
        """Advantages, not yet whitened, and returns, (B, T)."""
        rewards = at_last(played.reward, played.mask)
        if self.reward_kl is not None:
            rewards = rewards + self.reward_kl(played.old, played.ref, played.mask)
        return gae(rewards, played.values, played.mask, self.gamma, self.lam)

    def returns(self, played: Played) -> Tensor:
        return self.estimate(played)[1]

    def __call__(self, values: Tensor, extra: Mapping[str, Tensor], mask: Tensor) -> tuple[Tensor, Sums]:
        total, n = per_token(value_loss(values, extra["values"], extra["returns"], self.clip), mask)
        return self.weight * total, {"value_loss": (total.detach(), n)}


class PPO:
    aggregate, kl = staticmethod(per_token), None

    def __init__(self, cfg: PPOConfig):
        self.clip, self.dual = cfg.clip, cfg.dual
        reward_kl = cfg.reward_kl.build() if cfg.reward_kl else None
        self.also = Also(samples=1, reward_kl=reward_kl, critic=ScoreCritic(cfg, reward_kl))

    def advantages(self, played: Played) -> Tensor:
        return whitened(self.also.critic.estimate(played)[0], played.mask)

    def surrogate(self, logp: Tensor, old: Tensor, adv: Tensor, mask: Tensor, extra: Mapping[str, Tensor]) -> Surrogate:
        gain, clipped = clipped_gain(token_ratio(logp, old, mask), adv, 1 - self.clip, 1 + self.clip)
        gain, clipped = dual_clipped(gain, clipped, adv, self.dual)
        return Surrogate(*self.aggregate(-gain, mask), clipped)
