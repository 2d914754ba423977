"""Learning-rate schedules: a factor in (0, 1] of the peak rate for each optimizer step.

warm-up   (t + 1) / w                                  for t < w: no step is wasted at rate 0
cosine    floor + (1 - floor) (1 + cos(pi u)) / 2      u = (t - w) / (T - w)          1608.03983
wsd       1, then over the last `decay` share linearly (or 1 - sqrt) to floor         2404.06395, 2405.18392
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from zero2llm.core.config import by_kind, config


def check_share(name: str, value: float) -> None:
    """Raises ValueError for a warm-up that would take all steps or more."""
    if not 0 <= value < 1:
        raise ValueError(f"{name} = {value} must be a share of all steps, from 0 to below 1")


def check_floor(floor: float) -> None:
    if not 0 <= floor <= 1:
        raise ValueError(f"floor = {floor} must be a share of the peak, from 0 to 1")


@config
class CosineConfig:
    kind: Literal["cosine"] = "cosine"
    warmup: float = 0.02  # share of all steps
    floor: float = 0.1  # of the peak

    def __post_init__(self) -> None:
        check_share("warmup", self.warmup)
        check_floor(self.floor)

    def factor(self, step: int, steps: int) -> float:
        w = math.ceil(self.warmup * steps)
        if step < w:
            return (step + 1) / w
        u = min((step - w) / max(steps - w, 1), 1.0)
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * u))


@config
class WSDConfig:
    kind: Literal["wsd"] = "wsd"
    warmup: float = 0.02
    decay: float = 0.2  # share of all steps
    shape: Literal["linear", "sqrt"] = "linear"
    floor: float = 0.0

    def __post_init__(self) -> None:
        check_share("warmup", self.warmup)
        check_floor(self.floor)
        if not 0 <= self.decay <= 1 or self.warmup + self.decay > 1:
            raise ValueError(f"warmup = {self.warmup} and decay = {self.decay} must be shares, together at most 1")

    def factor(self, step: int, steps: int) -> float:
        w, d = math.ceil(self.warmup * steps), math.ceil(self.decay * steps)
        if step < w:
            return (step + 1) / w
        if step < steps - d:
            return 1.0
        u = min((step - (steps - d)) / max(d, 1), 1.0)
        fall = 1 - u if self.shape == "linear" else 1 - math.sqrt(u)
        return self.floor + (1 - self.floor) * fall


@config
class ConstantConfig:
    kind: Literal["constant"] = "constant"
    warmup: float = 0.0

    def __post_init__(self) -> None:
        check_share("warmup", self.warmup)

    def factor(self, step: int, steps: int) -> float:
        w = math.ceil(self.warmup * steps)
        return (step + 1) / w if step < w else 1.0


ScheduleConfig = Annotated[CosineConfig | WSDConfig | ConstantConfig, by_kind]
