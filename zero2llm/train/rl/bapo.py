"""BAPO: clip bounds that move until good answers push at least a given share of what bad ones push.

    P(high) = sum r A  over tokens with A > 0 and r <= high           N(low) = sum r |A|  over tokens with A < 0 and r >= low
    low, then high go up in small steps from their least until   P >= target N   or both are at their most
    L = - (1 / sum_i T_i) sum_i sum_t min(r_it A_i, clip(r_it, low, high) A_i)                       (+ weight * KL)

Source: 2510.18927, "balanced policy optimization with adaptive clipping"; bounds, target 0.5 and the order are those of the authors'
code, which also has the dual clip 3. Bounds are ratios, not 1 +- eps.
Ours: P and N count only tokens whose gradient the clip lets through. The authors count a clipped bad token as low |A|, and then
raising low can only raise N: their low always runs to its most before high moves.
Why: off-policy, bad answers are the more and the likelier tokens; they push entropy down, and a fixed clip cuts off the good ones.
One search per optimizer step, over the rows of all ranks, not one per micro-batch.
Cost: GRPO's, and one pass without gradient over each step's rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from zero2llm.core.batch import IGNORE, Batch
from zero2llm.core.config import config
from zero2llm.parallel.plan import World
from zero2llm.train.rl.advantages import standardised
from zero2llm.train.rl.aggregate import per_token
from zero2llm.train.rl.kl import KLConfig
from zero2llm.train.rl.policy import NOTE, Also, Played, Surrogate
from zero2llm.train.rl.ratios import clipped_gain, dual_clipped, token_ratio


@config
class BAPOConfig:
    """low, high : (least, most) of each bound.  step : of both.  target : P / N.  dual : null = no dual clip."""

    kind: Literal["bapo"] = "bapo"
    target: float = 0.5
    low: tuple[float, float] = (0.6, 0.9)
    high: tuple[float, float] = (1.2, 3.0)
    step: float = 0.05
    dual: float | None = 3.0
    kl: KLConfig | None = None

    def __post_init__(self) -> None:
        if not 0 < self.low[0] <= self.low[1] <= 1 <= self.high[0] <= self.high[1]:
            raise ValueError(f"bapo: 0 < low[0] <= low[1] <= 1 <= high[0] <= high[1] must hold, not low = {self.low}, high = {self.high}")
        if self.target < 0 or self.step <= 0 or (self.dual is not None and self.dual <= 1):
            raise ValueError(f"bapo: target = {self.target} may not be negative, step = {self.step} must be positive, dual = {self.dual} above 1 or null")

    def build(self) -> BAPO:
        return BAPO(self)


def walk(start: float, end: float, step: float) -> list[float]:
    """start, start + step ... and end."""
    return [*(start + i * step for i in range(int((end - start) / step + 0.999999))), end]


def pushes(ratio: Tensor, adv: Tensor, mask: Tensor, lows: list[float], highs: list[float]) -> Tensor:
    """N at each of ``lows``, then P at each of ``highs``."""
    weight = (ratio * adv.abs() * mask).double()
    negative = [(weight * ((adv < 0) & (ratio >= low))).sum() for low in lows]
    return torch.stack([*negative, *((weight * ((adv > 0) & (ratio <= high))).sum() for high in highs)])


def search(negative: list[float], positive: list[float], target: float) -> tuple[int, int]:
    """Places of the bounds: low moves to its end before high begins to."""
    low = high = 0
    while positive[high] < target * negative[low]:
        if low < len(negative) - 1:
            low += 1
        elif high < len(positive) - 1:
            high += 1
        else:
            break
    return low, high


class BAPO:
    aggregate = staticmethod(per_token)

    def __init__(self, cfg: BAPOConfig):
        self.target, self.dual, self.kl, self.also = cfg.target, cfg.dual, cfg.kl, Also(bounds=self.bounds)
        self.lows, self.highs = walk(*cfg.low, cfg.step), walk(*cfg.high, cfg.step)

    def advantages(self, played: Played) -> Tensor:
        return standardised(played.reward, played.ok, played.samples)[:, None]

    def bounds(self, logp: Tensor, batch: Batch, world: World) -> dict[str, Tensor]:
        mask, adv = batch.labels != IGNORE, batch.extra["adv"]
        found = world.sum(pushes(token_ratio(logp, batch.extra["old"], mask), adv, mask, self.lows, self.highs)).tolist()
        low, high = search(found[: len(self.lows)], found[len(self.lows) :], self.target)
        rows = {"low": torch.full((len(batch),), self.lows[low]), "high": torch.full((len(batch),), self.highs[high])}
        return rows | {NOTE + "bound_low": rows["low"], NOTE + "bound_high": rows["high"]}

    def surrogate(self, logp: Tensor, old: Tensor, adv: Tensor, mask: Tensor, extra: Mapping[str, Tensor]) -> Surrogate:
        low, high = extra["low"][:, None], extra["high"][:, None]
        gain, clipped = clipped_gain(token_ratio(logp, old, mask), adv, low, high)
        gain, clipped = dual_clipped(gain, clipped, adv, self.dual)
        return Surrogate(*self.aggregate(-gain, mask), clipped)
