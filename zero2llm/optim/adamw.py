"""AdamW: Adam with weight decay applied to the weights, not to the gradient.

    m <- b1 m + (1 - b1) g          v <- b2 v + (1 - b2) g^2
    w <- w (1 - lr * decay) - lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

Source: 1711.05101 algorithm 2; the step size multiplies the decay too. State: 2 values a parameter.
A step is bound by memory: 8 passes over w, g, m and v. On a CPU it goes block by block, so that only the first pass of a
block leaves the cache; every element sees the same operations in the same order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from zero2llm.core.config import config

BLOCK = 2**17  # elements: four tensors of them are 2 MiB in fp32


@config
class AdamWConfig:
    kind: Literal["adamw"] = "adamw"
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        if self.lr <= 0 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"lr = {self.lr} must be positive and betas = {self.betas} in [0, 1)")
        if self.eps <= 0 or self.weight_decay < 0:
            raise ValueError(f"eps = {self.eps} must be positive and weight_decay = {self.weight_decay} not negative")


class AdamW(torch.optim.Optimizer):
    def __init__(self, groups: list[dict], cfg: AdamWConfig):
        super().__init__(groups, {"lr": cfg.lr, "weight_decay": cfg.weight_decay})
        self.betas, self.eps = cfg.betas, cfg.eps

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(params, group["lr"], group["weight_decay"])

    def _update(self, params: list[nn.Parameter], lr: float, decay: float) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p] = {"step": torch.zeros(()), "m": torch.zeros_like(p), "v": torch.zeros_like(p)}
            self.state[p]["step"] += 1
        by_step = defaultdict(list)  # a parameter that got its first gradient late is younger than the rest
        for p in params:
            by_step[float(self.state[p]["step"])].append((p, p.grad, self.state[p]["m"], self.state[p]["v"]))
        for t, rows in by_step.items():
            for block in blocks(rows) if params[0].device.type == "cpu" else [rows]:
                self._update_block(*map(list, zip(*block, strict=True)), lr, decay, t)

    def _update_block(self, p: list[Tensor], g: list[Tensor], m: list[Tensor], v: list[Tensor], lr: float, decay: float,
                      t: float) -> None:  # fmt: skip
        b1, b2 = self.betas
        torch._foreach_lerp_(m, g, 1 - b1)
        torch._foreach_mul_(v, b2)
        torch._foreach_addcmul_(v, g, g, 1 - b2)
        denominator = torch._foreach_sqrt(v)
        torch._foreach_div_(denominator, (1 - b2**t) ** 0.5)
        torch._foreach_add_(denominator, self.eps)
        torch._foreach_mul_(p, 1 - lr * decay)
        torch._foreach_addcdiv_(p, m, denominator, -lr / (1 - b1**t))


def blocks(rows: list[tuple[Tensor, ...]], size: int = BLOCK) -> Iterator[list[tuple[Tensor, ...]]]:
    """The same tensors as views of about ``size`` elements at a time, all of a row (equal shapes) cut alike."""
    batch, n = [], 0
    for row in rows:
        whole = not all(x.is_contiguous() for x in row)
        for piece in [row] if whole else zip(*(x.view(-1).split(size) for x in row), strict=True):
            batch.append(piece)
            n += piece[0].numel()
            if n >= size:
                yield batch
                batch, n = [], 0
    if batch:
        yield batch
