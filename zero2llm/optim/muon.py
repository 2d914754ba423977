"""Muon: momentum whose matrix is replaced by the nearest orthogonal one before the step.

    M <- mu M + (1 - mu) G;   U = (1 - mu) G + mu M            (Nesterov)
    O = newton_schulz(U)      singular values pushed to about 1: every direction learns at the same rate
    W <- W (1 - lr * decay) - lr * 0.2 sqrt(max(rows, cols)) O

Source: K. Jordan 2024 (iteration, coefficients); 2502.16982 eq. 4 (the 0.2 sqrt(max) factor gives AdamW's update
size, so one learning rate serves both). For matrices inside blocks only; embeddings, head, norms and biases take AdamW.
State: 1 value a parameter. FLOPs: 5 iterations of 2 m^2 (2n + m) for an m x n matrix, m <= n, independent of the batch.

torch.optim.Muon always iterates in bf16, which a CPU without native bf16 emulates (steps 2.3 x slower here): this
one iterates in bf16 on CUDA and in fp32 elsewhere.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Literal

import torch
from torch import Tensor

from zero2llm.core.config import config


@config
class MuonConfig:
    kind: Literal["muon"] = "muon"
    lr: float = 3e-3
    momentum: float = 0.95
    weight_decay: float = 0.1
    iterations: int = 5
    betas: tuple[float, float] = (0.9, 0.95)  # of the AdamW that takes everything that is not a hidden matrix
    adamw_lr: float | None = None  # None = lr

    def __post_init__(self) -> None:
        if self.adamw_lr is not None and not self.adamw_lr > 0:
            raise ValueError(f"adamw_lr = {self.adamw_lr} must be positive; null = as lr")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay = {self.weight_decay} must not be negative")
        if self.lr <= 0 or self.iterations < 1 or not 0 <= self.momentum < 1:
            raise ValueError(
                f"lr = {self.lr} must be positive, iterations >= 1 and momentum = {self.momentum} in [0, 1)"
            )


def newton_schulz(x: Tensor, iterations: int = 5) -> Tensor:
    """(N, m, n) matrices with m <= n -> about orthogonal ones (singular values within 0.67 .. 1.13, not exactly 1).

    x <- a x + (b A + c A^2) x with A = x x^T acts on each singular value s as a s + b s^3 + c s^5.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.Optimizer):
    def __init__(self, groups: list[dict], cfg: MuonConfig):
        super().__init__(groups, {"lr": cfg.lr, "weight_decay": cfg.weight_decay})
        self.momentum, self.iterations = cfg.momentum, cfg.iterations

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape = defaultdict(list)  # equal shapes share one batched product
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[tuple(p.shape)].append(p)
            for params in by_shape.values():
                self._update(params, group["lr"], group["weight_decay"])

    def _update(self, params: list[Tensor], lr: float, decay: float) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p] = {"m": torch.zeros_like(p)}
        grads, m = [p.grad for p in params], [self.state[p]["m"] for p in params]
        torch._foreach_lerp_(m, grads, 1 - self.momentum)
        stacked = torch.stack(torch._foreach_lerp(grads, m, self.momentum))
        update = stacked.flatten(0, -3)  # (N, rows, cols); a 3-D parameter is a matrix per expert
        rows, cols = update.shape[1:]
        dtype = torch.bfloat16 if update.device.type == "cuda" else torch.float32
        wide = update.mT if rows > cols else update
        ortho = newton_schulz(wide.to(dtype), self.iterations).to(update.dtype)
        ortho = ortho.mT if rows > cols else ortho
        torch._foreach_mul_(params, 1 - lr * decay)
        torch._foreach_add_(params, list(ortho.view_as(stacked).unbind(0)), alpha=-lr * 0.2 * max(rows, cols) ** 0.5)
