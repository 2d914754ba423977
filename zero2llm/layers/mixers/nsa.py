"""Native sparse attention: each query reads summaries of all blocks, a few blocks in full, and the last tokens.

    cmp   k~_i = f_k(k_(id) .. k_(id + l - 1) + P),  v~_i likewise;  p = softmax(q . k~_i / sqrt(K)) over complete blocks i
    slc   importance of block j of l' tokens = sum over the group's heads and over i of p_i * (units of d shared by i and j)
          full attention inside the n best blocks j; the first, the own and the one before it are always among them
    win   full attention to the last w tokens, itself counted
    o = g_cmp o_cmp + g_slc o_slc + g_win o_win,    g = sigmoid(W_g x), three per head;    y = W_o o

Source: NSA 2502.11089 section 3.2-3.3, eq. 5-11: each branch has keys and values of its own; f is an MLP over a block with
learned places P inside it; eq. 9 counts from 1, and is the overlap in units of the stride d. Left open by the paper: f is
shared by the heads; a summary is rotated as its block's first token, not the tokens before f; the gate is one layer.
Why: a query meets T / d + n l' + w keys instead of T. Training here is the dense mask; decoding gathers. Stored per token
and layer: 2 G K values and 2 G K per d tokens, whatever the length 2 G K (w + l). Gradients reach f through o_cmp alone.
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
from zero2llm.layers.heads import grouped_heads
from zero2llm.layers.kv import KVState
from zero2llm.layers.linear import Linear
from zero2llm.layers.memory import Both, Memory
from zero2llm.layers.positions.catalog import RotaryConfig
from zero2llm.layers.positions.none import NoPositionConfig
from zero2llm.layers.positions.rope import check_unscaled
from zero2llm.ops.attend import attend, visible
from zero2llm.ops.marks import wide
from zero2llm.ops.sparse_attend import Blocks, attend_blocks, best, overlap, places, summaries


@config
class NSAConfig:
    kind: Literal["nsa"] = "nsa"
    n_heads: int
    n_kv_heads: int | None = None  # groups, each with one choice of blocks; None = n_heads
    head_dim: int | None = None  # None = d_model / n_heads
    span: int = 32  # l, tokens of a summary
    stride: int = 16  # d, from one summary to the next
    hidden: int | None = None  # width inside f; None = head_dim
    block: int = 64  # l', tokens of a block that is read in full
    top_k: int = 16  # n
    window: int = 512  # w
    position: RotaryConfig = NoPositionConfig()

    def build(self, d_model: int, place: Place = ALONE) -> NSA:
        self.widths(d_model)
        return NSA(d_model, self)

    def widths(self, d_model: int) -> tuple[int, int]:
        """(G, K). Raises ValueError for what cannot be built."""
        for name in ("hidden", "stride", "window"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be positive")
        if self.span % self.stride or self.block % self.stride or not self.stride <= self.span <= self.block:
            raise ValueError(
                f"stride = {self.stride} must divide span = {self.span} and block = {self.block}, and span not exceed block"
            )
        if self.top_k < 3:
            raise ValueError(
                f"top_k = {self.top_k} must be at least 3: the first, the own and the block before it are kept"
            )
        check_unscaled(self.position)
        return grouped_heads(d_model, self.n_heads, self.n_kv_heads, self.head_dim)

    def cost(self, d_model: int) -> Cost:
        """The ring of the window counts as fp32, though it has the model's number format; scoring the blocks from the
        summaries' weights, 2 G (T / d) (T / l') FLOPs per token, is left out."""
        (g, k), h, d = self.widths(d_model), self.n_heads, d_model
        m, kv = k if self.hidden is None else self.hidden, 2 * g * k
        weights, f = 2 * d * h * k + 3 * d * kv + 3 * d * h, 2 * m * (self.span * k + k)
        params = weights + f + 2 * (self.span * k + m + k)
        per_key = 4 * h * k * 2 + 4 * h * k // self.stride
        return Cost(
            params, 2 * weights + 2 * g * f // self.stride, per_key, state=kv,
            fixed_state=kv * (self.span + self.window), block=self.stride, block_state=kv,
        )  # fmt: skip


class Summary(nn.Module):
    """f: the tokens of a block and their places in it, through one hidden layer. (..., l, K) -> (..., K)."""

    def __init__(self, span: int, head_dim: int, hidden: int):
        super().__init__()
        self.places = nn.Parameter(torch.randn(span, head_dim) * 0.02)
        self.hidden = Linear(span * head_dim, hidden)
        self.out = Linear(hidden, head_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.silu(self.hidden((x + self.places).flatten(-2))))


class NSA(nn.Module):
    tp: ClassVar = {"q_proj": "col", "k_proj": "col", "v_proj": "col", "g_proj": "col", "o_proj": "row"}

    def __init__(self, d_model: int, cfg: NSAConfig):
        super().__init__()
        self.n_kv, self.head_dim = cfg.widths(d_model)
        self.span, self.stride, self.window = cfg.span, cfg.stride, cfg.window
        self.block, self.top_k, self.scale = cfg.block, cfg.top_k, self.head_dim**-0.5
        self.q_proj = Linear(d_model, cfg.n_heads * self.head_dim, bias=False)
        self.k_proj = Linear(d_model, self.n_kv * 3 * self.head_dim, bias=False)  # of each head: cmp, slc, win
        self.v_proj = Linear(d_model, self.n_kv * 3 * self.head_dim, bias=False)
        self.g_proj = Linear(d_model, cfg.n_heads * 3, bias=False)
        self.o_proj = Linear(cfg.n_heads * self.head_dim, d_model, bias=False)
        hidden = self.head_dim if cfg.hidden is None else cfg.hidden
        self.k_summary = Summary(cfg.span, self.head_dim, hidden)
        self.v_summary = Summary(cfg.span, self.head_dim, hidden)
        self.position = cfg.position.build(self.head_dim, cfg.n_heads)

    def init_state(self, batch: int, max_len: int, *, device=None, dtype=None) -> Both:
        """Keys and values of slc, a ring of win's, and cmp's: every summary, and the tokens that the next ones need."""
        new = lambda slots, ring: KVState.empty(
            batch, self.n_kv, slots, self.head_dim, self.head_dim, ring, device, dtype
        )
        width = 2 * self.n_kv * self.head_dim
        shapes = {"tail": (self.span - 1, width), "stored": (max_len // self.stride + 1, width)}
        return Both(new(max_len, False), new(self.window, True), Memory.zeros(batch, device, dtype, **shapes))

    def forward(self, x: Tensor, seq: Seq, state: Both | None = None) -> tuple[Tensor, Aux]:
        slc, win, cmp = (None, None, None) if state is None else state.parts
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # (B, T, H, K)
        k, v = (p(x).unflatten(-1, (-1, 3, self.head_dim)) for p in (self.k_proj, self.v_proj))  # (B, T, G, 3, K)
        raw = torch.cat((k[..., 0, :].flatten(2), v[..., 0, :].flatten(2)), -1)
        q, k = self.position(q, k[..., 1:, :].flatten(2, 3), seq)
        k_slc, k_win = k.unflatten(2, (-1, 2)).permute(3, 0, 2, 1, 4)  # (B, G, T, K) each
        v_slc, v_win = v[..., 1:, :].permute(3, 0, 2, 1, 4)
        q, blocks = q.transpose(1, 2), summaries(raw, seq, self.span, self.stride, self.summarise, cmp)
        o_cmp, p = self.compressed(q, blocks)
        o_slc = self.selected(q, k_slc, v_slc, p, blocks, seq, slc)
        if win is None:
            mask = seq.once(("visible", self.window, True), lambda: visible(seq, self.window, True))
        else:
            k_win, v_win, mask, _ = win.extend(k_win, v_win, seq, self.window)
        o_win = attend(q, k_win, v_win, mask)
        g = self.g_proj(x).sigmoid().unflatten(-1, (-1, 3)).transpose(1, 2)  # (B, H, T, 3)
        o = g[..., :1] * o_cmp + g[..., 1:2] * o_slc + g[..., 2:] * o_win
        return self.o_proj(o.transpose(1, 2).flatten(2)), {}

    def summarise(self, raw: Tensor, start: Tensor) -> Tensor:
        """Keys and values of blocks (B, N, l, 2 G K) that begin at ``start`` (B, N) -> (B, N, 2 G K)."""
        k, v = raw.unflatten(-1, (2, -1, self.head_dim)).permute(3, 0, 1, 4, 2, 5)  # (B, N, G, l, K) each
        k, v = self.k_summary(k), self.v_summary(v)
        k = self.position(k, k, Seq(start))[1]
        return torch.cat((k.flatten(2), v.flatten(2)), -1)

    def compressed(self, q: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
        """Attention to the summaries (B, H, T, K), 0 where there is none yet, and its weights (B, H, T, N)."""
        kv = blocks.x.unflatten(-1, (2, -1, self.head_dim)).permute(2, 0, 3, 1, 4)  # (2, B, G, N, K)
        k, v = kv.repeat_interleave(q.shape[1] // kv.shape[2], 2)
        seen = blocks.seen[:, None]
        scores = q @ k.transpose(-1, -2) * self.scale
        p = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1) * seen
        return p @ v, p

    def selected(
        self, q: Tensor, k: Tensor, v: Tensor, p: Tensor, blocks: Blocks, seq: Seq, state: KVState | None
    ) -> Tensor:
        """Attention inside the blocks that ``p`` makes important, (B, H, T, K)."""
        if state is None:
            mask, pos = seq.once(("visible", None, True), lambda: visible(seq, None, True)), places(seq)
            key_pos, length = pos, q.shape[2]
        else:
            pos, length = seq.pos, state.slots
            k, v, mask, key_pos = state.extend(k, v, seq, None)
        n = -(-length // self.block)
        own, block = ((x // self.block).clamp(0, n - 1) for x in (pos, key_pos))
        chosen = self.choose(p.unflatten(1, (k.shape[1], -1)).sum(2), blocks.number, own, n)
        return attend_blocks(q, k, v, chosen, block, mask, self.top_k * self.block)

    @torch.no_grad()
    def choose(self, p: Tensor, number: Tensor, own: Tensor, n: int) -> Tensor:
        """(B, G, T, n) bool: the blocks that a group reads, from its weights p (B, G, T, N) on the summaries."""
        (p,) = wide(p)
        importance = p @ overlap(number, self.span, self.stride, self.block, n)[:, None].to(p.dtype)
        j, own = torch.arange(n, device=p.device), own[:, None, :, None]
        always = (j == 0) | (j == own) | (j == own - 1)
        return best(importance.masked_fill(always, torch.inf), self.top_k, j <= own)
