"""DoRA: LoRA turns the rows of a weight, and a vector of its own says how long they are.

    V = W + s B A,   y = c (W x + s B A drop(x)) + b,   c_i = m_i / |V_i|          |V_i| length of row i, m = |W_i| at first
    |V_i|^2 = |W_i|^2 + 2 s (W A^T)_i . B_i + s^2 B_i (A A^T) B_i^T               so V is never built

Source: 2402.09353 eq. 5; |V| is a constant for the gradient (section 4.3). Dropout touches the low-rank path alone; peft
also sends the dropped x through W once more, for the term (c - 1) W x.
Why: full fine-tuning changes length and direction of a row independently, LoRA couples them; often better at small r.
Costs beside LoRA: N values to learn, 2 r K N FLOPs per call for |V| (one by one, while decoding, that is r times the
projection: merge first), and y itself saved, which the next operation often holds anyway.
Shapes: x (..., K) -> (..., N).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from zero2llm.adapters.lora import ALL_LINEAR, check_factors, factors
from zero2llm.adapters.lowrank import adapted
from zero2llm.adapters.projection import dense
from zero2llm.core.config import config
from zero2llm.ops.marks import autocast_dtype, full_precision


@config
class DoRAConfig:
    kind: Literal["dora"] = "dora"
    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = (ALL_LINEAR,)
    rank_stabilized: bool = False
    lr_ratio: float = 1.0  # of B and m

    def __post_init__(self) -> None:
        check_factors(self.r, self.alpha, self.dropout, self.targets, self.lr_ratio)

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rank_stabilized else self.r)

    def build(self, weight: Tensor) -> DoRA:
        return DoRA(weight, self)


@torch.no_grad()
def row_lengths(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """(N,) lengths of the rows of W + s B A, in the factors' precision also under autocast."""
    with full_precision(a):
        w = weight.to(a.dtype)
        square = torch.linalg.vector_norm(w, dim=1).square()
        square += 2 * scale * ((w @ a.t()) * b).sum(1) + scale**2 * ((b @ (a @ a.t())) * b).sum(1)
    return square.clamp(min=torch.finfo(square.dtype).tiny).sqrt()  # a row of zeros stays one, and finite


class DoRA(nn.Module):
    def __init__(self, weight: Tensor, cfg: DoRAConfig):
        super().__init__()
        self.cfg, self.scale = cfg, cfg.scale
        self.a, self.b = factors(weight, cfg.r)
        self.m = nn.Parameter(row_lengths(weight, self.a, self.b, cfg.scale))

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        bias, lengths = base.bias, row_lengths(dense(base), self.a, self.b, self.scale)
        dropout = self.cfg.dropout if self.training else 0.0
        plain = autocast_dtype(x) is None and x.dtype == self.a.dtype and isinstance(base, nn.Linear) and not dropout
        if plain and torch.is_grad_enabled():
            weight, fixed = base.weight.detach(), None if bias is None else bias.detach()
            return DoRALinear.apply(x, weight, fixed, self.a, self.b, self.m, lengths, self.scale)
        y = adapted(base, x, self.a, self.b, self.scale, dropout)
        c = (self.m / lengths).to(y.dtype)
        return c * y if bias is None else c * (y - bias) + bias

    def merged(self, weight: Tensor) -> Tensor:
        c = self.m / row_lengths(weight, self.a, self.b, self.scale)
        return (c[:, None] * (weight.to(self.a.dtype) + self.scale * (self.b @ self.a))).to(weight.dtype)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        return self.a, self.b

    def rates(self) -> dict[str, float]:
        return {"a": 1.0, "b": self.cfg.lr_ratio, "m": self.cfg.lr_ratio}


class DoRALinear(torch.autograd.Function):
    """The formula with v = c (W x + h B^T) saved:  dm_i = sum g_i v_i / m_i,  and g c in LoRA's place of g."""

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, m, lengths, scale):
        rows = x.flatten(0, -2)
        h = (rows @ a.t()).mul_(scale)
        c = m / lengths
        v = (rows @ weight.t()).addmm_(h, b.t()).mul_(c)
        ctx.save_for_backward(x, h, v, weight, a, b, m, c)
        ctx.scale = scale
        return (v if bias is None else v + bias).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, h, v, weight, a, b, m, c = ctx.saved_tensors
        g = grad.flatten(0, -2)
        dm = (g * v).sum(0) / torch.where(m == 0, 1, m)
        g = g * c
        gb = (g @ b).mul_(ctx.scale)
        dx = (g @ weight).addmm_(gb, a).view_as(x) if ctx.needs_input_grad[0] else None
        return dx, None, None, gb.t() @ x.flatten(0, -2), g.t() @ h, dm, None, None
