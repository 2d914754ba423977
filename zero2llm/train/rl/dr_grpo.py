"""Dr. GRPO, "GRPO done right": the same without the two divisions that bias it.

    A_i = R_i - mean                                                        no / std: hard and easy prompts weigh alike
    L   = - (1/B) sum_i (1/L_max) sum_t min(r_it A_i, clip(r_it, 1 - c, 1 + c) A_i)         no 1/T_i (+ weight * KL)

Source: 2503.20783 section 3.2 (c = 0.2, no KL). L_max is a constant, the longest that an answer may be.
Why: with 1/T_i a wrong answer is punished less per token the longer it is, so wrong answers grow; with / std a prompt that is
nearly solved or hopeless counts most.
Cost: as GRPO. The gradient is smaller by about mean T / L_max, so the learning rate means something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from zero2llm.core.config import config
from zero2llm.train.rl.advantages import centred
from zero2llm.train.rl.aggregate import constant
from zero2llm.train.rl.kl import KLConfig
from zero2llm.train.rl.policy import Also, Played, Surrogate
from zero2llm.train.rl.ratios import clipped_gain, token_ratio


@config
class DrGRPOConfig:
    """length : L_max, usually rollout.max_tokens."""

    kind: Literal["dr_grpo"] = "dr_grpo"
    length: int
    clip: float = 0.2
    kl: KLConfig | None = None

    def __post_init__(self) -> None:
        if not 0 < self.clip < 1 or self.length < 1:
            raise ValueError(f"dr_grpo: clip = {self.clip} must lie between 0 and 1, and length = {self.length} be at least 1")

    def build(self) -> DrGRPO:
        return DrGRPO(self)


class DrGRPO:
    also = Also()

    def __init__(self, cfg: DrGRPOConfig):
        self.clip, self.length, self.kl = cfg.clip, cfg.length, cfg.kl

    def aggregate(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return constant(x, mask, self.length)

    def advantages(self, played: Played) -> Tensor:
        return centred(played.reward, played.ok, played.samples)[:, None]

    def surrogate(self, logp: Tensor, old: Tensor, adv: Tensor, mask: Tensor, extra: Mapping[str, Tensor]) -> Surrogate:
        gain, clipped = clipped_gain(token_ratio(logp, old, mask), adv, 1 - self.clip, 1 + self.clip)
        return Surrogate(*self.aggregate(-gain, mask), clipped)
