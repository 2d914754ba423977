"""The chunked form of each recurrence against its step form: values, gradients, states; any chunk, any document borders."""

from __future__ import annotations

import pytest
import torch

from zero2llm.core.seq import Seq
from zero2llm.ops import scan as scans
from zero2llm.ops.conv import causal_conv
from zero2llm.ops.marks import Marks

B, H, T, K, V = 2, 3, 37, 4, 5


def rows(kind: str) -> Seq:
    if kind == "plain":
        return Seq.rows(B, T)
    if kind == "goes on":
        return Seq.rows(B, T, 11)
    seg = torch.zeros(B, T, dtype=torch.int32)
    cuts = [(0, 0, 1), (0, 1, 2), (0, 2, 20), (0, 22, 33), (1, 0, 9), (1, 9, 30)]
    for number, (row, begin, end) in enumerate(cuts, 1):
        seg[row, begin:end] = number
    seq = Seq.of_segments(seg)
    if kind == "packed, goes on":
        pos = seq.pos.clone()
        pos[1, :9] += 5
        seq = Seq(pos, seg)
    return seq


def inputs(per_channel: bool):
    torch.manual_seed(1)
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    g = -torch.rand(B, H, T, *([K] if per_channel else []), dtype=torch.float64) * 3
    return make(B, H, T, K), make(B, H, T, K), make(B, H, T, V), g.requires_grad_(), make(B, H, K, V)


@pytest.mark.parametrize("per_channel", [False, True], ids=["per head", "per channel"])
@pytest.mark.parametrize("kind", ["plain", "goes on", "packed", "packed, goes on"])
@pytest.mark.parametrize("chunk", [1, 5, 16, 37, 64])
def test_chunks_equal_steps(per_channel, kind, chunk):
    *leaves, start = inputs(per_channel)
    marks = Marks.of(rows(kind), True)
    found = []
    for form in (scans.scan_steps, lambda *a: scans.scan_chunks(*a, chunk)):
        q, k, v, g = leaves
        silent = [x.transpose(1, 2) for x in marks.silence(*(x.transpose(1, 2) for x in (k, v, g)))]
        o, S = form(q, *silent, marks, start)
        real = torch.ones(B, T) if marks.real is None else marks.real
        (o * real[:, None, :, None]).sin().sum().add(S.cos().sum()).backward()
        found.append([o * real[:, None, :, None], S, *(x.grad.clone() for x in (*leaves, start))])
        for x in (*leaves, start):
            x.grad = None
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_far_decays_neither_overflow_nor_vanish_in_fp32():
    q, k, v, g, start = (x.detach().float() for x in inputs(True))
    steps, _ = scans.scan_steps(q, k, v, 40 * g, Marks(), start)
    chunks, _ = scans.scan_chunks(q, k, v, 40 * g, Marks(), start, 32)
    torch.testing.assert_close(chunks, steps, atol=5e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", ["plain", "goes on", "packed", "packed, goes on"])
def test_convolution_equals_its_definition_and_streams(kind):
    seq, W = rows(kind), 4
    x, w, b = (torch.randn(*s, dtype=torch.float64) for s in ((B, T, 3), (3, W), (3,)))
    tail = torch.randn(B, W - 1, 3, dtype=torch.float64)
    y, last = causal_conv(x, w, b, Marks.of(seq, True), tail)
    long, doc = torch.cat((tail, x), 1), Marks.of(seq, True).doc
    for row in range(B):
        for t in range(T):
            if seq.seg is not None and seq.seg[row, t] == 0:
                continue
            want = b.clone()
            for j in range(W):
                same = doc[row, t] == 0 if t - j < 0 else doc[row, t - j] == doc[row, t]
                want += w[:, W - 1 - j] * long[row, W - 1 + t - j] * same
            torch.testing.assert_close(y[row, t], want)
    parts, kept = [], tail
    for begin, end in ((0, 1), (1, 3), (3, 21), (21, 22), (22, T)):
        part, kept = causal_conv(x[:, begin:end], w, b, Marks.of(seq.window(begin, end), True), kept)
        parts.append(part)
    real = torch.ones(B, T, dtype=torch.bool) if seq.seg is None else seq.seg != 0
    torch.testing.assert_close(torch.cat(parts, 1)[real], y[real])
    torch.testing.assert_close(kept, last)
