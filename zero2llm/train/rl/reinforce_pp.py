"""REINFORCE++: PPO's clip without a critic; advantages are what follows from a token on, made comparable over the whole rollout.

    r_t = -beta k1_t  (+ R at the last token),    G_t = sum_(s >= t) gamma^(s - t) r_s,    A = (G - mean) / std     over all tokens
    L   = - (1 / sum_i T_i) sum_i sum_t min(r_it A_it, clip(r_it, 1 - c, 1 + c) A_it)

Source: 2501.03262 section 3 (c = 0.2, gamma = 1, beta 0.01 there; k1 in the reward).
Why: a mean over the rollout needs no second answer to a prompt, and does not fit itself to one prompt as a mean over four answers does.
Mean and std are of the tokens of all ranks; a long answer counts in them more than a short one.
Cost: one answer per prompt is enough; a reference, unless reward_kl is null.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from zero2llm.core.config import config
from zero2llm.train.rl.advantages import at_last, returns, whitened
from zero2llm.train.rl.aggregate import per_token
from zero2llm.train.rl.kl import RewardKLConfig
from zero2llm.train.rl.policy import Also, Played, Surrogate
from zero2llm.train.rl.ratios import clipped_gain, token_ratio


@config
class REINFORCEPPConfig:
    kind: Literal["reinforce_pp"] = "reinforce_pp"
    clip: float = 0.2
    gamma: float = 1.0
    reward_kl: RewardKLConfig | None = RewardKLConfig(beta=0.01)

    def __post_init__(self) -> None:
        if not 0 < self.clip < 1 or not 0 < self.gamma <= 1:
            raise ValueError(f"reinforce_pp: clip = {self.clip} must lie between 0 and 1, and gamma = {self.gamma} in (0, 1]")

    def build(self) -> REINFORCEPP:
        return REINFORCEPP(self)


class REINFORCEPP:
    aggregate, kl = staticmethod(per_token), None

    def __init__(self, cfg: REINFORCEPPConfig):
        self.clip, self.gamma = cfg.clip, cfg.gamma
        self.also = Also(samples=1, reward_kl=cfg.reward_kl.build() if cfg.reward_kl else None)

    def advantages(self, played: Played) -> Tensor:
        rewards = at_last(played.reward, played.mask)
        if self.also.reward_kl is not None:
            rewards = rewards + self.also.reward_kl(played.old, played.ref, played.mask)
        return whitened(returns(rewards, played.mask, self.gamma), played.mask)

    def surrogate(self, logp: Tensor, old: Tensor, adv: Tensor, mask: Tensor, extra: Mapping[str, Tensor]) -> Surrogate:
        gain, clipped = clipped_gain(token_ratio(logp, old, mask), adv, 1 - self.clip, 1 + self.clip)
        return Surrogate(*self.aggregate(-gain, mask), clipped)
