"""Diagonal plus low rank: the delta rule whose reading key, writing key and value are three different things.

    S_t = diag(exp g_t) S_(t-1) + b_t (a_t^T S_(t-1)) + k_t v_t^T          o_t = S_t^T q_t          S (K, V), g <= 0

RWKV-7 (a = -kk, b = kk * rate); with a = exp(g) k, b = -beta k and v = beta v it is the gated delta rule of ops/delta.py.
`dplr_steps` is the formula; `dplr_chunks` the same in chunks of C tokens (2503.14456 appendix; 2406.06484 section 3):
with G = cumsum g inside a chunk, y_t = S_(t-1)^T a_t what token t reads, and <x, z>_ts = sum_c x_tc z_sc,

    (I - AB) Y = AK V + (exp(G_(t-1)) A) S_in          AB, AK = <a, b>, <a, k> times exp(G_(t-1) - G_s), s < t
    O = (exp(G) Q) S_in + QK V + QB Y                  QB, QK = <q, b>, <q, k> times exp(G_t - G_s), s <= t
    S_out = exp(G_C) S_in + (exp(G_C - G) K)^T V + (exp(G_C - G) B)^T Y

The read comes before the decay of its own step, hence G_(t-1). Documents are cut as in ops/delta.py.
Layout: q, k, a, b, g (B, H, T, K), v (B, H, T, V), state (B, H, K, V).
Cost per token and head: 8 K V + C (9 K + 7 V) FLOPs; the state does not grow.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zero2llm.ops.delta import goes_on, solve_unit
from zero2llm.ops.marks import Marks, full_precision, split, wide
from zero2llm.ops.scan import CHUNK, boundaries, empty_state, halving


def dplr(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor, marks: Marks, state: Tensor | None,
    chunk: int = CHUNK,
):  # fmt: skip
    """(o (B, H, T, V), state after the last token). One token: the step; more: chunks. Half precision runs in fp32."""
    q, k, v, a, b, g = wide(q, k, v, a, b, g)
    with full_precision(q):
        if q.shape[-2] == 1:
            return dplr_steps(q, k, v, a, b, g, marks, state)
        return dplr_chunks(q, k, v, a, b, g, marks, state, min(chunk, q.shape[-2]))


def dplr_steps(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor, marks: Marks, state: Tensor | None
):  # fmt: skip
    """The formula itself, one token at a time: for decoding, and the reference of `dplr_chunks`."""
    S, decay, out = empty_state(q, k, v) if state is None else state, g.exp(), []
    if marks.doc is not None:
        a, decay = a * goes_on(marks), decay * goes_on(marks)
    for q_t, k_t, v_t, a_t, b_t, decay_t in zip(*(x.unbind(-2) for x in (q, k, v, a, b, decay)), strict=True):
        read = a_t[..., None, :] @ S  # (B, H, 1, V)
        S = decay_t[..., None] * S + b_t[..., None] * read + k_t[..., None] * v_t[..., None, :]
        out.append((q_t[..., None, :] @ S).squeeze(-2))
    return torch.stack(out, -2), S


def dplr_chunks(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor, marks: Marks, state: Tensor | None,
    chunk: int = CHUNK,
):  # fmt: skip
    """The same in chunks of ``chunk`` tokens."""
    T, V = q.shape[-2], v.shape[-1]
    S = empty_state(q, k, v) if state is None else state
    q, k, v, a, b, g = (split(x, chunk, -2) for x in (q, k, v, a, b, g))  # (B, H, N, C, K)
    pairs, sees, writes, keeps = boundaries(marks, chunk, q.shape[-3], q.ndim, q.device)
    left = torch.stack((q, F.pad(a[..., 1:, :], (0, 0, 0, 1))))[:, None]  # a one row up, for it reads at t - 1 ...
    ((QK, QB), read), (q_in, a_in), (k_out, b_out), fade = halving(left, torch.stack((k, b)), g.exp())
    AK, AB = F.pad(read[..., :-1, :], (0, 0, 1, 0))  # ... and its products down again
    a_in = torch.cat((a[..., :1, :], a_in[0, ..., :-1, :]), -2)
    if marks.doc is not None:
        QK, QB, AK, AB = (x * pairs for x in (QK, QB, AK, AB))
    right = torch.cat((AK @ v, a_in * sees), -1)
    Y, W = solve_unit(-AB, right).split((V, k.shape[-1]), -1)  # what is read: Y + W S_in
    k_into, b_into = ((x * writes).mT for x in (k_out, b_out))
    added, factor = k_into @ v, fade.mT * keeps
    before, reads = [], []
    for Y_n, W_n, added_n, b_n, factor_n in zip(*(x.unbind(-3) for x in (Y, W, added, b_into, factor)), strict=True):
        before.append(S)
        reads.append(Y_n + W_n @ S)
        S = factor_n * S + added_n + b_n @ reads[-1]
    o = QK @ v + QB @ torch.stack(reads, -3) + (q_in[0] * sees) @ torch.stack(before, -3)
    return o.flatten(-3, -2)[..., :T, :], S
