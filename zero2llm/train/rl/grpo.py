"""Group relative policy optimisation: the other answers to the same prompt are the baseline, and no critic is needed.

    A_i = (R_i - mean) / (std + eps)                                        over the answers to one prompt
    L   = - (1/B) sum_i (1/T_i) sum_t min(r_it A_i, clip(r_it, 1 - c, 1 + c) A_i)   (+ weight * KL)

Source: DeepSeekMath 2402.03300 eq. 3 (c = 0.2, KL weight 0.04 with k3; 2503.20783 and 2503.14476 drop the KL).
Why: PPO's critic is another model of the same size, and on one reward at the end of an answer it knows little more than a mean.
Cost: samples answers per prompt; a reference only with kl.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from zero2llm.core.config import config
from zero2llm.train.rl.advantages import standardised
from zero2llm.train.rl.aggregate import per_answer
from zero2llm.train.rl.kl import KLConfig
from zero2llm.train.rl.policy import Also, Played, Surrogate
from zero2llm.train.rl.ratios import clipped_gain, token_ratio


@config
class GRPOConfig:
    kind: Literal["grpo"] = "grpo"
    clip: float = 0.2
    kl: KLConfig | None = None

    def __post_init__(self) -> None:
        if not 0 < self.clip < 1:
            raise ValueError(f"grpo.clip = {self.clip} must lie between 0 and 1")

    def build(self) -> GRPO:
        return GRPO(self)


class GRPO:
    aggregate, also = staticmethod(per_answer), Also()

    def __init__(self, cfg: GRPOConfig):
        self.clip, self.kl = cfg.clip, cfg.kl

    def advantages(self, played: Played) -> Tensor:
        return standardised(played.reward, played.ok, played.samples)[:, None]

    def surrogate(self, logp: Tensor, old: Tensor, adv: Tensor, mask: Tensor, extra: Mapping[str, Tensor]) -> Surrogate:
        gain, clipped = clipped_gain(token_ratio(logp, old, mask), adv, 1 - self.clip, 1 + self.clip)
        return Surrogate(*self.aggregate(-gain, mask), clipped)
