"""Planted bugs in the delta family: each is one line of a page written wrong, and by whom it is caught is part of the claim.

Laws compare a layer with itself; a bug that is wrong everywhere alike passes them, and only the hand formula sees it.
"""

import __future__

import functools
import inspect
import textwrap

import pytest
import torch

from tests.golden.planted import caught_by, must_catch
from tests.golden.test_delta_family import SEG, T, by_hand, setup
from zero2llm.core.seq import Seq
from zero2llm.layers.ffns.token_shift import RWKVChannel
from zero2llm.layers.mixers.deltanet import DeltaNet
from zero2llm.layers.mixers.gated_delta import GatedDelta
from zero2llm.layers.mixers.kda import KDA
from zero2llm.layers.mixers.rwkv7 import FIRST, RWKV7
from zero2llm.ops import conv, delta, dplr, scan

FAMILY = ("deltanet", "gated_delta", "kda", "rwkv7", "rwkv_channel")
ROWS = {False: lambda: Seq.rows(2, T), True: lambda: Seq.of_segments(SEG)}


def same(a, b, tolerance=1e-11):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


@functools.cache
def first_values(name):
    return torch.randn(2, T, 12, dtype=torch.float64) if name == "rwkv7" else None


@functools.cache
def expected(name, packed):
    return by_hand(name, *setup(name), ROWS[packed](), first_values(name))


def rows(name, packed=False):
    """Rows whose memo holds the first layer's values, as if the layer stood behind another."""
    seq = ROWS[packed]()
    if name == "rwkv7":
        seq.memo[FIRST] = first_values(name)
    return seq


def cut(name, seq, a, b, row=slice(None)):
    """Columns a .. b - 1 of ``seq`` (of one row), with their part of the memo."""
    window = seq[row].window(a, b)
    if FIRST in seq.memo:
        window.memo[FIRST] = seq.memo[FIRST][row, a:b]
    return window


# The checks. Each takes a mechanism and raises AssertionError.


def hand_formula(name):
    module, x = setup(name)
    same(module(x, rows(name))[0], expected(name, False))
    same(module(x, rows(name, True))[0] * (SEG != 0)[..., None], expected(name, True))


def causality(name):
    module, x = setup(name)
    full = module(x, rows(name))[0]
    for t in (1, 4, 7):
        changed = x.clone()
        changed[:, t] += 1
        assert torch.equal(full[:, :t], module(changed, rows(name))[0][:, :t])


def packed_equals_separate(name):
    module, x = setup(name)
    full, seq = module(x, rows(name, True))[0], rows(name)
    for row, a, b in [(0, 0, 5), (0, 5, 8), (1, 0, 2), (1, 2, 6)]:
        alone = Seq.rows(1, b - a)
        alone.memo.update({key: value[row : row + 1, a:b] for key, value in seq.memo.items() if key == FIRST})
        same(full[row, a:b], module(x[row : row + 1, a:b], alone)[0][0])


def stream(name, module, x, seq, cuts):
    state, at, parts = module.init_state(2, 16, dtype=x.dtype), 0, []
    for n in cuts:
        parts.append(module(x[:, at : at + n], cut(name, seq, at, at + n), state)[0])
        at += n
    return torch.cat(parts, 1)


def streamed_equals_whole(name):
    module, x = setup(name)
    for cuts in [(1,) * T, (3, 1, 2, 1, 1), (4, 4)]:
        same(stream(name, module, x, rows(name), cuts), module(x, rows(name))[0])


def streamed_packed_equals_whole(name):
    module, x = setup(name)
    real = SEG != 0
    for cuts in [(1,) * T, (3, 3, 2), (4, 1, 3)]:
        same(stream(name, module, x, rows(name, True), cuts)[real], module(x, rows(name, True))[0][real])


def ragged_prefill_then_decode(name):
    module, x = setup(name)
    lengths, state, seq = torch.tensor([5, 2]), module.init_state(2, 16, dtype=x.dtype), rows(name)
    prefill = Seq.ragged(lengths, 5)
    prefill.memo.update(cut(name, seq, 0, 5).memo)
    module(x[:, :5], prefill, state)
    steps = []
    for i in range(5, 8):
        one = Seq((lengths + i - 5)[:, None])
        one.memo.update(cut(name, seq, i, i + 1).memo)
        steps.append(module(x[:, i : i + 1], one, state)[0])
    for row, n in enumerate(lengths.tolist()):
        columns = [*range(n), 5, 6, 7]
        whole = Seq.rows(1, n + 3)
        whole.memo.update({key: value[row : row + 1, columns] for key, value in seq.memo.items() if key == FIRST})
        same(torch.cat(steps, 1)[row], module(x[row : row + 1, columns], whole)[0][0, n:])


LAWS = [
    causality,
    packed_equals_separate,
    streamed_equals_whole,
    streamed_packed_equals_whole,
    ragged_prefill_then_decode,
]


CHECKS = [*LAWS, hand_formula]


HAND, WHOLE, PACKED = {"hand_formula"}, {"streamed_equals_whole"}, {"packed_equals_separate"}
RAGGED, STREAMED_PACKED = {"ragged_prefill_then_decode"}, {"streamed_packed_equals_whole"}
DELTA, MIXERS = ("deltanet", "gated_delta", "kda"), FAMILY[:4]
SHIFTED = ("rwkv7", "rwkv_channel")
PAGES = {"deltanet": DeltaNet, "gated_delta": GatedDelta, "kda": KDA, "rwkv7": RWKV7, "rwkv_channel": RWKVChannel}
PAGE = "page"  # the mechanism's own class

BUGS = {  # bug: (mechanisms, where, function, right, wrong, checks that must catch it; HAND alone = it passes every law)
    # the rule itself
    "keys keep their length": (("deltanet", "gated_delta", "kda"), delta, "unit", "x * (", "x + 0 * (", HAND),
    "length as in F.normalize": (DELTA, delta, "unit", "+ eps).rsqrt()", ").sqrt().clamp(min=1e-12).reciprocal()", HAND),
    "no 1/sqrt(K)": (DELTA, PAGE, "forward", "self.head_dim**-0.5", "1", HAND),
    "no sigmoid over beta": (DELTA, PAGE, "forward", "self.b_proj(x).sigmoid()", "self.b_proj(x)", HAND),
    "no filter activation": (("deltanet",), PAGE, "forward", "F.silu(mixed)", "mixed", HAND),
    "no output norm": (("deltanet",), PAGE, "forward", "self.norm(o.transpose(1, 2).to(x.dtype))", "o.transpose(1, 2)", HAND),
    "tiled key heads": (("gated_delta",), PAGE, "forward", "p.repeat_interleave(v.shape[1] // p.shape[1], 1)", "p.repeat(1, v.shape[1] // p.shape[1], 1, 1)", HAND),
    "sigmoid for silu in the gate": (("gated_delta",), PAGE, "forward", "F.silu(self.g_proj(x))", "self.g_proj(x).sigmoid()", HAND),
    "silu for sigmoid in the gate": (("kda",), PAGE, "forward", "self.g_b_proj(self.g_a_proj(x)).sigmoid()", "F.silu(self.g_b_proj(self.g_a_proj(x)))", HAND),
    "bias outside of softplus": (("gated_delta",), PAGE, "log_decay", "F.softplus(a + dt)", "(F.softplus(a) + dt.exp())", HAND),
    "decay not exponentiated": (("gated_delta",), PAGE, "log_decay", "-A_log.exp()", "-A_log.abs()", HAND),
    "one pace per head": (("kda",), PAGE, "forward", "self.log_decay(x))", "self.log_decay(x).mean(-1, keepdim=True).expand(-1, -1, -1, self.head_dim))", HAND),
    "rate of the wrong head": (("kda",), PAGE, "log_decay", "A_log.exp()[:, None]", "A_log.exp().flip(0)[:, None]", HAND),
    "recall before the decay": (("gated_delta", "kda"), delta, "delta_steps", "(k_t[..., None, :] @ S)", "(k_t[..., None, :] @ (S / decay_t[..., None]))", WHOLE),
    # its chunks
    "diagonal in the solve": (DELTA, delta, "solve_unit", "M, right, upper=False, unitriangular=True", "M.tril() + torch.eye(M.shape[-1], dtype=M.dtype), right, upper=False", WHOLE | HAND),
    "beta on the wrong side": (DELTA, delta, "delta_chunks", "solve_unit(beta * M, right)", "solve_unit(M * beta.transpose(-1, -2), right)", WHOLE | HAND),
    "state fades a token too little": (("gated_delta", "kda"), delta, "delta_chunks", "fade.mT", "(fade / a[..., -1:, :]).mT", WHOLE | HAND),
    "writes do not fade": (("gated_delta", "kda"), delta, "delta_chunks", "k_out * writes", "k * writes", WHOLE | HAND),
    "the read is not shifted": (("rwkv7",), dplr, "dplr_chunks", "torch.cat((a[..., :1, :], a_in[0, ..., :-1, :]), -2)", "a_in[0]", WHOLE | HAND),
    "chunks forget what was read": (("rwkv7",), dplr, "dplr_chunks", "added_n + b_n @ reads[-1]", "added_n", WHOLE | HAND),
    # documents, padding, state
    "pairs across documents": (MIXERS, scan, "boundaries", "pairs & (doc[..., :, None] == doc[..., None, :])", "pairs & (doc[..., :, None] >= 0)", PACKED | HAND),
    "all documents see the state": (MIXERS, scan, "boundaries", "(doc == carried)", "(doc == doc)", PACKED | HAND),
    "all documents write the state": (MIXERS, scan, "boundaries", "(doc == last)", "(doc == doc)", PACKED | HAND),
    "the state outlives its document": (MIXERS, scan, "boundaries", "(carried == last)", "(last == last)", PACKED | HAND),
    "a step keeps the last document": (DELTA, delta, "delta_steps", "decay * goes_on(marks)", "decay", STREAMED_PACKED),
    "a step reads the last document": (("rwkv7",), dplr, "dplr_steps", "a * goes_on(marks)", "a", STREAMED_PACKED),
    "padding is written": (("deltanet",), PAGE, "forward", "(beta,) = marks.silence(self.b_proj(x).sigmoid())", "beta = self.b_proj(x).sigmoid()", RAGGED),
    "padding forgets": (("gated_delta", "kda"), PAGE, "forward", "beta, g = marks.silence(self.b_proj(x).sigmoid(), self.log_decay(x))", "beta, g = marks.silence(self.b_proj(x).sigmoid())[0], self.log_decay(x)", RAGGED),
    "padding learns": (("rwkv7",), PAGE, "forward", "marks.silence(k, log_w, rate)", "(*marks.silence(k, log_w), rate)", RAGGED),
    "the filter crosses documents": (DELTA + SHIFTED, conv, "shifted", "(doc[:, there] == marks.doc)", "(doc[:, there] >= 0)", PACKED | HAND),
    "the tail ends in padding": (DELTA + SHIFTED, conv, "shifted", "if marks.real is not None", "if False", RAGGED),
    "the tail is lost": (DELTA, PAGE, "forward", "state.write(S=S, tail=tail)", "state.write(S=S)", WHOLE),
    "the state is lost": (MIXERS, PAGE, "forward", "state.write(S=S, tail=tail)", "state.write(tail=tail)", WHOLE),
    # RWKV-7
    "the read sees the decay": (("rwkv7",), PAGE, "forward", "values, -kk,", "values, -kk * log_w.exp(),", HAND),
    "no tanh": (("rwkv7",), PAGE, "forward", ".tanh() @", " @", HAND),
    "no e^(-1/2)": (("rwkv7",), PAGE, "forward", "-math.exp(-0.5) * (", "-(", HAND),
    "values mixed the other way": (("rwkv7",), PAGE, "forward", "v = v + (first - v)", "v = first + (v - first)", HAND),
    "values not mixed": (("rwkv7",), PAGE, "forward", "(first - v) *", "(v - v) *", HAND),
    "erases along the key that it writes": (("rwkv7",), PAGE, "forward", "kk = F.normalize(self.heads(k * self.k_k), dim=-1)\n        k = k * (1 + (rate - 1) * self.k_a)", "k = k * (1 + (rate - 1) * self.k_a)\n        kk = F.normalize(self.heads(k * self.k_k), dim=-1)", HAND),
    "eps of heads 64 wide": (("rwkv7",), PAGE, "forward", "self.head_dim * 1e-5", "64e-5", HAND),
    "bonus under the norm": (("rwkv7",), PAGE, "forward", "o = F.layer_norm(o, o.shape[-1:], eps=self.head_dim * 1e-5)\n        bonus = (r * self.heads(k * self.r_k)).sum(-1, keepdim=True) * values", "bonus = (r * self.heads(k * self.r_k)).sum(-1, keepdim=True) * values\n        o = F.layer_norm(o + bonus, o.shape[-1:], eps=self.head_dim * 1e-5)", HAND),
    "no learning rate": (("rwkv7",), PAGE, "forward", "-kk, kk * rate", "-kk, kk * (rate != 0)", HAND),
    "mixes the wrong way round": (("rwkv7",), PAGE, "forward", "x + (before - x) * m", "before + (x - before) * m", HAND),
    # its channel mixing
    "not squared": (("rwkv_channel",), PAGE, "forward", ".square()", "", HAND),
    "no relu": (("rwkv_channel",), PAGE, "forward", "F.relu(", "(", HAND),
    "shares exchanged": (("rwkv_channel",), PAGE, "forward", "x + (before - x) * self.x_k", "before + (x - before) * self.x_k", HAND),
    "the token before is lost": (("rwkv_channel",), PAGE, "forward", "state.write(tail=tail)", "pass", WHOLE),
    "looks at the token behind": (SHIFTED, conv, "token_shift", "return taps[1], tail", "return taps[0].roll(-1, 1), tail", {"causality"}),
}  # fmt: skip


def plant(patch, owner, function, right, wrong):
    """``function`` with the one place that reads ``right`` reading ``wrong``."""
    original = getattr(owner, function)
    text = textwrap.dedent(inspect.getsource(original))
    right, wrong = (part.replace("\n        ", "\n    ") for part in (right, wrong))
    assert text.count(right) >= 1, f"{function} no longer says {right!r}"
    scope = original.__globals__ | {}
    exec(compile(text.replace(right, wrong), function, "exec", __future__.annotations.compiler_flag), scope)
    patch.setattr(owner, function, scope[function])
    if inspect.ismodule(owner):  # pages hold the function under its name
        for module in (delta, dplr, *map(inspect.getmodule, PAGES.values())):
            if getattr(module, function, None) is original:
                patch.setattr(module, function, scope[function])


@pytest.mark.parametrize("name", FAMILY)
def test_without_a_bug_every_check_holds(name):
    assert caught_by(CHECKS, [(name,)]) == set()


CASES = [(bug, name) for bug, (names, *_) in BUGS.items() for name in names]


@pytest.mark.parametrize(("bug", "name"), CASES, ids=[f"{name}: {bug}" for bug, name in CASES])
def test_a_planted_bug_is_caught(bug, name, monkeypatch):
    _, owner, function, right, wrong, must = BUGS[bug]
    plant(monkeypatch, PAGES[name] if owner == PAGE else owner, function, right, wrong)
    must_catch(must, CHECKS, [(name,)], alone=HAND)


@pytest.mark.parametrize("name", FAMILY)
def test_enough_bugs_are_planted(name):
    assert sum(name == other for _, other in CASES) >= 6
