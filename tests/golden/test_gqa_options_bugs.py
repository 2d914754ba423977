"""Planted bugs in attention's options: each must be caught, and by whom is part of the claim."""

import torch

from tests.golden.planted import bug_tests
from tests.golden.test_gqa_options import CASES, D, T, both, packed
from tests.golden.test_layers import randomised
from zero2llm.core.seq import Seq
from zero2llm.layers.mixers import gqa
from zero2llm.layers.mixers.gqa import GQA
from zero2llm.layers.norms.rms import RMSNorm
from zero2llm.ops import attend as ops

# The checks. Each takes a configuration and raises AssertionError.


def same(a, b):
    torch.testing.assert_close(a, b, atol=1e-11, rtol=0)


def setup(cfg):
    torch.manual_seed(3)
    return randomised(cfg.build(D)), torch.randn(2, T, D, dtype=torch.float64)


def hand_formula(cfg):
    module, x, seq, expected = both(cfg)
    same(module(x, seq)[0], expected)


def causality(cfg):
    module, x = setup(cfg)
    for t in range(1, T):
        changed = x.clone()
        changed[:, t] += 1
        same(module(x, Seq.rows(2, T))[0][:, :t], module(changed, Seq.rows(2, T))[0][:, :t])


def packed_equals_separate(cfg):
    module, x = setup(cfg)
    full = module(x, packed())[0]
    for row, a, b in [(0, 0, 5), (0, 5, 8), (1, 0, 2), (1, 2, 6)]:
        same(full[row, a:b], module(x[row : row + 1, a:b], Seq.rows(1, b - a))[0][0])


def streamed_equals_whole(cfg):
    module, x = setup(cfg)
    for cuts in [(1,) * T, (3, 1, 2, 1, 1)]:
        state, at, parts = module.init_state(2, 16, dtype=x.dtype), 0, []
        for n in cuts:
            parts.append(module(x[:, at : at + n], Seq.rows(2, T).window(at, at + n), state)[0])
            at += n
        same(torch.cat(parts, 1), module(x, Seq.rows(2, T))[0])


CHECKS = [causality, packed_equals_separate, streamed_equals_whole, hand_formula]


# The bugs


def weights_with(change):
    """`attention_weights` written out once more, to be wrong in one place."""

    def wrong(q, k, mask=None, scale=None, softcap=None, sinks=None):
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        if mask is None:
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        return change(q @ k.transpose(-1, -2), scale, softcap, mask, sinks)

    return wrong


def shut(scores, mask):
    return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask


def capped(scores, softcap):
    return scores if softcap is None else softcap * (scores / softcap).tanh()


def with_sink(scores, sinks):
    if sinks is None:
        return scores.softmax(-1)
    sink = sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat((sink, scores), -1).softmax(-1)[..., 1:]


def sink_is_scaled_too(patch):
    wrong = lambda s, scale, cap, mask, sinks: with_sink(shut(capped(s * scale, cap), mask), None if sinks is None else sinks * scale)
    patch.setattr(ops, "attention_weights", weights_with(wrong))


def sink_is_capped_too(patch):
    wrong = lambda s, scale, cap, mask, sinks: with_sink(shut(capped(s * scale, cap), mask), None if sinks is None else capped(sinks, cap))
    patch.setattr(ops, "attention_weights", weights_with(wrong))


def sink_s_share_is_given_back(patch):
    def wrong(s, scale, cap, mask, sinks):
        weights = with_sink(shut(capped(s * scale, cap), mask), sinks)
        return weights / weights.sum(-1, keepdim=True)

    patch.setattr(ops, "attention_weights", weights_with(wrong))


def sinks_in_the_order_of_key_heads(patch):
    right = ops.attention_weights
    tiled = lambda sinks: None if sinks is None else sinks[[0, 2, 1, 3]]
    patch.setattr(ops, "attention_weights", lambda q, k, m=None, s=None, c=None, sinks=None: right(q, k, m, s, c, tiled(sinks)))


def cap_before_the_scale(patch):
    wrong = lambda s, scale, cap, mask, sinks: with_sink(shut(capped(s, cap) * scale, mask), sinks)
    patch.setattr(ops, "attention_weights", weights_with(wrong))


def cap_after_the_mask(patch):
    def wrong(s, scale, cap, mask, sinks):
        return with_sink(capped(shut(s * scale, mask), cap), sinks)

    patch.setattr(ops, "attention_weights", weights_with(wrong))


def cap_clips(patch):
    def wrong(s, scale, cap, mask, sinks):
        return with_sink(shut(s * scale if cap is None else (s * scale).clamp(-cap, cap), mask), sinks)

    patch.setattr(ops, "attention_weights", weights_with(wrong))


def scale_on_top_of_the_usual_one(patch):
    right = GQA.__init__

    def wrong(self, d, h, g, k, cfg):
        right(self, d, h, g, k, cfg)
        self.scale = None if cfg.scale is None else cfg.scale / k**0.5

    patch.setattr(GQA, "__init__", wrong)


def options_lost_with_a_cache(patch):
    right = GQA.forward

    def wrong(self, x, seq, state=None):
        cap, self.softcap = self.softcap, None if state is not None else self.softcap
        out = right(self, x, seq, state)
        self.softcap = cap
        return out

    patch.setattr(GQA, "forward", wrong)


class Wrong(torch.nn.Module):
    def __init__(self, inside, change):
        super().__init__()
        self.inside, self.change = inside, change

    def forward(self, x):
        return self.change(self.inside(x))


def gate_with(patch, change):
    right = GQA.forward

    def wrong(self, x, seq, state=None):
        if self.g_proj is None:
            return right(self, x, seq, state)
        gate, self.g_proj = self.g_proj, None
        self.g_proj = Wrong(gate, change)
        out = right(self, x, seq, state)
        self.g_proj = gate
        return out

    patch.setattr(GQA, "forward", wrong)


def gate_of_the_token_before(patch):
    gate_with(patch, lambda g: g.roll(1, 1))


def gate_silu_instead_of_sigmoid(patch):
    gate_with(patch, lambda g: (g * g.sigmoid()).sigmoid())


def gate_over_channels_then_heads(patch):
    gate_with(patch, lambda g: g.unflatten(-1, (4, 3)).transpose(-1, -2).flatten(-2))


def norm_s_one_forgotten(patch):
    patch.setattr(RMSNorm, "forward", lambda self, x: torch.nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps))


def norm_over_all_taken_per_head(patch):
    right = GQA.project

    def wrong(self, x, seq):
        if not self.norm_all or isinstance(self.q_norm, torch.nn.Identity):
            return right(self, x, seq)
        out = []
        for p, norm in ((self.q_proj, self.q_norm), (self.k_proj, self.k_norm)):
            heads = p(x).unflatten(-1, (-1, self.head_dim))
            weight = (1 + norm.weight if norm.plus_one else norm.weight).unflatten(0, (-1, self.head_dim))
            out.append((torch.nn.functional.rms_norm(heads, (self.head_dim,), None, norm.eps) * weight).transpose(1, 2))
        return *out, self.v_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    patch.setattr(GQA, "project", wrong)


def bias_of_alibi_before_the_cap(patch):
    def wrong(s, scale, cap, mask, sinks):
        if mask.dtype == torch.bool:
            return with_sink(shut(capped(s * scale, cap), mask), sinks)
        return with_sink(shut(capped(s * scale + mask.masked_fill(mask == -torch.inf, 0), cap), mask > -torch.inf), sinks)

    patch.setattr(ops, "attention_weights", weights_with(wrong))


HAND = {"hand_formula"}
BUGS = {  # bug -> checks that must catch it; "hand_formula" alone = it passes every law
    sink_is_scaled_too: HAND,
    sink_is_capped_too: HAND,
    sink_s_share_is_given_back: HAND,
    sinks_in_the_order_of_key_heads: HAND,
    cap_before_the_scale: HAND,
    cap_after_the_mask: {"causality", "packed_equals_separate"},
    cap_clips: HAND,
    scale_on_top_of_the_usual_one: HAND,
    options_lost_with_a_cache: {"streamed_equals_whole"},
    gate_of_the_token_before: {"streamed_equals_whole"},
    gate_silu_instead_of_sigmoid: HAND,
    gate_over_channels_then_heads: HAND,
    norm_s_one_forgotten: HAND,
    norm_over_all_taken_per_head: HAND,
    bias_of_alibi_before_the_cap: HAND,
}


test_without_a_bug_every_check_holds, test_a_planted_bug_is_caught = bug_tests(BUGS, CHECKS, [(cfg,) for cfg in CASES.values()], alone=HAND)


def test_gqa_reads_its_weights_from_one_place():
    """The bugs above patch ops.attend.attention_weights: the fused kernel must not be what they run past."""
    assert gqa.attend is ops.attend
