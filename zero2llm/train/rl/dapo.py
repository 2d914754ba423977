"""DAPO: GRPO with a higher upper clip, every token weighing the same, and prompts that teach nothing sampled again.

    A_i = (R_i - mean) / (std + eps)                        of prompts with 0 < right answers < samples: others are replaced
    L   = - (1 / sum_i T_i) sum_i sum_t min(r_it A_i, clip(r_it, 1 - low, 1 + high) A_i)             (+ weight * KL)

Source: 2503.14476 eq. 8 (low 0.2, high 0.28, no KL); dynamic sampling: eq. 11, up to `rounds` times in all (gradient.py); its soft
punishment of overlong answers, eq. 13, is the reward `overlong`.
Why: 1 + 0.2 lets a token of probability 0.01 rise to 0.012 only, so nothing new is tried (clip-higher); in long answers each token
of GRPO's mean weighs little, so bad patterns in them stay.
Cost: as GRPO; near the end of learning, when most prompts are flat, up to `rounds` times the sampling.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from zero2llm.core.config import config
from zero2llm.train.rl.advantages import standardised
from zero2llm.train.rl.aggregate import per_token
from zero2llm.train.rl.kl import KLConfig
from zero2llm.train.rl.policy import Also, Played, Surrogate
from zero2llm.train.rl.ratios import clipped_gain, token_ratio


@config
class DAPOConfig:
    kind: Literal["dapo"] = "dapo"
    clip_low: float = 0.2
    clip_high: float = 0.28
    rounds: int = 3
    kl: KLConfig | None = None

    def __post_init__(self) -> None:
        if not 0 < self.clip_low < 1 or self.clip_high <= 0:
            raise ValueError(f"dapo: clip_low = {self.clip_low} must lie between 0 and 1, and clip_high = {self.clip_high} above 0")
        if self.rounds < 1:
            raise ValueError(f"dapo.rounds = {self.rounds} must be at least 1, which samples once and never again")

    def build(self) -> DAPO:
        return DAPO(self)


class DAPO:
    aggregate = staticmethod(per_token)

    def __init__(self, cfg: DAPOConfig):
        self.low, self.high, self.kl, self.also = 1 - cfg.clip_low, 1 + cfg.clip_high, cfg.kl, Also(rounds=cfg.rounds)

    def advantages(self, played: Played) -> Tensor:
        return standardised(played.reward, played.ok, played.samples)[:, None]

    def surrogate(self, logp: Tensor, old: Tensor, adv: Tensor, mask: Tensor, extra: Mapping[str, Tensor]) -> Surrogate:
        gain, clipped = clipped_gain(token_ratio(logp, old, mask), adv, self.low, self.high)
        return Surrogate(*self.aggregate(-gain, mask), clipped)
