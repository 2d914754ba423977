"""Planted bugs in Mamba, Performer, FLASH and log-linear attention: each must be caught, and by whom is part of the claim."""

import pytest
import torch

from tests.golden.planted import caught_by, must_catch
from tests.golden.test_layers import randomised
from tests.golden.test_layers_bugs import LAWS, SEG, D, T, same
from tests.golden.test_subquadratic import CASES, by_hand
from zero2llm.core.seq import Seq
from zero2llm.layers.memory import Memory
from zero2llm.layers.mixers import gau_flash, log_linear, mamba1, performer
from zero2llm.layers.positions.none import NoPosition
from zero2llm.ops import log_linear as trees
from zero2llm.ops import selective_scan as scans
from zero2llm.ops.marks import Marks

CONFIGS = {
    "mamba1": [CASES["mamba1 norms"][:1]],
    "performer": [CASES["performer"][:1]],
    "gau_flash": [CASES["gau_flash odd"][:1]],
    "log_linear": [CASES["log_linear"][:1]],
}


def hand_formula(cfg):
    formula = dict(CASES.values())[cfg]
    torch.manual_seed(3)
    module, x = randomised(cfg.build(D)), torch.randn(2, T, D, dtype=torch.float64)
    for seq in (Seq.rows(2, T), Seq.of_segments(SEG)):
        real = torch.ones(2, T) if seq.seg is None else seq.seg != 0
        same(module(x, seq)[0] * real[..., None], by_hand(module, cfg, formula, x, seq), 1e-9)


CHECKS = [*LAWS, hand_formula]


def forgets_to_write(patch, name):
    """The state keeps what it first held of ``name``."""
    right = Memory.write
    patch.setattr(Memory, "write", lambda self, **new: right(self, **{n: t for n, t in new.items() if n != name}))


def padding_counts(patch):
    right = Marks.of
    patch.setattr(Marks, "of", staticmethod(lambda seq, streamed: Marks(right(seq, streamed).doc)))


def rewired(patch, module, name, change):
    """``module.name`` called with arguments that ``change`` has altered."""
    right = getattr(module, name)
    patch.setattr(module, name, lambda *args: right(*change(*args)))


# Mamba


def the_state_outlives_its_document(patch):
    patch.setattr(scans, "begins", lambda marks, x: x.new_zeros(x.shape[:2]))


def the_filter_reads_across_documents(patch):
    rewired(patch, mamba1, "causal_conv", lambda x, w, b, marks, tail: (x, w, b, Marks(), tail))


def the_filter_looks_ahead(patch):
    right = mamba1.causal_conv
    patch.setattr(mamba1, "causal_conv", lambda x, *more: right(x.roll(-1, 1), *more))


def the_filter_is_turned_round(patch):
    rewired(patch, mamba1, "causal_conv", lambda x, w, *more: (x, w.flip(1), *more))


def the_tail_is_not_kept(patch):
    forgets_to_write(patch, "tail")


def decays_without_exp(patch):
    rewired(patch, mamba1, "selective_scan", lambda x, dt, A, *more: (x, dt, -(-A).log().abs(), *more))


def writes_without_the_step_size(patch):
    def wrong(x, dt, A, B, C, skip, marks, state):
        y, h = scans.selective_scan(x / dt, dt, A, B, C, 0 * skip, marks, state)
        return y + skip * x, h

    patch.setattr(mamba1, "selective_scan", wrong)


def no_skip(patch):
    rewired(patch, mamba1, "selective_scan", lambda x, dt, A, B, C, skip, *more: (x, dt, A, B, C, 0 * skip, *more))


def chunks_are_not_chained(patch):
    right = scans.two_levels

    def wrong(dt, dx, A, B, C, keep, h):
        cut = lambda n: (x[:, n : n + 1] for x in (dt, dx, B, C, keep) if x is not None)
        alone = lambda dt, dx, B, C, keep=None: right(dt, dx, A, B, C, keep, torch.zeros_like(h))[0]
        return torch.cat([alone(*cut(n)) for n in range(dt.shape[1])], 1), right(dt, dx, A, B, C, keep, h)[1]

    patch.setattr(scans, "two_levels", wrong)


# Performer


def one_maximum_for_the_whole_text(patch):
    def wrong(k, marks, carried):
        top = k.amax(-1).amax(-1, keepdim=True).expand(k.shape[:-1])
        return top, torch.zeros_like(top)

    patch.setattr(performer, "running_top", wrong)


def one_maximum_for_each_key(patch):
    patch.setattr(performer, "running_top", lambda k, *more: (k.amax(-1).clamp_min(-1e9), torch.zeros(k.shape[:-1])))


def sums_are_not_rescaled(patch):
    right = performer.running_top
    patch.setattr(performer, "running_top", lambda *a: (lambda top, rose: (top, 0 * rose))(*right(*a)))


def directions_are_drawn_again(patch):
    right = performer.Performer.exponents

    def wrong(self, x):
        self.W.copy_(performer.orthogonal_gaussian(*self.W.shape))
        return right(self, x)

    patch.setattr(performer.Performer, "exponents", wrong)


def features_without_the_scale(patch):
    rewired(patch, performer.Performer, "exponents", lambda self, x: (self, x * self.head_dim**0.25))


def features_without_the_norm(patch):
    right = performer.Performer.exponents
    lengths = lambda self, x: (x.transpose(1, 2) * self.head_dim**-0.25).square().sum(-1, keepdim=True) / 2
    patch.setattr(performer.Performer, "exponents", lambda self, x: right(self, x) + lengths(self, x))


def the_maximum_is_not_kept(patch):
    forgets_to_write(patch, "top")


def sums_of_several_documents(patch):
    rewired(patch, performer, "scan", lambda q, k, v, g, marks, *more: (q, k, v, g, Marks(), *more))


# FLASH


def chunks_of_the_row(patch):
    columns = lambda pos: torch.arange(pos.shape[1]).expand_as(pos)
    rewired(patch, gau_flash, "mix_chunks", lambda q, k, v, pos, *more: (q, k, v, columns(pos), *more))


def divided_by_the_row_s_length(patch):
    def change(q, k, v, pos, marks, C, state):
        S = q.shape[-1] // 2
        return torch.cat((q[..., :S] * C / q.shape[1], q[..., S:]), -1), k, v, pos, marks, C, state

    rewired(patch, gau_flash, "mix_chunks", change)


def far_is_a_sum(patch):
    patch.setattr(gau_flash, "n_far", lambda pos, C: torch.ones_like(pos))


def near_counts_as_far(patch):
    patch.setattr(gau_flash, "relations", lambda at, key_at, C: (key_at < 0, key_at <= at))


def near_looks_ahead(patch):
    patch.setattr(gau_flash, "relations", lambda at, key_at, C: (key_at // C == at // C, key_at // C < at // C))


def only_its_own_row_chunk(patch):
    right = gau_flash.with_previous
    nobody = lambda x: torch.full_like(x, -9) if x.ndim == 2 else torch.zeros_like(x)
    one = lambda old, new, i: right(nobody(old) if i else old, new[:, i : i + 1])
    alone = lambda old, new: torch.cat([one(old, new, i) for i in range(new.shape[1])], 1)
    patch.setattr(gau_flash, "with_previous", alone)


def views_are_swapped(patch):
    patch.setattr(NoPosition, "forward", lambda self, q, k, seq: (q[..., [2, 1, 0, 3], :], k))


def the_sum_is_not_kept(patch):
    forgets_to_write(patch, "done")


# Log-linear attention


def levels_count_along_the_row(patch):
    columns = lambda pos: torch.arange(pos.shape[1]).expand_as(pos)
    change = lambda q, k, v, g, lam, pos, marks, state, chunk: (q, k, v, g, lam, columns(pos), marks, state, chunk)
    rewired(patch, log_linear, "log_linear", change)


def levels_of_distance(patch):
    right = trees.level
    patch.setattr(trees, "level", lambda p, s, n: right((p - s).clamp_min(0), torch.zeros_like(p - s), n))


def levels_one_too_far(patch):
    rewired(patch, log_linear, "log_linear", lambda q, k, v, g, lam, *more: (q, k, v, g, lam.roll(1, -1), *more))


def the_token_is_lost_in_the_merge(patch):
    lost = lambda buckets: buckets * (torch.arange(buckets.shape[2]) > 0)[:, None, None]
    rewired(patch, trees, "merge", lambda buckets, to: (lost(buckets), to))


def the_tree_outlives_its_document(patch):
    change = lambda q, k, v, g, lam, pos, marks, S: (q, k, v, g, lam, pos, Marks(None, marks.real), S)
    rewired(patch, trees, "log_linear_steps", change)
    rewired(patch, trees, "tree", lambda sums, decay, doc, *more: (sums, decay, torch.zeros_like(doc), *more))


def blocks_do_not_fade(patch):
    rewired(patch, trees, "tree", lambda sums, decay, *more: (sums, torch.ones_like(decay), *more))


def old_buckets_stay_where_they_were(patch):
    patch.setattr(
        trees, "seen_from", lambda p, start, n: torch.arange(n).expand(*torch.broadcast_shapes(p.shape, start.shape), n)
    )


def written_without_the_step_size(patch):
    right = log_linear.LogLinear.gates
    patch.setattr(
        log_linear.LogLinear,
        "gates",
        lambda self, x: (lambda dt, g, lam: (torch.ones_like(dt), g, lam))(*right(self, x)),
    )


HAND = {"hand_formula"}
BUGS = {  # bug -> checks that must catch it; HAND alone = it passes every law
    "mamba1": {
        the_state_outlives_its_document: {"packed_equals_separate"},
        the_filter_reads_across_documents: {"packed_equals_separate"},
        the_filter_looks_ahead: {"causality"},
        the_filter_is_turned_round: HAND,
        the_tail_is_not_kept: {"streamed_equals_whole"},
        padding_counts: {"ragged_prefill_then_decode"},
        decays_without_exp: HAND,
        writes_without_the_step_size: HAND,
        no_skip: HAND,
        chunks_are_not_chained: {"streamed_equals_whole", "hand_formula"},
    },
    "performer": {
        one_maximum_for_the_whole_text: {"streamed_equals_whole"},
        one_maximum_for_each_key: HAND,
        sums_are_not_rescaled: HAND,
        directions_are_drawn_again: {"streamed_equals_whole", "hand_formula"},
        features_without_the_scale: HAND,
        features_without_the_norm: HAND,
        the_maximum_is_not_kept: {"streamed_equals_whole"},
        sums_of_several_documents: {"packed_equals_separate"},
        padding_counts: {"ragged_prefill_then_decode"},
    },
    "gau_flash": {
        chunks_of_the_row: {"packed_equals_separate"},
        divided_by_the_row_s_length: {"streamed_equals_whole", "packed_equals_separate"},
        far_is_a_sum: HAND,
        near_counts_as_far: {"streamed_equals_whole", "hand_formula"},
        near_looks_ahead: {"causality"},
        only_its_own_row_chunk: {"packed_equals_separate"},
        views_are_swapped: HAND,
        the_sum_is_not_kept: {"streamed_equals_whole"},
        padding_counts: {"ragged_prefill_then_decode"},
    },
    "log_linear": {
        levels_count_along_the_row: {"packed_equals_separate"},
        levels_of_distance: {"streamed_equals_whole", "hand_formula"},
        levels_one_too_far: HAND,
        the_token_is_lost_in_the_merge: {"streamed_equals_whole", "hand_formula"},
        the_tree_outlives_its_document: {"packed_equals_separate", "streamed_packed_equals_whole"},
        blocks_do_not_fade: {"streamed_equals_whole", "hand_formula"},
        old_buckets_stay_where_they_were: {"streamed_equals_whole"},
        written_without_the_step_size: HAND,
        padding_counts: {"ragged_prefill_then_decode"},
    },
}


@pytest.mark.parametrize("kind", BUGS)
def test_without_a_bug_every_check_holds(kind):
    assert caught_by(CHECKS, CONFIGS[kind]) == set()


@pytest.mark.parametrize(
    ("kind", "bug"),
    [(kind, bug) for kind, bugs in BUGS.items() for bug in bugs],
    ids=lambda b: getattr(b, "__name__", b),
)
def test_a_planted_bug_is_caught(kind, bug, monkeypatch):
    bug(monkeypatch)
    must_catch(BUGS[kind][bug], CHECKS, CONFIGS[kind], alone=HAND)
