"""PiSSA: LoRA that begins with the principal part of the weight, and so learns where the weight is largest.

    W = U S V^T,   B0 = U_r sqrt(S_r / s),   A0 = sqrt(S_r / s) V_r^T,   A = A0,  B = B0 at first
    y = W x + b + s (B A - B0 A0) x          = (W - s B0 A0) x + b + s B A x, the residual and its principal part

Source: 2404.02948 section 3. There the residual replaces W; here W stays and B0 A0, which never learns, is subtracted,
as one path of rank 2 r. So the base is still the base: it can be switched to, be a reference, and carry other adapters,
and what is saved is a plain LoRA [B, -B0] [A; A0]. With a packed base it is that base's weight which is split (the paper
packs the residual, whose error is smaller).
Why: the gradient reaches A and B at once (neither is zero), along the directions that matter most; converges faster.
With dropout the first steps differ from the base: B A meets the dropped x.
Shapes: x (..., K) -> (..., N).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from zero2llm.adapters.lora import ALL_LINEAR, check_factors
from zero2llm.adapters.lowrank import adapted
from zero2llm.core.config import config


@config
class PiSSAConfig:
    kind: Literal["pissa"] = "pissa"
    r: int = 8
    alpha: float = 8.0  # = r in the paper: s = 1
    dropout: float = 0.0
    targets: tuple[str, ...] = (ALL_LINEAR,)
    rank_stabilized: bool = False
    lr_ratio: float = 1.0

    def __post_init__(self) -> None:
        check_factors(self.r, self.alpha, self.dropout, self.targets, self.lr_ratio)

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rank_stabilized else self.r)

    def build(self, weight: Tensor) -> PiSSA:
        """Raises ValueError for a weight that has fewer than r singular values."""
        if self.r > min(weight.shape):
            raise ValueError(
                f"pissa: r = {self.r}, but a weight {tuple(weight.shape)} has {min(weight.shape)} singular values; "
                "leave it out of targets, or take a smaller r"
            )
        return PiSSA(weight, self)


class PiSSA(nn.Module):
    def __init__(self, weight: Tensor, cfg: PiSSAConfig):
        super().__init__()
        self.cfg, self.scale = cfg, cfg.scale
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        u, s, vh = torch.linalg.svd(wide, full_matrices=False)
        root = (s[: cfg.r] / cfg.scale).sqrt()
        a, b = root[:, None] * vh[: cfg.r], u[:, : cfg.r] * root
        self.a, self.b = nn.Parameter(a.clone()), nn.Parameter(b.clone())
        self.register_buffer("a0", a.contiguous())
        self.register_buffer("b0", b.contiguous())

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """[A; A0] (2 r, K) and [B, -B0] (N, 2 r)."""
        return torch.cat((self.a, self.a0)), torch.cat((self.b, -self.b0), 1)

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        if self.training and self.cfg.dropout:  # the principal part that is subtracted belongs to W, which sees all of x
            y = adapted(base, x, self.a, self.b, self.scale, self.cfg.dropout)
            return y - self.scale * (x.to(self.a0.dtype) @ self.a0.t() @ self.b0.t()).to(y.dtype)
        return adapted(base, x, *self.low_rank(), self.scale)

    def merged(self, weight: Tensor) -> Tensor:
        a, b = self.low_rank()
        return (weight.to(a.dtype) + self.scale * (b @ a)).to(weight.dtype)

    def rates(self) -> dict[str, float]:
        return {"a": 1.0, "b": self.cfg.lr_ratio}
