"""Log-linear attention: the chunked form and the T x T form against the tree walked token by token."""

from __future__ import annotations

import pytest
import torch

from tests.laws.test_selective_scan import rows
from zero2llm.core.seq import Seq
from zero2llm.ops import log_linear as forms
from zero2llm.ops.marks import Marks

B, H, T, K, V = 2, 2, 37, 3, 4


def inputs(levels: int, dtype=torch.float64):
    torch.manual_seed(1)
    make = lambda *shape: torch.randn(B, H, *shape, dtype=dtype)
    leaves = [make(T, K), make(T, K), make(T, V), -make(T).abs() / 4, make(T, levels)]
    return [leaf.requires_grad_() for leaf in leaves], make(levels - 1, K, V)


def outcome(form, kind: str, levels: int, streamed: bool):
    """Output, state and gradients; what stands at padding does not count."""
    seq = rows(kind)
    marks, (leaves, start) = Marks.of(seq, streamed), inputs(levels)
    bits = torch.arange(levels - 1)
    seen = (seq.pos[:, :1] >> bits) % 2 == 1  # buckets that a state at that position can have
    seen[:, -1] |= seq.pos[:, 0] >= 2 ** (levels - 2)
    start = (start * (seen & (seq.pos[:, :1] > 0))[:, None, :, None, None]).requires_grad_()
    o, S = form(*leaves, seq.pos, marks, start if streamed else None)
    o = o if marks.real is None else o * marks.real[:, None, :, None]
    (o.sin().sum() + (S.cos().sum() if streamed else 0)).backward()
    return [o, *(leaf.grad for leaf in leaves), *([S, start.grad * seen[:, None, :, None, None]] if streamed else [])]


@pytest.mark.parametrize("kind", ["plain", "goes on", "packed", "packed, goes on"])
@pytest.mark.parametrize("chunk", [1, 2, 8, 32, 64])
@pytest.mark.parametrize("levels", [2, 4, 8])
def test_chunks_equal_steps(kind, chunk, levels):
    for streamed in (True, False):
        steps = outcome(forms.log_linear_steps, kind, levels, streamed)
        chunks = outcome(lambda *a: forms.log_linear_chunks(*a, chunk), kind, levels, streamed)
        for a, b in zip(steps, chunks, strict=True):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


@pytest.mark.parametrize("kind", ["plain", "goes on", "packed", "packed, goes on"])
@pytest.mark.parametrize("levels", [2, 3, 7])
def test_the_tree_equals_the_formula(kind, levels):
    dense = lambda *a: (forms.log_linear_dense(*a[:-1]), None)
    for a, b in zip(*(outcome(form, kind, levels, False) for form in (dense, forms.log_linear_steps)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


@pytest.mark.parametrize("start", [1, 5, 4093])
def test_a_row_that_opens_inside_a_document_counts_from_its_first_token(start):
    (q, k, v, g, lam), _ = inputs(7)
    q, k, v, g, lam = (x[:, :, :8] for x in (q, k, v, g, lam))
    want = torch.zeros_like(v)
    for t in range(8):
        for s in range(t + 1):
            weight = lam[:, :, t, (t ^ s).bit_length()] * g[:, :, s + 1 : t + 1].sum(-1).exp() * (q[:, :, t] * k[:, :, s]).sum(-1)
            want[:, :, t] += weight[..., None] * v[:, :, s]
    pos = Seq.rows(B, 8, start).pos
    for got in (
        forms.log_linear_dense(q, k, v, g, lam, pos, Marks()),
        forms.log_linear_steps(q, k, v, g, lam, pos, Marks(), None)[0],
        forms.log_linear_chunks(q, k, v, g, lam, pos, Marks(), None, 4)[0],
    ):
        torch.testing.assert_close(got, want, atol=1e-11, rtol=0)


@pytest.mark.parametrize("chunk", [1, 4, 8])
def test_a_window_of_packed_rows_is_that_row_with_its_first_document_begun_anew(chunk):
    seg = torch.tensor([[1] * 9 + [2] * 14 + [3] * 14, [1] * 20 + [2] * 9 + [0] * 8])
    window = Seq.of_segments(seg).window(5, 33)
    anew = Seq.of_segments(seg[:, 5:33])
    (q, k, v, g, lam), _ = inputs(7)
    q, k, v, g, lam = (x[:, :, 5:33] for x in (q, k, v, g, lam))
    first, second = (forms.log_linear_chunks(q, k, v, g, lam, s.pos, Marks.of(s, False), None, chunk)[0] for s in (window, anew))
    torch.testing.assert_close(first * (window.seg != 0)[:, None, :, None], second * (window.seg != 0)[:, None, :, None], atol=1e-11, rtol=0)


def test_equal_weights_are_gated_linear_attention():
    from zero2llm.ops.scan import scan_steps

    (q, k, v, g, lam), _ = inputs(5)
    marks, pos = Marks(), rows("plain").pos
    want, _ = scan_steps(q, k, v, g, marks, None)
    torch.testing.assert_close(forms.log_linear_chunks(q, k, v, g, torch.ones_like(lam), pos, marks, None, 8)[0], want, atol=1e-12, rtol=0)


def test_as_many_buckets_are_in_use_as_the_position_has_bits():
    levels = 8
    (q, k, v, g, lam), _ = inputs(levels)
    _, S = forms.log_linear_steps(q, k, v, g, lam, rows("plain").pos, Marks(), None)
    used = (S != 0).flatten(3).any(-1)[0, 0].tolist()
    assert used == [T >> bit & 1 == 1 for bit in range(levels - 1)]


def test_far_decays_stay_finite_in_fp32():
    leaves, _ = inputs(7, torch.float32)
    leaves[3] = (200 * leaves[3].detach()).requires_grad_()
    seq = rows("packed")
    marks = Marks.of(seq, False)
    chunks = forms.log_linear_chunks(*leaves, seq.pos, marks, None, 16)[0]
    grads = torch.autograd.grad(chunks.sin().sum(), leaves)
    assert torch.isfinite(chunks).all() and all(torch.isfinite(g).all() for g in grads)
    steps = forms.log_linear_steps(*leaves, seq.pos, marks, None)[0]
    real = marks.real[:, None, :, None]
    torch.testing.assert_close(chunks * real, steps * real, atol=5e-6, rtol=1e-4)
