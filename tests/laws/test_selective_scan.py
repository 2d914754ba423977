"""The two-level selective scan against its step form: values, gradients, states; any chunk, any channel groups, any borders."""

from __future__ import annotations

import time

import pytest
import torch

from zero2llm.core.seq import Seq
from zero2llm.ops import selective_scan as scans
from zero2llm.ops.marks import Marks

B, T, D, N = 2, 37, 5, 3


def rows(kind: str) -> Seq:
    if kind == "plain":
        return Seq.rows(B, T)
    if kind == "goes on":
        return Seq.rows(B, T, 11)
    seg = torch.zeros(B, T, dtype=torch.int32)
    for number, (row, begin, end) in enumerate([(0, 0, 1), (0, 1, 2), (0, 2, 20), (0, 22, 33), (1, 0, 9), (1, 9, 30)], 1):
        seg[row, begin:end] = number
    seq = Seq.of_segments(seg)
    if kind == "packed, goes on":
        pos = seq.pos.clone()
        pos[1, :9] += 5
        seq = Seq(pos, seg)
    return seq


def inputs(scale: float = 1.0, dtype=torch.float64):
    torch.manual_seed(1)
    x, dt, b, c = (torch.randn(B, T, n, dtype=dtype) for n in (D, D, N, N))
    leaves = [x, scale * dt.exp(), -torch.randn(D, N, dtype=dtype).exp(), b, c, torch.randn(D, dtype=dtype)]
    return [leaf.requires_grad_() for leaf in leaves], torch.randn(B, D, N, dtype=dtype).requires_grad_()


def outcome(form, marks: Marks, with_state: bool):
    """Output, state and all gradients; what stands at padding does not count."""
    leaves, start = inputs()
    y, h = form(*leaves, marks, start if with_state else None)
    y = y if marks.real is None else y * marks.real[..., None]
    (y.sin().sum() + h.cos().sum()).backward()
    return [y, h, *(leaf.grad for leaf in leaves), *([start.grad] if with_state else [])]


@pytest.mark.parametrize("kind", ["plain", "goes on", "packed", "packed, goes on"])
@pytest.mark.parametrize("chunk", [1, 5, 16, 37, 64, None])
def test_chunks_equal_steps(kind, chunk):
    for with_state in (True, False):
        marks = Marks.of(rows(kind), with_state)
        found = [outcome(form, marks, with_state) for form in (scans.selective_steps, lambda *a: scans.selective_chunks(*a, chunk))]
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


@pytest.mark.parametrize("group", [1, 2 * B * T * N, B * T * N * D])
def test_groups_of_channels_change_nothing(group):
    marks = Marks.of(rows("packed, goes on"), True)
    form = lambda group: lambda *args: scans.selective_chunks(*args, 8, group)
    for a, b in zip(*(outcome(form(size), marks, True) for size in (scans.GROUP, group)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_far_decays_stay_finite_in_fp32():
    leaves, start = inputs(1e4, torch.float32)
    steps, chunks = (form(*leaves, Marks(), start)[0] for form in (scans.selective_steps, scans.selective_chunks))
    grads = torch.autograd.grad(chunks.sin().sum(), leaves)
    assert torch.isfinite(chunks).all() and all(torch.isfinite(g).all() for g in grads)
    torch.testing.assert_close(chunks, steps, atol=0, rtol=1e-4)


def test_groups_bound_what_autograd_keeps():
    kept = []
    x, dt, b, c = torch.rand(1, 256, 32), torch.rand(1, 256, 32), torch.rand(1, 256, 4), torch.rand(1, 256, 4)
    A, skip = (-torch.rand(32, 4)).requires_grad_(), torch.rand(32)
    for group in (2**30, 1):
        held = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t, h=held: h.setdefault(t.data_ptr(), t), lambda t: t):
            scans.selective_chunks(x, dt, A, b, c, skip, Marks(), None, None, group)
        kept.append(sum(t.numel() for t in held.values()) / (256 * 32 * 4))
    assert 3 < kept[0] < 4.5 and kept[1] < 1, kept  # in tensors of (B, T, D, N)


@pytest.mark.slow
def test_chunks_are_five_times_faster_than_steps():
    rows, T, D, N = 1, 1024, 64, 16
    x, dt, b, c = (torch.rand(rows, T, n).requires_grad_() for n in (D, D, N, N))
    A, best = -torch.rand(D, N), []
    for form in (scans.selective_steps, scans.selective_chunks):
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            form(x, dt, A, b, c, torch.ones(D), Marks(), None)[0].sum().backward()
            times.append(time.perf_counter() - begin)
        best.append(min(times))
    assert best[0] > 5 * best[1], best
