"""Log-linear attention: gated linear attention whose past is kept in log2(T) pieces, each with a weight of its own.

    o_t = sum_{s <= t} lam_t[level(t, s)] exp(G_t - G_s) (q_t . k_s) v_s          G = cumsum g, log-decay g <= 0
    level(t, s) = bit_length(t xor s)          0: the token itself; l: 2^(l-1) tokens, the farther back, the more

Source: 2506.04761 section 3; all lam = 1 is gated linear attention.
t and s count inside the document; without a state, from the first token that is here, for a row may open inside a
document. With L weights, levels from L - 1 on share the last: the paper's while T <= 2^(L-1),
and defined beyond. Three forms of one sum: `log_linear_dense` is the formula, T x T; `log_linear_steps` is what
decoding does:

    seen from p, bucket l >= 1 is the block of 2^(l-1) tokens before p's bit l - 1 was set, empty if that bit is 0;
    going from p to p + 1, bucket 0 (the token) and those below p + 1's lowest set bit merge into one   Fenwick's tree

`log_linear_chunks` (training): pairs inside a block of C positions by their level; then the same tree, whose leaves
are the blocks, once per block; each block reads the buckets left of it. FLOPs per token: 4 C (K + V) for the pairs,
which look through two chunks of the row because a document's blocks lie across them, and 2 K V (L - log2 C) for the
tree: T log T in all.
Layout: q, k (B, H, T, K), v (B, H, T, V), g (B, H, T), lam (B, H, T, L), pos (B, T); state (B, H, L - 1, K, V),
buckets 1 .. L - 1 as the next token sees them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zero2llm.ops.marks import Marks, full_precision, split, wide

CHUNK = 64


def log_linear(q, k, v, g, lam, pos: Tensor, marks: Marks, state: Tensor | None, chunk: int = CHUNK):
    """(o (B, H, T, V), state after the last token). One token: the step; more: chunks. Half precision runs in fp32."""
    q, k, v, g, lam = wide(q, k, v, g, lam)
    with full_precision(q):
        if q.shape[-2] == 1:
            return log_linear_steps(q, k, v, g, lam, pos, marks, state)
        return log_linear_chunks(q, k, v, g, lam, pos, marks, state, chunk)


def level(p: Tensor, s: Tensor, n: int) -> Tensor:
    """bit_length(p xor s), at most n - 1."""
    return torch.bucketize(p ^ s, 2 ** torch.arange(n - 1, device=p.device), right=True)


def seen_from(p: Tensor, start: Tensor, n: int) -> Tensor:
    """(..., n): in which bucket ``p`` finds each bucket that ``start`` <= p sees; 0 is the token at ``start``."""
    bits = torch.arange(n, device=p.device)
    found = level(p[..., None], (start[..., None] >> bits) << bits, n)  # by the first token of the bucket's block
    return torch.where(bits == n - 1, n - 1, found)


def merge(buckets: Tensor, to: Tensor) -> Tensor:
    """One position on: from buckets 0 .. n - 1 (B, H, n, K, V) and where they go, ``to`` (B, n), to buckets 1 .. n - 1.

    Those that go, all go to the same.
    """
    n = to.shape[1]
    stays, into = (x[:, None, :, None, None] for x in (to == torch.arange(n, device=to.device), one_hot(to[:, 0], n)))
    gone = (buckets * ~stays).sum(2, keepdim=True)
    return (buckets * stays + gone * into)[:, :, 1:]


def one_hot(x: Tensor, n: int) -> Tensor:
    """(..., n) bool."""
    return x[..., None] == torch.arange(n, device=x.device)


def counted(pos: Tensor, marks: Marks) -> Tensor:
    """Positions for rows without a state, (B, T): those of a document that began before the row count from 0, so < T."""
    if marks.doc is None:
        return pos - pos[:, :1]
    opened = marks.doc == 0 if marks.real is None else (marks.doc == 0) & marks.real
    first = pos.gather(1, opened.int().argmax(1, keepdim=True))  # (B, 1)
    return torch.where(opened, pos - first, pos)


def log_linear_dense(q, k, v, g, lam, pos: Tensor, marks: Marks):
    """o by the formula, with T x T weights; no state."""
    T, pos = q.shape[-2], counted(pos, marks)
    doc = torch.zeros_like(pos) if marks.doc is None else marks.doc
    k, g = silenced(marks, k, g)
    meets = (doc[:, :, None] == doc[:, None, :]).tril()[:, None]  # (B, 1, T, T)
    G = g.cumsum(-1)
    decay = (G[..., :, None] - G[..., None, :]).masked_fill(~meets, -torch.inf).exp()
    levels = level(pos[:, :, None], pos[:, None, :], lam.shape[-1])[:, None].expand(-1, q.shape[1], T, T)
    return (q @ k.mT * decay * lam.gather(-1, levels)) @ v


def log_linear_steps(q, k, v, g, lam, pos: Tensor, marks: Marks, state: Tensor | None):
    """One token at a time through the tree: for decoding, and the reference of `log_linear_chunks`."""
    n, out = lam.shape[-1], []
    S, pos = (empty(k, v, n), counted(pos, marks)) if state is None else (state, pos)
    k, g = silenced(marks, k, g)
    to = seen_from(pos + 1, pos, n)  # (B, T, n)
    decay = g.exp()
    if marks.doc is not None:
        decay = (
            decay * (marks.doc == F.pad(marks.doc[:, :-1], (1, 0)))[:, None]
        )  # a document's first token drops the past
    for t in range(q.shape[-2]):
        written, faded = k[..., t, :, None] * v[..., t, None, :], decay[..., t, None, None, None] * S
        now = torch.cat((written[:, :, None], faded), 2)  # (B, H, L, K, V)
        out.append(torch.einsum("bhl,bhk,bhlkv->bhv", lam[..., t, :], q[..., t, :], now))
        merged = merge(now, to[:, t])
        S = merged if marks.real is None else torch.where(marks.real[:, t].view(-1, 1, 1, 1, 1), merged, S)
    return torch.stack(out, -2), S


def log_linear_chunks(q, k, v, g, lam, pos: Tensor, marks: Marks, state: Tensor | None, chunk: int = CHUNK):
    """The same in blocks of ``chunk`` positions, a power of two."""
    k, g = silenced(marks, k, g)
    if state is None:
        pos = counted(pos, marks)  # < T
        lam = lam[..., : (q.shape[-2] - 1).bit_length() + 1]
    doc = torch.zeros_like(pos) if marks.doc is None else marks.doc
    real = torch.ones_like(pos, dtype=torch.bool) if marks.real is None else marks.real
    o = pairs(q, k, v, g, lam, pos, doc, chunk) + blocks(q, k, v, g, lam, pos, doc, real, chunk)
    if state is None:
        return o, None
    start = pos.gather(1, real.int().argmax(1, keepdim=True))  # (B, 1) where each row goes on
    o = o + read_old(q, g, lam, pos, doc, start, state)
    return o, remember(k, v, g, pos, doc, real, start, state)


def pairs(q, k, v, g, lam, pos: Tensor, doc: Tensor, chunk: int) -> Tensor:
    """What comes from the same block: at most ``chunk`` - 1 tokens back, so from this row chunk or the one before."""
    T, n = q.shape[-2], lam.shape[-1]
    size = min(chunk, T)
    q, k, v, lam = (split(x, size, -2) for x in (q, k, v, lam))  # (B, H, N, C, K)
    g, pos, doc = split(g, size, -1), split(pos, size, -1), split(doc, size, -1)
    k, v = with_previous(k, 2), with_previous(v, 2)  # (B, H, N, 2 C, K)
    G = with_previous(g, 2).cumsum(-1)
    key_pos, key_doc = with_previous(pos, 1), with_previous(doc + 1, 1) - 1  # before the first chunk: nobody's
    p, s = pos[..., :, None], key_pos[..., None, :]  # (B, N, C, 2 C)
    past = torch.ones(size, 2 * size, dtype=torch.bool, device=q.device).tril(size)
    meets = past & (doc[..., :, None] == key_doc[..., None, :]) & (p // chunk == s // chunk)
    decay = (G[..., size:, None] - G[..., None, :]).masked_fill(~meets[:, None], -torch.inf).exp()
    levels = level(p, s, n)[:, None].expand(-1, q.shape[1], -1, -1, -1)
    return ((q @ k.mT * decay * lam.gather(-1, levels)) @ v).flatten(2, 3)[:, :, :T]


def with_previous(x: Tensor, dim: int) -> Tensor:
    """Chunks along ``dim``, of tokens along ``dim`` + 1, each behind the one before it; zeros before the first."""
    before = torch.cat((torch.zeros_like(x.narrow(dim, 0, 1)), x.narrow(dim, 0, x.shape[dim] - 1)), dim)
    return torch.cat((before, x), dim + 1)


def blocks(q, k, v, g, lam, pos: Tensor, doc: Tensor, real: Tensor, chunk: int) -> Tensor:
    """What comes from blocks before one's own: a Fenwick tree over the blocks that end in these rows."""
    T, n = q.shape[-2], max(1, lam.shape[-1] - chunk.bit_length())  # n levels above those inside a block
    count = (T - 1) // chunk + 1  # at most so many blocks end here; the first may have begun before
    ends = real & (pos % chunk == chunk - 1)
    number = torch.where(ends, ends.cumsum(1) - 1, count)
    column = torch.arange(T, device=pos.device).expand_as(pos)
    end = torch.full_like(pos[:, :1], T).repeat(1, count + 1).scatter(1, number, column)[:, :count]  # T = no such block
    inside, after = (end[..., None] + torch.arange(i, i + chunk, device=pos.device) for i in (1 - chunk, 1))
    pick = lambda x, at: x.gather(1, at.clamp(0, T - 1).flatten(1)).view_as(at)
    exists = lambda at: (at >= 0) & (at < T) & (end < T)[..., None] & pick(real, at)
    wrote, reads = (exists(at) & (pick(doc, at) == pick(doc, end)[..., None]) for at in (inside, after))

    take = lambda x, at, ok: gather_tokens(x, at.clamp(0, T - 1)) * ok[:, None, ..., None]  # (B, H, blocks, C, K)
    decay = take(g[..., None], inside, wrote)[..., 0].cumsum(-1)  # (B, H, blocks, C)
    sums = (take(k, inside, wrote) * (decay[..., -1:] - decay).exp()[..., None]).mT @ take(v, inside, wrote)
    buckets = tree(sums, decay[..., -1].exp(), pick(doc, end), pick(pos, end) // chunk, n)  # (B, H, blocks, n, K, V)
    since = take(g[..., None], after, reads).cumsum(-2).exp()
    asked = take(q, after, reads)[..., None, :] * (take(lam[..., -n:], after, reads) * since)[..., None]
    found = asked.flatten(-2) @ buckets.flatten(-3, -2)  # (.., C, n K) @ (.., n K, V)
    to = torch.where(reads, after, T).flatten(1)[:, None, :, None].expand(-1, q.shape[1], -1, v.shape[-1])
    return v.new_zeros(*q.shape[:2], T + 1, v.shape[-1]).scatter(2, to, found.flatten(2, 3))[:, :, :T]


def gather_tokens(x: Tensor, at: Tensor) -> Tensor:
    """x (B, H, T, K) at columns (B, N, C): (B, H, N, C, K)."""
    index = at.flatten(1)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[-1])
    return x.gather(2, index).unflatten(2, at.shape[1:])


def tree(sums: Tensor, decay: Tensor, doc: Tensor, number: Tensor, n: int) -> Tensor:
    """The buckets right of each block, (B, H, N, n, K, V), from the blocks' sums (B, H, N, K, V), decays (B, H, N),
    documents and numbers in the document (B, N). One loop over blocks: `log_linear_steps` with blocks for tokens."""
    to = seen_from(number + 1, number, n + 1)  # (B, N, n + 1)
    same = torch.cat((torch.zeros_like(doc[:, :1], dtype=torch.bool), doc[:, 1:] == doc[:, :-1]), 1)
    factor = (decay * same[:, None])[..., None, None, None]
    S, out = sums.new_zeros(*sums.shape[:2], n, *sums.shape[-2:]), []
    for added, keep, goes in zip(sums.unbind(2), factor.unbind(2), to.unbind(1), strict=True):
        S = merge(torch.cat((added[:, :, None], keep * S), 2), goes)
        out.append(S)
    return torch.stack(out, 2)


def read_old(q, g, lam, pos: Tensor, doc: Tensor, start: Tensor, state: Tensor) -> Tensor:
    """What comes from the state: each of its buckets lies in one level of every later token."""
    mine = doc == 0
    at = seen_from(pos, start, lam.shape[-1])[:, None, :, 1:].expand(-1, q.shape[1], -1, -1)
    fade = (g * mine[:, None]).cumsum(-1).exp() * mine[:, None]
    weight = lam.gather(-1, at) * fade[..., None]  # (B, H, T, L - 1)
    return (q[..., None, :] * weight[..., None]).flatten(-2) @ state.flatten(2, 3)


def remember(k, v, g, pos: Tensor, doc: Tensor, real: Tensor, start: Tensor, state: Tensor) -> Tensor:
    """The state behind the last document: old buckets moved, and each new token added where the next one sees it."""
    n, last = state.shape[2] + 1, doc[:, -1:]
    mine, goes_on = real & (doc == last), last == 0
    end = torch.where(mine, pos, -1).amax(1, keepdim=True) + 1  # (B, 1) the next position
    end = torch.where(end == 0, start, end)  # no token: nothing moves
    left = (g * mine[:, None]).flip(-1).cumsum(-1).flip(-1) - g * mine[:, None]  # log-decay after each token
    into = one_hot(level(end, pos, n), n)[..., 1:] & mine[..., None]  # (B, T, n - 1)
    new = torch.einsum("btn,bhtk,bhtv->bhnkv", into.to(v.dtype), k * left.exp()[..., None], v)
    moves = one_hot(seen_from(end, start, n)[:, 0, 1:], n)[..., 1:].to(v.dtype)  # (B, from, to)
    moved = torch.einsum("bln,bhlkv->bhnkv", moves, state)
    faded = (g * mine[:, None]).sum(-1).exp()[..., None, None, None] * moved
    kept = torch.where(goes_on.view(-1, 1, 1, 1, 1), faded, torch.zeros_like(state))
    return torch.where(mine.any(1).view(-1, 1, 1, 1, 1), kept + new, state)


def silenced(marks: Marks, k: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """k and g with padding set to 0: it writes nothing and forgets nothing."""
    if marks.real is None:
        return k, g
    return k * marks.real[:, None, :, None], g * marks.real[:, None]


def empty(k: Tensor, v: Tensor, n: int) -> Tensor:
    return v.new_zeros(*k.shape[:2], n - 1, k.shape[-1], v.shape[-1])
