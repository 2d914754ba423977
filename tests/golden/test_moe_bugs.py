"""Planted bugs in mixtures of experts: each must be caught, and by whom is part of the claim.

A wrong weight or a wrong choice is wrong for every token alike, so no law sees it: the hand formula does. A wrong
dispatch is seen by its twin, a wrong load by a count over micro-batches.
"""

import math
from types import SimpleNamespace

import torch

from tests.golden import test_expert_glu as glu
from tests.golden import test_moe as golden
from tests.golden import test_moe_balance as balance
from tests.golden.planted import bug_tests
from zero2llm.core.seq import Seq
from zero2llm.layers.ffns import expert_choice, moe, routers
from zero2llm.layers.ffns.expert_choice import ExpertChoice, ExpertChoiceConfig
from zero2llm.layers.ffns.moe import MoE
from zero2llm.ops import expert_glu, route
from zero2llm.ops.route import Plan
from zero2llm.train.guard import NonFiniteError

# The checks. Each raises AssertionError.


def hand_formula():
    for name in golden.CONFIGS:
        golden.test_moe_equals_the_formula(name)


def dispatch_twin():
    golden.test_dropless_equals_every_expert_on_every_token(11, 5, 3)
    golden.test_grouped_linear_equals_its_twin()


def expert_glu_twin():
    glu.test_expert_glu_equals_its_twin("silu")


def independent_tokens():
    golden.test_tokens_are_independent("mixtral")
    golden.test_tokens_are_independent("deepseek-v3")


def losses_mean_the_same():
    balance.test_balance_is_one_when_even_and_e_when_one_expert_takes_all(12, 4, 2)
    balance.test_losses_do_not_depend_on_shape_or_padding()


def bias_step():
    torch.manual_seed(0)
    balance.test_one_step_moves_each_bias_against_its_load()


def bias_over_micro_batches():
    torch.manual_seed(0)
    balance.test_micro_batches_give_the_bias_of_the_whole_batch(1, False)
    balance.test_gradient_is_the_global_count_whatever_the_targets()


def half_precision():
    golden.test_autocast_multiplies_in_half_precision()


def expert_choice_formula():
    for capacity in (1.0, 1.3, 2.0):
        golden.test_expert_choice_equals_the_formula(capacity)


CHECKS = [
    hand_formula, dispatch_twin, expert_glu_twin, independent_tokens, losses_mean_the_same, bias_step, bias_over_micro_batches,
    half_precision, expert_choice_formula,
]  # fmt: skip


# Bugs of the choice and its weights


def weights_carry_the_choice_bias(patch):
    right = MoE.route

    def wrong(self, logits):
        scores, weights, experts = right(self, logits)
        return scores, weights if self.router_bias is None else weights + self.router_bias[experts], experts

    patch.setattr(MoE, "route", wrong)


def always_renormalised(patch):
    right = moe.weigh
    patch.setattr(moe, "weigh", lambda scores, experts, renormalise, scaling: right(scores, experts, True, scaling))


def never_renormalised(patch):
    right = moe.weigh
    patch.setattr(moe, "weigh", lambda scores, experts, renormalise, scaling: right(scores, experts, False, scaling))


def scaling_before_renormalising(patch):
    right = moe.weigh
    patch.setattr(
        moe, "weigh", lambda scores, experts, renormalise, scaling: right(scores * scaling, experts, renormalise, 1.0)
    )


def groups_ranked_by_their_best_alone(patch):
    def wrong(scores, bias, k, n_groups=1, top_groups=1):
        choice = scores.detach() if bias is None else scores.detach() + bias.detach()
        grouped = choice.unflatten(1, (n_groups, -1))
        best = grouped.amax(-1).topk(top_groups, -1).indices
        closed = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(1, best, False)
        return grouped.masked_fill(closed[..., None], -math.inf).flatten(1).topk(k, -1).indices

    patch.setattr(moe, "choose", wrong)


def groups_forgotten(patch):
    right = moe.choose
    patch.setattr(moe, "choose", lambda scores, bias, k, n_groups=1, top_groups=1: right(scores, bias, k))


def softmax_instead_of_sigmoid(patch):
    right = MoE.route

    def wrong(self, logits):
        scores, weights, experts = right(self, logits)
        return scores, logits.gather(1, experts).softmax(-1) if self.cfg.router == "sigmoid" else weights, experts

    patch.setattr(MoE, "route", wrong)


def gate_and_up_exchanged(patch):
    right = MoE.__init__

    def wrong(self, d_model, cfg):
        right(self, d_model, cfg)
        act = self.act
        self.act = lambda gate, up: act(up, gate)

    patch.setattr(MoE, "__init__", wrong)


def shared_experts_without_their_gate(patch):
    right = MoE.__init__

    def wrong(self, d_model, cfg):
        right(self, d_model, cfg)
        if cfg.shared_gate:
            self.shared_gate.forward = lambda x: x.new_full((len(x), 1), 50.0)  # sigmoid 1

    patch.setattr(MoE, "__init__", wrong)


# Bugs of the dispatch


def unsorted_by_the_wrong_permutation(patch):
    right = Plan.of

    def wrong(experts, n_experts):
        plan = right(experts, n_experts)
        return Plan(plan.order, plan.order, plan.groups, plan.sizes, plan.k)

    patch.setattr(Plan, "of", staticmethod(wrong))


def weights_in_the_order_of_tokens(patch):
    right = moe.collect
    patch.setattr(
        moe, "collect", lambda rows, weights, plan: right(rows, weights.flatten()[plan.order].view_as(weights), plan)
    )


def a_capacity_drops_tokens(patch):
    right = moe.collect

    def wrong(rows, weights, plan):
        first = plan.sizes.cumsum(0) - plan.sizes
        place = torch.arange(len(rows)) - first[plan.groups]
        return right(rows * (place < math.ceil(len(rows) / len(plan.sizes)))[:, None], weights, plan)

    patch.setattr(moe, "collect", wrong)


def empty_experts_shift_the_slices(patch):
    def wrong(sizes):
        start = 0
        for group, n in enumerate(n for n in sizes.tolist() if n):
            yield group, slice(start, start + n)
            start += n

    patch.setattr(route, "slices", wrong)


def activation_s_slope_is_forgotten(patch):
    patch.setitem(expert_glu.ACTS, "silu", (expert_glu.ACTS["silu"][0], lambda grad, g: grad))


def slope_is_taken_behind_the_activation(patch):
    forward, slope = expert_glu.ACTS["silu"]
    patch.setitem(expert_glu.ACTS, "silu", (forward, lambda grad, g: slope(grad, forward(g))))


def gradient_of_spread_counts_one_choice(patch):
    def wrong(ctx, grad):
        return grad.index_select(0, ctx.saved_tensors[0][:, 0]), None, None, None

    patch.setattr(route._Spread, "backward", staticmethod(wrong))


# Bugs of the balance


def padding_is_counted(patch):
    right = moe.load_of
    patch.setattr(moe, "load_of", lambda experts, n_experts, real: right(experts, n_experts))


def padding_is_averaged(patch):
    patch.setattr(routers, "mean_over", lambda values, real: values.mean(0))


def balance_summed_over_the_choices(patch):
    right = moe.balance_loss
    patch.setattr(moe, "balance_loss", lambda scores, load, real: right(scores, load, real) * load.sum() / len(scores))


def z_loss_without_its_square(patch):
    patch.setattr(moe, "z_loss", lambda logits, real: routers.mean_over(logits.logsumexp(-1), real))


def bias_moves_towards_the_load(patch):
    right = moe.CountLoad.backward
    patch.setattr(moe.CountLoad, "backward", staticmethod(lambda ctx, grad: (grad, -right(ctx, grad)[1], None)))


def bias_weighs_micro_batches_by_their_loss(patch):
    def wrong(ctx, grad):
        (load,) = ctx.saved_tensors
        return grad, (len(load) * load - load.sum()) / load.sum(), None

    patch.setattr(moe.CountLoad, "backward", staticmethod(wrong))


def bias_under_the_schedule(patch):
    from zero2llm.optim.build import OptimizerSet

    right = OptimizerSet.set_lr

    def wrong(self, factor):
        for group in self.parts[-1].param_groups:
            group["lr"] = 0.05 * factor
        return right(self, factor)

    patch.setattr(OptimizerSet, "set_lr", wrong)


def router_in_half_precision(patch):
    patch.setattr(MoE, "logits", lambda self, x: self.router(x))


# Bugs of expert choice


def experts_share_their_tokens_out(patch):
    patch.setattr(
        ExpertChoice,
        "take",
        lambda self, tokens, real: (s := (tokens @ self.router.weight.T).softmax(0).t()).topk(
            min(len(tokens), math.ceil(self.capacity * len(tokens) / len(s))), -1
        ),
    )


def capacity_rounded_down(patch):
    patch.setattr(expert_choice, "math", SimpleNamespace(ceil=math.floor))


def padding_is_taken(patch):
    right = ExpertChoice.take
    patch.setattr(ExpertChoice, "take", lambda self, tokens, real: right(self, tokens, None))


def unweighted(patch):
    right = ExpertChoice.take
    patch.setattr(
        ExpertChoice, "take", lambda self, tokens, real: ((found := right(self, tokens, real))[0].sign(), found[1])
    )


def one_expert_per_token(patch):
    right = ExpertChoice.take

    def wrong(self, tokens, real):
        weights, taken = right(self, tokens, real)
        first = torch.full((len(tokens),), -1).scatter(
            0, taken.flip(0).flatten(), torch.arange(len(weights)).flip(0).repeat_interleave(taken.shape[1])
        )
        return weights * (first[taken] == torch.arange(len(weights))[:, None]), taken

    patch.setattr(ExpertChoice, "take", wrong)


def renormalised_over_the_taken(patch):
    right = ExpertChoice.take

    def wrong(self, tokens, real):
        weights, taken = right(self, tokens, real)
        return weights / weights.sum(-1, keepdim=True), taken

    patch.setattr(ExpertChoice, "take", wrong)


BUGS = {  # bug -> checks that must catch it
    weights_carry_the_choice_bias: {"hand_formula"},
    always_renormalised: {"hand_formula"},
    never_renormalised: {"hand_formula"},
    scaling_before_renormalising: {"hand_formula"},
    groups_ranked_by_their_best_alone: {"hand_formula"},
    groups_forgotten: {"hand_formula"},
    softmax_instead_of_sigmoid: {"hand_formula"},
    gate_and_up_exchanged: {"hand_formula"},
    shared_experts_without_their_gate: {"hand_formula"},
    unsorted_by_the_wrong_permutation: {"hand_formula", "dispatch_twin", "independent_tokens"},
    weights_in_the_order_of_tokens: {"hand_formula", "independent_tokens"},
    a_capacity_drops_tokens: {"hand_formula", "independent_tokens"},
    empty_experts_shift_the_slices: {"dispatch_twin"},
    activation_s_slope_is_forgotten: {"expert_glu_twin"},
    slope_is_taken_behind_the_activation: {"expert_glu_twin"},
    gradient_of_spread_counts_one_choice: {"dispatch_twin"},
    padding_is_counted: {"hand_formula", "losses_mean_the_same", "bias_over_micro_batches"},
    padding_is_averaged: {"hand_formula", "losses_mean_the_same"},
    balance_summed_over_the_choices: {"hand_formula"},
    z_loss_without_its_square: {"hand_formula"},
    bias_moves_towards_the_load: {"bias_step", "bias_over_micro_batches"},
    bias_weighs_micro_batches_by_their_loss: {"bias_over_micro_batches"},
    bias_under_the_schedule: {"bias_step"},
    router_in_half_precision: {"half_precision"},
    experts_share_their_tokens_out: {"expert_choice_formula"},
    capacity_rounded_down: {"expert_choice_formula"},
    padding_is_taken: {"expert_choice_formula"},
    unweighted: {"expert_choice_formula"},
    one_expert_per_token: {"expert_choice_formula"},
    renormalised_over_the_taken: {"expert_choice_formula"},
}


test_without_a_bug_every_check_holds, test_a_planted_bug_is_caught = bug_tests(BUGS, CHECKS, also=(NonFiniteError,))


def test_expert_choice_breaks_causality_where_moe_does_not():
    """The law that keeps expert choice out of language models: the same check on both."""

    def leaks(cfg):
        module, x = golden.build(cfg)
        changed = x.clone()
        changed[:, -1] *= -3
        seq = Seq.rows(2, golden.T)
        return not torch.allclose(module(x, seq)[0][:, :-1], module(changed, seq)[0][:, :-1], atol=1e-9)

    assert leaks(ExpertChoiceConfig(n_experts=4, hidden=5, capacity=1.0))
    assert not any(leaks(cfg) for cfg in golden.CONFIGS.values())
