"""Cross-entropy from hidden states, in chunks: the (tokens, vocabulary) logits never stand in memory at once.

    loss = sum_i  logsumexp(z_i) - z_i[y_i],  z_i = cap(W h_i)         over the positions with y_i != IGNORE
    cap(z) = c tanh(z / c) with a soft-cap c (Gemma 2), else z

Source: the idea of Liger (arXiv 2410.10989): the gradient of the chunk's logits, softmax - onehot, is known as soon
as the chunk is, so `cross_entropy_sum` makes both gradients in the forward pass and keeps only those. `token_logps`
gives one value per token (preference and RL objectives weigh them later) and, where there are many, recomputes chunks in the
backward pass. Memory: chunk * V floats instead of tokens * V. FLOPs: the same three products as the direct form (four for
`token_logps` where it recomputes), over the positions that have a label.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from zero2llm.core.batch import IGNORE
from zero2llm.ops.marks import autocast_dtype

CHUNK = 1024  # tokens; at V = 4,096 a chunk's fp32 logits are 16 MB
KEPT = 2**24  # logits that `token_logps` keeps for the backward pass, 64 MiB, in place of working them out again
SPARSE = 0.9  # share of positions with a label below which the others are left out of the product


def cap(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def cross_entropy_sum(
    hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None = None, chunk: int = CHUNK
) -> Tensor:
    """Summed loss in nats, a scalar in fp32.

    hidden (..., D), weight (V, D), labels (...) int64 with IGNORE where no loss is wanted. All positions ignored: 0,
    still connected to the graph with zero gradients.
    """
    flat, y = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    keep = y != IGNORE
    if not y.is_meta and keep.sum() < SPARSE * len(y):  # in fine-tuning the head need not see what the user says
        flat, y = flat[keep], y[keep]
    return _ChunkedCrossEntropy.apply(flat, weight, y, softcap, chunk)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None, chunk: int) -> Tensor:
        need_h, need_w = ctx.needs_input_grad[:2]
        dtype = autocast_dtype(hidden) or hidden.dtype
        grad_h = torch.empty_like(hidden) if need_h else None
        grad_w = torch.zeros_like(weight, dtype=torch.float32) if need_w else None
        cast, total = weight.to(dtype), hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), chunk):
            h, y = hidden[start : start + chunk].to(dtype), labels[start : start + chunk]
            keep = y != IGNORE
            target = y.clamp(min=0)[:, None]
            logits = cap((h @ cast.t()).float(), softcap)  # (chunk, V)
            slope = None if softcap is None else 1 - (logits / softcap).square()  # d cap / d logits
            logp = logits.log_softmax(-1)
            total -= (logp.gather(1, target).squeeze(1) * keep).sum()
            if not (need_h or need_w):
                continue
            grad = logp.exp_()  # softmax, in place
            grad.scatter_add_(1, target, grad.new_full((len(y), 1), -1.0))
            grad = grad.mul_(keep[:, None] if slope is None else slope.mul_(keep[:, None])).to(dtype)
            if need_h:
                grad_h[start : start + chunk] = grad @ cast
            if need_w:
                grad_w.addmm_(grad.t().to(torch.float32), h.to(torch.float32))
        ctx.save_for_backward(grad_h, grad_w if grad_w is None else grad_w.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_h, grad_w = ctx.saved_tensors
        scale = lambda g: None if g is None else g * grad.to(g.dtype)
        return scale(grad_h), scale(grad_w), None, None, None


def cross_entropy_plain(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None = None) -> Tensor:
    """The definition: the reference twin of `cross_entropy_sum`, and the better form inside torch.compile."""
    logits = cap(F.linear(hidden, weight).reshape(-1, len(weight)).float(), softcap)
    return F.cross_entropy(logits, labels.reshape(-1), ignore_index=IGNORE, reduction="sum")


def token_logps(
    hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None = None, chunk: int = CHUNK, temperature: float = 1.0
) -> Tensor:
    """log p(label) of each position in nats, labels' shape, fp32 or wider; 0 where the label is IGNORE.

    temperature : of p = softmax(z / temperature).
    """
    flat, y = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    keep = y != IGNORE
    some = not (y.is_meta or torch.compiler.is_compiling()) and keep.sum() < SPARSE * len(y)  # prompts and padding have no label
    if some:
        flat, y = flat[keep], y[keep]
    if len(y) * len(weight) <= KEPT:
        found = _chunk_logps(flat, weight, y, softcap, temperature)
    else:
        pieces = zip(flat.split(chunk), y.split(chunk), strict=True)
        found = torch.cat([checkpoint(_chunk_logps, h, weight, t, softcap, temperature, use_reentrant=False) for h, t in pieces])
    return (found.new_zeros(keep.shape).masked_scatter(keep, found) if some else found).reshape(labels.shape)


def _chunk_logps(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None, temperature: float) -> Tensor:
    logits = F.linear(hidden, weight)
    logits = cap(logits.to(torch.promote_types(logits.dtype, torch.float32)), softcap)
    if temperature != 1:
        logits = logits / temperature
    return -F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
