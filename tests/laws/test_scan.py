"""The chunked form of each recurrence against its step form: values, gradients, states; any chunk, any document borders."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from zero2llm.core.seq import Seq
from zero2llm.ops import scan as scans
from zero2llm.ops.conv import causal_conv
from zero2llm.ops.marks import Marks

B, H, T, K, V = 2, 3, 37, 4, 5
R = 2  # heads that share keys

SHAPES = {  # name -> (q and k, v, g, state)
    "per head": ((B, H, T, K), (B, H, T, V), (B, H, T), (B, H, K, V)),
    "per channel": ((B, H, T, K), (B, H, T, V), (B, H, T, K), (B, H, K, V)),
    "shared keys": ((B, H, 1, T, K), (B, H, R, T, V), (B, H, R, T), (B, H, R, K, V)),
    "shared keys per channel": ((B, H, 1, T, K), (B, H, R, T, V), (B, H, R, T, K), (B, H, R, K, V)),
    "g alike in all rows": ((B, H, T, K), (B, H, T, V), (1, H, T), (B, H, K, V)),
    "g alike in all heads": ((B, H, T, K), (B, H, T, V), (1, 1, T), (B, H, K, V)),
}


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


def inputs(name: str) -> list[torch.Tensor]:
    torch.manual_seed(1)
    qk, v, g, state = SHAPES[name]
    make = lambda shape: torch.randn(shape, dtype=torch.float64)
    leaves = [make(qk), make(qk), make(v), -3 * torch.rand(g, dtype=torch.float64), make(state)]
    return [x.requires_grad_() for x in leaves]


def silenced(marks: Marks, x: torch.Tensor) -> torch.Tensor:
    """Padding set to 0, written out: the time axis is the one of length T."""
    if marks.real is None:
        return x
    return x * marks.real.view(B, *[n if n == T else 1 for n in x.shape[1:]]).to(x.dtype)


def value_state_and_gradients(form, leaves, marks, state, chosen):
    q, k, v, g = leaves
    o, S = form(q, silenced(marks, k), silenced(marks, v), silenced(marks, g), marks, state)
    o = silenced(marks, o)
    inputs = [x for x in (*leaves, state) if x is not None]
    grads = torch.autograd.grad(o.sin().sum() + S.cos().sum(), inputs)
    return [o, S, *grads][: chosen or None]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", ["plain", "goes on", "packed", "packed, goes on"])
@pytest.mark.parametrize("chunk", [1, 5, 16, 37, 64])
def test_chunks_equal_steps(name, kind, chunk):
    *leaves, start = inputs(name)
    marks = Marks.of(rows(kind), True)
    steps = value_state_and_gradients(scans.scan_steps, leaves, marks, start, 0)
    chunks = value_state_and_gradients(lambda *a: scans.scan_chunks(*a, chunk), leaves, marks, start, 0)
    for a, b in zip(chunks, steps, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


@pytest.mark.parametrize("form", [scans.scan_steps, lambda *a: scans.scan_chunks(*a, 16)], ids=["steps", "chunks"])
@pytest.mark.parametrize("name", ["shared keys", "shared keys per channel"])
def test_shared_keys_equal_keys_repeated_for_each_head(name, form):
    q, k, v, g, start = inputs(name)
    marks = Marks.of(rows("packed, goes on"), True)
    o, S = form(q, k, v, g, marks, start)
    flat = lambda x: x.expand(B, H, R, *x.shape[3:]).flatten(1, 2)
    alone, alone_S = form(*(flat(x) for x in (q, k, v, g)), marks, flat(start))
    torch.testing.assert_close(o.flatten(1, 2), alone, atol=1e-12, rtol=0)
    torch.testing.assert_close(S.flatten(1, 2), alone_S, atol=1e-12, rtol=0)


def test_without_a_state_it_starts_from_zero():
    q, k, v, g, start = inputs("shared keys")
    for form in (scans.scan_steps, scans.scan_chunks):
        for a, b in zip(form(q, k, v, g, Marks(), None), form(q, k, v, g, Marks(), 0 * start), strict=True):
            torch.testing.assert_close(a, b, atol=0, rtol=0)


@pytest.mark.parametrize("C", [1, 2, 5, 8, 37])
def test_halving_is_its_definition(C):
    x, y = torch.randn(2, 3, C, K, dtype=torch.float64), torch.randn(2, 3, C, K, dtype=torch.float64)
    g = -300 * torch.rand(2, 3, C, K, dtype=torch.float64)  # exp(-G) alone would overflow
    G, (found, *_) = g.cumsum(-2), scans.halving(x, y, g.exp())
    for t in range(C):
        for s in range(C):
            want = (x[..., t, :] * y[..., s, :] * (G[..., t, :] - G[..., s, :]).exp()).sum(-1) if s <= t else 0.0
            torch.testing.assert_close(
                found[..., t, s], torch.as_tensor(want).expand(2, 3).to(x), atol=1e-12, rtol=1e-12
            )


@pytest.mark.parametrize("per_channel", [False, True], ids=["per head", "per channel"])
@pytest.mark.parametrize("strength", [0.1, 3.0, 30.0, 300.0])
def test_in_fp32_chunks_are_as_exact_as_steps_however_strong_the_decay(strength, per_channel):
    """A difference of cumulative sums would lose the digits of a weak decay behind strong ones: 3e-3 at 300."""
    exact = [torch.randn(1, 4, 256, 16, dtype=torch.float64) for _ in range(3)]
    exact.append(-strength * torch.rand(1, 4, 256, *([16] if per_channel else []), dtype=torch.float64))
    want, _ = scans.scan_steps(*exact, Marks(), None)
    chunks, _ = scans.scan_chunks(*(x.float() for x in exact), Marks(), None, 64)
    assert (chunks - want).abs().max() < 4e-7 * want.abs().max()


class Written(TorchDispatchMode):
    """Counts the values that all operations write, views not counted."""

    values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.values += sum(
                x.numel() for x in (out if isinstance(out, (tuple, list)) else [out]) if torch.is_tensor(x)
            )
        return out


@pytest.mark.parametrize("form", [scans.scan_steps, lambda *a: scans.scan_chunks(*a, 4)], ids=["steps", "chunks"])
@pytest.mark.parametrize("per_channel", [False, True], ids=["per head", "per channel"])
def test_forward_and_backward_cost_as_many_writes_per_token_in_a_long_row(form, per_channel):
    per_token = []
    for n in (32, 256):
        leaves = [torch.randn(1, 2, n, K, requires_grad=True) for _ in range(3)]
        g = -torch.rand(1, 2, n, *([K] if per_channel else []))
        with Written() as written:
            form(*leaves, g.requires_grad_(), Marks(), None)[0].sum().backward()
        per_token.append(written.values / n)
    assert per_token[1] < 1.1 * per_token[0]


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
