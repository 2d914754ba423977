"""Planted bugs in initialisation and in muP's multipliers: each must be caught."""

import pytest
import torch

from tests.golden import test_init as golden
from tests.golden import test_init_width as width
from tests.golden.planted import bug_tests
from zero2llm.model import init, lm
from zero2llm.model.init import DeepNormInitConfig, GPT2InitConfig, KaimingInitConfig, MuPInitConfig, XavierInitConfig
from zero2llm.optim import build

# The checks


def spreads():
    for kind in golden.EXPECTED:
        golden.check_spreads(kind)


def experts():
    for kind in ("gpt2", "xavier", "kaiming"):
        golden.test_experts_are_drawn_as_separate_matrices(kind)


def base_is_gpt2():
    golden.test_mup_at_its_base_is_gpt2()


def multipliers():
    golden.check_mup_multipliers()


def refusals():
    for given, more, reason in golden.REFUSED:
        with pytest.raises(ValueError, match=reason):
            golden.model_config(given, **more)


def coordinates():
    width.test_coordinates_stay_where_they_are_at_every_width(True, "heads")


CHECKS = [spreads, experts, base_is_gpt2, multipliers, refusals, coordinates]


# The bugs


def spread_with(patch, cfg, formula):
    patch.setattr(cfg, "spread", formula)


def residuals_scaled_by_one_branch_a_layer(patch):
    right = GPT2InitConfig.spread
    spread_with(patch, GPT2InitConfig, lambda s, name, w, n, d: right(s, name, w, n / 2, d))


def only_attention_s_writer_scaled(patch):
    patch.setattr(init, "RESIDUAL_WRITERS", ("o_proj",))


def xavier_of_the_fan_in(patch):
    spread_with(patch, XavierInitConfig, lambda s, name, w, n, d: w.shape[-1] ** -0.5)


def xavier_counts_experts(patch):
    spread_with(patch, XavierInitConfig, lambda s, name, w, n, d: (2 / sum(w.shape)) ** 0.5)


def kaiming_of_the_fan_out(patch):
    spread_with(patch, KaimingInitConfig, lambda s, name, w, n, d: (2 / w.shape[-2]) ** 0.5)


def kaiming_without_its_gain(patch):
    spread_with(patch, KaimingInitConfig, lambda s, name, w, n, d: w.shape[-1] ** -0.5)


def deepnorm_on_queries_and_keys_too(patch):
    right = DeepNormInitConfig.spread
    spread_with(patch, DeepNormInitConfig, lambda s, name, w, n, d: right(s, "v_proj", w, n, d))


def deepnorm_with_the_wiring_s_constant(patch):
    right = DeepNormInitConfig.spread
    spread_with(patch, DeepNormInitConfig, lambda s, name, w, n, d: right(s, name, w, n / 4, d))


def biases_are_left(patch):
    right = init.init_weights

    def wrong(model, cfg):
        right(model, cfg)
        for name, p in model.named_parameters():
            if name.endswith("proj.bias"):
                torch.nn.init.constant_(p, 0.1)

    patch.setattr(lm, "init_weights", wrong)


def mup_shrinks_by_m_not_its_root(patch):
    spread_with(patch, MuPInitConfig, lambda s, name, w, n, d: s.std * (s.base_width / d if name != "head" else 1))


def mup_shrinks_the_head(patch):
    right = MuPInitConfig.spread
    spread_with(patch, MuPInitConfig, lambda s, name, w, n, d: right(s, "head_of_all", w, n, d))


def mup_shrinks_embeddings(patch):
    right = init.init_weights

    def wrong(model, cfg):
        right(model, cfg)
        with torch.no_grad():
            model.embed.weight.mul_(init.width_ratio(cfg, model.cfg.d_model) ** 0.5)

    patch.setattr(lm, "init_weights", wrong)


def no_output_multiplier(patch):
    patch.setattr(lm, "width_ratio", lambda cfg, d: 1.0)


def output_multiplier_upside_down(patch):
    right = init.width_ratio
    patch.setattr(lm, "width_ratio", lambda cfg, d: 1 / right(cfg, d))


def optim_with(patch, change):
    right = build.OptimizerSet.__init__

    def wrong(self, model, cfg, matrix_lr=1.0, rates=None):
        right(self, model, cfg, matrix_lr, rates)
        for group in self.groups:
            change(self, group, matrix_lr)

    patch.setattr(build.OptimizerSet, "__init__", wrong)


def every_group_scaled(patch):
    def change(self, group, ratio):
        group["peak_lr"] = group["lr"] = self.groups[0]["lr"]

    optim_with(patch, change)


def schedule_forgets_the_scale(patch):
    def change(self, group, ratio):
        group["peak_lr"] = max(g["lr"] for g in self.groups)

    optim_with(patch, change)


def decay_not_scaled_back(patch):
    def change(self, group, ratio):
        group["weight_decay"] *= ratio

    optim_with(patch, change)


def attention_scale_not_checked(patch):
    right = init.check_init

    def wrong(cfg, specs, d):
        if not isinstance(cfg, MuPInitConfig):
            right(cfg, specs, d)

    patch.setattr("zero2llm.model.spec.check_init", wrong)


BUGS = {
    residuals_scaled_by_one_branch_a_layer: {"spreads"},
    only_attention_s_writer_scaled: {"spreads"},
    xavier_of_the_fan_in: {"spreads"},
    xavier_counts_experts: {"experts"},
    kaiming_of_the_fan_out: {"spreads"},
    kaiming_without_its_gain: {"spreads"},
    deepnorm_on_queries_and_keys_too: {"spreads"},
    deepnorm_with_the_wiring_s_constant: {"spreads"},
    biases_are_left: {"spreads"},
    mup_shrinks_by_m_not_its_root: {"spreads"},
    mup_shrinks_the_head: {"spreads"},
    mup_shrinks_embeddings: {"spreads"},
    no_output_multiplier: {"multipliers"},
    output_multiplier_upside_down: {"multipliers", "coordinates"},
    every_group_scaled: {"multipliers"},
    schedule_forgets_the_scale: {"multipliers", "coordinates"},
    decay_not_scaled_back: {"multipliers"},
    attention_scale_not_checked: {"refusals"},
}


test_without_a_bug_every_check_holds, test_a_planted_bug_is_caught = bug_tests(BUGS, CHECKS, also=(pytest.fail.Exception,))
