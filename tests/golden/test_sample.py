"""Sampling transforms against their definitions, and the drawn distribution against the wanted one."""

from __future__ import annotations

import pytest
import torch

from zero2llm.engine.engine import release
from zero2llm.engine.sampling import Sampling
from zero2llm.ops.sample import draw, repetition_penalty, truncate


def kept(logits: torch.Tensor) -> list[list[int]]:
    return [torch.nonzero(row > -torch.inf).flatten().tolist() for row in logits]


def test_top_k_keeps_k():
    logits = torch.tensor([[0.1, 3.0, 2.0, -1.0], [5.0, 1.0, 2.0, 3.0]])
    assert kept(truncate(logits, top_k=2)) == [[1, 2], [0, 3]]
    assert torch.equal(truncate(logits, top_k=0), logits) and torch.equal(truncate(logits, top_k=9), logits)


@pytest.mark.parametrize("p,want", [(0.5, [0]), (0.55, [0, 1]), (0.79, [0, 1]), (0.81, [0, 1, 2]), (0.999, [0, 1, 2, 3]), (0.01, [0])])
def test_top_p_keeps_the_smallest_sufficient_set(p, want):
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64).log()
    assert kept(truncate(logits, top_p=p)) == [want]


def test_min_p_is_relative_to_the_likeliest():
    logits = torch.tensor([[0.5, 0.26, 0.2, 0.04]], dtype=torch.float64).log()
    assert kept(truncate(logits, min_p=0.5)) == [[0, 1]]


def test_repetition_penalty_lowers_seen_tokens_of_either_sign():
    logits, seen = torch.tensor([[2.0, -2.0, 1.0]]), torch.tensor([[True, True, False]])
    assert repetition_penalty(logits, seen, torch.tensor([2.0])).tolist() == [[1.0, -4.0, 1.0]]


def test_draw_follows_the_distribution():
    probs = torch.tensor([0.5, 0.0, 0.3, 0.2], dtype=torch.float64)
    picked = draw(probs.log().expand(20_000, 4), torch.rand(20_000))
    share = torch.bincount(picked, minlength=4) / 20_000
    assert share[1] == 0 and float((share - probs).abs().sum()) / 2 < 3 * (4 / (4 * 20_000)) ** 0.5
    ends = draw(probs.log().expand(2, 4), torch.tensor([0.0, 1.0 - 1e-12], dtype=torch.float64))
    assert ends.tolist() == [0, 3]


@pytest.mark.parametrize(
    "text,stops,final,want",
    [
        ("hello", ["###"], False, ("hello", "", False)),
        ("hello#", ["###"], False, ("hello", "#", False)),
        ("hello##", ["###"], True, ("hello##", "", False)),
        ("hello###tail", ["###"], False, ("hello", "", True)),
        ("a<b>c", ["<b>", "a<"], False, ("", "", True)),
        ("好的。再", ["再见"], False, ("好的。", "再", False)),
    ],
)
def test_stop_strings_are_never_shown_even_in_part(text, stops, final, want):
    assert release(text, stops, final) == want


@pytest.mark.parametrize("bad", [{"temperature": -1}, {"top_p": 0}, {"top_k": -1}, {"max_tokens": 0}, {"min_p": 2}, {"stop": ("",)}])
def test_impossible_sampling_is_refused(bad):
    with pytest.raises(ValueError):
        Sampling(**bad)
