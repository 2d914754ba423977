"""CISPO: the ratio is only a weight, and capped; no token's gradient is ever cut off.

    L = - (1 / sum_i T_i) sum_i sum_t stop(min(r_it, cap)) A_i log pi_it                             (+ weight * KL)

Source: MiniMax-M1 2506.13585 eqs. 4, 5 (no lower bound); cap 4 to 8: ScaleRL 2510.13786. The cap is the ratio itself, not 1 + eps.
Why: PPO's clip drops tokens that have moved, and those are the rare words at which reasoning turns; here they keep a bounded weight.
Cost: as GRPO.
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
from zero2llm.train.rl.ratios import token_ratio


@config
class CISPOConfig:
    kind: Literal["cispo"] = "cispo"
    cap: float = 5.0
    kl: KLConfig | None = None

    def __post_init__(self) -> None:
        if not self.cap >= 1:
            raise ValueError(f"cispo.cap = {self.cap} must be at least 1: it is the largest ratio, not what is added to 1")

    def build(self) -> CISPO:
        return CISPO(self)


class CISPO:
    aggregate, also = staticmethod(per_token), Also()

    def __init__(self, cfg: CISPOConfig):
        self.cap, self.kl = cfg.cap, cfg.kl

    def advantages(self, played: Played) -> Tensor:
        return standardised(played.reward, played.ok, played.samples)[:, None]

    def surrogate(self, logp: Tensor, old: Tensor, adv: Tensor, mask: Tensor, extra: Mapping[str, Tensor]) -> Surrogate:
        ratio = token_ratio(logp, old, mask).detach()
        return Surrogate(*self.aggregate(-ratio.clamp(max=self.cap) * adv * logp, mask), ratio > self.cap)
