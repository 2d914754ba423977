"""FLASH: a gated attention unit that is quadratic inside a chunk of the document and linear across chunks.

    u = silu(W_g x), v = silu(W_v x) of width E;   z = silu(W_z x) of width S, shared
    q, k, q', k' = rotate(gamma_i * z + beta_i)              four cheap views of z instead of four projections
    near_t = sum_{s <= t, same chunk} relu(q_t . k_s / C)^2 v_s
    far_t  = sum_{s, earlier chunk} (q'_t . k'_s) v_s / n_t             n_t = C floor(t / C), the tokens in that sum
    y = W_o (u * (near + far))                               one head; u replaces the feed-forward layer

Source: 2202.10447 sections 2 and 3, figure 4; used with `ffn: null`. Not FlashAttention, which computes plain softmax
attention.
Changed: no learned relative bias in the scores (rotary angles on the four views instead, as its implementations do).
The paper divides scores by the length; that is the chunk C here, whatever the text's length, and `far` is a mean over
the tokens it sums, not a growing sum, so that decoding equals training at every length. With C >= T it is the paper's
plain GAU.
Chunks count from the document's first token (t = position), so that a packed row and a stream cut anywhere give the
same; a chunk of the document may lie across two of the row's, so each row chunk meets the one before it: 2 C keys a
query.
Why: 3 D E + D S parameters replace attention and feed-forward; mixing takes 4 C (2 S + E) + 4 S E FLOPs per token,
whatever T.
Decoding keeps C (2 S + E) + 2 S E values. Delete `far` and the chunks are islands; delete `near` and it is linear
attention.
Shapes: x (B, T, D) -> (B, T, D).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zero2llm.core.config import config
from zero2llm.core.seq import Aux, Seq
from zero2llm.layers.contract import ALONE, Cost, Place
from zero2llm.layers.linear import Linear
from zero2llm.layers.memory import Memory
from zero2llm.layers.positions.catalog import RotaryConfig
from zero2llm.layers.positions.none import NoPositionConfig
from zero2llm.layers.positions.rope import check_unscaled
from zero2llm.ops.marks import Marks, full_precision, split, wide


@config
class GAUFlashConfig:
    kind: Literal["gau_flash"] = "gau_flash"
    expand: int = 2  # E / D
    key_dim: int = 128  # S
    chunk: int = 256  # C
    position: RotaryConfig = NoPositionConfig()

    def build(self, d_model: int, place: Place = ALONE) -> GAUFlash:
        for name in ("expand", "key_dim", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")
        check_unscaled(self.position)
        return GAUFlash(d_model, self)

    def cost(self, d_model: int) -> Cost:
        d, e, s, c = d_model, self.expand * d_model, self.key_dim, self.chunk
        weights = 3 * d * e + d * s
        mixing = 4 * c * (2 * s + e) + 4 * s * e
        return Cost(weights + 8 * s, 2 * weights + mixing, fixed_state=c * (2 * s + e) + 2 * s * e)


class GAUFlash(nn.Module):
    tp: ClassVar = None  # one head: every unit needs all of z

    def __init__(self, d_model: int, cfg: GAUFlashConfig):
        super().__init__()
        self.width, self.key_dim, self.chunk = cfg.expand * d_model, cfg.key_dim, cfg.chunk
        self.g_proj = Linear(d_model, self.width, bias=False)
        self.v_proj = Linear(d_model, self.width, bias=False)
        self.z_proj = Linear(d_model, cfg.key_dim, bias=False)
        self.o_proj = Linear(self.width, d_model, bias=False)
        self.gamma = nn.Parameter(torch.ones(4, cfg.key_dim))  # near q, near k, far q, far k
        self.beta = nn.Parameter(torch.zeros(4, cfg.key_dim))
        self.position = cfg.position.build(cfg.key_dim)

    def init_state(self, batch: int, max_len: int, *, device=None, dtype=None) -> Memory:
        """k, v: near and far keys, and values, of the current chunk; done, all: sum of k' v^T before it, and with it."""
        C, S, E = self.chunk, self.key_dim, self.width
        return Memory.zeros(batch, device, dtype, k=(C, 2 * S), v=(C, E), done=(S, E), all=(S, E))

    def forward(self, x: Tensor, seq: Seq, state: Memory | None = None) -> tuple[Tensor, Aux]:
        marks = Marks.of(seq, state is not None)
        v, z = F.silu(self.v_proj(x)), F.silu(self.z_proj(x))
        views = self.gamma * z[..., None, :] + self.beta  # (B, T, 4, S)
        views, _ = self.position(views, views, seq)
        q, k = views[..., 0::2, :].flatten(2), views[..., 1::2, :].flatten(2)  # (B, T, 2 S): near, far
        q, k, v = wide(q, k, v)
        with full_precision(x):
            if state is None:
                nothing = self.init_state(len(x), 0, device=x.device, dtype=v.dtype)
                o, _ = mix_chunks(q, k, v, seq.pos, marks, self.chunk, nothing)
            elif x.shape[1] > 1:
                o, total = mix_chunks(q, k, v, seq.pos, marks, self.chunk, state)
                state.write(**remembered(k, v, seq.pos, marks, self.chunk, state), all=total)
            else:
                o, new = mix_step(q, k, v, seq.pos, marks, self.chunk, state)
                state.write(**new)
        return self.o_proj(F.silu(self.g_proj(x)) * o.to(x.dtype)), {}


def mix_chunks(q: Tensor, k: Tensor, v: Tensor, pos: Tensor, marks: Marks, C: int, state: Memory):
    """(o (B, T, E), sum of k' v^T over the last document). q, k (B, T, 2 S) near and far, v (B, T, E), pos (B, T).

    Which tokens meet, and how, follows from document and position alone: the row's chunks only bound the search.
    """
    doc, key_doc = documents(pos, marks)
    old_pos, old_doc = old_places(pos, marks, C)
    size, S = min(C, pos.shape[1]), k.shape[-1] // 2
    cut = lambda x: split(x, size, 1 - x.ndim)  # (B, T, ...) -> (B, n, size, ...)
    q, new_k, new_v, new_doc = cut(q), cut(k), cut(v), cut(key_doc)
    keys, values = with_previous(state["k"], new_k), with_previous(state["v"], new_v)  # (B, n, C + size, ...)
    same = cut(doc)[..., None] == with_previous(old_doc, new_doc)[..., None, :]
    at, key_at = cut(pos)[..., None], with_previous(old_pos, cut(pos))[..., None, :]
    near, far = (same & kind for kind in relations(at, key_at, C))
    far_q = q[..., S:] / n_far(at, C)
    near_scores = (q[..., :S] / C @ keys[..., :S].mT).relu().square()  # (B, n, size, C + size)
    scores = near_scores.where(near, (far_q @ keys[..., S:].mT).where(far, 0.0))

    last = torch.zeros_like(split(pos, size, -1)[..., -1]) if marks.doc is None else marks.chunks(size)[..., -1]
    added = new_k[..., S:].mT @ (new_v * (new_doc == last[..., None])[..., None])  # (B, n, S, E)
    before, owner, total = [state["done"]], [torch.zeros_like(last[:, 0])], state["all"]
    for n, added_n in enumerate(added.unbind(1)):  # what lies before the two chunks that meet, and whose it is
        before.append(total)
        owner.append(last[:, n - 1] if n else owner[0])
        total = (last[:, n] == owner[-1])[:, None, None] * total + added_n
    sees = (cut(doc) == torch.stack(owner[:-1], 1)[..., None])[..., None]
    o = scores @ values + far_q @ torch.stack(before[:-1], 1) * sees
    return o.flatten(1, 2)[:, : pos.shape[1]], total


def relations(at: Tensor, key_at: Tensor, C: int) -> tuple[Tensor, Tensor]:
    """Which tokens meet in which way, by their positions in one document: near, far."""
    return (key_at // C == at // C) & (key_at <= at), key_at // C < at // C


def n_far(pos: Tensor, C: int) -> Tensor:
    """How many tokens of the document lie in chunks before this one (1 for none, whose sum is 0)."""
    return (pos - pos % C).clamp_min(1)


def with_previous(old: Tensor, new: Tensor) -> Tensor:
    """Chunks (B, n, C, ...) behind the one before, ``old`` (B, C, ...) before the first: (B, n, 2 C, ...)."""
    old = old[:, None]
    return torch.cat((old if new.shape[1] == 1 else torch.cat((old, new[:, :-1]), 1), new), 2)


def documents(pos: Tensor, marks: Marks) -> tuple[Tensor, Tensor]:
    """The document of each token (B, T), as a query and as a key: padding is nobody's key."""
    doc = torch.zeros_like(pos) if marks.doc is None else marks.doc
    return doc, doc if marks.real is None else doc.masked_fill(~marks.real, -2)


def old_places(pos: Tensor, marks: Marks, C: int) -> tuple[Tensor, Tensor]:
    """Positions and documents (B, C) of the keys in the state: those of the chunk in which the last token stood."""
    first = pos[:, :1] if marks.real is None else pos.gather(1, marks.real.int().argmax(1, keepdim=True))
    latest = first - 1
    old_pos = latest - latest % C + torch.arange(C, device=pos.device)
    return old_pos, torch.where((old_pos <= latest) & (latest >= 0), 0, -1)


def remembered(k: Tensor, v: Tensor, pos: Tensor, marks: Marks, C: int, state: Memory) -> dict[str, Tensor]:
    """The current chunk's keys and values, and the sum before it, once these tokens have been read."""
    S, (doc, key_doc) = k.shape[-1] // 2, documents(pos, marks)
    mine = key_doc == doc[:, -1:]  # (B, T) of the document that goes on
    end = torch.where(mine, pos, -1).amax(1, keepdim=True) // C  # (B, 1) number of the current chunk
    slot = torch.where(mine & (pos // C == end), pos % C, C)
    closed = mine & (pos // C < end)
    old_chunk, goes_on = old_places(pos, marks, C)[0][:, :1] // C, doc[:, -1:] == 0
    old = torch.where((old_chunk < end)[..., None], state["all"], state["done"]) * goes_on[..., None]
    done = k[..., S:].mT @ (v * closed[..., None]) + old
    none = (end < 0)[..., None]
    return {
        "k": put(state["k"], slot, k),
        "v": put(state["v"], slot, v),
        "done": torch.where(none, state["done"], done),
    }


def put(store: Tensor, slot: Tensor, new: Tensor) -> Tensor:
    """``store`` (B, C, W) with ``new`` (B, T, W) at ``slot`` (B, T); slot C is thrown away."""
    room = F.pad(store, (0, 0, 0, 1))
    return room.scatter(1, slot[..., None].expand_as(new), new)[:, :-1]


def mix_step(q: Tensor, k: Tensor, v: Tensor, pos: Tensor, marks: Marks, C: int, state: Memory):
    """One token (T = 1) by the formula; also the reference of `mix_chunks`."""
    S, here = k.shape[-1] // 2, pos % C  # (B, 1)
    real = torch.ones_like(pos, dtype=torch.bool) if marks.real is None else marks.real
    total = state["all"] * (~real | (pos > 0))[..., None]
    done = torch.where((real & (here == 0))[..., None], total, state["done"])
    keys, values = (put(state[n], torch.where(real, here, C), x) for n, x in (("k", k), ("v", v)))
    near = torch.arange(C, device=pos.device) <= here
    weights = (q[..., :S] @ keys[..., :S].mT / C).relu().square() * near[:, None]  # (B, 1, C)
    o = weights @ values + q[..., S:] @ done / n_far(pos, C)[..., None]
    written = k[..., S:].mT @ v * real[..., None]
    return o, {"k": keys, "v": values, "done": done, "all": total + written}
