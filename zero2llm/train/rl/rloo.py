"""RLOO: REINFORCE whose baseline is the mean of the other answers to the same prompt.

    R'_i = R_i - beta sum_t k1_it,    A_i = R'_i - mean_(j != i) R'_j
    L    = - (1/B) sum_i min(w_i A_i, clip(w_i, 1 - c, 1 + c) A_i),    w_i = exp(sum_t log r_it)         the whole answer's ratio

Source: 2402.14740 eq. 8 (2 to 4 samples; beta and its KL inside the reward: section 2); ratio and clip for further updates on the
same answers as in TRL (c = 0.2).
Why: an answer is one action, so neither a critic nor a baseline per token is needed; leaving the answer itself out keeps it unbiased.
Cost: samples answers per prompt; a reference, unless reward_kl is null. The whole ratio leaves the clip soon in long answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from zero2llm.core.config import config
from zero2llm.train.rl.advantages import left_out
from zero2llm.train.rl.aggregate import per_answer
from zero2llm.train.rl.kl import RewardKLConfig
from zero2llm.train.rl.policy import Also, Played, Surrogate
from zero2llm.train.rl.ratios import clipped_gain, whole_ratio


@config
class RLOOConfig:
    kind: Literal["rloo"] = "rloo"
    clip: float = 0.2
    reward_kl: RewardKLConfig | None = RewardKLConfig()

    def __post_init__(self) -> None:
        if not 0 < self.clip < 1:
            raise ValueError(f"rloo.clip = {self.clip} must lie between 0 and 1")

    def build(self) -> RLOO:
        return RLOO(self)


class RLOO:
    aggregate, kl = staticmethod(per_answer), None

    def __init__(self, cfg: RLOOConfig):
        self.clip, self.also = cfg.clip, Also(reward_kl=cfg.reward_kl.build() if cfg.reward_kl else None)

    def advantages(self, played: Played) -> Tensor:
        reward = played.reward
        if self.also.reward_kl is not None:
            reward = reward + self.also.reward_kl(played.old, played.ref, played.mask).sum(1)
        return left_out(reward, played.ok, played.samples)[:, None]

    def surrogate(self, logp: Tensor, old: Tensor, adv: Tensor, mask: Tensor, extra: Mapping[str, Tensor]) -> Surrogate:
        gain, clipped = clipped_gain(whole_ratio(logp, old, mask), adv[:, :1], 1 - self.clip, 1 + self.clip)  # (B, 1)
        return Surrogate(*self.aggregate(-gain, mask), clipped)
