"""Products of a few rows: every form that decoding takes, against the sum written out in double precision; planted bugs."""

from __future__ import annotations

import pytest
import torch

from tests.golden.planted import bug_tests
from zero2llm.ops import linear as page

ROWS = (1, 2, 4, 5, 8, 9, 48, 49, 64, 192, 193)  # on both sides of each threshold
SHAPES = ((12, 20), (13, 20), (640, 400), (page.WIDE + 4, 24))  # (N, K): few, not divisible by four, above SMALL, wide


def off(rows: tuple[int, ...], n: int, k: int, bias: bool) -> float:
    """The largest difference from the exact sums, in units of what fp32 may round away: right below 1."""
    x, w, b = torch.randn(*rows, k), torch.randn(n, k), torch.randn(n) if bias else None
    exact = (x.double()[..., None, :] * w.double()).sum(-1) + (b.double() if bias else 0)
    with torch.no_grad():
        found = page.linear(x, w, b)
    assert found.shape == exact.shape and found.dtype == torch.float32
    return float(((found - exact).abs() / (1e-6 * k + 1e-5 * exact.abs())).max())


@pytest.mark.parametrize("n,k", SHAPES)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_every_number_of_rows(n, k, bias):
    for rows in ROWS:
        assert off((rows, 1), n, k, bias) < 1, f"{rows} rows"


def check_one():
    assert off((1,), 640, 400, False) < 1
    assert off((1, 1), page.WIDE + 4, 24, True) < 1


def check_few():
    assert off((3,), 12, 20, True) < 1


def check_split():
    assert off((2, 8), 12, 20, True) < 1


def check_many():
    assert off((7, 9), 13, 20, True) < 1


def check_threshold_is_reached():
    """Above 48 rows the weight stands on the left, whatever its width: the form that was measured."""
    with torch.no_grad():
        assert page.linear(torch.randn(64, 20), torch.randn(12, 20)).stride() == (1, 64)
        assert page.linear(torch.randn(193, 20), torch.randn(12, 20)).stride() == (12, 1)


def columns_swapped(mp):
    right = torch.bmm
    mp.setattr(torch, "bmm", lambda a, b: right(a, b).flip(0))


def no_bias(mp):
    right = page.linear
    mp.setattr(page, "linear", lambda x, w, b=None: right(x, w))


def half_precision(mp):
    right = page.linear
    mp.setattr(page, "linear", lambda x, w, b=None: right(x.half().float(), w, b))


def never_split(mp):
    mp.setattr(page, "SPLIT_ROWS", 10**6)


def always_plain(mp):
    mp.setattr(page, "MAX_ROWS", 0)


def no_limit(mp):
    mp.setattr(page, "MAX_ROWS", 10**6)


BUGS = {
    columns_swapped: {"check_one", "check_split"},
    no_bias: {"check_one", "check_few", "check_split", "check_many"},
    half_precision: {"check_few", "check_split", "check_many"},
    never_split: {"check_threshold_is_reached"},
    always_plain: {"check_threshold_is_reached"},
    no_limit: {"check_threshold_is_reached"},
}
CHECKS = [check_one, check_few, check_split, check_many, check_threshold_is_reached]
test_products_hold, test_planted_bugs_are_caught = bug_tests(BUGS, CHECKS)
