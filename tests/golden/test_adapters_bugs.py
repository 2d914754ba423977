"""Planted bugs in adapters: each must be caught, and by whom is part of the claim.

A wrong scale, start or schedule trains, merges and saves without complaint: only the hand formula sees it. A file with
rows in the wrong order is seen by comparing it with the export of the merged model.
"""

import math
import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable

from tests.contract import test_adapters as contract
from tests.golden import test_adapters as golden
from tests.golden.planted import bug_tests
from zero2llm.adapters import adalora, dora, lora, lowrank, pissa, wrap
from zero2llm.adapters.adalora import AdaLoRA, AdaLoRAConfig
from zero2llm.adapters.dora import DoRA, DoRAConfig, DoRALinear
from zero2llm.adapters.lora import LoRA, LoRAConfig
from zero2llm.adapters.lowrank import LowRankLinear
from zero2llm.adapters.pissa import PiSSA
from zero2llm.interop.peft import read as peft_read
from zero2llm.interop.peft import write as peft
from zero2llm.interop.peft.places import Place

# The checks. Each raises AssertionError.


def lora_formula():
    for stabilized in (False, True):
        golden.test_lora_equals_the_formula(True, stabilized)


def lora_start():
    golden.test_lora_begins_as_the_base()


def lora_plus():
    golden.test_lora_plus()


def twin():
    golden.test_the_operator_equals_its_twin()


def dropout():
    for kind in (LoRAConfig, DoRAConfig):
        with pytest.MonkeyPatch.context() as patch:
            golden.test_dropout_touches_the_low_rank_path_alone(kind, patch)


def frozen_costs():
    golden.test_a_frozen_weight_costs_no_gradient(LoRAConfig)


def dora_formula():
    golden.test_dora_equals_the_formula(True, False)
    golden.test_dora_equals_the_formula(False, True)


def dora_start():
    golden.test_dora_begins_as_the_base()


def dora_zeros():
    golden.test_dora_bears_a_row_of_zeros()


def pissa_start():
    for alpha, stabilized in ((3.0, False), (7.0, True)):
        golden.test_pissa_takes_the_principal_part(alpha, stabilized)


def pissa_formula():
    golden.test_pissa_equals_the_residual_with_a_lora()


def pissa_base():
    golden.test_pissa_learns_at_once_and_leaves_the_base()


def pissa_dropout():
    with pytest.MonkeyPatch.context() as patch:
        golden.test_pissa_with_dropout_drops_only_what_learns(patch)


def adalora_formula():
    golden.test_adalora_equals_the_formula()


def adalora_budget():
    golden.test_budget_by_hand()


def adalora_penalty():
    golden.test_penalty_by_hand()


def adalora_allocation():
    golden.test_allocation_by_hand()


def adalora_resume():
    golden.test_an_interrupted_allocation_goes_on_exactly()


def files():
    for name, cfg in (("llama-interleaved", LoRAConfig(r=3, rank_stabilized=True)), ("phi3", DoRAConfig(r=2)), ("phi3", LoRAConfig(r=2, targets=("v_proj",))),
                      ("qwen3_next", contract.LoRAConfig(r=3, targets=("*.mixer.*",)))):  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            contract.test_a_file_means_the_merged_model(name, cfg, Path(folder))


def several():
    contract.test_several_adapters_switch_and_do_not_disturb_each_other()


def decoding():
    contract.test_decoding_token_by_token_is_the_whole_row("mla", LoRAConfig(r=3))


CHECKS = [
    lora_formula, lora_start, lora_plus, twin, dropout, frozen_costs, dora_formula, dora_start, dora_zeros, pissa_start, pissa_formula, pissa_base,
    pissa_dropout, adalora_formula, adalora_budget, adalora_penalty, adalora_allocation, adalora_resume, files, several, decoding,
]  # fmt: skip


# LoRA


def alpha_is_the_scale(patch):
    patch.setattr(LoRAConfig, "scale", property(lambda self: self.alpha))


def stabilized_divides_by_r(patch):
    patch.setattr(LoRAConfig, "scale", property(lambda self: self.alpha / self.r))


def a_starts_wider(patch):
    """Kaiming-uniform with a = 0: sqrt 6 times as wide."""
    right = lora.factors

    def wrong(weight, r):
        a, b = right(weight, r)
        return nn.Parameter(a.detach() * math.sqrt(6)), b

    patch.setattr(lora, "factors", wrong)


def b_starts_random(patch):
    right = lora.factors

    def wrong(weight, r):
        a, b = right(weight, r)
        return a, nn.Parameter(0.01 * torch.randn_like(b))

    patch.setattr(lora, "factors", wrong)


def a_learns_faster_instead_of_b(patch):
    patch.setattr(LoRA, "rates", lambda self: {"a": self.cfg.lr_ratio, "b": 1.0})


def backward_of(change):
    """LoRA's backward with one term changed."""

    def wrong(ctx, grad):
        x, h, weight, a, b = ctx.saved_tensors
        g, s = grad.flatten(0, -2), ctx.scale
        terms = {"gb": s * (g @ b), "into_a": s * (g @ b), "h": h}
        terms |= change(g, b, h, s)
        dx = (g @ weight + terms["gb"] @ a).view_as(x) if ctx.needs_input_grad[0] else None
        return dx, None, None, terms["into_a"].t() @ x.flatten(0, -2), g.t() @ terms["h"], None

    return staticmethod(once_differentiable(wrong))


def gradient_of_a_without_its_scale(patch):
    patch.setattr(LowRankLinear, "backward", backward_of(lambda g, b, h, s: {"into_a": g @ b}))


def gradient_of_b_scaled_twice(patch):
    patch.setattr(LowRankLinear, "backward", backward_of(lambda g, b, h, s: {"h": s * h}))


def gradient_of_x_misses_the_path(patch):
    patch.setattr(LowRankLinear, "backward", backward_of(lambda g, b, h, s: {"gb": 0 * (g @ b)}))


def the_frozen_weight_gets_a_gradient(patch):
    right = lowrank.low_rank_linear
    patch.setattr(lowrank, "low_rank_linear", lambda x, w, *rest: right(x, w, *rest) + 0 * (x @ w.detach().requires_grad_().t()))


def merged_without_the_scale(patch):
    patch.setattr(LoRA, "merged", lambda self, weight: weight + self.b @ self.a)


def dropout_on_the_base_too(patch):
    right = lowrank.adapted

    def wrong(base, x, a, b, scale, p=0.0):
        return right(base, torch.nn.functional.dropout(x, p) if p else x, a, b, scale)

    for page in (lora, dora):
        patch.setattr(page, "adapted", wrong)


# DoRA


def length_of_the_base_alone(patch):
    patch.setattr(dora, "row_lengths", lambda weight, a, b, scale: weight.norm(dim=1).detach())


def length_without_the_cross_term(patch):
    patch.setattr(dora, "row_lengths", lambda w, a, b, s: (w.square().sum(1) + (s * b @ a).square().sum(1)).sqrt().detach())


def length_learns(patch):
    def wrong(self, base, x):
        v = base.weight + self.scale * self.b @ self.a
        return torch.nn.functional.linear(x, (self.m / v.norm(dim=1))[:, None] * v, base.bias)

    patch.setattr(DoRA, "forward", wrong)


def one_length_for_the_whole_matrix(patch):
    patch.setattr(dora, "row_lengths", lambda w, a, b, s: (w + s * b @ a).norm().detach().repeat(len(w)))


def bias_is_stretched(patch):
    def wrong(self, base, x):
        c = self.m / dora.row_lengths(base.weight, self.a, self.b, self.scale)
        return c * lowrank.plain(x, base.weight.detach(), base.bias, self.a, self.b, self.scale)

    patch.setattr(DoRA, "forward", wrong)


def magnitude_starts_at_one(patch):
    right = DoRA.__init__

    def wrong(self, weight, cfg):
        right(self, weight, cfg)
        self.m.data.fill_(1.0)

    patch.setattr(DoRA, "__init__", wrong)


def dora_backward(divide, stretch):
    def wrong(ctx, grad):
        x, h, v, weight, a, b, m, c = ctx.saved_tensors
        g = grad.flatten(0, -2)
        dm = (g * v).sum(0) / (m if divide else c)
        g = g * c if stretch else g
        gb = (g @ b) * ctx.scale
        dx = (g @ weight + gb @ a).view_as(x) if ctx.needs_input_grad[0] else None
        return dx, None, None, gb.t() @ x.flatten(0, -2), g.t() @ h, dm, None, None

    return staticmethod(once_differentiable(wrong))


def gradient_of_m_divided_by_c(patch):
    patch.setattr(DoRALinear, "backward", dora_backward(False, True))


def gradient_below_without_the_stretch(patch):
    patch.setattr(DoRALinear, "backward", dora_backward(True, False))


def a_row_of_zeros_divides(patch):
    patch.setattr(dora, "row_lengths", lambda w, a, b, s: (w + s * b @ a).norm(dim=1).detach())


# PiSSA


def svd(change):
    """torch.linalg.svd with its result changed."""
    right = torch.linalg.svd
    return lambda weight, full_matrices=True: change(*right(weight, full_matrices=full_matrices))


def the_minor_part(patch):
    patch.setattr(torch.linalg, "svd", svd(lambda u, s, vh: (u.flip(1), s.flip(0), vh.flip(0))))


def init_of(change):
    right = PiSSA.__init__

    def wrong(self, weight, cfg):
        right(self, weight, cfg)
        with torch.no_grad():
            change(self)

    return wrong


def the_scale_is_forgotten(patch):
    def change(self):
        for t in (self.a, self.b, self.a0, self.b0):
            t.mul_(math.sqrt(self.scale))

    patch.setattr(PiSSA, "__init__", init_of(change))


def the_root_on_one_side(patch):
    def change(self):
        norms = self.a.norm(dim=1)
        for a, b in ((self.a, self.b), (self.a0, self.b0)):
            a.mul_(norms[:, None])
            b.div_(norms)

    patch.setattr(PiSSA, "__init__", init_of(change))


def the_residual_is_not_taken(patch):
    patch.setattr(PiSSA, "low_rank", lambda self: (self.a, self.b))


def the_start_learns_along(patch):
    def change(self):
        self.a0, self.b0 = self.a.data, self.b.data

    patch.setattr(PiSSA, "__init__", init_of(change))


def the_base_becomes_the_residual(patch):
    right = PiSSA.__init__

    def wrong(self, weight, cfg):
        right(self, weight, cfg)
        with torch.no_grad():
            weight.sub_(self.scale * self.b0 @ self.a0)
            self.b0.zero_()

    patch.setattr(PiSSA, "__init__", wrong)


def dropout_on_the_residual(patch):
    patch.setattr(PiSSA, "forward", lambda self, base, x: pissa.adapted(base, x, *self.low_rank(), self.scale, self.cfg.dropout))


# AdaLoRA


def the_scale_is_alpha_over_r(patch):
    patch.setattr(AdaLoRAConfig, "scale", property(lambda self: self.alpha / self.init_r))


def singular_values_squared(patch):
    right = adalora.adapted
    patch.setattr(AdaLoRA, "forward", lambda self, base, x: right(base, x, self.a * self.e.square(), self.b, self.scale))


def norms_of_the_penalty_squared(patch):
    right = torch.linalg.matrix_norm
    patch.setattr(torch.linalg, "matrix_norm", lambda gram: right(gram).square())


def budget_falls_in_a_line(patch):
    def wrong(self, step, total, n):
        left = 1 - (step - self.warmup) / (total - self.final - self.warmup)
        return int(((self.init_r - self.target_r) * min(max(left, 0), 1) + self.target_r) * n)

    patch.setattr(AdaLoRAConfig, "budget", wrong)


def observing(change):
    def wrong(self):
        for name in "aeb":
            p = self.get_parameter(name)
            importance, uncertainty = self.get_buffer(f"{name}_importance"), self.get_buffer(f"{name}_uncertainty")
            change(p, importance, uncertainty, self.cfg)

    return wrong


def importance_keeps_its_sign(patch):
    def change(p, importance, uncertainty, cfg):
        now = p * p.grad
        importance.lerp_(now, 1 - cfg.beta1)
        uncertainty.lerp_((now - importance).abs(), 1 - cfg.beta2)

    patch.setattr(AdaLoRA, "observe", observing(change))


def importance_is_the_gradient(patch):
    def change(p, importance, uncertainty, cfg):
        importance.lerp_(p.grad.abs(), 1 - cfg.beta1)
        uncertainty.lerp_((p.grad.abs() - importance).abs(), 1 - cfg.beta2)

    patch.setattr(AdaLoRA, "observe", observing(change))


def no_uncertainty(patch):
    patch.setattr(AdaLoRA, "observe", observing(lambda p, i, u, cfg: (i.lerp_((p * p.grad).abs(), 1 - cfg.beta1), u.fill_(1.0))))


def scores_add_up_over_the_width(patch):
    def wrong(self):
        a, e, b = (self.get_buffer(f"{n}_importance") * self.get_buffer(f"{n}_uncertainty") for n in "aeb")
        return e[:, 0] + a.sum(1) + b.sum(0)

    patch.setattr(AdaLoRA, "scores", wrong)


def the_least_important_stay(patch):
    right = AdaLoRA.scores
    patch.setattr(AdaLoRA, "scores", lambda self: -right(self))


def every_projection_keeps_the_same(patch):
    def wrong(found, budget):
        for adapter in found:
            best = adapter.scores().topk(budget // len(found)).indices
            adapter.kept.zero_()[best] = True

    patch.setattr(adalora, "_allocate", wrong)


def importance_is_not_saved(patch):
    right = wrap.adapter_state
    wrong = lambda model, name: {k: v for k, v in right(model, name).items() if "importance" not in k}
    patch.setattr(golden, "adapter_state", wrong)
    patch.setattr(wrap, "adapter_state", wrong)


def what_is_settled_learns_on(patch):
    right = adalora.after_step
    patch.setattr(golden, "after_step", lambda model, step, total: step <= total - 2 and right(model, step, total))


# Files and models


def rows_keep_our_order(patch):
    patch.setattr(Place, "pack", lambda self, parts: torch.cat(parts))


def blocks_keep_our_order(patch):
    right = peft._piece

    def wrong(place, *rest):
        return right(Place(place.theirs, place.ours, place.sizes, place.columns, torch.arange(len(place.rows)), place.transposed), *rest)

    patch.setattr(peft, "_piece", wrong)


def read_with_the_same_permutation(patch):
    patch.setattr(Place, "unpack", lambda self, whole: list(whole[self.rows].split(self.sizes)))


def alpha_divided_by_r_though_stabilized(patch):
    right = peft.Piece.alpha
    patch.setattr(peft.Piece, "alpha", lambda self, stabilized: right(self, False))


def blocks_keep_one_alpha(patch):
    right = peft._config
    patch.setattr(peft, "_config", lambda pieces, cfg, base: right(pieces, cfg, base) | {"alpha_pattern": {}})


def no_row_for_what_is_not_adapted(patch):
    """B's blocks from the top, wherever the adapted projection stands."""
    right = torch.block_diag
    patch.setattr(torch, "block_diag", lambda *blocks: right(*sorted(blocks, key=lambda b: -b.shape[1])))


def magnitudes_are_left_at_their_start(patch):
    right = peft_read._ours

    def wrong(*args):
        return {path: (cfg, {k: v for k, v in ts.items() if k != "m"}) for path, (cfg, ts) in right(*args).items()}

    patch.setattr(peft_read, "_ours", wrong)


def switching_forgets_some(patch):
    right = wrap.adapted_modules
    calls = lambda model: dict(list(right(model).items())[:-1])
    patch.setattr(contract, "switch", lambda model, name: [setattr(m, "active", name) for m in calls(model).values()])


def decoding_reads_the_bare_weight(patch):
    from zero2llm.adapters.adapted import Adapted, dense

    patch.setattr(Adapted, "weight", property(lambda self: dense(self.base)))


BUGS = {  # bug -> checks that must catch it
    alpha_is_the_scale: {"lora_formula"},
    stabilized_divides_by_r: {"lora_formula"},
    a_starts_wider: {"lora_start"},
    b_starts_random: {"lora_start"},
    a_learns_faster_instead_of_b: {"lora_plus"},
    gradient_of_a_without_its_scale: {"lora_formula", "twin"},
    gradient_of_b_scaled_twice: {"lora_formula", "twin"},
    gradient_of_x_misses_the_path: {"lora_formula", "twin"},
    the_frozen_weight_gets_a_gradient: {"frozen_costs"},
    merged_without_the_scale: {"lora_formula"},
    dropout_on_the_base_too: {"dropout"},
    length_of_the_base_alone: {"dora_formula"},
    length_without_the_cross_term: {"dora_formula"},
    length_learns: {"dora_formula"},
    one_length_for_the_whole_matrix: {"dora_start", "dora_formula"},
    bias_is_stretched: {"dora_formula"},
    magnitude_starts_at_one: {"dora_start"},
    gradient_of_m_divided_by_c: {"dora_formula"},
    gradient_below_without_the_stretch: {"dora_formula"},
    a_row_of_zeros_divides: {"dora_zeros"},
    the_minor_part: {"pissa_start"},
    the_scale_is_forgotten: {"pissa_start"},
    the_root_on_one_side: {"pissa_start"},
    the_residual_is_not_taken: {"pissa_start", "pissa_formula"},
    the_start_learns_along: {"pissa_formula"},
    the_base_becomes_the_residual: {"pissa_base"},
    dropout_on_the_residual: {"pissa_dropout"},
    the_scale_is_alpha_over_r: {"adalora_formula"},
    singular_values_squared: {"adalora_formula"},
    norms_of_the_penalty_squared: {"adalora_penalty"},
    budget_falls_in_a_line: {"adalora_budget"},
    importance_keeps_its_sign: {"adalora_allocation"},
    importance_is_the_gradient: {"adalora_allocation"},
    no_uncertainty: {"adalora_allocation"},
    scores_add_up_over_the_width: {"adalora_allocation"},
    the_least_important_stay: {"adalora_allocation"},
    every_projection_keeps_the_same: {"adalora_allocation"},
    importance_is_not_saved: {"adalora_resume"},
    what_is_settled_learns_on: {"adalora_allocation"},
    rows_keep_our_order: {"files"},
    blocks_keep_our_order: {"files"},
    read_with_the_same_permutation: {"files"},
    alpha_divided_by_r_though_stabilized: {"files"},
    blocks_keep_one_alpha: {"files"},
    no_row_for_what_is_not_adapted: {"files"},
    magnitudes_are_left_at_their_start: {"files"},
    switching_forgets_some: {"several"},
    decoding_reads_the_bare_weight: {"decoding"},
}


test_without_a_bug_every_check_holds, test_a_planted_bug_is_caught = bug_tests(BUGS, CHECKS)
