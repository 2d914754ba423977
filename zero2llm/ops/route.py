"""Tokens to experts and back: sort by expert, one product per expert, un-sort. No token is dropped, none is padded.

    reference   y_t = sum_e w_te f_e(x_t)                     every expert works on every token; w_te = 0: not chosen
    dropless    X = x[order // k],  order = argsort(experts)  the N k choices: all of expert 0, then all of expert 1 ...
                Y_e = f_e(X_e)                                a contiguous slice each: one product per expert
                y_t = sum_k w_tk Y[back][t, k],  back = order^-1

Source: MegaBlocks 2211.15841 section 4, with a sort in place of its sparse blocks.
Why: k / E of the reference's FLOPs. The gradient of either permutation is the other one: both directions read rows and
none adds into them, so no order of summation is left to chance.
The products are a loop over experts: on a CPU as fast as torch's grouped kernel (which knows no double precision), and
an operator of its own, so that torch.compile need not know the sizes. On CUDA in bf16 the grouped kernel takes over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from zero2llm.ops.linear import linear
from zero2llm.ops.marks import autocast_dtype


@dataclass(frozen=True)
class Plan:
    """Where N tokens with k choices each stand once they are sorted by expert.

    order : (N k) int64, the choice in each sorted row; choice c is token c // k's.  back : its inverse.
    groups : (N k) int64, the expert of each sorted row.  sizes : (E) int64, rows of each expert.
    """

    order: Tensor
    back: Tensor
    groups: Tensor
    sizes: Tensor
    k: int

    @staticmethod
    def of(experts: Tensor, n_experts: int) -> Plan:
        """experts (N, k) int64, the choices of each token."""
        groups, order = experts.flatten().sort(stable=True)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return Plan(order, back, groups, load_of(experts, n_experts), experts.shape[1])


def load_of(experts: Tensor, n_experts: int, real: Tensor | None = None) -> Tensor:
    """(E) int64 number of choices (N, k) that fall on each expert; of ``real`` (N) tokens only."""
    one = torch.ones_like(experts) if real is None else real[:, None].expand_as(experts).to(torch.int64)
    return torch.zeros(n_experts, dtype=torch.int64, device=experts.device).scatter_add_(
        0, experts.flatten(), one.flatten()
    )


def spread(x: Tensor, plan: Plan) -> Tensor:
    """x (N, D) -> (N k, D): each token once for each of its choices, sorted by expert."""
    return _Spread.apply(x, plan.order, plan.back, plan.k)


def collect(y: Tensor, weights: Tensor, plan: Plan) -> Tensor:
    """y (N k, D) sorted by expert, weights (N, k) -> (N, D): the weighted sum over each token's choices."""
    return _Collect.apply(y, weights.to(y.dtype), plan.order, plan.back)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, back: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(back.view(-1, k))
        return x.index_select(0, order // k)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (back,) = ctx.saved_tensors
        return F.embedding_bag(back, grad, mode="sum"), None, None, None


class _Collect(torch.autograd.Function):
    """torch's embedding bag is the weighted sum of k rows of a table, without a copy of those rows."""

    @staticmethod
    def forward(ctx, y: Tensor, weights: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(y, weights, order, back)
        return F.embedding_bag(back.view_as(weights), y, mode="sum", per_sample_weights=weights)

    @staticmethod
    def backward(ctx, grad: Tensor):
        y, weights, order, back = ctx.saved_tensors
        rows = grad.index_select(0, order // weights.shape[1])  # (N k, D): what reaches each sorted row
        for_weights = (y * rows).sum(-1).index_select(0, back).view_as(weights)
        return rows.mul_(weights.flatten()[order, None]), for_weights, None, None


def grouped_linear(x: Tensor, weight: Tensor, sizes: Tensor) -> Tensor:
    """x (M, K) sorted by group, sizes (E) rows of each, weight (E, N, K) -> (M, N): row m times its group's W^T."""
    dtype = autocast_dtype(x)  # autocast knows no operators but torch's own
    if dtype is not None:
        x, weight = x.to(dtype), weight.to(dtype)
    if grouped_kernel(x, weight):
        return torch._grouped_mm(x, weight.mT, offs=sizes.cumsum(0, dtype=torch.int32))
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.is_meta:
        return rows_times(x, weight, sizes)
    parts = [linear(x[rows], weight[group]) for group, rows in slices(sizes)]  # decoding: few rows, nothing to keep
    return torch.cat(parts) if parts else x.new_empty(0, weight.shape[1])


def grouped_kernel(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's own grouped product serves: bf16 on CUDA, rows of a multiple of 16 bytes."""
    half = (autocast_dtype(x) or x.dtype) == torch.bfloat16
    return x.device.type == "cuda" and half and weight.shape[1] % 8 == weight.shape[2] % 8 == 0


def grouped_linear_plain(x: Tensor, weight: Tensor, sizes: Tensor) -> Tensor:
    """The same in one line of torch; autograd copies every weight gradient once more."""
    return torch.cat([F.linear(rows, w) for rows, w in zip(x.split(sizes.tolist()), weight.unbind(0), strict=True)])


def slices(sizes: Tensor) -> Iterator[tuple[int, slice]]:
    """(group, its rows) of every group that has any."""
    start = 0
    for group, n in enumerate(sizes.tolist()):
        if n:
            yield group, slice(start, start + n)
        start += n


@torch.library.custom_op("zero2llm::rows_times", mutates_args=())
def rows_times(x: Tensor, weight: Tensor, sizes: Tensor) -> Tensor:
    y = x.new_empty(x.shape[0], weight.shape[1])
    for group, rows in slices(sizes):
        torch.mm(x[rows], weight[group].t(), out=y[rows])
    return y


@torch.library.custom_op("zero2llm::group_products", mutates_args=())
def group_products(a: Tensor, b: Tensor, sizes: Tensor) -> Tensor:
    """a (M, N), b (M, K) -> (E, N, K): a_e^T b_e, the gradient of the weights."""
    out, rows = a.new_empty(sizes.shape[0], a.shape[1], b.shape[1]), sizes.tolist()
    for product, left, right in zip(out, a.split(rows), b.split(rows), strict=True):
        torch.mm(left.t(), right, out=product)  # of no rows: 0
    return out


@rows_times.register_fake
def _(x, weight, sizes):
    return x.new_empty(x.shape[0], weight.shape[1])


@group_products.register_fake
def _(a, b, sizes):
    return a.new_empty(sizes.shape[0], a.shape[1], b.shape[1])


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx, grad: Tensor):
    x, weight, sizes = ctx.saved_tensors
    for_x = rows_times(grad, weight.mT, sizes) if ctx.needs_input_grad[0] else None
    for_weight = group_products(grad, x, sizes) if ctx.needs_input_grad[1] else None
    return for_x, for_weight, None


rows_times.register_autograd(_gradients, setup_context=_save)


def mix_plain(x: Tensor, weights: Tensor, experts: Tensor, each: list[Callable[[Tensor], Tensor]]) -> Tensor:
    """The reference: x (N, D), weights and experts (N, k), each = E functions (N, D) -> (N, D). Returns (N, D)."""
    dense = torch.zeros(len(x), len(each), dtype=weights.dtype, device=x.device).scatter_add(1, experts, weights)
    return sum(dense[:, e, None] * f(x) for e, f in enumerate(each))
