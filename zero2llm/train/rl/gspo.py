"""GSPO: one ratio for the whole answer, because the reward is one for the whole answer.

    s_i = exp((1/T_i) sum_t log r_it)                                       the geometric mean of the token ratios
    L   = - (1/B) sum_i min(s_i A_i, clip(s_i, 1 - low, 1 + high) A_i)                               (+ weight * KL)
    token form: s_it = stop(s_i) pi_it / stop(pi_it), which may have an A per token; with one A the same value and gradient

Source: 2507.18071 eqs. 5, 7 (low 3e-4, high 4e-4: a mean of logs moves far less than one token); token form: eqs. 13, 14.
Why: a token's ratio rests on one sample and says nothing about the rest of the answer; in a mixture of experts it also jumps when
the routing changes. The mean is steady.
Cost: as GRPO; the 1/T_i puts long and short answers on one scale.
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
from zero2llm.train.rl.ratios import clipped_gain, mean_ratio


@config
class GSPOConfig:
    kind: Literal["gspo"] = "gspo"
    clip_low: float = 3e-4
    clip_high: float = 4e-4
    form: Literal["sequence", "token"] = "sequence"
    kl: KLConfig | None = None

    def __post_init__(self) -> None:
        if not 0 < self.clip_low < 1 or self.clip_high <= 0:
            raise ValueError(f"gspo: clip_low = {self.clip_low} must lie between 0 and 1, and clip_high = {self.clip_high} above 0")

    def build(self) -> GSPO:
        return GSPO(self)


class GSPO:
    aggregate, also = staticmethod(per_answer), Also()

    def __init__(self, cfg: GSPOConfig):
        self.low, self.high, self.by_token, self.kl = 1 - cfg.clip_low, 1 + cfg.clip_high, cfg.form == "token", cfg.kl

    def advantages(self, played: Played) -> Tensor:
        return standardised(played.reward, played.ok, played.samples)[:, None]

    def surrogate(self, logp: Tensor, old: Tensor, adv: Tensor, mask: Tensor, extra: Mapping[str, Tensor]) -> Surrogate:
        ratio = mean_ratio(logp, old, mask)  # (B, 1)
        if self.by_token:
            ratio = ratio.detach() * (logp - logp.detach()).exp()  # (B, T)
        gain, clipped = clipped_gain(ratio, adv, self.low, self.high)
        return Surrogate(*self.aggregate(-gain, mask), clipped)
