"""The delta rule: a matrix state that is corrected, not only added to, token by token or chunk by chunk.

    S' = diag(exp g_t) S_(t-1)          S_t = S' + beta_t k_t (v_t - S'^T k_t)^T          o_t = S_t^T q_t

Read what the (decayed) state answers to the key k_t, compare with v_t, write the difference back: one step of gradient
descent on |S^T k_t - v_t|^2 / 2. DeltaNet (no g), Gated DeltaNet (g per head and token), KDA (g per channel).
`delta_steps` is the formula. `delta_chunks` is the same in another order (2406.06484 section 3, 2412.06464 section 3.3):
with G = cumsum g inside a chunk of C tokens, S_in the state that enters it and u_t what token t really writes,

    (I + M) U = beta (V - exp(G) K S_in)          M_ts = beta_t sum_c k_tc k_sc exp(G_tc - G_sc) for s < t, else 0
    O = (exp(G) Q) S_in + P U                     P_ts = sum_c q_tc k_sc exp(G_tc - G_sc) for s <= t, else 0
    S_out = exp(G_C) S_in + (exp(G_C - G) K)^T U

I + M is triangular with ones on its diagonal: one solve, all chunks at once, gives U as a function of S_in; only S_in
itself goes through a loop over T / C chunks. exp(G_t - G_s) are products of factors exp g (`scan.halving`): a difference
of long sums would lose the digits of a strong decay. A document border
cuts the pairs (t, s) before the solve, hides S_in from documents that begin here, and lets the last one alone write.
Keys should have length <= 1 and beta lie in [0, 2]: then no step enlarges the state.
Layout: q, k (B, H, T, K), v (B, H, T, V), beta (B, H, T), g None or (B, H, T) or (B, H, T, K), state (B, H, K, V).
Cost per token and head: 6 K V + C (5 K + 3 V) FLOPs; the state does not grow.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zero2llm.ops.marks import Marks, full_precision, split, wide
from zero2llm.ops.scan import CHUNK, boundaries, empty_state, halving


def delta(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, marks: Marks, state: Tensor | None,
    chunk: int = CHUNK,
):  # fmt: skip
    """(o (B, H, T, V), state after the last token). One token: the step; more: chunks. Half precision runs in fp32."""
    q, k, v, beta, g = wide(q, k, v, beta, beta.new_zeros(q.shape[-2]) if g is None else g)
    with full_precision(q):
        if q.shape[-2] == 1:
            return delta_steps(q, k, v, beta, g, marks, state)
        return delta_chunks(q, k, v, beta, g, marks, state, min(chunk, q.shape[-2]))


def delta_steps(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, marks: Marks, state: Tensor | None):
    """The formula itself, one token at a time: for decoding, and the reference of `delta_chunks`."""
    S = empty_state(q, k, v) if state is None else state
    decay = (g if g.ndim == q.ndim else g[..., None]).exp()  # (B, H, T, K or 1)
    if marks.doc is not None:
        decay = decay * goes_on(marks)
    out = []
    for q_t, k_t, v_t, beta_t, decay_t in zip(*(x.unbind(-2) for x in (q, k, v, beta[..., None], decay)), strict=True):
        S = decay_t[..., None] * S
        recalled = (k_t[..., None, :] @ S).squeeze(-2)  # (B, H, V) what the state answers to k_t
        S = S + k_t[..., None] * (beta_t * (v_t - recalled))[..., None, :]
        out.append((q_t[..., None, :] @ S).squeeze(-2))
    return torch.stack(out, -2), S


def delta_chunks(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, marks: Marks, state: Tensor | None, chunk: int = CHUNK
):
    """The same in chunks of ``chunk`` tokens."""
    T, V, per_channel = q.shape[-2], v.shape[-1], g.ndim == q.ndim
    S = empty_state(q, k, v) if state is None else state
    q, k, v = (split(x, chunk, -2) for x in (q, k, v))  # (B, H, N, C, K)
    beta = split(beta, chunk, -1)[..., None]
    a = split(g if per_channel else g[..., None], chunk, -2).exp()  # (B, H, N, C, K or 1)
    pairs, sees, writes, keeps = boundaries(marks, chunk, q.shape[-3], q.ndim, q.device)
    if per_channel:
        (M, P), (k_in, q_in), k_out, fade = halving(torch.stack((k, q)), k, a)  # (B, H, N, C, C) each, then (.., C, K)
    else:
        one = a.new_ones(chunk, 1)
        decay, from_start, to_end, fade = halving(one, one, a)
        M, P = torch.stack((k, q)) @ k.mT * decay
        k_in, q_in, k_out = k * from_start, q * from_start, k * to_end
    if marks.doc is not None:
        M, P = M * pairs, P * pairs
    right = torch.cat((beta * v, beta * k_in * sees), -1)
    U, W = solve_unit(beta * M, right).split((V, k.shape[-1]), -1)  # what is written: U - W S_in
    out, into, factor = q_in * sees, (k_out * writes).mT, fade.mT * keeps
    before, written = [], []
    for U_n, W_n, into_n, factor_n in zip(*(x.unbind(-3) for x in (U, W, into, factor)), strict=True):
        before.append(S)
        written.append(U_n - W_n @ S)
        S = factor_n * S + into_n @ written[-1]
    o = P @ torch.stack(written, -3) + out @ torch.stack(before, -3)
    return o.flatten(-3, -2)[..., :T, :], S


def goes_on(marks: Marks) -> Tensor:
    """(B, 1, T, 1) bool: the token belongs to the document of the one before it (the first: to the carried one)."""
    return (marks.doc == F.pad(marks.doc[:, :-1], (1, 0)))[:, None, :, None]


def solve_unit(M: Tensor, right: Tensor) -> Tensor:
    """X of (I + M) X = right, where M counts below its diagonal only: the solver reads nothing else of it."""
    return torch.linalg.solve_triangular(M, right, upper=False, unitriangular=True)


def unit(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum x^2 + eps) over the last dimension, in fp32 or wider: keys and queries of the delta family."""
    (x,) = wide(x)
    return x * (x.square().sum(-1, keepdim=True) + eps).rsqrt()
