"""Which experts a token goes to, how much each counts, and what keeps their load even.

    chosen = top-k of s + b                s (N, E) scores, b the choice bias: it decides, but weighs nothing
    w      = s[chosen]                     w / sum w with renormalise; then times the scaling
    groups   the experts stand in groups (machines): only those groups with the best sums of their two best s + b count

    balance loss  E sum_e f_e P_e          f_e share of choices, P_e mean of s_e / sum s: 1 when even, at worst E / k
    z-loss        mean (log sum_e exp z_e)^2          keeps the logits z small, where fp32 and bf16 agree
    choice bias   b_e <- b_e + rate * sign(mean load - load_e)     once per optimizer step: balance without a loss

Source: softmax and top-k 2401.04088 (Mixtral) section 2.1; balance loss 2101.03961 (Switch) eq. 4-6, divided by k so
that even means 1 for every k; z-loss 2202.08906 eq. 5; choice bias 2408.15664 algorithm 1; sigmoid scores and groups
2412.19437 (DeepSeek-V3) section 2.1.2. Losses are means over the real tokens of all rows of one forward pass.
Shapes: N tokens, E experts, k choices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zero2llm.core.seq import Aux


def choose(scores: Tensor, bias: Tensor | None, k: int, n_groups: int = 1, top_groups: int = 1) -> Tensor:
    """scores (N, E), bias (E) -> (N, k) int64, the best first. No gradient."""
    choice = scores.detach() if bias is None else scores.detach() + bias.detach()
    if n_groups > 1:
        grouped = choice.unflatten(1, (n_groups, -1))  # (N, groups, E / groups)
        best = grouped.topk(2, -1).values.sum(-1).topk(top_groups, -1).indices
        closed = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(1, best, False)
        choice = grouped.masked_fill(closed[..., None], float("-inf")).flatten(1)
    return choice.topk(k, -1).indices


def weigh(scores: Tensor, experts: Tensor, renormalise: bool, scaling: float) -> Tensor:
    """(N, k) how much each chosen expert counts."""
    weights = scores.gather(1, experts)
    if renormalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)  # k sigmoids may all be 0
    return weights * scaling


def balance_loss(scores: Tensor, load: Tensor, real: Tensor | None) -> Tensor:
    """scores (N, E), load (E) choices of the real (N) tokens. The gradient goes through P alone: f is a count."""
    share = scores / scores.sum(-1, keepdim=True)
    f = load / load.sum().clamp(min=1)
    return scores.shape[1] * (f * mean_over(share, real)).sum()


def z_loss(logits: Tensor, real: Tensor | None) -> Tensor:
    return mean_over(logits.logsumexp(-1).square(), real)


def mean_over(values: Tensor, real: Tensor | None) -> Tensor:
    """Mean of (N, ...) over the tokens that are ``real`` (N) bool; None = all."""
    if real is None:
        return values.mean(0)
    real = real.to(values.dtype)
    return (values * real.view(-1, *[1] * (values.ndim - 1))).sum(0) / real.sum().clamp(min=1)


def load_statistics(load: Tensor) -> Aux:
    """moe_peak_load: the fullest expert's load over the mean.  moe_idle: share of experts that no token chose."""
    return {"moe_peak_load": load.max() / load.mean().clamp(min=1e-9), "moe_idle": (load == 0).to(load.dtype).mean()}


class CountLoad(torch.autograd.Function):
    """Weights (N, k) unchanged; the bias (E) receives as its gradient E load_e - sum load, whatever the loss is.

    Gradients add up over micro-batches and ranks, so this is the load of the global batch, in exact integers (up to
    2^24). `optim.sign` takes a step against its sign. A loss of value 0 would do the same, were it not weighed by
    each micro-batch's number of targets.
    """

    @staticmethod
    def forward(ctx, weights: Tensor, bias: Tensor, load: Tensor) -> Tensor:
        ctx.save_for_backward(load)
        ctx.dtype = bias.dtype
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (load,) = ctx.saved_tensors
        return grad, (len(load) * load - load.sum()).to(ctx.dtype), None
