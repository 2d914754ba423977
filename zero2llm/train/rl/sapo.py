"""SAPO: a soft gate in place of the clip: a token's gradient fades the further its ratio is from 1.

    f(r) = (4 / tau) sigmoid(tau (r - 1)),  f'(1) = 1                       tau_bad where A <= 0, else tau_good
    L    = - (1/B) sum_i (1/T_i) sum_t f(r_it) A_i                                                   (+ weight * KL)

Source: 2511.20347 eqs. 5, 6 (tau 1.0 and 1.05: a bad token's gate closes sooner, for it pushes up many others).
Why: a hard clip is all or nothing; at r = 1 this is GRPO's gradient, and far away nothing.
Cost: as GRPO. f(1) = 2 / tau, so the loss is not that of GRPO even where its gradient is; nothing counts as clipped.
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
from zero2llm.train.rl.ratios import token_ratio


@config
class SAPOConfig:
    kind: Literal["sapo"] = "sapo"
    tau_good: float = 1.0
    tau_bad: float = 1.05
    kl: KLConfig | None = None

    def __post_init__(self) -> None:
        if min(self.tau_good, self.tau_bad) <= 0:
            raise ValueError(f"sapo: tau_good = {self.tau_good} and tau_bad = {self.tau_bad} must be positive")

    def build(self) -> SAPO:
        return SAPO(self)


class SAPO:
    aggregate, also = staticmethod(per_answer), Also()

    def __init__(self, cfg: SAPOConfig):
        self.good, self.bad, self.kl = cfg.tau_good, cfg.tau_bad, cfg.kl

    def advantages(self, played: Played) -> Tensor:
        return standardised(played.reward, played.ok, played.samples)[:, None]

    def surrogate(self, logp: Tensor, old: Tensor, adv: Tensor, mask: Tensor, extra: Mapping[str, Tensor]) -> Surrogate:
        tau = torch.where(adv > 0, torch.full_like(adv, self.good), self.bad)
        gate = 4 / tau * torch.sigmoid(tau * (token_ratio(logp, old, mask) - 1))
        return Surrogate(*self.aggregate(-gate * adv, mask), torch.zeros_like(mask))
