"""Attention over a few keys of many: blocks of a document, their summaries, the best k, and the mask they make.

    block of a token = pos // size            counted inside its document, so that packing and streaming cut alike
    summary of a block = f(its tokens)        known to its last token and to those behind it, never before
    kept = the k best of what may be seen     of equal scores the first, so that the choice never depends on T
    o_i = sum_{j kept by i} softmax_j(q_i . k_j * scale) v_j

The definition is a dense mask, (B, M, T, S) for M = 1, G or H different choices, made for ROWS queries at a time: right
everywhere, and no faster than full attention. Decoding one token gathers the kept keys and reads nothing else.
Layout in this file: q (B, H, T, K), k and v (B, G, S, K), as in attend.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from zero2llm.core.seq import Seq
from zero2llm.ops.attend import attend

ROWS = 1024  # queries whose token mask exists at a time


def best(scores: Tensor, k: int, seen: Tensor) -> Tensor:
    """(..., N) bool: the ``k`` highest scores among ``seen`` (broadcast), all of them if there are no more than k.

    torch.topk settles ties differently for another N; here the first wins, and a stream equals the whole.
    """
    seen = seen.expand_as(scores)
    if k >= scores.shape[-1]:
        return seen
    if k < 1:
        return torch.zeros_like(seen)
    scores = scores.masked_fill(~seen, -torch.inf)
    bound = scores.topk(k, -1).values[..., -1:]
    above, equal = scores > bound, scores == bound
    room = k - above.sum(-1, keepdim=True)
    return (above | (equal & (equal.cumsum(-1) <= room))) & seen


def places(seq: Seq) -> Tensor:
    """(B, T) positions counted from the first token that is here: a row without a past may open inside a document."""
    first = seq.pos[:, :1]
    return seq.pos - (first if seq.seg is None else torch.where(seq.seg == seq.seg[:, :1], first, 0))


def real_tokens(seq: Seq) -> Tensor:
    """(B, T) bool: not padding."""
    return torch.ones_like(seq.pos, dtype=torch.bool) if seq.seg is None else seq.seg != 0


class Blocks(NamedTuple):
    """x : (B, N, W) summaries.  number : (B, N) each block's place in its document.  seen : (B, T, N) bool, the block is
    of the token's document and complete."""

    x: Tensor
    number: Tensor
    seen: Tensor


Summarise = Callable[[Tensor, Tensor], Tensor]  # tokens (B, N, size, W), position of the first (B, N) -> (B, N, W')


def summaries(x: Tensor, seq: Seq, size: int, stride: int, summarise: Summarise, memory=None) -> Blocks:
    """Blocks of ``size`` tokens of x (B, T, W) that begin every ``stride``; block i is tokens i stride .. i stride + size - 1.

    memory : ``tail`` (B, size - 1, W), the tokens before these, and ``stored`` (B, M + 1, W'), the summary of block i of
    the current document in slot i, with a bin behind; both are updated in place. ``None`` = documents begin here.
    """
    B, T, W = x.shape
    pos, column = (places(seq) if memory is None else seq.pos), torch.arange(T, device=x.device)
    ends = real_tokens(seq) & (pos >= size - 1) & ((pos + 1 - size) % stride == 0)
    last = torch.where(ends, column, T).sort(1).values[:, : -(-T // stride)]  # (B, N) a block's last column, T = none
    at = last.clamp(max=T - 1)
    long = torch.cat((x.new_zeros(B, size - 1, W) if memory is None else memory["tail"].to(x.dtype), x), 1)
    members = (at[:, :, None] + torch.arange(size, device=x.device)).flatten(1)
    tokens = long.gather(1, members[..., None].expand(-1, -1, W)).unflatten(1, (-1, size))
    number = (pos.gather(1, at) + 1 - size) // stride
    seen = (last[:, None] <= column[:, None]) & (last < T)[:, None]
    if seq.seg is not None:
        seen = seen & (seq.seg[:, :, None] == seq.seg.gather(1, at)[:, None])
    new = Blocks(summarise(tokens, seq.pos.gather(1, at) + 1 - size), number, seen)
    if memory is None:
        return new
    return _remember(new, last, long, seq, size, stride, memory)


def _remember(new: Blocks, last: Tensor, long: Tensor, seq: Seq, size: int, stride: int, memory) -> Blocks:
    """The stored blocks and the ``new`` ones; then the memory moves on to the end of the row's last document."""
    T, slots = seq.pos.shape[1], memory["stored"].shape[1] - 1
    real, at = real_tokens(seq), last.clamp(max=T - 1)
    first = real.int().argmax(1, keepdim=True)
    known = torch.arange(slots, device=last.device)
    old = (known * stride + size <= seq.pos.gather(1, first))[:, None].expand(-1, T, -1)  # (B, T, M)
    current = real
    if seq.seg is not None:
        old = old & (seq.seg == seq.seg.gather(1, first))[:, :, None]  # only the first document continues
        current = real & (seq.seg == (seq.seg * real).amax(1, keepdim=True))
    stored = memory["stored"][:, :slots].to(new.x.dtype)
    both = Blocks(
        torch.cat((stored, new.x), 1),
        torch.cat((known.expand(len(last), -1), new.number), 1),
        torch.cat((old, new.seen), 2),
    )
    slot = torch.where((last < T) & current.gather(1, at), new.number, slots)[..., None]
    memory["stored"].scatter_(1, slot.expand_as(new.x), new.x.to(memory["stored"].dtype))
    end = (real * torch.arange(1, T + 1, device=last.device)).amax(1, keepdim=True)  # behind the last real token
    kept = (end + torch.arange(size - 1, device=last.device))[..., None].expand(-1, -1, long.shape[-1])
    memory["tail"].copy_(long.gather(1, kept))
    return both


def overlap(number: Tensor, size: int, stride: int, block: int, n: int) -> Tensor:
    """(B, N, n): in units of ``stride`` tokens, how much summarised block ``number`` (B, N) shares with block j of ``block``."""
    wide, j = block // stride, torch.arange(n, device=number.device)
    begin = torch.maximum(number[..., None], j * wide)
    end = torch.minimum(number[..., None] + size // stride, (j + 1) * wide)
    return (end - begin).clamp(min=0)


def token_mask(chosen: Tensor, block: Tensor, seen: Tensor) -> Tensor:
    """Chosen blocks (B, M, T, J), each key's block (B, S), seen (B, 1, T, S) -> (B, M, T, S) bool."""
    index = block[:, None, None].expand(*chosen.shape[:3], -1)
    return chosen.gather(-1, index) & seen


def attend_blocks(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, block: Tensor, seen: Tensor, most: int, rows: int = ROWS
) -> Tensor:
    """(B, H, T, V) attention to the seen keys of the chosen blocks (see `token_mask`), at most ``most`` for a query."""
    T, S = q.shape[2], k.shape[2]
    if T == 1:
        return attend_one(q, k, v, token_mask(chosen, block, seen), most)
    out = []
    for a in range(0, T, rows):
        here, to = slice(a, a + rows), S - T + min(a + rows, T)  # keys behind the last of these queries are of no use
        mask = token_mask(chosen[:, :, here], block[:, :to], seen[:, :, here, :to])
        mask = mask.repeat_interleave(q.shape[1] // mask.shape[1], 1)
        out.append(attend(q[:, :, here], k[:, :, :to], v[:, :, :to], mask))
    return torch.cat(out, 2)


def attend_one(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, most: int, scale: float | None = None) -> Tensor:
    """One token a row: q (B, H, 1, K), kept (B, M, 1, S) with G | M | H -> (B, H, 1, V). Heads that share a choice are
    rows of one product; the kept keys, at most ``most``, are gathered first if the memory holds more."""
    B, G, S = k.shape[:3]
    M = kept.shape[1]
    if most < S:
        valid, index = kept[:, :, 0].float().topk(most, -1, sorted=False)  # (B, M, most)
        k, v = (_take(x, index.unflatten(1, (G, -1))) for x in (k, v))
        kept = (valid > 0)[:, :, None]
    elif M != G:
        k, v = (x.repeat_interleave(M // G, 1) for x in (k, v))
    return attend(q.reshape(B, M, -1, q.shape[-1]), k, v, kept, scale).reshape(B, q.shape[1], 1, -1)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """x (B, G, S, K), index (B, G, M / G, n) -> (B, M, n, K)."""
    many = x[:, :, None].expand(-1, -1, index.shape[2], -1, -1)
    return many.gather(3, index[..., None].expand(-1, -1, -1, -1, x.shape[-1])).flatten(1, 2)
