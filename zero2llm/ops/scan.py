"""Gated linear recurrence: a matrix state that decays and is written to, token by token or chunk by chunk.

    S_t = diag(exp g_t) S_(t-1) + k_t v_t^T          o_t = S_t^T q_t          S (K, V), log-decay g <= 0

Linear attention (g = 0), RetNet and Lightning (g constant), Mamba-2 (g per head and token), GLA (g per channel).
`scan_steps` is the formula. `scan_chunks` is the same sum in another order (2312.06635 section 4, 2405.21060 section 6):
with G = cumsum g inside a chunk of C tokens and S_in the state that enters it,

    o_t = exp(G_t) S_in^T q_t  +  sum_{s <= t} (q_t . k_s exp(G_t - G_s)) v_s          matrix products, all chunks at once
    S_out = exp(G_C) S_in  +  sum_s exp(G_C - G_s) k_s v_s^T                            a loop over T / C chunks

Only differences G_t - G_s <= 0 are ever exponentiated: exp(G_t) * exp(-G_s) would overflow. A document boundary cuts
three things: which pairs (t, s) meet, who sees S_in, and who writes S_out.
Layout: q, k (B, ..., T, K), v (B, ..., T, V), g (B, ..., T) or (B, ..., T, K), state (B, ..., K, V); the dimensions
between broadcast, so that heads may share keys. Cost per token: 4 K V + 2 C (K + V) FLOPs; the state does not grow.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zero2llm.ops.marks import Marks, split, wide

CHUNK = 64


def scan(q: Tensor, k: Tensor, v: Tensor, g: Tensor, marks: Marks, state: Tensor | None, chunk: int = CHUNK):
    """(o (B, ..., T, V), state after the last token). One token: the step; more: chunks. Half precision runs in fp32."""
    q, k, v, g = wide(q, k, v, g)
    with torch.autocast(q.device.type, enabled=False):
        if q.shape[-2] == 1:
            return scan_steps(q, k, v, g, marks, state)
        return scan_chunks(q, k, v, g, marks, state, min(chunk, q.shape[-2]))


def scan_steps(q: Tensor, k: Tensor, v: Tensor, g: Tensor, marks: Marks, state: Tensor | None):
    """The formula itself, one token at a time: for decoding, and the reference of `scan_chunks`."""
    S = empty_state(q, k, v) if state is None else state
    decay = (g if g.ndim == q.ndim else g[..., None]).exp()[..., None]  # (B, ..., T, K or 1, 1)
    out = []
    for t in range(q.shape[-2]):
        if marks.doc is not None:
            S = S * continues(marks.doc, t, S.ndim)
        S = decay[..., t, :, :] * S + k[..., t, :, None] * v[..., t, None, :]
        out.append((q[..., t, None, :] @ S).squeeze(-2))
    return torch.stack(out, -2), S


def scan_chunks(q: Tensor, k: Tensor, v: Tensor, g: Tensor, marks: Marks, state: Tensor | None, chunk: int = CHUNK):
    """The same in chunks of ``chunk`` tokens."""
    T, per_channel = q.shape[-2], g.ndim == q.ndim
    S = empty_state(q, k, v) if state is None else state
    q, k, v = (split(x, chunk, -2) for x in (q, k, v))  # (B, ..., N, C, K)
    G = split(g, chunk, -2 if per_channel else -1).cumsum(-2 if per_channel else -1)
    pairs, sees_state, writes, keeps = boundaries(marks, chunk, q.shape[-3], q.ndim, q.device)
    if per_channel:
        weights = decayed_products(q, k, G).masked_fill(~pairs, 0.0)
        end = G[..., -1:, :]
        q, k, v_out, after = q * G.exp(), k * (end - G).exp(), v, 1.0
        factor = end.exp().transpose(-1, -2)  # (B, ..., N, K, 1)
    else:
        weights = q @ k.transpose(-1, -2) * (G[..., :, None] - G[..., None, :]).masked_fill(~pairs, -torch.inf).exp()
        end = G[..., -1:]
        v_out, after = v * (end - G).exp()[..., None], G.exp()[..., None]
        factor = end.exp()[..., None]
    added = k.transpose(-1, -2) @ (v_out * writes)  # (B, ..., N, K, V) what each chunk writes
    factor = factor * keeps
    before = []
    for n in range(added.shape[-3]):
        before.append(S)
        S = factor[..., n, :, :] * S + added[..., n, :, :]
    o = weights @ v + (q @ torch.stack(before, -3)) * (after * sees_state)
    return o.flatten(-3, -2)[..., :T, :], S


def empty_state(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Zeros (B, ..., K, V) of the broadcast shape."""
    lead = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    return v.new_zeros(*lead, k.shape[-1], v.shape[-1])


def continues(doc: Tensor, t: int, ndim: int) -> Tensor:
    """(B, 1, ...) bool: token t belongs to the document of the token before it (for t = 0, to the carried one)."""
    return (doc[:, t] == (doc[:, t - 1] if t else 0)).view(-1, *[1] * (ndim - 1))


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


def decayed_products(x: Tensor, y: Tensor, G: Tensor, block: int = 16) -> Tensor:
    """A[t, s] = sum_k x_tk y_sk exp(G_tk - G_sk) for s <= t, else 0. (..., C, K) each -> (..., C, C).

    Two tokens of one block of 16 are multiplied pair by pair; across blocks both are decayed to the later block's
    first token, which keeps either exponent below 0 and makes it a matrix product (2312.06635 section 4.3).
    """
    C, rows = x.shape[-2], []
    block = min(block, C)
    tril = torch.ones(block, block, dtype=torch.bool, device=x.device).tril()[..., None]
    for i in range(0, C, block):
        here = slice(i, min(i + block, C))
        n = here.stop - i
        gap = (G[..., here, None, :] - G[..., None, here, :]).masked_fill(~tril[:n, :n], -torch.inf)
        parts = [(x[..., here, None, :] * y[..., None, here, :] * gap.exp()).sum(-1)]
        if i:
            ref = G[..., i : i + 1, :]
            left = x[..., here, :] * (G[..., here, :] - ref).exp()
            parts.insert(0, left @ (y[..., :i, :] * (ref - G[..., :i, :]).exp()).transpose(-1, -2))
        parts.append(x.new_zeros(*parts[0].shape[:-1], C - here.stop))
        rows.append(torch.cat(parts, -1))
    return torch.cat(rows, -2)
