"""Multi-head latent attention: keys and values of all heads are unpacked from one short vector per token.

    c_t = norm(W_DKV x_t)  (rank r),    k^R_t = rotate(W_KR x_t)          one rotated key, shared by all heads
    [k^C_h ; v_h] = W_UKV,h c_t         [q^C_h ; q^R_h] = W_UQ,h norm(W_DQ x_t),  q^R_h rotated   (or W_Q,h x_t)
    s_ij = (q^C_i . k^C_j + q^R_i . k^R_j) / sqrt(nope + rope),    y = W_o [softmax(s_h) v_h]_h

    absorbed:  q^C . k^C_j = (W_UK^T q^C) . c_j,    o = W_UV sum_j p_j c_j          nothing is unpacked

Source: DeepSeek-V2 2405.04434 section 2.1, DeepSeek-V3 2412.19437 section 2.1.1; without rotation Kimi Linear 2510.26692
section 3. kv_a_proj = [W_DKV ; W_KR], kv_b_proj holds [W_UK,h ; W_UV,h] head by head. YaRN's mscale_all_dim: `position`.
Why: stored per token and layer: r + rope values, whatever the number of heads (V3: 576; as MHA: 40,960). Several tokens
run expanded, 2 H (nope + rope + v) FLOPs per token and key; one new token absorbed, 2 H (2 r + rope), which reads r + rope
values a key instead of unpacking the whole memory. The absorbed form reads kv_b_proj's weight itself, so an adapter on it
has to be merged for decoding.
Shapes: x (B, T, D) -> (B, T, D).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from zero2llm.core.config import config
from zero2llm.core.seq import Aux, Seq
from zero2llm.layers.contract import ALONE, Cost, Place
from zero2llm.layers.kv import KVState
from zero2llm.layers.linear import Linear
from zero2llm.layers.norms.rms import RMSNorm, check_eps
from zero2llm.layers.positions.catalog import RotaryConfig
from zero2llm.layers.positions.rope import RoPEConfig
from zero2llm.ops.attend import attend, visible
from zero2llm.ops.sparse_attend import attend_one


@config
class MLAConfig:
    kind: Literal["mla"] = "mla"
    n_heads: int
    kv_rank: int  # r
    q_rank: int | None = None  # None = queries straight from x
    nope_dim: int  # channels of a key that differ from head to head
    rope_dim: int  # channels of the shared, rotated key
    v_dim: int
    position: RotaryConfig = RoPEConfig(layout="interleaved")
    norm_eps: float = 1e-6  # of the two latent norms
    scale: float | None = None  # of the scores; None = 1 / sqrt(nope_dim + rope_dim), times YaRN's factor

    def build(self, d_model: int, place: Place = ALONE) -> MLA:
        check_eps(self.norm_eps)
        for name in ("n_heads", "kv_rank", "nope_dim", "v_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be positive")
        for name in ("kv_rank", "q_rank"):
            rank = getattr(self, name)
            if rank is not None and not 1 <= rank <= d_model:
                raise ValueError(f"{name} = {rank} must be between 1 and d_model = {d_model}: it compresses")
        if self.rope_dim < (2 if isinstance(self.position, RoPEConfig) else 0):
            raise ValueError(
                f"rope_dim = {self.rope_dim} leaves nothing to rotate: 2 or more, or position: {{kind: none}}"
            )
        if self.scale is not None and not self.scale > 0:
            raise ValueError(f"scale = {self.scale} must be positive")
        return MLA(d_model, self)

    def cost(self, d_model: int) -> Cost:
        d, h, r, qk = d_model, self.n_heads, self.kv_rank, self.nope_dim + self.rope_dim
        query = d * h * qk if self.q_rank is None else self.q_rank * (d + h * qk)
        weights = query + d * (r + self.rope_dim) + r * h * (self.nope_dim + self.v_dim) + h * self.v_dim * d
        norms = r + (0 if self.q_rank is None else self.q_rank)
        return Cost(weights + norms, 2 * weights, 2 * h * (qk + self.v_dim), state=r + self.rope_dim)

    @property
    def score_scale(self) -> float:
        factor = self.position.score_factor if isinstance(self.position, RoPEConfig) else 1.0
        return factor * (self.nope_dim + self.rope_dim) ** -0.5 if self.scale is None else self.scale


class MLA(nn.Module):
    tp: ClassVar = {"q_proj": "col", "q_b_proj": "col", "kv_b_proj": "col", "o_proj": "row"}

    def __init__(self, d_model: int, cfg: MLAConfig):
        super().__init__()
        self.nope, self.rope, self.v_dim, self.rank = cfg.nope_dim, cfg.rope_dim, cfg.v_dim, cfg.kv_rank
        width = cfg.n_heads * (self.nope + self.rope)
        if cfg.q_rank is None:
            self.q_proj, self.q_a_proj = Linear(d_model, width, bias=False), None
        else:
            self.q_a_proj = Linear(d_model, cfg.q_rank, bias=False)
            self.q_a_norm = RMSNorm(cfg.q_rank, cfg.norm_eps)
            self.q_b_proj = Linear(cfg.q_rank, width, bias=False)
        self.kv_a_proj = Linear(d_model, self.rank + self.rope, bias=False)
        self.kv_a_norm = RMSNorm(self.rank, cfg.norm_eps)
        self.kv_b_proj = Linear(self.rank, cfg.n_heads * (self.nope + self.v_dim), bias=False)
        self.o_proj = Linear(cfg.n_heads * self.v_dim, d_model, bias=False)
        self.position = cfg.position.build(self.rope)
        self.scale = cfg.score_scale

    def init_state(self, batch: int, max_len: int, *, device=None, dtype=None) -> KVState:
        return KVState.empty(batch, 1, max_len, self.rank + self.rope, 0, False, device, dtype)

    def forward(self, x: Tensor, seq: Seq, state: KVState | None = None) -> tuple[Tensor, Aux]:
        q, entry, _ = self.project(x, seq)
        if state is None:
            mask = seq.once(("visible", None, False), lambda: visible(seq))
            return self.mix(self.expanded(q, entry, mask)), {}
        entry, _, mask, _ = state.extend(entry, entry[..., :0], seq, None)
        if x.shape[1] == 1:
            return self.mix(self.absorbed(q, entry, mask, entry.shape[2])), {}
        return self.mix(self.expanded(q, entry, mask)), {}

    def project(self, x: Tensor, seq: Seq) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, T, nope + rope), entries [c ; k^R] (B, 1, T, r + rope), and what the queries are made of."""
        source = x if self.q_a_proj is None else self.q_a_norm(self.q_a_proj(x))
        q = (self.q_proj if self.q_a_proj is None else self.q_b_proj)(source)
        q_nope, q_rope = q.unflatten(-1, (-1, self.nope + self.rope)).split((self.nope, self.rope), -1)
        latent, k_rope = self.kv_a_proj(x)[:, :, None].split(
            (self.rank, self.rope), -1
        )  # (B, T, 1, r), (B, T, 1, rope)
        q_rope, k_rope = self.position(q_rope, k_rope, seq)
        q, entry = torch.cat((q_nope, q_rope), -1), torch.cat((self.kv_a_norm(latent), k_rope), -1)
        return q.transpose(1, 2), entry.transpose(1, 2), source

    def unpack(self, entry: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (B, H, S, nope + rope) and values (B, H, S, V) of entries (B, 1, S, r + rope)."""
        latent, k_rope = entry[:, 0].split((self.rank, self.rope), -1)
        kv = self.kv_b_proj(latent).unflatten(-1, (-1, self.nope + self.v_dim)).transpose(1, 2)
        k_nope, v = kv.split((self.nope, self.v_dim), -1)
        return torch.cat((k_nope, k_rope[:, None].expand(-1, kv.shape[1], -1, -1)), -1), v

    def expanded(self, q: Tensor, entry: Tensor, mask: Tensor | None) -> Tensor:
        """(B, H, T, V)."""
        k, v = self.unpack(entry)
        return attend(q, k, v, mask, self.scale)

    def absorbed(self, q: Tensor, entry: Tensor, mask: Tensor, most: int) -> Tensor:
        """The same for one new token, (B, H, 1, V): multi-query attention with key width r + rope and value width r.
        The mask (B, 1, 1, S) allows at most ``most`` entries."""
        w = self.kv_b_proj.weight.unflatten(0, (-1, self.nope + self.v_dim))  # (H, nope + V, r)
        w_uk, w_uv = w.split((self.nope, self.v_dim), 1)
        q_nope, q_rope = q.split((self.nope, self.rope), -1)
        q = torch.cat((q_nope @ w_uk, q_rope), -1)  # (B, H, 1, r + rope)
        return attend_one(q, entry, entry[..., : self.rank], mask, most, self.scale) @ w_uv.transpose(1, 2)

    def mix(self, o: Tensor) -> Tensor:
        """Heads (B, H, T, V) to the residual stream (B, T, D)."""
        return self.o_proj(o.transpose(1, 2).flatten(2))
