"""Grouped-query attention: H query heads share G key/value heads; the page of every plain softmax attention.

    q = W_q x,  k = W_k x,  v = W_v x                  split into H, G, G heads of width K
    q, k = rotate(norm(q)), rotate(norm(k))            norm only with qk_norm, rotate as the position module says
    o_i  = sum_{j <= i} softmax_j(q_i . k_j / sqrt(K)) v_j         query head h reads key head h // (H / G)
    y    = W_o o                                       with gate: W_o (sigmoid(W_g x) * o)

    window    i sees j only while i - j < window       sink     a logit per head that takes weight and gives nothing
    softcap   scores s become c tanh(s / c)            ALiBi    as a position: scores - m_h (i - j)

Source: MHA 1706.03762 eq. 1; MQA (G = 1) 1911.02150; GQA 2305.13245; sliding window 2004.05150 and Mistral
2310.06825 (the token itself counted); QK-norm before the rotation: per head as in Qwen3 (2505.09388) and Gemma 3, or over
all heads at once as in OLMo 2 (2501.00656); soft-cap Gemma 2 (2408.00118); learned sink gpt-oss (2508.10925), not
StreamingLLM's cache policy; output gate Qwen3-Next (2505.06708).
Why: G < H divides the cache by H / G. Stored per token and layer: 2 G K values; a window caps the tokens at `window`.
FLOPs per token: 2 D K (2H + 2G) for the projections + 4 H K * (tokens seen). A soft-cap or a sink gives up the fused
kernel and holds H T^2 weights.
Shapes: x (B, T, D) -> (B, T, D).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from zero2llm.core.config import config
from zero2llm.core.seq import Aux, Seq
from zero2llm.layers.contract import ALONE, Cost, Place
from zero2llm.layers.heads import grouped_heads
from zero2llm.layers.kv import KVState
from zero2llm.layers.linear import Linear
from zero2llm.layers.norms.rms import RMSNorm, check_eps
from zero2llm.layers.positions.alibi import ALiBi
from zero2llm.layers.positions.catalog import AttentionPositionConfig
from zero2llm.layers.positions.none import NoPositionConfig
from zero2llm.layers.positions.rope import check_unscaled
from zero2llm.ops.attend import attend, attention_weights, visible


@config
class GQAConfig:
    kind: Literal["gqa"] = "gqa"
    n_heads: int
    n_kv_heads: int | None = None  # None = n_heads (MHA); 1 = MQA
    head_dim: int | None = None  # None = d_model / n_heads
    window: int | None = None  # tokens a query sees, itself included; None = all
    qk_norm: bool = False
    qk_norm_span: Literal["head", "all"] = "head"  # what one norm covers
    qk_norm_plus_one: bool = False  # scale 1 + w
    qkv_bias: bool = False
    out_bias: bool = False
    norm_eps: float = 1e-6  # of the QK-norm
    position: AttentionPositionConfig = NoPositionConfig()
    scale: float | None = None  # of the scores; None = 1 / sqrt(head_dim)
    softcap: float | None = None
    sink: bool = False
    gate: bool = False

    def build(self, d_model: int, place: Place = ALONE) -> GQA:
        n_kv, head_dim = self.widths(d_model)
        check_eps(self.norm_eps)
        check_unscaled(self.position)
        if self.window is not None and self.window < 1:
            raise ValueError(f"window = {self.window} must be at least 1 (the token itself)")
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError(f"softcap = {self.softcap} must be positive")
        if self.scale is not None and self.scale <= 0:
            raise ValueError(f"scale = {self.scale} must be positive")
        if not self.qk_norm and (self.qk_norm_plus_one or self.qk_norm_span != "head"):
            raise ValueError("qk_norm_plus_one and qk_norm_span need qk_norm: true")
        return GQA(d_model, self.n_heads, n_kv, head_dim, self)

    def widths(self, d_model: int) -> tuple[int, int]:
        """(G, K). Raises ValueError for what cannot be built."""
        return grouped_heads(d_model, self.n_heads, self.n_kv_heads, self.head_dim)

    def cost(self, d_model: int) -> Cost:
        """Saved: the input, q and k around the QK-norm with a scale each, cos and sin, q k v, output, logsumexp."""
        d, h, (g, k) = d_model, self.n_heads, self.widths(d_model)
        weights = d * k * ((2 + self.gate) * h + 2 * g)
        biases = self.qkv_bias * k * (h + 2 * g) + self.out_bias * d
        norms = self.qk_norm * (2 * k if self.qk_norm_span == "head" else (h + g) * k)
        normed = self.qk_norm * (2 * (h + g) * k + (h + g if self.qk_norm_span == "head" else 2))
        angles = self.position.saved(k)
        unusual = self.softcap or self.sink or self.gate or angles is None
        saved = None if unusual else d + normed + angles + 2 * h * k + 2 * g * k + h
        params = weights + biases + norms + self.sink * h
        return Cost(params, 2 * weights, 4 * h * k, self.window, 2 * g * k, saved=saved)


class GQA(nn.Module):
    tp: ClassVar = {"q_proj": "col", "k_proj": "col", "v_proj": "col", "g_proj": "col", "sinks": "col", "o_proj": "row"}

    def __init__(self, d_model: int, n_heads: int, n_kv: int, head_dim: int, cfg: GQAConfig):
        super().__init__()
        self.head_dim, self.window, self.n_kv = head_dim, cfg.window, n_kv
        self.q_proj = Linear(d_model, n_heads * head_dim, bias=cfg.qkv_bias)
        self.k_proj = Linear(d_model, n_kv * head_dim, bias=cfg.qkv_bias)
        self.v_proj = Linear(d_model, n_kv * head_dim, bias=cfg.qkv_bias)
        self.o_proj = Linear(n_heads * head_dim, d_model, bias=cfg.out_bias)
        self.norm_all = cfg.qk_norm_span == "all"
        norm = lambda heads: RMSNorm(head_dim * (heads if self.norm_all else 1), cfg.norm_eps, cfg.qk_norm_plus_one)
        self.q_norm = norm(n_heads) if cfg.qk_norm else nn.Identity()
        self.k_norm = norm(n_kv) if cfg.qk_norm else nn.Identity()
        self.position = cfg.position.build(head_dim, n_heads)
        if self.norm_all or isinstance(self.position, ALiBi):
            self.tp = None  # one norm over all heads, or slopes numbered over all heads
        self.scale, self.softcap = cfg.scale, cfg.softcap
        self.sinks = nn.Parameter(torch.zeros(n_heads)) if cfg.sink else None
        self.g_proj = Linear(d_model, n_heads * head_dim, bias=False) if cfg.gate else None

    def init_state(self, batch: int, max_len: int, *, device=None, dtype=None) -> KVState:
        ring = self.window is not None and self.window < max_len
        slots = self.window if ring else max_len
        return KVState.empty(batch, self.n_kv, slots, self.head_dim, self.head_dim, ring, device, dtype)

    def project(self, x: Tensor, seq: Seq) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries, keys, and values, (B, H or G, T, K)."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.norm_all:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (p.unflatten(-1, (-1, self.head_dim)) for p in (q, k, v))  # (B, T, H, K)
        if not self.norm_all:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self.position(q, k, seq)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def forward(self, x: Tensor, seq: Seq, state: KVState | None = None) -> tuple[Tensor, Aux]:
        q, k, v = self.project(x, seq)
        if state is None:
            mask, k_pos = self.visible(seq), seq.pos
        else:
            k, v, mask, k_pos = state.extend(k, v, seq, self.window)
        mask = self.biased(mask, seq, k_pos, q.dtype)
        o = attend(q, k, v, mask, self.scale, self.softcap, self.sinks)  # (B, H, T, K)
        o = o.transpose(1, 2).flatten(2)
        if self.g_proj is not None:
            o = o * self.g_proj(x).sigmoid()
        return self.o_proj(o), {}

    def visible(self, seq: Seq) -> Tensor | None:
        """(B, 1, T, T) bool, once per pass; None = plain causal."""
        explicit = isinstance(self.position, ALiBi)
        return seq.once(("visible", self.window, explicit), lambda: visible(seq, self.window, explicit))

    def biased(self, mask: Tensor | None, seq: Seq, k_pos: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The mask with ALiBi's bias, a float (B, H, T, S); any other position leaves it as it is."""
        if not isinstance(self.position, ALiBi):
            return mask
        key = ("alibi", self.position.n_heads, self.window, mask.shape)
        return seq.once(key, lambda: self.position.bias(seq.pos, k_pos, mask, dtype))

    @torch.no_grad()
    def weights(self, x: Tensor, seq: Seq) -> Tensor:
        """(B, H, T, T) attention probabilities, to look at."""
        q, k, _ = self.project(x, seq)
        mask = self.biased(self.visible(seq), seq, seq.pos, q.dtype)
        return attention_weights(q, k, mask, self.scale, self.softcap, self.sinks)
