"""Performer (FAVOR+): softmax attention estimated by linear attention over random positive features.

    phi(x) = exp(W x' - |x'|^2 / 2) / sqrt(M)          x' = x / K^(1/4);  rows of W orthogonal, long as Gaussian vectors
    E[phi(q) . phi(k)] = exp(q . k / sqrt(K))
    o_t = sum_{s <= t} phi(q_t) . phi(k_s) v_s  /  sum_{s <= t} phi(q_t) . phi(k_s)

Source: 2009.14794 sections 2.3 (positive features), 2.4 (orthogonal). All heads share W.
exp overflows, so the largest exponent is taken out. For q that is one number a token and cancels. For k it must be the
same for all keys of a sum: the paper takes the maximum over the whole text, which lets the past see the future. Here
it is the *running* maximum m_t of the document: keys are written as exp(. - m_t) and the sums so far are scaled by
exp(m_(t-1) - m_t) <= 1, which is the decay of ops/scan.py. m is state like the sums, and cancels: no gradient.
No constant is added to the features (the paper's code: 1e-4), so that only the estimate's own error remains: it falls
as M^(-1/2) and grows as exp(|q|^2), so q and k want to be small; a denominator below 1e-19 in fp32 counts as that
much.
W is drawn once, from torch's generator when the layer is built, and stored in checkpoints; the paper redraws it in
training, which would make the sums that decoding keeps worthless.
Why: cost linear in T; decoding keeps H (M (V + 1) + 1) values. Replace phi by elu + 1 and it is linear attention.
Shapes: x (B, T, D) -> (B, T, D); features (B, H, T, M).
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
from zero2llm.ops.marks import Marks, full_precision, wide
from zero2llm.ops.scan import CHUNK, scan


@config
class PerformerConfig:
    kind: Literal["performer"] = "performer"
    n_heads: int
    head_dim: int | None = None  # None = d_model / n_heads
    n_features: int = 256  # M; theory asks for some K log K
    position: RotaryConfig = NoPositionConfig()
    chunk: int = CHUNK

    def build(self, d_model: int, place: Place = ALONE) -> Performer:
        return Performer(d_model, self.width(d_model), self)

    def width(self, d_model: int) -> int:
        """K. Raises ValueError for what cannot be built."""
        check_unscaled(self.position)
        if self.n_heads < 1 or (self.head_dim is None and d_model % self.n_heads):
            raise ValueError(f"d_model = {d_model} must be a multiple of n_heads = {self.n_heads}, or give head_dim")
        for name in ("n_features", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")
        if self.head_dim is not None and self.head_dim < 1:
            raise ValueError(f"head_dim = {self.head_dim} must be at least 1")
        return d_model // self.n_heads if self.head_dim is None else self.head_dim

    def cost(self, d_model: int) -> Cost:
        h, m, k = self.n_heads, self.n_features, self.width(d_model)
        weights = 4 * d_model * h * k
        mixing = h * (4 * k * m + 4 * m * (k + 1) + 2 * self.chunk * (m + k + 1))
        return Cost(weights, 2 * weights + mixing, fixed_state=h * (m * (k + 1) + 1))


class Performer(nn.Module):
    tp: ClassVar = {"q_proj": "col", "k_proj": "col", "v_proj": "col", "o_proj": "row"}

    def __init__(self, d_model: int, head_dim: int, cfg: PerformerConfig):
        super().__init__()
        self.head_dim, self.n_heads, self.chunk = head_dim, cfg.n_heads, cfg.chunk
        self.q_proj = Linear(d_model, cfg.n_heads * head_dim, bias=False)
        self.k_proj = Linear(d_model, cfg.n_heads * head_dim, bias=False)
        self.v_proj = Linear(d_model, cfg.n_heads * head_dim, bias=False)
        self.o_proj = Linear(cfg.n_heads * head_dim, d_model, bias=False)
        self.position = cfg.position.build(head_dim)
        self.register_buffer("W", orthogonal_gaussian(cfg.n_features, head_dim))

    def init_state(self, batch: int, max_len: int, *, device=None, dtype=None) -> Memory:
        sums = (self.n_heads, len(self.W), self.head_dim + 1)
        return Memory.zeros(batch, device, dtype, S=sums, top=(self.n_heads,))

    def exponents(self, x: Tensor) -> Tensor:
        """log(sqrt(M) phi(x)), (B, T, H, K) -> (B, H, T, M)."""
        x, W = wide(x.transpose(1, 2) * self.head_dim**-0.25, self.W)
        with full_precision(x):
            return x @ W.t() - x.square().sum(-1, keepdim=True) / 2

    def forward(self, x: Tensor, seq: Seq, state: Memory | None = None) -> tuple[Tensor, Aux]:
        marks = Marks.of(seq, state is not None)
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (self.exponents(part) for part in self.position(q, k, seq))
        if marks.real is not None:
            k = k.masked_fill(~marks.real[:, None, :, None], -torch.inf)
        top, decay = running_top(k, marks, None if state is None else state["top"])  # (B, H, T)
        q = (q - q.detach().amax(-1, keepdim=True)).exp()
        k = (k - top[..., None]).exp()
        v = F.pad(v.transpose(1, 2), (0, 1), value=1.0)  # the denominator is one more value channel
        o, S = scan(q, k, v, decay, marks, None if state is None else state["S"], self.chunk)
        if state is not None:
            state.write(S=S, top=top[..., -1])
        least = torch.finfo(o.dtype).tiny ** 0.5  # its square, in the gradient, is still above 0
        o = o[..., :-1] / o[..., -1:].clamp_min(least)
        return self.o_proj(o.transpose(1, 2).flatten(2).to(x.dtype)), {}


def orthogonal_gaussian(rows: int, width: int) -> Tensor:
    """(rows, width): blocks of ``width`` orthogonal rows of uniform direction, each as long as a Gaussian vector."""
    blocks = []
    for _ in range(-(-rows // width)):
        Q, R = torch.linalg.qr(torch.randn(width, width))
        blocks.append(Q * R.diagonal().sign())  # without the sign QR's directions are not uniform
    return torch.cat(blocks)[:rows] * torch.randn(rows, width).norm(dim=1, keepdim=True)


@torch.no_grad()
def running_top(k: Tensor, marks: Marks, carried: Tensor | None) -> tuple[Tensor, Tensor]:
    """From exponents k (B, H, T, M): the largest so far in the document, (B, H, T), and by how much it rose, <= 0.

    A maximum that restarts at documents is not `cummax`; doubling the reach log2(T) times is, and is exact.
    """
    top = k.amax(-1).clamp_min(torch.finfo(k.dtype).min)  # padding: finite, so that differences are
    T, doc = top.shape[-1], marks.doc
    if carried is not None:
        first = doc[:, None, :] == 0
        top = torch.where(first, torch.maximum(top, carried[..., None]), top)
    reach = 1
    while reach < T:
        before = F.pad(top, (reach, 0), value=torch.finfo(k.dtype).min)[..., :T]
        if doc is not None:
            before = torch.where((doc == F.pad(doc, (reach, 0), value=-1)[:, :T])[:, None], before, top)
        top = torch.maximum(top, before)
        reach *= 2
    before = torch.cat((top[..., :1] if carried is None else carried[..., None], top[..., :-1]), -1)
    rose = before - top
    if doc is not None:
        same = doc == F.pad(doc, (1, 0))[:, :T]
        rose = torch.where(same[:, None], rose, torch.zeros_like(rose))
    return top, rose
