"""LoRA: a frozen projection learns through a product of two thin matrices beside it.

    y = W x + b + s B A drop(x),   s = alpha / r              A (r, K) uniform in +-1/sqrt(K),  B (N, r) zero
    rsLoRA   s = alpha / sqrt(r)         what is learnt at a large r no longer shrinks with it
    LoRA+    lr of B = lr_ratio * lr     A and B move at the rates at which their products do

Source: LoRA 2106.09685 section 4.1 (A Kaiming-uniform with a = sqrt 5 as its code has it); rsLoRA 2312.03732 theorem 3.2;
LoRA+ 2402.12354 section 4, lr_ratio 16 there. init gaussian: A normal with deviation 1 / r, peft's other start.
Why: r (K + N) values learn instead of K N, and optimizer and gradient hold only those; merged it costs nothing at all.
At the first step y is the base's own, A's gradient is zero and B's is not.
Shapes: x (..., K) -> (..., N).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from zero2llm.adapters.lowrank import adapted
from zero2llm.core.config import config

ALL_LINEAR = "all-linear"


def check_factors(r: int, alpha: float, dropout: float, targets: tuple[str, ...], lr_ratio: float) -> None:
    """What every adapter of two factors needs. Raises ValueError with the offending value."""
    if r < 1 or not 0 < alpha < math.inf:
        raise ValueError(f"an adapter needs r = {r} at least 1 and alpha = {alpha} positive")
    if not 0 <= dropout < 1 or not 0 < lr_ratio < math.inf:
        raise ValueError(f"dropout = {dropout} must be in [0, 1) and lr_ratio = {lr_ratio} positive")
    if not targets or not all(targets):
        raise ValueError(f"targets = {list(targets)} must name projections, such as q_proj, blocks.3.* or {ALL_LINEAR}")


@config
class LoRAConfig:
    kind: Literal["lora"] = "lora"
    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = (ALL_LINEAR,)  # see targets.py
    rank_stabilized: bool = False  # rsLoRA
    lr_ratio: float = 1.0  # LoRA+
    init: Literal["default", "gaussian"] = "default"

    def __post_init__(self) -> None:
        check_factors(self.r, self.alpha, self.dropout, self.targets, self.lr_ratio)

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rank_stabilized else self.r)

    def build(self, weight: Tensor) -> LoRA:
        """For a projection of this weight (N, K)."""
        return LoRA(weight, self)


def factors(weight: Tensor, r: int) -> tuple[nn.Parameter, nn.Parameter]:
    """A (r, K) and B (N, r) as LoRA begins, in fp32 or wider: a bf16 weight is too coarse to learn in small steps."""
    n, k = weight.shape
    where = {"device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32)}
    a = nn.init.uniform_(torch.empty(r, k, **where), -(k**-0.5), k**-0.5)
    return nn.Parameter(a), nn.Parameter(torch.zeros(n, r, **where))


class LoRA(nn.Module):
    def __init__(self, weight: Tensor, cfg: LoRAConfig):
        super().__init__()
        self.cfg, self.scale = cfg, cfg.scale
        self.a, self.b = factors(weight, cfg.r)
        if cfg.init == "gaussian":
            nn.init.normal_(self.a, std=1 / cfg.r)

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        return adapted(base, x, self.a, self.b, self.scale, self.cfg.dropout if self.training else 0.0)

    def merged(self, weight: Tensor) -> Tensor:
        """(N, K): the weight of one projection that does the same."""
        return (weight.to(self.a.dtype) + self.scale * (self.b @ self.a)).to(weight.dtype)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """A and B of the plain LoRA with this scale that does the same."""
        return self.a, self.b

    def rates(self) -> dict[str, float]:
        """What the learning rate of each parameter is multiplied by."""
        return {"a": 1.0, "b": self.cfg.lr_ratio}
