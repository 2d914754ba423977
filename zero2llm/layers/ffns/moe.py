"""Mixture of experts: many feed-forwards of which each token meets k, so that parameters grow and its price does not.

    z = W_r x (fp32),   s = softmax(z) or sigmoid(z),   chosen and w as in routers.py
    y = sum_{e chosen} w_e f_e(x) + f_shared(x)          shared_gate: sigmoid(w_g . x) * f_shared(x)
    f_e(x) = W_down_e( act(W_gate_e x) * (W_up_e x) )    act "gptoss": (u + 1) g sigmoid(1.702 g), clamped at 7

    Mixtral             router softmax, renormalise            Qwen2-MoE    softmax, no renormalise, shared_gate
    DeepSeek-V2         softmax, no renormalise, shared        Qwen3-MoE    as Mixtral, many narrow experts
    DeepSeek-V3         sigmoid, groups, routed_scaling, bias_rate, shared          gpt-oss      act gptoss, bias

Source: Mixtral 2401.04088; narrow and shared experts 2401.06066 (DeepSeekMoE) section 3; DeepSeek-V3 2412.19437 section
2.1.2; Qwen2-MoE 2407.10671 section 2.2.2; gpt-oss 2508.10925. Dropless, so a token's output never depends on others.
Why: E / k times the parameters of a dense layer for the FLOPs of 6 D hidden k per token, which then are bound by moving
weights. Even load is what makes it work: watch `moe_peak_load` (1 = even) and `moe_idle` (0 = all experts learn).
Padding is computed but in no loss, load or statistic. Losses add up over layers.
Shapes: x (B, T, D) -> (B, T, D); inside N = B T tokens, sorted by expert into N k rows.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zero2llm.core.config import config
from zero2llm.core.seq import Aux, Seq, State
from zero2llm.layers.activations import GatedActivation, gated
from zero2llm.layers.contract import Cost
from zero2llm.layers.ffns.experts import ExpertLinear
from zero2llm.layers.ffns.glu import GLU
from zero2llm.layers.ffns.routers import CountLoad, balance_loss, choose, load_statistics, weigh, z_loss
from zero2llm.layers.linear import Linear
from zero2llm.ops.expert_glu import ACTS, expert_glu
from zero2llm.ops.marks import full_precision, wide
from zero2llm.ops.route import Plan, collect, grouped_kernel, load_of, spread


@config
class MoEConfig:
    kind: Literal["moe"] = "moe"
    n_experts: int
    top_k: int
    hidden: int  # of one expert
    act: GatedActivation = "silu"
    bias: bool = False  # of the router and every expert
    router: Literal["softmax", "sigmoid"] = "softmax"
    renormalise: bool = True  # the chosen weights sum to 1
    routed_scaling: float = 1.0
    n_groups: int = 1
    top_groups: int = 1  # groups that a token may choose from
    n_shared: int = 0  # experts that every token meets, built as one
    shared_hidden: int | None = None  # of one shared expert; None = hidden
    shared_gate: bool = False
    balance_weight: float = 0.01
    z_weight: float = 0.0
    bias_rate: float | None = None  # of the choice bias per optimizer step; 0 = a bias that stays, None = no bias

    def build(self, d_model: int) -> MoE:
        self.check()
        return MoE(d_model, self)

    def check(self) -> None:
        e, k, size = self.n_experts, self.top_k, self.n_experts // max(self.n_groups, 1)
        if self.hidden < 1 or not 1 <= k <= e:
            raise ValueError(f"moe needs 1 <= top_k = {k} <= n_experts = {e} and hidden = {self.hidden} positive")
        if not 1 <= self.top_groups <= self.n_groups or e % self.n_groups:
            raise ValueError(
                f"n_experts = {e} must be a multiple of n_groups = {self.n_groups}, and top_groups = {self.top_groups} at "
                "most n_groups"
            )
        if self.n_groups > 1 and (self.router != "sigmoid" or size < 2 or self.top_groups * size < k):
            raise ValueError(
                f"groups need router sigmoid (not {self.router}), 2 experts each (not {size}) and top_k = {k} experts in "
                f"the {self.top_groups} best"
            )
        if self.n_shared < 0 or (self.n_shared == 0 and (self.shared_gate or self.shared_hidden is not None)):
            raise ValueError(f"shared_gate and shared_hidden need n_shared = {self.n_shared} >= 1")
        if self.n_shared and (self.act == "gptoss" or self.shared_width < 1):
            raise ValueError(f"shared experts need hidden > 0 (not {self.shared_width}) and an act other than gptoss")
        if min(self.balance_weight, self.z_weight, self.bias_rate or 0.0) < 0 or self.routed_scaling <= 0:
            raise ValueError(
                f"balance_weight = {self.balance_weight}, z_weight = {self.z_weight} and bias_rate = {self.bias_rate} may "
                f"not be negative, routed_scaling = {self.routed_scaling} must be positive"
            )

    @property
    def shared_width(self) -> int:
        return self.n_shared * (self.hidden if self.shared_hidden is None else self.shared_hidden)

    def cost(self, d_model: int) -> Cost:
        """Saved: the input, a copy of it per choice, gate, up and result; the router's scores."""
        d, e, k, h = d_model, self.n_experts, self.top_k, self.hidden
        every = d * e + 3 * d * self.shared_width + self.shared_gate * d  # products that every token meets
        always = every + (self.bias + (self.bias_rate is not None)) * e
        expert = 3 * d * h + self.bias * (2 * h + d)
        saved = d + k * (2 * d + 2 * h) + 4 * self.shared_width + 4 * e
        unusual = self.act == "gptoss" or self.bias or self.shared_gate
        return Cost(
            always + e * expert, 2 * (every + k * 3 * d * h), active=always + k * expert,
            saved=None if unusual else saved,
        )  # fmt: skip


class MoE(nn.Module):
    tp: ClassVar = None
    whole_rows: ClassVar = True  # the balance is that of all tokens

    def __init__(self, d_model: int, cfg: MoEConfig):
        super().__init__()
        e, h = cfg.n_experts, cfg.hidden
        self.cfg, self.bias_rate = cfg, cfg.bias_rate
        self.router = Linear(d_model, e, bias=cfg.bias)
        self.router_bias = None
        if cfg.bias_rate is not None:
            self.router_bias = nn.Parameter(torch.zeros(e), requires_grad=cfg.bias_rate > 0)
        self.gate_proj = ExpertLinear(e, d_model, h, cfg.bias)
        self.up_proj = ExpertLinear(e, d_model, h, cfg.bias)
        self.down_proj = ExpertLinear(e, h, d_model, cfg.bias)
        self.act = gated(cfg.act)
        self.shared = GLU(d_model, cfg.shared_width, cfg.act) if cfg.n_shared else None
        self.shared_gate = Linear(d_model, 1, bias=False) if cfg.shared_gate else None

    def logits(self, x: Tensor) -> Tensor:
        """(N, D) -> (N, E), never in half precision: a choice must not hang on rounding."""
        with full_precision(x):
            bias = self.router.bias
            return F.linear(*wide(x, self.router.weight), None if bias is None else wide(bias)[0])

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, E) -> scores (N, E), weights (N, k), experts (N, k)."""
        cfg = self.cfg
        scores = logits.softmax(-1) if cfg.router == "softmax" else logits.sigmoid()
        experts = choose(scores, self.router_bias, cfg.top_k, cfg.n_groups, cfg.top_groups)
        return scores, weigh(scores, experts, cfg.renormalise, cfg.routed_scaling), experts

    def report(self, logits: Tensor, scores: Tensor, load: Tensor, real: Tensor | None) -> Aux:
        cfg, aux = self.cfg, load_statistics(load)
        if cfg.balance_weight:
            aux["balance_loss"] = cfg.balance_weight * balance_loss(scores, load, real)
        if cfg.z_weight:
            aux["router_z_loss"] = cfg.z_weight * z_loss(logits, real)
        return aux

    def experts(self, rows: Tensor, plan: Plan) -> Tensor:
        """(N k, D) sorted by expert -> (N k, D)."""
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        if (
            self.cfg.act in ACTS
            and not self.cfg.bias
            and torch.is_grad_enabled()
            and not grouped_kernel(rows, gate.weight)
        ):
            return expert_glu(rows, gate.weight, up.weight, down.weight, plan.sizes, self.cfg.act)
        return down(self.act(gate(rows, plan), up(rows, plan)), plan)

    def forward(self, x: Tensor, seq: Seq, state: State | None = None) -> tuple[Tensor, Aux]:
        tokens, aux = x.flatten(0, 1), {}  # (N, D)
        logits = self.logits(tokens)
        scores, weights, experts = self.route(logits)
        plan = Plan.of(experts, self.cfg.n_experts)
        if x.shape[1] > 1:  # one token a row is decoding: no load to speak of
            real = None if seq.seg is None else (seq.seg != 0).flatten()
            load = (plan.sizes if real is None else load_of(experts, self.cfg.n_experts, real)).to(scores.dtype)
            aux = self.report(logits, scores, load, real)
            if self.router_bias is not None:
                weights = CountLoad.apply(weights, self.router_bias, load)
        rows = spread(tokens, plan)  # (N k, D), sorted by expert
        y = collect(self.experts(rows, plan), weights, plan)
        if self.shared is not None:
            always = self.shared(tokens, seq)[0]
            y = y + (always if self.shared_gate is None else self.shared_gate(tokens).sigmoid() * always)
        return y.view_as(x), aux
