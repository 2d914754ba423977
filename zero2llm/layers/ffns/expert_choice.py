"""Expert choice: experts choose their tokens instead of the reverse. Perfectly even load, but not causal.

    s_t = softmax(W_r x_t)                               over the E experts, in fp32
    expert e takes the C tokens of the batch with the largest s_te,   C = ceil(capacity N / E)
    y_t = sum_{e that took t} s_te f_e(x_t)              a token is taken by any number of experts, 0 to E

Source: 2202.09368 section 3.2 (without the optional cap on experts per token).
Why: every expert works on C tokens, so no balance loss and no idle expert; `capacity` is the mean number of experts per
token and fixes the price: 6 D hidden capacity FLOPs.
NOT CAUSAL, TRAINING ONLY: whether token t is taken depends on tokens after it and on the other rows and documents of the
batch. A language model trained with it sees into the future, and its loss flatters it; decoding is refused. It stands
here to be compared with `moe`, and for encoders. Padding is taken last and weighs nothing, but counts towards C.
Shapes: x (B, T, D) -> (B, T, D); inside N = B T tokens.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zero2llm.core.config import config
from zero2llm.core.log import log_once
from zero2llm.core.seq import Aux, Seq, State
from zero2llm.layers.activations import GatedActivation, gated
from zero2llm.layers.contract import Cost
from zero2llm.layers.ffns.experts import ExpertLinear
from zero2llm.layers.linear import Linear
from zero2llm.ops.marks import full_precision, wide

REFUSAL = (
    "expert_choice cannot decode: which experts take a token depends on tokens that come after it. "
    "Train with kind: moe (the token chooses) for a model that generates"
)


@config
class ExpertChoiceConfig:
    kind: Literal["expert_choice"] = "expert_choice"
    n_experts: int
    hidden: int  # of one expert
    capacity: float = 2.0  # mean number of experts per token
    act: GatedActivation = "silu"

    def build(self, d_model: int) -> ExpertChoice:
        if self.n_experts < 1 or self.hidden < 1 or not 0 < self.capacity <= self.n_experts:
            raise ValueError(
                f"expert_choice needs n_experts = {self.n_experts} and hidden = {self.hidden} positive, and "
                f"0 < capacity = {self.capacity} <= n_experts"
            )
        log_once("expert_choice is not causal: its loss sees the future, and the model cannot generate")
        return ExpertChoice(d_model, self)

    def cost(self, d_model: int) -> Cost:
        expert, router = 3 * d_model * self.hidden, d_model * self.n_experts
        mean = round(self.capacity * expert)
        return Cost(router + self.n_experts * expert, 2 * (router + mean), active=router + mean)


class ExpertChoice(nn.Module):
    tp: ClassVar = None
    whole_rows: ClassVar = True  # an expert chooses among all tokens

    def __init__(self, d_model: int, cfg: ExpertChoiceConfig):
        super().__init__()
        self.capacity = cfg.capacity
        self.router = Linear(d_model, cfg.n_experts, bias=False)
        self.gate_proj = ExpertLinear(cfg.n_experts, d_model, cfg.hidden)
        self.up_proj = ExpertLinear(cfg.n_experts, d_model, cfg.hidden)
        self.down_proj = ExpertLinear(cfg.n_experts, cfg.hidden, d_model)
        self.act = gated(cfg.act)

    def init_state(self, batch: int, max_len: int, *, device=None, dtype=None) -> State:
        raise ValueError(REFUSAL)

    def take(self, tokens: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        """(N, D) -> weights (E, C) and which tokens each expert takes (E, C)."""
        with full_precision(tokens):
            scores = F.linear(*wide(tokens, self.router.weight)).softmax(-1).t()  # (E, N)
        if real is not None:
            scores = scores * real
        n_experts, n = scores.shape
        weights, taken = scores.topk(min(n, math.ceil(self.capacity * n / n_experts)), -1)
        return weights, taken

    def forward(self, x: Tensor, seq: Seq, state: State | None = None) -> tuple[Tensor, Aux]:
        if state is not None:
            raise ValueError(REFUSAL)
        tokens = x.flatten(0, 1)  # (N, D)
        real = torch.ones_like(seq.pos, dtype=torch.bool) if seq.seg is None else seq.seg != 0
        weights, taken = self.take(tokens, None if seq.seg is None else real.flatten())
        rows = tokens[taken]  # (E, C, D): groups of one size, so plain batched products
        gate, up, down = (p.weight.mT for p in (self.gate_proj, self.up_proj, self.down_proj))
        out = self.act(rows @ gate, rows @ up) @ down
        out = out * weights[..., None].to(out.dtype)
        y = torch.zeros_like(tokens, dtype=out.dtype).index_add(0, taken.flatten(), out.flatten(0, 1))
        count = torch.zeros_like(seq.pos).flatten().index_add(0, taken.flatten(), torch.ones_like(taken).flatten())
        left = (count.view_as(real) == 0) & real
        return y.view_as(x), {"moe_left_out": left.sum() / real.sum().clamp(min=1)}
