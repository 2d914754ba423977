"""Planted bugs in policy gradients: six or more of each method, each caught by the checks of test_rl.py."""

import contextlib

import pytest
import torch

from tests.golden import test_rl as golden
from tests.golden.planted import caught_by
from tests.golden.rl_cases import CONFIGS
from zero2llm.train.rl import aggregate, bapo, grpo, trpo
from zero2llm.train.rl.advantages import centred, standardised
from zero2llm.train.rl.kl import RewardKLConfig
from zero2llm.train.rl.policy import Surrogate
from zero2llm.train.rl.ratios import log_ratio, mean_ratio, token_ratio


class Wrong:
    """A method with one thing replaced."""

    def __init__(self, right, **changed):
        self.right, self.kl, self.also = right, right.kl, right.also
        self.advantages = changed.get("advantages", right.advantages)
        self.surrogate = changed.get("surrogate", right.surrogate)


# Bugs of the loss, as a changed call of the right one


def sign_flipped(m):
    return Wrong(m, surrogate=lambda logp, old, adv, mask, extra: m.surrogate(logp, old, -adv, mask, extra))


def mask_forgotten(m):
    return Wrong(m, surrogate=lambda logp, old, adv, mask, extra: m.surrogate(logp, old, adv, torch.ones_like(mask), extra))


def last_token_forgotten(m):
    """The end of the answer, whose label is as good as any."""
    shorter = lambda mask: mask & torch.cat((mask[:, 1:], torch.zeros_like(mask[:, :1])), 1)
    return Wrong(m, surrogate=lambda logp, old, adv, mask, extra: m.surrogate(logp, old, adv, shorter(mask), extra))


def ratio_upside_down(m):
    return Wrong(m, surrogate=lambda logp, old, adv, mask, extra: m.surrogate(old, logp, adv, mask, extra))


def old_is_new(m):
    """On-policy is assumed: every ratio is 1."""
    return Wrong(m, surrogate=lambda logp, old, adv, mask, extra: m.surrogate(logp, logp.detach(), adv, mask, extra))


def gradient_into_old(m):
    return Wrong(m, surrogate=lambda logp, old, adv, mask, extra: m.surrogate(logp, old + 0.5 * (logp - logp.detach()), adv, mask, extra))


def counted(m, count):
    def surrogate(logp, old, adv, mask, extra):
        made = m.surrogate(logp, old, adv, mask, extra)
        return Surrogate(made.total, count(made, mask), made.clipped)

    return Wrong(m, surrogate=surrogate)


def divided_by_the_other_unit(m):
    """Tokens for answers, or answers for tokens."""
    return counted(m, lambda made, mask: aggregate.answers(mask) if made.count == mask.sum() else mask.sum())


def divided_by_the_width(m):
    return counted(m, lambda made, mask: torch.tensor(mask.numel()))


def averaged_per_micro_batch(m):
    """A mean where the loop wants a sum."""

    def surrogate(logp, old, adv, mask, extra):
        made = m.surrogate(logp, old, adv, mask, extra)
        return Surrogate(made.total / made.count, torch.ones_like(made.count), made.clipped)

    return Wrong(m, surrogate=surrogate)


LOSS = [
    sign_flipped, mask_forgotten, last_token_forgotten, divided_by_the_other_unit, divided_by_the_width, averaged_per_micro_batch,
]  # fmt: skip
RATIO = [ratio_upside_down, old_is_new, gradient_into_old]  # of methods with a ratio


# Bugs of advantages


def whole_batch_as_one_group(m):
    from dataclasses import replace

    return Wrong(m, advantages=lambda p: m.advantages(replace(p, samples=len(p.reward))))


def failed_answers_counted_as_zero(m):
    from dataclasses import replace

    return Wrong(m, advantages=lambda p: m.advantages(replace(p, ok=torch.ones_like(p.ok))))


def divided_by_std(m):
    return Wrong(m, advantages=lambda p: standardised(p.reward, p.ok, p.samples)[:, None])


def not_divided_by_std(m):
    return Wrong(m, advantages=lambda p: centred(p.reward, p.ok, p.samples)[:, None])


def biased_std(m):
    return Wrong(m, advantages=lambda p: m.advantages(p) * (p.samples / (p.samples - 1)) ** 0.5)


def normalised_twice(m):
    def advantages(p):
        a = m.advantages(p)
        return (a - a.mean()) / a.std()

    return Wrong(m, advantages=advantages)


GROUPS = [whole_batch_as_one_group, failed_answers_counted_as_zero, normalised_twice]
STANDARD = [not_divided_by_std, biased_std]


def kl_with_the_wrong_sign(m):
    m.also.reward_kl.beta = -m.also.reward_kl.beta
    return m


def kl_forgotten(m):
    m.also.reward_kl.beta = 0.0
    return m


# Bugs inside a page: a named function of its module is another one


def patched(module, name, wrong):
    def bug(m, patch):
        patch.setattr(f"zero2llm.train.rl.{module}.{name}", wrong)
        return m

    bug.__name__ = f"{name}_{wrong.__name__}"
    return bug


def larger_of_the_two(ratio, advantage, low, high):
    free, bound = ratio * advantage, ratio.clamp(low, high) * advantage
    return torch.maximum(free, bound), (bound > free).detach()


def clipped_always(ratio, advantage, low, high):
    return ratio.clamp(low, high) * advantage, (ratio != ratio.clamp(low, high)).detach()


def never_clipped(ratio, advantage, low, high):
    return ratio * advantage, torch.zeros_like(ratio, dtype=torch.bool)


def without_upper(ratio, advantage, low, high):
    free, bound = ratio * advantage, ratio.clamp(min=low) * advantage
    return torch.minimum(free, bound), (bound < free).detach()


def without_lower(ratio, advantage, low, high):
    free, bound = ratio * advantage, ratio.clamp(max=high) * advantage
    return torch.minimum(free, bound), (bound < free).detach()


def not_dual(gain, clipped, advantage, bound):
    return gain, clipped


def dual_for_good_ones(gain, clipped, advantage, bound):
    return gain.minimum(bound * advantage.abs()), clipped


def unbounded(logp, old, mask):
    return ((logp - old) * mask).exp()


def unbounded_whole(logp, old, mask):
    return ((logp - old) * mask).double().sum(1, keepdim=True).mul(20).exp()


def mean_of_ratios(logp, old, mask):
    return (log_ratio(logp, old, mask).exp() * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)


def mean_over_width(logp, old, mask):
    return log_ratio(logp, old, mask).mean(1, keepdim=True).exp()


def summed_ratio(logp, old, mask):
    return log_ratio(logp, old, mask).sum(1, keepdim=True).exp()


def clipped_on_both_sides(m):
    """GMPO's clip without a look at the sign of the advantage."""
    held = lambda logp, old: old + (logp - old).clamp(-m.low, m.high)
    return Wrong(m, surrogate=lambda logp, old, adv, mask, extra: m.surrogate(held(logp, old), old, adv, mask, extra))


def clipped_after_the_mean(m):
    def surrogate(logp, old, adv, mask, extra):
        away = log_ratio(logp, old, mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
        return Surrogate(*m.aggregate(-away.clamp(-m.low, m.high).exp() * adv, mask), away > m.high)

    return Wrong(m, surrogate=surrogate)


def reward_at_the_end_of_the_row(score, mask):
    out = torch.zeros(mask.shape, dtype=score.dtype)
    out[:, -1] = score
    return out


def reward_at_every_token(score, mask):
    return score[:, None] * mask


def not_whitened(x, mask):
    return x


def mean_kept(x, mask):
    return x / x[mask].std()


def pads_in_the_mean(x, mask):
    return (x - x.mean()) / x.std() * mask


def first_value_not_last(rewards, values, mask, gamma, lam):
    return golden_gae(rewards, values.roll(1, 1), mask, gamma, lam)


def golden_gae(rewards, values, mask, gamma, lam):
    from zero2llm.train.rl.advantages import gae

    return gae(rewards, values, mask, gamma, lam)


def undiscounted(rewards, values, mask, gamma, lam):
    return golden_gae(rewards, values, mask, gamma, 1.0)


CLIPS = [larger_of_the_two, clipped_always, never_clipped, without_upper, without_lower]
clips = lambda module: [patched(module, "clipped_gain", wrong) for wrong in CLIPS]
TOKENS = lambda module: [patched(module, "whitened", w) for w in (not_whitened, mean_kept, pads_in_the_mean)] + [
    patched(module, "at_last", w) for w in (reward_at_the_end_of_the_row, reward_at_every_token)
]
BUGS = {
    "grpo": [*LOSS, *RATIO, *GROUPS, *STANDARD, *clips("grpo"), patched("grpo", "token_ratio", mean_ratio)],
    "dr_grpo": [*LOSS, *RATIO, *GROUPS, divided_by_std, *clips("dr_grpo")],
    "dapo": [*LOSS, *RATIO, *GROUPS, *STANDARD, *clips("dapo")],
    "gspo": [*LOSS, *RATIO, *GROUPS, *STANDARD, *clips("gspo"),
             *[patched("gspo", "mean_ratio", w) for w in (mean_of_ratios, mean_over_width, summed_ratio, token_ratio)]],
    "gspo_token": [*LOSS, *RATIO[:2], *GROUPS, *STANDARD, *clips("gspo"), patched("gspo", "mean_ratio", mean_of_ratios)],
    "gmpo": [*LOSS, *RATIO, *GROUPS, *STANDARD, clipped_on_both_sides, clipped_after_the_mean],
    "cispo": [*LOSS, *RATIO[:2], *GROUPS, *STANDARD],
    "sapo": [*LOSS, *RATIO, *GROUPS, *STANDARD, patched("sapo", "token_ratio", mean_ratio)],
    "bapo": [*LOSS, *RATIO, *GROUPS, *STANDARD, *clips("bapo"), patched("bapo", "dual_clipped", not_dual)],
    "reinforce": [*LOSS, failed_answers_counted_as_zero, divided_by_std, not_divided_by_std],
    "rloo": [*LOSS, *RATIO, *GROUPS, not_divided_by_std, divided_by_std, kl_with_the_wrong_sign, kl_forgotten, *clips("rloo"),
             patched("rloo", "whole_ratio", mean_ratio)],
    "reinforce_pp": [*LOSS, *RATIO, *clips("reinforce_pp"), *TOKENS("reinforce_pp"), kl_with_the_wrong_sign, kl_forgotten],
    "ppo": [*LOSS, *RATIO, *clips("ppo"), *TOKENS("ppo"), kl_with_the_wrong_sign, kl_forgotten, patched("ppo", "gae", undiscounted),
            patched("ppo", "gae", first_value_not_last), patched("ppo", "dual_clipped", dual_for_good_ones)],
    "trpo": [*LOSS, *RATIO, *GROUPS, *STANDARD],
}  # fmt: skip


def caught(name, method):
    """RuntimeError: there is nothing to take a gradient of."""
    return caught_by(golden.CHECKS, [(name, method)], also=(RuntimeError,))


@pytest.mark.parametrize("name", BUGS)
def test_bugs_are_caught(name):
    assert len(BUGS[name]) >= 6
    assert not caught(name, CONFIGS[name].build())
    for bug in BUGS[name]:
        with pytest.MonkeyPatch.context() as patch:
            m = CONFIGS[name].build()
            wrong = bug(m, patch) if bug.__code__.co_argcount == 2 else bug(m)
            assert caught(name, wrong), bug.__name__


def test_an_unbounded_ratio_is_caught_in_single_precision(monkeypatch):
    """e^80 is finite, its product with what a sum makes of it is not."""
    monkeypatch.setattr(grpo, "token_ratio", lambda logp, old, mask: unbounded(logp, old, mask) ** 10)
    assert "check_extreme" in caught("grpo", CONFIGS["grpo"].build())


@pytest.mark.parametrize("bound", ["cap", "low", "high", "good", "bad"])
def test_other_bounds_are_caught(bound):
    """A constant of CISPO, GMPO and SAPO that is not the one that was asked for."""
    name = {"cap": "cispo", "low": "gmpo", "high": "gmpo", "good": "sapo", "bad": "sapo"}[bound]
    m = CONFIGS[name].build()
    setattr(m, bound, getattr(m, bound) * 1.1)
    assert "check_loss" in caught(name, m)


# BAPO's search


def high_moves_first(negative, positive, target):
    low = high = 0
    while positive[high] < target * negative[low]:
        if high < len(positive) - 1:
            high += 1
        elif low < len(negative) - 1:
            low += 1
        else:
            break
    return low, high


def never_moves(negative, positive, target):
    return 0, 0


def moves_one_too_far(negative, positive, target):
    low, high = bapo_search(negative, positive, target)
    return min(low + 1, len(negative) - 1), high


def target_of_the_sum(negative, positive, target):
    return bapo_search([n + p for n, p in zip(negative, negative, strict=True)], positive, target)


def clipped_tokens_push_on(ratio, adv, mask, lows, highs):
    """The authors' count, under which raising low raises N."""
    weight = lambda r: (r * adv.abs() * mask).double()
    negative = [(weight(ratio.clamp(min=low)) * (adv < 0)).sum() for low in lows]
    return torch.stack([*negative, *((weight(ratio.clamp(max=high)) * (adv > 0)).sum() for high in highs)])


def pads_push(ratio, adv, mask, lows, highs):
    return bapo_pushes(ratio, adv, torch.ones_like(mask), lows, highs)


bapo_search, bapo_pushes = bapo.search, bapo.pushes
SEARCH = {"search": [high_moves_first, never_moves, moves_one_too_far, target_of_the_sum], "pushes": [clipped_tokens_push_on, pads_push]}


@pytest.mark.parametrize("where, wrong", [(where, w) for where, some in SEARCH.items() for w in some])
def test_bugs_of_bapos_search_are_caught(where, wrong, monkeypatch):
    monkeypatch.setattr(bapo, where, wrong)
    with pytest.raises(AssertionError):
        golden.check_bapo_search()
        golden.check_bapo_bounds()


# TRPO's step


@contextlib.contextmanager
def replaced(owner, name, wrong):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, wrong)
        yield


right_fisher, right_step, right_cg, right_divergence = trpo.Policy.fisher, trpo.full_step, trpo.conjugate_gradient, trpo.divergence
STEP = {
    "old distribution not detached": (trpo, "divergence", lambda old, new: right_divergence(new, new)),
    "KL the other way round": (trpo, "divergence", lambda old, new: right_divergence(new, old)),
    "Hessian of the sum, not the mean": (trpo.Policy, "fisher", lambda self, v: right_fisher(self, v) * self.tokens),
    "uphill": (trpo, "full_step", lambda p, g, c: tuple(-x for x in right_step(p, g, c))),
    "factor without the 2": (trpo, "full_step", lambda p, g, c: tuple(x / 2**0.5 for x in right_step(p, g, c))),
    "gradient itself": (trpo, "conjugate_gradient", lambda product, b, steps: b),
    "conjugate gradient without conjugation": (trpo, "conjugate_gradient", lambda product, b, steps: right_cg(product, b, 1)),
}


def no_line_search(policy, gradient, cfg):
    step, factor = right_step(policy, gradient, cfg)
    policy.put(policy.weights() + step)
    return trpo.Step(1.0, factor, cfg.delta)


@pytest.mark.slow
@pytest.mark.parametrize("bug", STEP)
def test_bugs_of_trpos_step_are_caught(bug, monkeypatch):
    owner, name, wrong = STEP[bug]
    monkeypatch.setattr(owner, name, wrong)
    if owner is trpo and name != "divergence":
        monkeypatch.setattr(golden, name, wrong)
    with pytest.raises(AssertionError):
        golden.check_trpo()


def test_a_missing_line_search_is_caught(monkeypatch):
    monkeypatch.setattr(golden, "trust_step", no_line_search)
    with pytest.raises(AssertionError):
        golden.check_trpo_holds_the_region()


def test_reward_kl_bugs_start_from_a_kl():
    assert RewardKLConfig().beta > 0
