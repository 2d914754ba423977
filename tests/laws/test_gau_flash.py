"""FLASH in chunks against FLASH token by token: values, gradients, states; any chunk, any document borders."""

from __future__ import annotations

import pytest
import torch

from tests.laws.test_selective_scan import rows
from zero2llm.layers.memory import Memory
from zero2llm.layers.mixers.gau_flash import mix_chunks, mix_step, remembered
from zero2llm.ops.marks import Marks

B, T, S, E = 2, 37, 3, 5


def in_chunks(q, k, v, seq, chunk, state):
    marks = Marks.of(seq, True)
    o, total = mix_chunks(q, k, v, seq.pos, marks, chunk, state)
    return o, remembered(k, v, seq.pos, marks, chunk, state) | {"all": total}


def in_steps(q, k, v, seq, chunk, state):
    out = []
    for t in range(T):
        one = seq.window(t, t + 1)
        o, new = mix_step(*(x[:, t : t + 1] for x in (q, k, v)), one.pos, Marks.of(one, True), chunk, state)
        state = Memory(**new)
        out.append(o)
    return torch.cat(out, 1), new


def state_at(seq, chunk):
    """What a state can hold at the rows' first positions: no key or sum that no token has written."""
    state = Memory.zeros(B, None, torch.float64, k=(chunk, 2 * S), v=(chunk, E), done=(S, E), all=(S, E))
    start = seq.pos[:, :1]
    if (start == 0).all():
        return state
    filled = ((torch.arange(chunk) <= (start - 1) % chunk) & (start > 0))[..., None]
    k, v, done = torch.randn(B, chunk, 2 * S).double() * filled, torch.randn(B, chunk, E).double() * filled, torch.randn(B, S, E).double()
    done = done * (start > chunk)[..., None]
    state.write(k=k, v=v, done=done, all=done + k[..., S:].mT @ v)
    return state


@pytest.mark.parametrize("kind", ["plain", "goes on", "packed", "packed, goes on"])
@pytest.mark.parametrize("chunk", [1, 3, 8, 11, 37, 64])
def test_chunks_equal_steps(kind, chunk):
    seq = rows(kind)
    real = torch.ones(B, T, 1) if seq.seg is None else (seq.seg != 0)[..., None]
    leaves = [torch.randn(B, T, n, dtype=torch.float64, requires_grad=True) for n in (2 * S, 2 * S, E)]
    state, found = state_at(seq, chunk), []
    document = seq.pos.new_ones(B, T) if seq.seg is None else seq.seg
    last = torch.where(document == document.amax(1, keepdim=True), seq.pos, -1).amax(1, keepdim=True)
    live = (torch.arange(chunk) <= last % chunk)[..., None]  # slots of an older chunk hold anything
    for form in (in_chunks, in_steps):
        o, new = form(*leaves, seq, chunk, state)
        parts = [o * real, new["all"], new["k"] * live, new["v"] * live]
        found.append([*parts, *torch.autograd.grad(sum(p.sin().sum() for p in parts), leaves)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)
