"""REINFORCE: make what was sampled likelier in proportion to its reward. The ancestor of all of them.

    L = - (1/B) sum_i (R_i - b) sum_t log pi_it                             b = 0, or the mean reward of the rollout

Source: Williams 1992, eq. 4; its gradient is that of E[R], whatever b is, as long as b does not depend on the answer.
Why a baseline: with R in {0, 1} and b = 0 every right answer is pushed up and nothing down; b = mean has less variance.
(The mean holds the answer itself, so its gradient is (1 - 1/B) of the unbiased one; RLOO leaves it out.)
No ratio and no clip: right for the first update after sampling only. With more than one epoch or minibatch it is biased.
Cost: one answer per prompt is enough, and no other model; a reference only with reward_kl.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from zero2llm.core.config import config
from zero2llm.train.rl.advantages import mean_over
from zero2llm.train.rl.aggregate import constant
from zero2llm.train.rl.kl import RewardKLConfig
from zero2llm.train.rl.policy import Also, Played, Surrogate


@config
class REINFORCEConfig:
    kind: Literal["reinforce"] = "reinforce"
    baseline: Literal["none", "mean"] = "mean"
    reward_kl: RewardKLConfig | None = None

    def build(self) -> REINFORCE:
        return REINFORCE(self)


class REINFORCE:
    kl = None

    def __init__(self, cfg: REINFORCEConfig):
        self.baseline = cfg.baseline
        self.also = Also(samples=1, reward_kl=cfg.reward_kl.build() if cfg.reward_kl else None)

    def aggregate(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return constant(x, mask, 1)

    def advantages(self, played: Played) -> Tensor:
        reward = played.reward
        if self.also.reward_kl is not None:
            reward = reward + self.also.reward_kl(played.old, played.ref, played.mask).sum(1)
        baseline = mean_over(reward, played.ok, 0) if self.baseline == "mean" else 0
        return ((reward - baseline) * played.ok)[:, None]

    def surrogate(self, logp: Tensor, old: Tensor, adv: Tensor, mask: Tensor, extra: Mapping[str, Tensor]) -> Surrogate:
        return Surrogate(*self.aggregate(-adv * logp, mask), torch.zeros_like(mask))
