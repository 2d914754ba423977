"""A frozen projection and a low-rank path beside it, in one operator.

    y  = x W^T + b + h B^T,   h = s x A^T                    W (N, K) and b frozen, A (r, K) and B (N, r) learn
    dx = g W + s (g B) A,   dA = s (g B)^T x,   dB = g^T h   no gradient of W is ever formed

Source: the chain rule on 2106.09685 eq. 3.
Why: written with plain operators the path costs four more passes over (tokens, N) and (tokens, K): times s, plus, and in
the backward pass times s and plus again. Here both sums are the accumulator of a matrix product. Saved per token: x and
the r values of h. FLOPs per token: 2 r (K + N) forward, twice that backward, beside 2 K N each way for W.
Shapes: x (..., K) -> (..., N). BA is never built.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from zero2llm.ops.marks import autocast_dtype


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The formula: what `low_rank_linear` is compared with."""
    return F.linear(x, weight, bias) + scale * F.linear(F.linear(x, a), b)


def low_rank_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """(..., K) -> (..., N). ``weight`` and ``bias`` get no gradient."""
    if (dtype := autocast_dtype(x)) is not None:  # autocast does not look inside an operator of ours
        x, weight, a, b = (t.to(dtype) for t in (x, weight, a, b))
        bias = None if bias is None else bias.to(dtype)
    return LowRankLinear.apply(x, weight.detach(), None if bias is None else bias.detach(), a, b, scale)


class LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scale):
        rows = x.flatten(0, -2)
        h = (rows @ a.t()).mul_(scale)
        y = F.linear(rows, weight, bias).addmm_(h, b.t())
        ctx.save_for_backward(x, h, weight, a, b)
        ctx.scale = scale
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, h, weight, a, b = ctx.saved_tensors
        g = grad.flatten(0, -2)
        gb = (g @ b).mul_(ctx.scale)  # (tokens, r)
        dx = (g @ weight).addmm_(gb, a).view_as(x) if ctx.needs_input_grad[0] else None
        return dx, None, None, gb.t() @ x.flatten(0, -2), g.t() @ h, None


def adapted(base: nn.Module, x: Tensor, a: Tensor, b: Tensor, scale: float, dropout: float = 0.0) -> Tensor:
    """``base(x)`` + scale B A x, where x is dropped out on the low-rank path alone.

    base : a Linear, or one that keeps its weight packed. Factors wider than the model (fp32 beside bf16) work in theirs.
    """
    narrow = autocast_dtype(x) is None and x.dtype != a.dtype
    if torch.is_grad_enabled() and isinstance(base, nn.Linear) and not dropout and not narrow:
        return low_rank_linear(x, base.weight, base.bias, a, b, scale)
    y = base(x)
    z = F.dropout(x.to(a.dtype) if narrow else x, dropout)
    return y + F.linear(scale * F.linear(z, a), b).to(y.dtype)
