"""Selective scan: a diagonal state space whose step size, input and output all depend on the token.

    h_t = exp(dt_t A) * h_(t-1) + (dt_t x_t) B_t^T          y_t = h_t C_t + D * x_t         h (D, N)

Source: Mamba 2312.00752 algorithm 2; A by zero-order hold, B by Euler (dt B), as its code does. Every channel and
state has a decay of its own, so that no matrix product does it (Mamba-2 gives that up for one). `selective_steps` is
the formula. `selective_chunks` has two levels: T is cut into n chunks of C tokens, and C steps run in all chunks at
once, from h = 0, to find what each chunk adds; the n results are chained; and the C steps run again from the right h:

    h_out = (h after C steps from 0)  +  exp(A sum dt) * h_in

2 C + T / C steps instead of T, each of more numbers: many times as fast where a step of one token is too small to fill
the machine, hardly faster where it is not. No decay is ever divided by, so nothing overflows. A token that begins a
document has decay 0 (`keep`), which cuts every sum; padding has dt = 0: decay 1, writes nothing.
Memory: (B, T, D, N) is N times the activations, and autograd would keep four of them; above a size, channels run in
groups, each computed again in the backward pass. Cost: 9 D N FLOPs per token (7 in steps); state D N values.
Layout: x, dt (B, T, D); A (D, N); B, C (B, T, N); skip (D,); state (B, D, N).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from zero2llm.ops.marks import Marks, full_precision, split, wide

GROUP = 2**25  # most values of (B, T, D, N) that are held at once; autograd's four copies are 512 MiB in fp32


def selective_scan(x, dt, A, B, C, skip, marks: Marks, state: Tensor | None):
    """(y (B, T, D), state after the last token). One token: the step; more: chunks. Half precision runs in fp32."""
    x, dt, A, B, C, skip = wide(x, dt, A, B, C, skip)
    with full_precision(x):
        form = selective_steps if x.shape[1] == 1 else selective_chunks
        return form(x, dt, A, B, C, skip, marks, state)


def selective_steps(x, dt, A, B, C, skip, marks: Marks, state: Tensor | None):
    """The formula itself, one token at a time: for decoding, and the reference of `selective_chunks`."""
    h = x.new_zeros(len(x), *A.shape) if state is None else state
    (dt,) = marks.silence(dt)
    keep, out = 1 - begins(marks, x), []
    for dt_t, dx_t, B_t, C_t, keep_t in zip(*(part.unbind(1) for part in (dt, dt * x, B, C, keep)), strict=True):
        decay = (dt_t[..., None] * A).exp() * keep_t[:, None, None]  # (B, D, N)
        h = torch.addcmul(decay * h, dx_t[..., None], B_t[:, None, :])
        out.append((h @ C_t[..., None]).squeeze(-1))
    return torch.stack(out, 1) + skip * x, h


def selective_chunks(
    x, dt, A, B, C, skip, marks: Marks, state: Tensor | None, chunk: int | None = None, group: int = GROUP
):
    """The same in chunks of ``chunk`` tokens (None = about sqrt(T)), ``group`` values of (B, T, D, N) at a time."""
    rows, T, D = x.shape
    chunk = chunk or math.ceil(T**0.5)
    h = x.new_zeros(rows, *A.shape) if state is None else state
    (dt,) = marks.silence(dt)
    keep = None if marks.doc is None else 1 - split(begins(marks, x), chunk, -1)  # (B, n, C)
    B, C, dt, dx = (split(v, chunk, -2) for v in (B, C, dt, dt * x))  # (B, n, C, N or D)
    width = max(1, group // (rows * T * A.shape[1]))  # channels at a time
    again = width < D and torch.is_grad_enabled()
    parts = []
    for dt_g, dx_g, A_g, h_g in zip(*(v.split(width, d) for v, d in ((dt, -1), (dx, -1), (A, 0), (h, 1))), strict=True):
        args = (dt_g, dx_g, A_g, B, C, keep, h_g)
        parts.append(checkpoint(two_levels, *args, use_reentrant=False) if again else two_levels(*args))
    y, h = (torch.cat(p, dim) for p, dim in zip(zip(*parts, strict=True), (2, 1), strict=True))
    return y[:, :T] + skip * x, h


def two_levels(dt: Tensor, dx: Tensor, A: Tensor, B: Tensor, C: Tensor, keep: Tensor | None, h: Tensor):
    """(y (B, n C, D), last state) from dt and dx = dt x (B, n, C, D), B and C (B, n, C, N), keep (B, n, C)."""
    steps, last = [], None
    for i, (dt_t, dx_t, B_t) in enumerate(zip(*(v.unbind(2) for v in (dt, dx, B)), strict=True)):
        decay, write = (dt_t[..., None] * A).exp(), dx_t[..., None] * B_t[..., None, :]  # (B, n, D, N)
        if keep is not None:
            decay = decay * keep[:, :, i, None, None]
        last = write if last is None else torch.addcmul(write, decay, last)
        steps.append((decay, write))
    fade = (dt.sum(2)[..., None] * A).exp()
    if keep is not None:
        fade = fade * keep.amin(2)[..., None, None]
    entering, out = [], []
    for last_n, fade_n in zip(last.unbind(1), fade.unbind(1), strict=True):  # (B, D, N)
        entering.append(h)
        h = torch.addcmul(last_n, fade_n, h)
    now = torch.stack(entering, 1)
    for (decay, write), C_t in zip(steps, C.unbind(2), strict=True):
        now = torch.addcmul(write, decay, now)
        out.append((now @ C_t[..., None]).squeeze(-1))  # (B, n, D)
    return torch.stack(out, 2).flatten(1, 2), h


def begins(marks: Marks, x: Tensor) -> Tensor:
    """(B, T): 1 where a token begins a document and drops what came before, else 0."""
    if marks.doc is None:
        return x.new_zeros(x.shape[:2])
    before = torch.cat((torch.zeros_like(marks.doc[:, :1]), marks.doc[:, :-1]), 1)
    return (marks.doc != before).to(x.dtype)
