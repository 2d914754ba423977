"""Rotary frequencies for texts longer than those seen in training: five ways to slow the clock.

    f_m = base^(-2m / K)                                   turns per 2 pi tokens of pair m; L = length of training
    linear    f_m / s                                      every pair alike: 2306.15595 (position interpolation)
    ntk       (base s^(K/(K-2)))^(-2m / K)                 fastest pair unchanged, slowest divided by exactly s
    yarn      f_m (1 - r) + f_m / s r                      r ramps 0 -> 1 from pairs that turn 32 times in L to those
              cos, sin times 0.1 ln s + 1                  that turn once; scores get the square: 2309.00071 section 3
    llama3    f_m u + f_m / s (1 - u)                      u = (L f_m / 2 pi - low) / (high - low) within [0, 1]
    longrope  f_m / factor_m                               a factor per pair, found by search: 2402.13753
              cos, sin times sqrt(1 + ln(max_len / L) / ln L)

Source: as named; ntk is the public "NTK-aware" note that YaRN's section 3.1 writes down; llama3 is Meta's Llama 3.1
release. Why: linear blurs neighbours, which the fast pairs tell apart; the others slow only what has not turned once
in training. No parameters, no cost per token. The frequencies depend on the configuration alone, never on the row at
hand (dynamic NTK and transformers' LongRoPE switch with it, and make cached keys stale).
Shapes: frequencies (K/2,) fp32, `amplitude` one number.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from torch import Tensor

from zero2llm.core.config import by_kind, config


def plain(base: float, dim: int, device=None) -> Tensor:
    """base^(-2m / dim), (dim/2,) fp32."""
    return base ** -(torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)


def check_factor(factor: float) -> None:
    if factor < 1:
        raise ValueError(f"scaling factor = {factor} must be at least 1: new length / length of training")


@config
class LinearScalingConfig:
    kind: Literal["linear"] = "linear"
    factor: float

    def check(self, dim: int) -> None:
        check_factor(self.factor)

    def frequencies(self, base: float, dim: int, device=None) -> Tensor:
        return plain(base, dim, device) / self.factor

    def amplitude(self) -> float:
        return 1.0


@config
class NTKScalingConfig:
    kind: Literal["ntk"] = "ntk"
    factor: float

    def check(self, dim: int) -> None:
        check_factor(self.factor)
        if dim < 4:
            raise ValueError(f"ntk scaling needs a slow and a fast pair: rotary width {dim} must be at least 4")

    def frequencies(self, base: float, dim: int, device=None) -> Tensor:
        return plain(base * self.factor ** (dim / (dim - 2)), dim, device)

    def amplitude(self) -> float:
        return 1.0


@config
class YaRNConfig:
    """``mscale`` with ``mscale_all_dim`` as DeepSeek: their amplitudes' quotient on cos and sin, and the mixer multiplies all
    its scores by `score_factor`; ``mscale`` alone counts for nothing, as in transformers. ``truncate``: whole pairs at the
    ramp's ends."""

    kind: Literal["yarn"] = "yarn"
    factor: float
    original_max_len: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def check(self, dim: int) -> None:
        check_factor(self.factor)
        if self.original_max_len < 1 or not self.beta_fast > self.beta_slow > 0:
            raise ValueError(
                f"yarn needs original_max_len = {self.original_max_len} >= 1 and "
                f"beta_fast = {self.beta_fast} > beta_slow = {self.beta_slow} > 0"
            )

    def frequencies(self, base: float, dim: int, device=None) -> Tensor:
        freq = plain(base, dim, device)
        low, high = (self.pair_that_turns(n, base, dim) for n in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        pair = torch.arange(dim // 2, device=device, dtype=torch.float32)
        ramp = ((pair - low) / max(high - low, 1e-3)).clamp(0, 1)
        return freq * (1 - ramp) + freq / self.factor * ramp

    def pair_that_turns(self, times: float, base: float, dim: int) -> float:
        """Index m, a fraction, of the pair with that many full turns in the length of training."""
        return dim * math.log(self.original_max_len / (times * 2 * math.pi)) / (2 * math.log(base))

    def grown(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1

    def amplitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self.grown(self.mscale) / self.grown(self.mscale_all_dim)
        return self.grown(1.0)

    def score_factor(self) -> float:
        return self.grown(self.mscale_all_dim or 0.0) ** 2


@config
class Llama3ScalingConfig:
    kind: Literal["llama3"] = "llama3"
    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_len: int = 8192

    def check(self, dim: int) -> None:
        check_factor(self.factor)
        if self.original_max_len < 1 or not self.high_freq_factor > self.low_freq_factor > 0:
            raise ValueError(
                f"llama3 scaling needs original_max_len = {self.original_max_len} >= 1 and high_freq_factor = "
                f"{self.high_freq_factor} > low_freq_factor = {self.low_freq_factor} > 0"
            )

    def frequencies(self, base: float, dim: int, device=None) -> Tensor:
        freq = plain(base, dim, device)
        turns = self.original_max_len * freq / (2 * math.pi)
        keep = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return freq * keep + freq / self.factor * (1 - keep)

    def amplitude(self) -> float:
        return 1.0


@config
class LongRoPEConfig:
    """The long factors when the model is meant for texts (``max_len``) beyond those of training, else the short ones."""

    kind: Literal["longrope"] = "longrope"
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_len: int
    max_len: int
    attention_factor: float | None = None

    def check(self, dim: int) -> None:
        for name in ("short_factor", "long_factor"):
            given = getattr(self, name)
            if len(given) != dim // 2 or min(given) <= 0:
                raise ValueError(f"longrope {name} = {list(given)} must be {dim // 2} positive numbers, one a pair")
        if self.original_max_len < 2 or self.max_len < 1:
            raise ValueError(
                f"longrope needs original_max_len = {self.original_max_len} >= 2 and max_len = {self.max_len} >= 1"
            )

    def frequencies(self, base: float, dim: int, device=None) -> Tensor:
        factor = self.long_factor if self.max_len > self.original_max_len else self.short_factor
        return plain(base, dim, device) / torch.tensor(factor, device=device, dtype=torch.float32)

    def amplitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        grown = max(self.max_len / self.original_max_len, 1.0)
        return math.sqrt(1 + math.log(grown) / math.log(self.original_max_len))


ScalingConfig = Annotated[
    LinearScalingConfig | NTKScalingConfig | YaRNConfig | Llama3ScalingConfig | LongRoPEConfig, by_kind
]
