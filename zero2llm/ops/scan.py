"""Gated linear recurrence: a matrix state that decays and is written to, token by token or chunk by chunk.

    S_t = diag(exp g_t) S_(t-1) + k_t v_t^T          o_t = S_t^T q_t          S (K, V), log-decay g <= 0

Linear attention (g = 0), RetNet and Lightning (g constant), Mamba-2 (g per head and token), GLA (g per channel).
`scan_steps` is the formula. `scan_chunks` is the same sum in another order (2312.06635 section 4, 2405.21060 section 6):
with G = cumsum g inside a chunk of C tokens and S_in the state that enters it,

    o_t = exp(G_t) S_in^T q_t  +  sum_{s <= t} (q_t . k_s exp(G_t - G_s)) v_s          matrix products, all chunks at once
    S_out = exp(G_C) S_in  +  sum_s exp(G_C - G_s) k_s v_s^T                            a loop over T / C chunks

exp(G_t) * exp(-G_s) would overflow, so `halving` multiplies the factors exp g instead. A document boundary cuts three
things: which pairs (t, s) meet, who sees S_in, and who writes S_out.
Layout: q, k (B, ..., T, K), v (B, ..., T, V), g (B, ..., T) or (B, ..., T, K), state (B, ..., K, V). The dimensions
between broadcast, so that heads may share keys (Mamba-2), and so may a g that rows or heads have in common: what is
shared is computed once. Cost per token: 4 K V + 2 C (K + V) FLOPs; the state does not grow.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zero2llm.ops.marks import Marks, full_precision, split, wide

CHUNK = 64


def scan(q: Tensor, k: Tensor, v: Tensor, g: Tensor, marks: Marks, state: Tensor | None, chunk: int = CHUNK):
    """(o (B, ..., T, V), state after the last token). One token: the step; more: chunks. Half precision runs in fp32."""
    q, k, v, g = wide(q, k, v, g)
    with full_precision(q):
        if q.shape[-2] == 1:
            return scan_steps(q, k, v, g, marks, state)
        return scan_chunks(q, k, v, g, marks, state, min(chunk, q.shape[-2]))


def scan_steps(q: Tensor, k: Tensor, v: Tensor, g: Tensor, marks: Marks, state: Tensor | None):
    """The formula itself, one token at a time: for decoding, and the reference of `scan_chunks`."""
    S = empty_state(q, k, v) if state is None else state
    decay = (g if g.ndim == q.ndim else g[..., None]).exp()[..., None]  # (B, ..., T, K or 1, 1)
    if marks.doc is not None:
        goes_on = marks.doc == F.pad(marks.doc[:, :-1], (1, 0))  # (B, T): in the document of the token before
        decay = decay * goes_on.view(len(goes_on), *[1] * (decay.ndim - 4), -1, 1, 1)
    out = []
    for q_t, k_t, v_t, decay_t in zip(q.unbind(-2), k.unbind(-2), v.unbind(-2), decay.unbind(-3), strict=True):
        S = torch.addcmul(decay_t * S, k_t[..., :, None], v_t[..., None, :])
        out.append((q_t[..., None, :] @ S).squeeze(-2))
    return torch.stack(out, -2), S


def scan_chunks(q: Tensor, k: Tensor, v: Tensor, g: Tensor, marks: Marks, state: Tensor | None, chunk: int = CHUNK):
    """The same in chunks of ``chunk`` tokens."""
    T, per_channel = q.shape[-2], g.ndim == q.ndim
    S = empty_state(q, k, v) if state is None else state
    q, k, v = (split(x, chunk, -2) for x in (q, k, v))  # (B, ..., N, C, K)
    a = split(g if per_channel else g[..., None], chunk, -2).exp()  # (B, ..., N, C, K or 1)
    pairs, sees, writes, keeps = boundaries(marks, chunk, q.shape[-3], q.ndim, q.device)
    if per_channel:
        weights, q, k, fade = halving(q, k, a)
    else:
        one = a.new_ones(chunk, 1)
        decay, from_start, to_end, fade = halving(one, one, a)
        weights = q @ k.mT * decay
        sees, writes = from_start * sees, to_end * writes
    if marks.doc is not None:
        weights = weights * pairs
    added = k.mT @ (v * writes)  # (B, ..., N, K, V) what each chunk writes
    fade, before = fade.mT * keeps, []
    for fade_n, added_n in zip(fade.unbind(-3), added.unbind(-3), strict=True):  # unbind: indexing would cost T^2 / C
        before.append(S)
        S = fade_n * S + added_n
    o = weights @ v + (q @ torch.stack(before, -3)) * sees
    return o.flatten(-3, -2)[..., :T, :], S


def empty_state(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Zeros (B, ..., K, V) of the broadcast shape."""
    lead = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    return v.new_zeros(*lead, k.shape[-1], v.shape[-1])


def boundaries(marks: Marks, chunk: int, n: int, ndim: int, device) -> tuple[Tensor, ...]:
    """For tensors (B, ..., N, C, K) of ``ndim`` dimensions: which pairs of a chunk meet (t, s), which tokens see the state
    that enters, which write to the one that leaves (both (..., C, 1)), and whether the old state survives (..., 1, 1)."""
    pairs = torch.ones(chunk, chunk, dtype=torch.bool, device=device).tril()
    doc = marks.chunks(chunk)  # (B, N, C)
    if doc is None:
        one = torch.ones((), device=device)
        return pairs, one, one, torch.ones(n, 1, 1, device=device)
    lift = lambda x: x.view(len(x), *[1] * (ndim - x.ndim), *x.shape[1:])
    last = doc[..., -1:]
    carried = torch.cat((torch.zeros_like(last[:, :1]), last[:, :-1]), 1)  # (B, N, 1)
    pairs = lift(pairs & (doc[..., :, None] == doc[..., None, :]))
    return pairs, lift((doc == carried)[..., None]), lift((doc == last)[..., None]), lift((carried == last)[..., None])


def halving(x: Tensor, y: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Products between the tokens of a chunk, decayed by every factor a <= 1 that lies between them, and what goes with
    them; x, y, a (..., C, K), the dimensions in front broadcast:

        A[t, s] = sum_k x_tk y_sk a_(s+1)k ... a_tk, 0 for s > t        (..., C, C)
        x_t a_1 ... a_t          decayed since the chunk began           (..., C, K)
        y_s a_(s+1) ... a_C      decayed until it ends                   (..., C, K)
        a_1 ... a_C                                                      (..., 1, K)

    All four for blocks of 2 n tokens follow from those for blocks of n: a pair with s in the earlier half and t in the
    later one meets as y decayed until the former's end times x decayed since the latter's start, a matrix product.
    Only products of a: no quotient that could overflow, no difference of long sums that would lose digits.
    """
    C = a.shape[-2]
    short = (1 << (C - 1).bit_length()) - C  # up to a power of two
    if short:
        x, y, a = F.pad(x, (0, 0, 0, short)), F.pad(y, (0, 0, 0, short)), F.pad(a, (0, 0, 0, short), value=1.0)
    shape = torch.broadcast_shapes(x.shape, y.shape, a.shape)
    A = (x * y).sum(-1).expand(shape[:-1])[..., None, None]  # (..., C / n, n, n), n = 1
    x, y, a = (z[..., None, :] for z in (x * a, y.expand(torch.broadcast_shapes(y.shape, a.shape)), a))
    while A.shape[-3] > 1:
        (x_1, x_2), (y_1, y_2), (a_1, a_2), (A_1, A_2) = (z.unflatten(-3, (-1, 2)).unbind(-3) for z in (x, y, a, A))
        cross = x_2 * y_1.mT if x.shape[-1] == 1 else x_2 @ y_1.mT  # (..., C / 2n, n, n)
        A = torch.cat((F.pad(A_1, (0, cross.shape[-1])), torch.cat((cross, A_2), -1)), -2)
        x, y, a = torch.cat((x_1, x_2 * a_1), -2), torch.cat((y_1 * a_2, y_2), -2), a_1 * a_2
    A, x, y, a = (z.squeeze(-3) for z in (A, x, y, a))
    return A[..., :C, :C], x[..., :C, :], y[..., :C, :], a
