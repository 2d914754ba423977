"""Planted bugs in NF4: each must be caught, and by which check is part of the claim.

A wrong table, block or rounding is the same in both directions, so only hand-worked codes see it; a constant that is
forgotten on one side alone shows in the values.
"""

import pytest
import torch
import torch.nn.functional as F

from tests.golden import test_nf4 as golden
from tests.golden.planted import bug_tests
from zero2llm.layers import nf4 as layer
from zero2llm.ops import nf4

# The checks. Each raises AssertionError.


def codes_by_hand():
    for shape in ((4, 64), (3, 70), (5, 13)):
        golden.test_codes_and_bytes_by_hand(shape)


def tables():
    golden.test_the_codes_are_the_published_ones_and_quantiles()
    golden.test_the_dynamic_codes_by_hand()


def double_by_hand():
    golden.test_double_quantisation_by_hand()


def error_bound():
    golden.test_error_bound_of_each_block(True)
    golden.test_error_bound_of_each_block(False)


def again():
    golden.test_quantising_again_changes_nothing()


def product():
    golden.test_product_and_gradient_are_those_of_the_dequantised_weight((2, 3, 70))


def pieces():
    with pytest.MonkeyPatch.context() as patch:
        golden.test_rows_in_pieces_are_the_whole(patch)


def memory():
    golden.test_only_the_packed_weight_is_remembered()


def casts():
    golden.test_constants_stay_in_fp32_whatever_the_model_is_cast_to()


CHECKS = [codes_by_hand, tables, double_by_hand, error_bound, again, product, pieces, memory, casts]


# Bugs of the format


def low_nibble_first(patch):
    patch.setattr(nf4, "pack", lambda q: q[1::2] << 4 | q[::2])


def plant(patch, table):
    patch.setattr(nf4, "CODES", table)
    patch.setattr(nf4, "PAIRS", nf4.pairs_of(table))


def even_steps_instead_of_quantiles(patch):
    plant(patch, torch.linspace(-1, 1, 16))


def a_quantile_short_of_zero(patch):
    plant(patch, torch.where(nf4.CODES == 0, torch.tensor(0.0398), nf4.CODES))


def blocks_of_32(patch):
    patch.setattr(nf4, "BLOCK", 32)


def scales_shared_by_128(patch):
    patch.setattr(nf4, "NESTED", 128)


# Bugs of the rounding


def absmax_of_the_positive_alone(patch):
    def wrong(flat):
        n = len(flat)
        rows = F.pad(flat.float(), (0, -n % 64)).view(-1, 64)
        absmax = rows.amax(1)
        q = nf4.nearest((rows * absmax.clamp(min=nf4.TINY).reciprocal()[:, None]).clamp(-1, 1))
        return nf4.pack(q.view(-1)[: n + n % 2]), absmax

    patch.setattr(nf4, "_quantize_piece", wrong)


def rounded_down_to_the_code_below(patch):
    patch.setattr(nf4, "nearest", lambda x: (torch.bucketize(x, nf4.CODES, right=True) - 1).clamp(0, 15).to(torch.uint8))


def rounded_to_the_neighbour_by_index(patch):
    patch.setattr(nf4, "nearest", lambda x: ((x + 1) * 7.5).round().to(torch.uint8))


def scales_not_centred(patch):
    right = nf4.quantize_absmax
    patch.setattr(nf4, "quantize_absmax", lambda centred: right(centred + centred.abs().max()))


def offset_forgotten(patch):
    def wrong(q):
        if q.scale is None:
            return q.absmax
        return nf4.DYNAMIC[q.absmax.int()] * q.scale.repeat_interleave(256)[: len(q.absmax)]

    patch.setattr(nf4, "absmax_of", wrong)
    patch.setattr(golden, "absmax_of", wrong)


# Bugs of the projection


def gradient_of_the_first_rows_alone(patch):
    right = layer._Product.backward

    def wrong(ctx, grad):
        return right(ctx, grad * (torch.arange(grad.shape[-1]) < 64))

    patch.setattr(layer._Product, "backward", staticmethod(wrong))


def dense_weight_is_remembered(patch):
    patch.setattr(layer.NF4Linear, "forward", lambda self, x: F.linear(x, self.dequantized(x.dtype), self.bias))


def constants_are_cast(patch):
    patch.delattr(layer.NF4Linear, "_apply")


BUGS = {  # bug -> checks that must catch it
    low_nibble_first: {"codes_by_hand", "error_bound", "again"},
    even_steps_instead_of_quantiles: {"codes_by_hand", "tables"},
    a_quantile_short_of_zero: {"codes_by_hand", "tables"},
    blocks_of_32: {"codes_by_hand", "double_by_hand"},
    scales_shared_by_128: {"double_by_hand"},
    absmax_of_the_positive_alone: {"codes_by_hand", "error_bound"},
    rounded_down_to_the_code_below: {"codes_by_hand", "error_bound"},
    rounded_to_the_neighbour_by_index: {"codes_by_hand", "error_bound"},
    scales_not_centred: {"double_by_hand", "error_bound"},
    offset_forgotten: {"double_by_hand", "again"},
    gradient_of_the_first_rows_alone: {"product", "pieces"},
    dense_weight_is_remembered: {"memory"},
    constants_are_cast: {"casts"},
}


test_the_checks_pass_without_a_bug, test_planted_bug_is_caught = bug_tests(BUGS, CHECKS, also=(RuntimeError,))  # of another size, or a gradient that differs
