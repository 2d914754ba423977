"""Planted bugs in the gated-scan mixers: each must be caught, and by whom is part of the claim.

Laws compare a layer with itself; a bug that is wrong everywhere alike passes them, and only the hand formula sees it.
"""

import inspect
import textwrap
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from tests.golden.planted import caught_by, must_catch
from tests.golden.test_layers import randomised
from tests.golden.test_scan_family import PLACE, by_hand
from zero2llm.core.seq import Seq
from zero2llm.layers.memory import Memory
from zero2llm.layers.mixers import gla, lightning, linear, mamba2, retnet
from zero2llm.layers.positions.rope import RoPE
from zero2llm.ops import scan as scans
from zero2llm.ops.conv import causal_conv
from zero2llm.ops.marks import Marks

D, T = 12, 8
CONFIGS = {
    linear: linear.LinearConfig(n_heads=2, head_dim=4, value_dim=3, eps=0.1, chunk=4),
    retnet: retnet.RetNetConfig(n_heads=2, head_dim=4, value_dim=3, base=30.0, norm_eps=0.3, chunk=4),
    lightning: lightning.LightningConfig(n_heads=3, head_dim=4, norm_eps=0.3, chunk=4),
    gla: gla.GLAConfig(n_heads=2, head_dim=4, value_dim=3, gate_rank=2, tau=2.0, norm_eps=0.3, chunk=4),
    mamba2: mamba2.Mamba2Config(
        n_heads=4, head_dim=3, state_dim=3, n_groups=2, chunk=4, dt_limit=(0.3, 1.5), norm_eps=0.3
    ),
}
SEG = torch.tensor([[1, 1, 1, 1, 1, 2, 2, 2], [3, 3, 4, 4, 4, 4, 0, 0]], dtype=torch.int32)


def setup(page):
    torch.manual_seed(3)
    return randomised(CONFIGS[page].build(D, PLACE)), torch.randn(2, T, D, dtype=torch.float64)


def same(a, b, tolerance=1e-11):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


# The checks. Each takes a mixer's page (its module) and raises AssertionError.


def hand_formula(page):
    module, x = setup(page)
    for seq, real in ((Seq.rows(2, T), SEG >= 0), (Seq.of_segments(SEG), SEG != 0)):
        same(
            module(x, seq)[0][real],
            by_hand(module, CONFIGS[page], x, seq, PLACE)[real],
            1e-5 if page is retnet else 1e-10,
        )


def causality(page):
    module, x = setup(page)
    for t in range(1, T):
        changed = x.clone()
        changed[:, t] += 1
        assert torch.equal(module(x, Seq.rows(2, T))[0][:, :t], module(changed, Seq.rows(2, T))[0][:, :t])


def packed_equals_separate(page):
    module, x = setup(page)
    full = module(x, Seq.of_segments(SEG))[0]
    for row, a, b in [(0, 0, 5), (0, 5, 8), (1, 0, 2), (1, 2, 6)]:
        same(full[row, a:b], module(x[row : row + 1, a:b], Seq.rows(1, b - a))[0][0])


def stream(module, x, seq, cuts):
    state, at, parts = module.init_state(2, 16, dtype=x.dtype), 0, []
    for n in cuts:
        parts.append(module(x[:, at : at + n], seq.window(at, at + n), state)[0])
        at += n
    return torch.cat(parts, 1)


def streamed_equals_whole(page):
    module, x = setup(page)
    for cuts in [(1,) * T, (3, 1, 2, 1, 1), (4, 4)]:
        same(stream(module, x, Seq.rows(2, T), cuts), module(x, Seq.rows(2, T))[0])


def streamed_packed_equals_whole(page):
    module, x = setup(page)
    seq, real = Seq.of_segments(SEG), SEG != 0
    for cuts in [(1,) * T, (3, 3, 2), (4, 1, 3)]:
        same(stream(module, x, seq, cuts)[real], module(x, seq)[0][real])


def ragged_prefill_then_decode(page):
    module, x = setup(page)
    lengths, state = torch.tensor([5, 2]), module.init_state(2, 16, dtype=x.dtype)
    module(x[:, :5], Seq.ragged(lengths, 5), state)
    steps = torch.cat([module(x[:, 5 + i : 6 + i], Seq((lengths + i)[:, None]), state)[0] for i in range(3)], 1)
    for row, n in enumerate(lengths.tolist()):
        whole = torch.cat((x[row, :n], x[row, 5:]))[None]
        same(steps[row], module(whole, Seq.rows(1, n + 3))[0][0, n:])


LAWS = [
    causality,
    packed_equals_separate,
    streamed_equals_whole,
    streamed_packed_equals_whole,
    ragged_prefill_then_decode,
]


CHECKS = [*LAWS, hand_formula]


# The bugs. A planted one is a function of (patch, page).


def change(page, name, wrong):
    """The bug: ``page.name`` called through ``wrong``, which gets the right function first."""

    def plant(patch, page=page):
        right = getattr(page, name)
        patch.setattr(page, name, lambda *a: wrong(right, *a))

    return plant


def functions(page, **wrong):
    """The bug: some of torch.nn.functional replaced on this page alone."""

    def plant(patch, page=page):
        patch.setattr(page, "F", SimpleNamespace(**{n: getattr(F, n) for n in dir(F) if not n.startswith("_")} | wrong))

    return plant


def on_scan(page, wrong):
    """The bug: other arguments for the recurrence; ``wrong(q, k, v, g, marks)`` returns the five."""
    return change(page, "scan", lambda right, q, k, v, g, marks, S, chunk: right(*wrong(q, k, v, g, marks), S, chunk))


def method(cls, name, wrong):
    def plant(patch, page):
        right = getattr(cls, name)
        patch.setattr(cls, name, lambda *a, **kw: wrong(right, *a, **kw))

    return plant


def silence_all_but_decays(right, marks, *tensors):
    """Padding writes nothing, but the state fades."""
    return [*right(marks, *tensors[:-1]), tensors[-1]]


def head_norm_over_all(right):
    def wrong(o, shape, weight=None, eps=None):
        flat = o.transpose(1, 2).flatten(2)
        return right(flat, flat.shape[-1:], eps=eps).unflatten(-1, (o.shape[1], -1)).transpose(1, 2)

    return wrong


def without_scale(width):
    return lambda q, k, v, g, marks: (q * width**0.5, k, v, g, marks)


def exclusive(right, q, k, v, g, marks, S, chunk):
    """o_t reads the state before token t has written."""
    o, S = right(q, k, v, g, marks, S, chunk)
    return o - (q * k).sum(-1, keepdim=True) * v, S


def normaliser_leaks(right, q, k, v, g, marks, S, chunk):
    """The last column, z, does not hear of documents."""
    o, new = right(q, k, v, g, marks, S, chunk)
    z, _ = right(q, k, v, g, Marks(), None if S is None else S, chunk)
    return torch.cat((o[..., :-1], z[..., -1:]), -1), new


def decay_by_place(bug):
    def wrong(right, module, x):
        heads = torch.arange(module.n_heads, dtype=x.dtype)
        return bug(module, heads).expand(1, x.shape[1], -1)

    return wrong


def mamba_forward_as(rewrite):
    """The bug: the page's forward with one piece of its text replaced. Raises when the text is gone."""

    def plant(patch, page):
        text = textwrap.dedent(inspect.getsource(page.Mamba2.forward))
        old, new = rewrite
        assert text.count(old) == 1, f"{old!r} is not on the page any more"
        space: dict = {}
        exec(compile(text.replace(old, new), "planted", "exec"), vars(page), space)
        patch.setattr(page.Mamba2, "forward", space["forward"])

    return plant


HAND, PACKED = {"hand_formula"}, {"packed_equals_separate"}
STREAM, RAGGED = {"streamed_equals_whole"}, {"ragged_prefill_then_decode"}
scale4 = without_scale(4)
documents_forgotten = method(Marks, "_of", lambda right, seq, streamed: Marks(None, right(seq, streamed).real))
state_not_written = method(Memory, "write", lambda right, memory, **new: None)
padding_speaks = method(Marks, "silence", lambda right, marks, *t: list(t))
padding_fades = method(Marks, "silence", silence_all_but_decays)
later_key = lambda q, k, v, g, marks: (q, k.roll(-1, -2), v.roll(-1, -2), g, marks)
write_fades_too = lambda q, k, v, g, marks: (q, k * (g if g.ndim == q.ndim else g[..., None]).exp(), v, g, marks)

BUGS = {  # (page, what is wrong): (the bug, checks that must catch it); HAND alone = it passes every law
    (linear, "phi is relu"): (change(linear, "phi", lambda right, a: a.relu()), HAND),
    (linear, "phi is elu + 2"): (change(linear, "phi", lambda right, a: right(a) + 1), HAND),
    (linear, "queries scaled before phi"): (on_scan(linear, lambda q, k, v, g, m: ((q.log() / 2).exp(), k, v, g, m)), HAND),
    (linear, "not normalised"): (functions(linear, pad=lambda x, p, value=0.0: F.pad(x, p, value=0.0)), HAND),
    (linear, "z leaks across documents"): (change(linear, "scan", normaliser_leaks), PACKED),
    (linear, "documents forgotten"): (documents_forgotten, PACKED),
    (linear, "padding writes"): (padding_speaks, RAGGED),
    (linear, "state not written"): (state_not_written, STREAM),
    (linear, "sees one ahead"): (on_scan(linear, later_key), {"causality"}),
    (linear, "does not see itself"): (change(linear, "scan", exclusive), HAND),
    (retnet, "gamma numbered from 1"): (method(retnet.RetNet, "log_decay", decay_by_place(lambda m, h: torch.log1p(-(2 ** (-6 - h))))), HAND),
    (retnet, "gamma = 2^(-5-h)"): (method(retnet.RetNet, "log_decay", decay_by_place(lambda m, h: (2 ** (-5 - h)).log())), HAND),
    (retnet, "keys not rotated"): (method(RoPE, "forward", lambda right, self, q, k, seq: (right(self, q, k, seq)[0], k)), HAND),
    (retnet, "phase restarts in decoding"): (method(RoPE, "forward", lambda right, self, q, k, seq: right(self, q, k, Seq.rows(*seq.pos.shape))), STREAM),
    (retnet, "not scaled"): (on_scan(retnet, scale4), HAND),
    (retnet, "norm over all heads"): (functions(retnet, rms_norm=head_norm_over_all(F.rms_norm)), HAND),
    (retnet, "gate is a sigmoid"): (functions(retnet, silu=torch.sigmoid), HAND),
    (retnet, "padding fades the state"): (padding_fades, RAGGED),
    (retnet, "documents forgotten"): (documents_forgotten, PACKED),
    (retnet, "the write fades too"): (on_scan(retnet, write_fades_too), HAND),
    (lightning, "slopes alike in all layers"): (
        method(lightning.Lightning, "log_decay", decay_by_place(lambda m, h: -(2 ** (-8 * (h + 1) / 3)))), HAND),
    (lightning, "slopes numbered from 0"): (
        method(lightning.Lightning, "log_decay", decay_by_place(lambda m, h: -(2 ** (-8 * h / 3)) * m.depth)), HAND),
    (lightning, "no silu"): (functions(lightning, silu=lambda x: x), HAND),
    (lightning, "scaled by 1 / sqrt(K)"): (on_scan(lightning, without_scale(1 / 4)), HAND),
    (lightning, "norm per head"): (functions(lightning, rms_norm=lambda o, shape, eps: F.rms_norm(o.unflatten(-1, (3, -1)), (4,), eps=eps).flatten(2)), HAND),
    (lightning, "padding fades the state"): (padding_fades, RAGGED),
    (lightning, "state not written"): (state_not_written, STREAM),
    (gla, "tau forgotten"): (method(gla.GLA, "log_decay", lambda right, self, x: right(self, x) * self.tau), HAND),
    (gla, "one decay per head"): (method(gla.GLA, "log_decay", lambda right, self, x: right(self, x).mean(-1, keepdim=True).expand(-1, -1, -1, 4)), HAND),
    (gla, "decay of the token before"): (method(gla.GLA, "log_decay", lambda right, self, x: right(self, x).roll(1, 1)), HAND | STREAM),
    (gla, "the write fades too"): (on_scan(gla, write_fades_too), HAND),
    (gla, "not scaled"): (on_scan(gla, scale4), HAND),
    (gla, "norm over all heads"): (functions(gla, rms_norm=head_norm_over_all(F.rms_norm)), HAND),
    (gla, "gate is a sigmoid"): (functions(gla, silu=torch.sigmoid), HAND),
    (gla, "padding fades the state"): (padding_fades, RAGGED),
    (gla, "documents forgotten"): (documents_forgotten, PACKED),
    (mamba2, "D reads dt u"): (mamba_forward_as(("[..., None] * u  # (B, T, G, R, P)", "[..., None] * dt[..., None] * u")), HAND),
    (mamba2, "gate behind the norm"): (
        mamba_forward_as(("y.flatten(3) * F.silu(by_group(wide(z)[0]))", "F.rms_norm(y.flatten(3), (6,), eps=self.eps) * F.silu(by_group(z))")), HAND),
    (mamba2, "one norm over all groups"): (functions(mamba2, rms_norm=lambda y, shape, eps: F.rms_norm(y.flatten(2), (12,), eps=eps).view_as(y)), HAND),
    (mamba2, "heads dealt round to groups"): (
        on_scan(mamba2, lambda q, k, v, g, m: (*(t.expand(-1, -1, 2, -1, -1).transpose(1, 2) for t in (q, k)), v, g, m)), HAND),
    (mamba2, "B and C swapped"): (on_scan(mamba2, lambda q, k, v, g, m: (k, q, v, g, m)), HAND),
    (mamba2, "values not times dt"): (mamba_forward_as(("(dt[..., None] * u).movedim", "u.movedim")), HAND | RAGGED),
    (mamba2, "A = -A_log"): (mamba_forward_as(("-wide(self.A_log)[0].exp()", "-self.A_log.abs()")), HAND),
    (mamba2, "limits before softplus"): (
        method(mamba2.Mamba2, "step_size", lambda right, self, dt: F.softplus((dt + self.dt_bias).clamp(*self.dt_limit))), HAND),
    (mamba2, "convolution without silu"): (mamba_forward_as(("F.silu(ubc).split", "ubc.split")), HAND),
    (mamba2, "taps reversed"): (change(mamba2, "causal_conv", lambda right, x, w, *more: right(x, w.flip(1), *more)), HAND),
    (mamba2, "convolution crosses documents"): (
        change(mamba2, "causal_conv", lambda right, x, w, b, marks, tail: causal_conv(x, w, b, Marks(), tail)), PACKED),
    (mamba2, "tail forgotten"): (change(mamba2, "causal_conv", lambda right, x, w, b, marks, tail: causal_conv(x, w, b, marks, None)), STREAM),
    (mamba2, "padding takes steps"): (padding_speaks, RAGGED),
    (mamba2, "documents forgotten"): (documents_forgotten, PACKED),
}  # fmt: skip


@pytest.mark.parametrize("page", CONFIGS, ids=lambda page: page.__name__.rpartition(".")[2])
def test_without_a_bug_every_check_holds(page):
    assert caught_by(CHECKS, [(page,)]) == set()


@pytest.mark.parametrize(
    ("page", "what"), BUGS, ids=lambda part: part if isinstance(part, str) else part.__name__.rpartition(".")[2]
)
def test_a_planted_bug_is_caught(page, what, monkeypatch):
    bug, expected = BUGS[page, what]
    bug(monkeypatch, page)
    must_catch(expected, CHECKS, [(page,)], alone=HAND)


@pytest.mark.parametrize("page", [gla, mamba2], ids=["per channel", "per head"])
def test_each_cut_at_a_document_boundary_is_needed(page, monkeypatch):
    """Pairs, readers of the old state, writers of the new one; and whether the old state survives, which shows later."""
    right = scans.boundaries
    for lost, check in enumerate([packed_equals_separate] * 3 + [streamed_packed_equals_whole]):

        def wrong(marks, chunk, n, ndim, device, lost=lost):
            cuts, free = list(right(marks, chunk, n, ndim, device)), right(Marks(), chunk, n, ndim, device)
            cuts[lost] = free[lost].expand_as(cuts[lost])
            return tuple(cuts)

        with monkeypatch.context() as patch:
            patch.setattr(scans, "boundaries", wrong)
            must_catch({check.__name__}, CHECKS, [(page,)])
