"""Planted bugs in norms: each must be caught by the hand formula or by the measured statistics."""

import torch
import torch.nn.functional as F

from tests.golden import test_norms as golden
from tests.golden.planted import bug_tests
from zero2llm.layers.norms.batch import BatchNorm
from zero2llm.layers.norms.dyt import DyT
from zero2llm.layers.norms.rms import RMSNorm


def dyt():
    golden.test_dyt()
    golden.test_dyt_starts_as_the_tanh_of_half()


def rms():
    golden.test_rms_norm_plus_one_starts_as_plain_and_scales_by_one_plus_w()


def batch():
    golden.test_batch_norm_over_two_batches_and_then_eval()


def leaks():
    for what in golden.LEAKS:
        golden.test_batch_norm_leaks_in_training_and_not_in_eval(what)
    golden.test_two_micro_batches_are_not_one_batch()


CHECKS = [dyt, rms, batch, leaks]


def dyt_with(patch, formula):
    patch.setattr(DyT, "forward", lambda self, x: formula(x, self.alpha, self.weight, self.bias))


def dyt_alpha_outside(patch):
    dyt_with(patch, lambda x, a, w, b: a * x.tanh() * w + b)


def dyt_bias_inside(patch):
    dyt_with(patch, lambda x, a, w, b: (a * x + b).tanh() * w)


def dyt_weight_inside(patch):
    dyt_with(patch, lambda x, a, w, b: (a * w * x).tanh() + b)


def dyt_sigmoid(patch):
    dyt_with(patch, lambda x, a, w, b: (a * x).sigmoid() * w + b)


def dyt_without_bias(patch):
    dyt_with(patch, lambda x, a, w, b: (a * x).tanh() * w)


def dyt_starts_at_one(patch):
    right = DyT.__init__
    patch.setattr(DyT, "__init__", lambda self, d, alpha: right(self, d, 1.0))


def rms_with(patch, formula):
    patch.setattr(RMSNorm, "forward", lambda self, x: formula(x, self.weight, self.eps, self.plus_one))


def rms_one_forgotten(patch):
    rms_with(patch, lambda x, w, eps, plus: F.rms_norm(x, w.shape, w, eps))


def rms_eps_outside_the_root(patch):
    rms_with(patch, lambda x, w, eps, plus: x / (x.square().mean(-1, keepdim=True).sqrt() + eps) * (1 + w if plus else w))


def rms_subtracts_the_mean(patch):
    rms_with(patch, lambda x, w, eps, plus: F.rms_norm(x - x.mean(-1, keepdim=True), w.shape, 1 + w if plus else w, eps))


def rms_of_the_sum(patch):
    rms_with(patch, lambda x, w, eps, plus: x / (x.square().sum(-1, keepdim=True) + eps).sqrt() * (1 + w if plus else w))


def rms_starts_at_two(patch):
    right = RMSNorm.__init__

    def wrong(self, d, eps, plus_one=False):
        right(self, d, eps, plus_one)
        torch.nn.init.ones_(self.weight)

    patch.setattr(RMSNorm, "__init__", wrong)


def rms_over_tokens(patch):
    rms_with(patch, lambda x, w, eps, plus: x / (x.square().mean(-2, keepdim=True) + eps).sqrt() * (1 + w if plus else w))


def batch_runs_on_the_biased_variance(patch):
    def wrong(self, x):
        var, mean = torch.var_mean(x.flatten(0, -2), 0, correction=0)
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var, self.momentum)
        return mean, var

    patch.setattr(BatchNorm, "measured", wrong)


def batch_normalises_by_the_unbiased_variance(patch):
    right = BatchNorm.measured

    def wrong(self, x):
        mean, var = right(self, x)
        n = x.flatten(0, -2).shape[0]
        return mean, var * n / (n - 1)

    patch.setattr(BatchNorm, "measured", wrong)


def batch_momentum_of_the_old_value(patch):
    right = BatchNorm.__init__
    patch.setattr(BatchNorm, "__init__", lambda self, d, eps, momentum: right(self, d, eps, 1 - momentum))


def batch_measures_in_eval(patch):
    right = BatchNorm.forward

    def wrong(self, x):
        if not self.training:
            self.measured(x)
        return right(self, x)

    patch.setattr(BatchNorm, "forward", wrong)


def batch_uses_running_values_in_training(patch):
    right = BatchNorm.measured

    def wrong(self, x):
        right(self, x)
        return self.running_mean.clone(), self.running_var.clone()

    patch.setattr(BatchNorm, "measured", wrong)


def batch_statistics_of_one_row(patch):
    """Instance normalisation: it still sees the future, but neither other rows nor micro-batches."""

    def wrong(self, x):
        BatchNorm.right(self, x)
        return x.mean(1, keepdim=True), x.var(1, keepdim=True, correction=0)

    patch.setattr(BatchNorm, "right", BatchNorm.measured, raising=False)
    patch.setattr(BatchNorm, "measured", wrong)


def batch_eval_uses_the_batch(patch):
    right = BatchNorm.forward

    def wrong(self, x):
        self.training = True
        return right(self, x)

    patch.setattr(BatchNorm, "forward", wrong)


BUGS = {
    dyt_alpha_outside: {"dyt"},
    dyt_bias_inside: {"dyt"},
    dyt_weight_inside: {"dyt"},
    dyt_sigmoid: {"dyt"},
    dyt_without_bias: {"dyt"},
    dyt_starts_at_one: {"dyt"},
    rms_one_forgotten: {"rms"},
    rms_eps_outside_the_root: {"rms"},
    rms_subtracts_the_mean: {"rms"},
    rms_of_the_sum: {"rms"},
    rms_starts_at_two: {"rms"},
    rms_over_tokens: {"rms"},
    batch_runs_on_the_biased_variance: {"batch"},
    batch_normalises_by_the_unbiased_variance: {"batch"},
    batch_momentum_of_the_old_value: {"batch"},
    batch_measures_in_eval: {"batch", "leaks"},
    batch_uses_running_values_in_training: {"batch"},
    batch_statistics_of_one_row: {"batch", "leaks"},
    batch_eval_uses_the_batch: {"batch", "leaks"},
}


test_without_a_bug_every_check_holds, test_a_planted_bug_is_caught = bug_tests(BUGS, CHECKS)
