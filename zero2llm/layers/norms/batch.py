"""Batch normalisation, for contrast: each channel by its mean and variance over all tokens of the batch.

    training    y = (x - mean) / sqrt(var + eps) * w + b          mean, var over B T tokens; var the biased one
                running = (1 - m) running + m (mean, var n / (n - 1))         n = B T; the unbiased variance is kept
    eval        y = (x - running mean) / sqrt(running var + eps) * w + b

Source: 1502.03167 algorithms 1 and 2. Why not in a language model: in training a token's output depends on later
tokens, on other documents and on padding, so the model may learn to read the answer from the statistics; decoding has no
batch and uses other numbers than training did; micro-batches and ranks each have their own, so gradient accumulation
is no longer one big batch; recomputed activations count a batch twice. In eval it is a fixed scale and shift, and causal.
Costs 2 D parameters and 2 D running values. Shapes: (..., D) -> (..., D).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from zero2llm.core.config import config
from zero2llm.core.log import log_once
from zero2llm.layers.contract import Cost
from zero2llm.layers.norms.rms import check_eps


@config
class BatchNormConfig:
    kind: Literal["batch"] = "batch"
    eps: float = 1e-5
    momentum: float = 0.1

    def build(self, d_model: int) -> BatchNorm:
        check_eps(self.eps, "eps")
        if not 0 < self.momentum <= 1:
            raise ValueError(f"momentum = {self.momentum} must be above 0 and at most 1")
        return BatchNorm(d_model, self.eps, self.momentum)

    def cost(self, d_model: int) -> Cost:
        """Saved: the centred input and its quotient."""
        return Cost(2 * d_model, saved=2 * d_model)


class BatchNorm(nn.Module):
    whole_rows: ClassVar = True  # its statistics are those of all tokens

    def __init__(self, d_model: int, eps: float, momentum: float):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(d_model))
        self.bias = nn.Parameter(torch.zeros(d_model))
        self.register_buffer("running_mean", torch.zeros(d_model))
        self.register_buffer("running_var", torch.ones(d_model))

    def train(self, mode: bool = True) -> BatchNorm:
        if mode:
            log_once("batch norm leaks while it trains: its loss sees the future, other documents and padding")
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, var = self.measured(wide) if self.training else (self.running_mean, self.running_var)
        return ((wide - mean) * torch.rsqrt(var + self.eps) * self.weight + self.bias).to(x.dtype)

    def measured(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance (D,) of all tokens; the running values move towards them."""
        rows = x.flatten(0, -2)
        if len(rows) < 2:
            raise ValueError("batch normalisation cannot train on a single token: its variance is unknown")
        var, mean = torch.var_mean(rows, 0, correction=0)
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            unbiased = var * len(rows) / (len(rows) - 1)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        return mean, var
