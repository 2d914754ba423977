"""GMPO: the geometric mean of the token ratios, each clipped before it enters, so that no single one rules an answer.

    l'_it = clip(log r_it, -low, high), where that makes the gain smaller
    L     = - (1/B) sum_i A_i exp((1/T_i) sum_t l'_it)                                               (+ weight * KL)

Source: 2507.20673 eq. 4 and algorithm 1 (in logs, per token; one-sided by the sign of A as PPO's min is), section 4: low = high = 0.4.
Why: an arithmetic mean of ratios is moved by its largest; the geometric one is at most that, and allows a wider clip.
Cost: as GRPO. Without the clip it is GSPO without one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from zero2llm.core.config import config
from zero2llm.train.rl.advantages import standardised
from zero2llm.train.rl.aggregate import per_answer
from zero2llm.train.rl.kl import KLConfig
from zero2llm.train.rl.policy import Also, Played, Surrogate
from zero2llm.train.rl.ratios import log_ratio


@config
class GMPOConfig:
    kind: Literal["gmpo"] = "gmpo"
    clip_low: float = 0.4
    clip_high: float = 0.4
    kl: KLConfig | None = None

    def __post_init__(self) -> None:
        if min(self.clip_low, self.clip_high) <= 0:
            raise ValueError(f"gmpo: clip_low = {self.clip_low} and clip_high = {self.clip_high} are of the log ratio and must be positive")

    def build(self) -> GMPO:
        return GMPO(self)


class GMPO:
    aggregate, also = staticmethod(per_answer), Also()

    def __init__(self, cfg: GMPOConfig):
        self.low, self.high, self.kl = cfg.clip_low, cfg.clip_high, cfg.kl

    def advantages(self, played: Played) -> Tensor:
        return standardised(played.reward, played.ok, played.samples)[:, None]

    def surrogate(self, logp: Tensor, old: Tensor, adv: Tensor, mask: Tensor, extra: Mapping[str, Tensor]) -> Surrogate:
        one = adv[:, :1]  # an answer has one advantage
        away = log_ratio(logp, old, mask)
        bound = torch.where(one > 0, away.clamp(max=self.high), away.clamp(min=-self.low))
        clipped = (bound != away).detach() & (one != 0)
        mean = (bound * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)  # (B, 1)
        return Surrogate(*self.aggregate(-mean.exp() * one, mask), clipped)
