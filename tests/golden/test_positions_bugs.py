"""Planted bugs in positions: each must be caught, and by whom is part of the claim.

Laws compare a layer with itself: a frequency that is wrong everywhere alike passes them, and only the hand formula sees it.
"""

import math

import torch

from tests.golden import test_positions as golden
from tests.golden.planted import bug_tests
from tests.golden.test_layers import randomised
from zero2llm.core.config import parse
from zero2llm.core.seq import Seq
from zero2llm.layers.mixers.gqa import GQAConfig
from zero2llm.layers.positions import alibi, interpolation, mrope, rope
from zero2llm.layers.positions.alibi import ALiBi
from zero2llm.layers.positions.catalog import AttentionPositionConfig
from zero2llm.layers.positions.interpolation import (
    Llama3ScalingConfig,
    LongRoPEConfig,
    NTKScalingConfig,
    YaRNConfig,
    plain,
)
from zero2llm.layers.positions.mrope import MRoPE
from zero2llm.layers.positions.rope import RoPE

D, T = 16, 8
POSITIONS = {
    "scaled": {"kind": "rope", "base": 50.0, "rotary_dim": 4, "scaling": {"kind": "linear", "factor": 2.0}},
    "yarn": {"kind": "rope", "base": 50.0, "scaling": golden.SCALINGS["yarn"]},
    "mrope": {"kind": "mrope", "base": 50.0, "sections": [2, 1, 1]},
    "alibi": {"kind": "alibi"},
}
SEG = torch.tensor([[1, 1, 1, 1, 1, 2, 2, 2], [3, 3, 4, 4, 4, 4, 0, 0]], dtype=torch.int32)


def setup(position, window=None):
    torch.manual_seed(3)
    cfg = GQAConfig(n_heads=3, n_kv_heads=1, head_dim=8, window=window, position=parse(AttentionPositionConfig, position))
    return randomised(cfg.build(D)), torch.randn(2, T, D, dtype=torch.float64)


def same(a, b, tolerance=1e-6):  # angles are computed in fp32 by design
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


# The checks. Each raises AssertionError.


def hand_formula():
    torch.manual_seed(0)
    for name in golden.SCALINGS:
        golden.test_rope(name, "half_split", 8)
        golden.test_rope(name, "interleaved", None)
    golden.test_mrope(False)
    golden.test_mrope(True)
    for heads in golden.SLOPES:
        golden.test_alibi(heads)


def packed_equals_separate():
    for position in POSITIONS.values():
        module, x = setup(position)
        full = module(x, Seq.of_segments(SEG))[0]
        for row, a, b in [(0, 0, 5), (0, 5, 8), (1, 0, 2), (1, 2, 6)]:
            same(full[row, a:b], module(x[row : row + 1, a:b], Seq.rows(1, b - a))[0][0])


def streamed_equals_whole():
    for position in POSITIONS.values():
        for window in (None, 3):
            module, x = setup(position, window)
            grid = torch.randint(0, 9, (2, T, 3))
            seq = Seq(Seq.rows(2, T).pos, None, grid)
            for cuts in [(1,) * T, (3, 1, 2, 1, 1)]:
                state, at, parts = module.init_state(2, 16, dtype=x.dtype), 0, []
                for n in cuts:
                    parts.append(module(x[:, at : at + n], seq.window(at, at + n), state)[0])
                    at += n
                same(torch.cat(parts, 1), module(x, seq)[0])


def only_the_distance_counts():
    for position in POSITIONS.values():
        module, x = setup(position)
        same(module(x, Seq.rows(2, T))[0], module(x, Seq.rows(2, T, 9))[0], 1e-4)  # fp32 angles, scores of O(10)


def layers_of_one_pass_do_not_mix():
    """Two layers that share everything but one option, in one pass, equal each alone."""
    base = {"kind": "rope", "base": 50.0}
    turned = {"kind": "mrope", "base": 50.0, "sections": [1, 1, 2]}
    grid = torch.randint(0, 9, (2, T, 3))
    for one, two in [
        (base, base | {"scaling": {"kind": "linear", "factor": 2.0}}), (base, base | {"rotary_dim": 4}),
        (base | {"scaling": golden.SCALINGS["longrope"]}, base | {"scaling": golden.SCALINGS["longrope short"]}),
        (POSITIONS["mrope"], turned),
    ]:  # fmt: skip
        seq = Seq(Seq.rows(2, T).pos, None, grid)
        for position in (one, two):
            module, x = setup(position)
            same(module(x, seq)[0], module(x, seq.fresh())[0])


CHECKS = [packed_equals_separate, streamed_equals_whole, only_the_distance_counts, layers_of_one_pass_do_not_mix, hand_formula]


# The bugs


def frequencies_of_the_whole_head_in_a_partial_rotation(patch):
    patch.setattr(rope, "plain", lambda base, dim, device=None: plain(base, 12 if dim == 8 else 2 * dim, device)[: dim // 2])


def last_channels_rotate(patch):
    def wrong(rotate, x, cos, sin):
        still = x.shape[-1] - 2 * cos.shape[-1]
        return torch.cat((x[..., :still], rotate(x[..., still:], cos, sin)), -1)

    patch.setattr(rope, "rotate_first", wrong)


def only_queries_are_stretched(patch):
    def wrong(self, q, k, seq):
        cos, sin = self.angles(seq)
        freq = plain(self.base, self.dim)
        theta = seq.pos[..., None, None] * freq
        return rope.rotate_first(self.rotate, q, cos, sin), rope.rotate_first(self.rotate, k, theta.cos(), theta.sin())

    patch.setattr(RoPE, "forward", wrong)


def ntk_base_times_the_factor_alone(patch):
    patch.setattr(NTKScalingConfig, "frequencies", lambda self, base, dim, device=None: plain(base * self.factor, dim))


def yarn_ramp_upside_down(patch):
    right = YaRNConfig.frequencies

    def wrong(self, base, dim, device=None):
        return plain(base, dim) * (1 + 1 / self.factor) - right(self, base, dim)

    patch.setattr(YaRNConfig, "frequencies", wrong)


def yarn_without_amplitude(patch):
    patch.setattr(YaRNConfig, "amplitude", lambda self: 1.0)


def yarn_amplitude_squared_before_the_scores_square_it(patch):
    right = YaRNConfig.amplitude
    patch.setattr(YaRNConfig, "amplitude", lambda self: right(self) ** 2)


def yarn_ramp_over_channels(patch):
    right = YaRNConfig.pair_that_turns
    patch.setattr(YaRNConfig, "pair_that_turns", lambda self, n, base, dim: 2 * right(self, n, base, dim))


def llama3_ends_exchanged(patch):
    def wrong(self, base, dim, device=None):
        freq = plain(base, dim)
        turns = self.original_max_len * freq / (2 * math.pi)
        keep = 1 - ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return freq * keep + freq / self.factor * (1 - keep)

    patch.setattr(Llama3ScalingConfig, "frequencies", wrong)


def llama3_without_clamp(patch):
    patch.setattr(interpolation.Tensor, "clamp", lambda self, low, high: self)


def longrope_always_short(patch):
    patch.setattr(LongRoPEConfig, "frequencies", lambda self, base, dim, device=None: plain(base, dim) / torch.tensor(self.short_factor))


def angles_shared_by_layers_of_other_scaling(patch):
    right = RoPE.__init__

    def wrong(self, *args):
        right(self, *args)
        self.key = ("rope", self.base, self.dim)

    patch.setattr(RoPE, "__init__", wrong)


def angles_shared_by_layers_of_other_sections(patch):
    def wrong(self, q, k, seq):
        cos, sin = seq.once(("mrope", self.base), lambda: self.angles(seq))
        return mrope.rotate_half_split(q, cos, sin), mrope.rotate_half_split(k, cos, sin)

    patch.setattr(MRoPE, "forward", wrong)


def width_before_height(patch):
    right = MRoPE.angles
    patch.setattr(MRoPE, "angles", lambda self, seq: right(self, Seq(seq.pos, None, None if seq.grid is None else seq.grid[..., [0, 2, 1]])))


def grid_lost_in_a_window(patch):
    patch.setattr(Seq, "window", lambda self, a, b: Seq(self.pos[:, a:b], None if self.seg is None else self.seg[:, a:b]))


def each_section_restarts_its_frequencies(patch):
    right = mrope.plain

    def wrong(base, dim, device=None):
        return torch.cat([right(base, dim)[:2], right(base, dim)[: dim // 2 - 2]])

    patch.setattr(mrope, "plain", wrong)


def slopes_from_one(patch):
    right = alibi.slopes
    patch.setattr(alibi, "slopes", lambda n, like: right(n, like) * 2 ** (8 / 2 ** math.floor(math.log2(n))))


def slopes_of_no_power_of_two_by_the_plain_formula(patch):
    wrong = lambda n, like: torch.tensor([2 ** (-8 * (h + 1) / n) for h in range(n)], dtype=like.dtype).view(-1, 1, 1)
    patch.setattr(alibi, "slopes", wrong)


def bias_by_slot_instead_of_position(patch):
    right = ALiBi.bias
    slots = lambda k_pos: torch.arange(k_pos.shape[1]).expand_as(k_pos)
    patch.setattr(ALiBi, "bias", lambda self, q_pos, k_pos, seen, dtype: right(self, q_pos, slots(k_pos), seen, dtype))


def bias_without_the_mask(patch):
    right = ALiBi.bias
    patch.setattr(ALiBi, "bias", lambda self, q, k, seen, dtype: right(self, q, k, torch.ones_like(seen).tril(), dtype))


def near_is_lowered(patch):
    right = ALiBi.bias
    patch.setattr(ALiBi, "bias", lambda self, q, k, seen, dtype: -right(self, q, k, seen, dtype).masked_fill(~seen, torch.inf))


HAND, STREAM, MIX = "hand_formula", "streamed_equals_whole", "layers_of_one_pass_do_not_mix"
BUGS = {  # bug -> checks that must catch it; "hand_formula" alone = it passes every law
    frequencies_of_the_whole_head_in_a_partial_rotation: {HAND},
    last_channels_rotate: {HAND},
    only_queries_are_stretched: {HAND, "only_the_distance_counts"},
    ntk_base_times_the_factor_alone: {HAND},
    yarn_ramp_upside_down: {HAND},
    yarn_without_amplitude: {HAND},
    yarn_amplitude_squared_before_the_scores_square_it: {HAND},
    yarn_ramp_over_channels: {HAND},
    llama3_ends_exchanged: {HAND},
    llama3_without_clamp: {HAND},
    longrope_always_short: {HAND},
    angles_shared_by_layers_of_other_scaling: {MIX},
    angles_shared_by_layers_of_other_sections: {MIX},
    width_before_height: {HAND},
    grid_lost_in_a_window: {STREAM},
    each_section_restarts_its_frequencies: {HAND},
    slopes_from_one: {HAND},
    slopes_of_no_power_of_two_by_the_plain_formula: {HAND},
    bias_by_slot_instead_of_position: {STREAM},
    bias_without_the_mask: {"packed_equals_separate"},
    near_is_lowered: {HAND},
}


test_without_a_bug_every_check_holds, test_a_planted_bug_is_caught = bug_tests(BUGS, CHECKS, also=(RuntimeError,), alone={HAND})  # RuntimeError: shared angles of another width
