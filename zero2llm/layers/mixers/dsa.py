"""DeepSeek sparse attention: a small indexer scores every earlier token, and latent attention reads the best top_k.

    I_ts = sum_h w_th ReLU(q^I_th . k^I_s) / sqrt(H_I K_I)          the lightning indexer: one key per token, H_I queries
    kept(t) = the top_k tokens s <= t of highest I_ts, the same for all heads of the attention
    o_t = MLA over kept(t)
    L_I = mean_t KL(p_t || softmax(I_t)) over kept(t),   p = attention of all heads, averaged        aux "indexer_loss"

    q^I = rotate(W_Q^I c^Q),  k^I = rotate(LayerNorm(W_K^I x)),  w = W_w x          c^Q: MLA's query latent, else x

Source: DeepSeek-V3.2 2512.02556 section 2.1; top_k >= T is its dense warm-up. The indexer learns from L_I alone and the model
from everything else alone: x, c^Q and p are detached. Rotated are the first rope_dim channels, in halves. Left out: the Hadamard
rotation of q^I and k^I and their FP8, which change speed, not the formula.
Why: attention costs top_k keys a token instead of T; the indexer 2 H_I (K_I + 1) FLOPs per token and key. Training here is the
dense mask, computes the attention twice (once for p) and holds H_I T^2 scores; decoding gathers top_k entries.
Stored: MLA's r + rope values per token and layer, and K_I of the index key.
Shapes: x (B, T, D) -> (B, T, D).
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zero2llm.core.config import config
from zero2llm.core.seq import Aux, Seq
from zero2llm.layers.contract import ALONE, Cost, Place
from zero2llm.layers.kv import KVState
from zero2llm.layers.linear import Linear
from zero2llm.layers.mixers.mla import MLAConfig
from zero2llm.layers.norms.layer import LayerNorm
from zero2llm.layers.positions.none import NoPositionConfig
from zero2llm.layers.positions.rope import RoPEConfig
from zero2llm.ops.attend import attend, attention_weights, visible
from zero2llm.ops.marks import wide
from zero2llm.ops.sparse_attend import best, real_tokens


@config
class DSAConfig:
    kind: Literal["dsa"] = "dsa"
    mla: MLAConfig
    index_heads: int = 64  # H_I
    index_dim: int = 128  # K_I
    top_k: int = 2048  # tokens

    def build(self, d_model: int, place: Place = ALONE) -> DSA:
        for name in ("index_heads", "index_dim", "top_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be positive")
        if self.index_dim < self.mla.rope_dim:
            raise ValueError(f"index_dim = {self.index_dim} must hold the mla's rope_dim = {self.mla.rope_dim}")
        return DSA(d_model, self, place)

    @property
    def index_position(self) -> RoPEConfig | NoPositionConfig:
        """MLA's angles on the first rope_dim channels, paired in halves."""
        if not isinstance(self.mla.position, RoPEConfig):
            return self.mla.position
        turned = self.mla.rope_dim if self.mla.position.rotary_dim is None else self.mla.position.rotary_dim
        return replace(self.mla.position, layout="half_split", rotary_dim=turned)

    def source_dim(self, d_model: int) -> int:
        """Width of what the index queries come from."""
        return d_model if self.mla.q_rank is None else self.mla.q_rank

    def cost(self, d_model: int) -> Cost:
        mla, h, k = self.mla.cost(d_model), self.index_heads, self.index_dim
        weights = self.source_dim(d_model) * h * k + d_model * (k + h)
        per_key = mla.flops_per_key + 2 * self.mla.n_heads * (self.mla.nope_dim + self.mla.rope_dim) + 2 * h * (k + 1)
        return Cost(mla.params + weights + 2 * k, mla.flops + 2 * weights, per_key, state=mla.state + k)


class Indexer(nn.Module):
    def __init__(self, d_model: int, d_source: int, cfg: DSAConfig):
        super().__init__()
        self.head_dim, self.scale = cfg.index_dim, (cfg.index_heads * cfg.index_dim) ** -0.5
        self.q_proj = Linear(d_source, cfg.index_heads * cfg.index_dim, bias=False)
        self.k_proj = Linear(d_model, cfg.index_dim, bias=False)
        self.k_norm = LayerNorm(cfg.index_dim, 1e-6, bias=True)
        self.w_proj = Linear(d_model, cfg.index_heads, bias=False)
        self.position = cfg.index_position.build(cfg.index_dim)

    def forward(self, x: Tensor, source: Tensor, seq: Seq) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, H_I, T, K_I), k (B, 1, T, K_I) and the scaled weights (B, H_I, T, 1)."""
        q, k = self.q_proj(source).unflatten(-1, (-1, self.head_dim)), self.k_norm(self.k_proj(x))[:, :, None]
        q, k = self.position(q, k, seq)
        return q.transpose(1, 2), k.transpose(1, 2), (self.w_proj(x) * self.scale).transpose(1, 2)[..., None]


def index_scores(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """I, (B, 1, T, S), in fp32 or wider (under autocast the products are not)."""
    q, k, w = wide(q, k, w)
    return (w * F.relu(q @ k.transpose(-1, -2))).sum(1, keepdim=True)


def index_loss(scores: Tensor, p: Tensor, kept: Tensor, seq: Seq) -> Tensor:
    """Mean over real tokens of KL(p || softmax of the scores over kept), nats. All (B, 1, T, S)."""
    log_q = scores.masked_fill(~kept, -torch.inf).log_softmax(-1).masked_fill(~kept, 0.0)
    real = real_tokens(seq)
    divergence = (torch.special.xlogy(p, p) - p * log_q).sum(-1)[:, 0]  # (B, T)
    return (divergence * real).sum() / real.sum().clamp(min=1)


class DSA(nn.Module):
    tp: ClassVar = None  # p is a sum over all heads
    whole_rows: ClassVar = True  # the indexer's loss is a mean over all tokens

    def __init__(self, d_model: int, cfg: DSAConfig, place: Place):
        super().__init__()
        self.mla = cfg.mla.build(d_model, place)
        self.indexer = Indexer(d_model, cfg.source_dim(d_model), cfg)
        self.top_k = cfg.top_k

    def init_state(self, batch: int, max_len: int, *, device=None, dtype=None) -> KVState:
        """MLA's entries as keys, the index keys as values."""
        width = self.mla.rank + self.mla.rope
        return KVState.empty(batch, 1, max_len, width, self.indexer.head_dim, False, device, dtype)

    def forward(self, x: Tensor, seq: Seq, state: KVState | None = None) -> tuple[Tensor, Aux]:
        q, entry, source = self.mla.project(x, seq)
        index_q, index_k, w = self.indexer(x.detach(), source.detach(), seq)
        if state is None:
            mask = seq.once(("visible", None, True), lambda: visible(seq, None, True))
        else:
            entry, index_k, mask, _ = state.extend(entry, index_k, seq, None)
        scores = index_scores(index_q, index_k, w)
        kept = best(scores.detach(), self.top_k, mask)
        if state is not None and x.shape[1] == 1:
            return self.mla.mix(self.mla.absorbed(q, entry, kept, self.top_k)), {}
        k, v = self.mla.unpack(entry)
        y = self.mla.mix(attend(q, k, v, kept, self.mla.scale))
        if state is not None:
            return y, {}
        with torch.no_grad():
            p = attention_weights(*wide(q, k), kept, self.mla.scale).mean(1, keepdim=True)
        return y, {"indexer_loss": index_loss(scores, p, kept, seq)}
