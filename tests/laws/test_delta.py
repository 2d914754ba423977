"""The chunked delta rules against their step forms: values, gradients, states; any chunk, any document borders."""

from __future__ import annotations

import pytest
import torch

from tests.laws.test_scan import B, H, K, T, V, rows
from zero2llm.core.seq import Seq
from zero2llm.layers.ffns.token_shift import RWKVChannelConfig
from zero2llm.layers.mixers.deltanet import DeltaNetConfig
from zero2llm.layers.mixers.gated_delta import GatedDeltaConfig
from zero2llm.layers.mixers.kda import KDAConfig
from zero2llm.layers.mixers.rwkv7 import RWKV7Config
from zero2llm.model.lm import LM
from zero2llm.model.spec import LayerPattern, LayerSpec, ModelConfig
from zero2llm.ops import delta as deltas
from zero2llm.ops import dplr as dplrs
from zero2llm.ops.marks import Marks

KINDS, CHUNKS = ["plain", "goes on", "packed", "packed, goes on"], [1, 5, 16, 37, 64]


def make(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def delta_inputs(decay: str) -> tuple[list[torch.Tensor], torch.Tensor]:
    torch.manual_seed(1)
    g = -3 * torch.rand(B, H, T, *([K] if decay == "per channel" else []), dtype=torch.float64)
    g = torch.zeros(T, dtype=torch.float64) if decay == "none" else g
    q, k, v, beta = make(B, H, T, K), deltas.unit(make(B, H, T, K)), make(B, H, T, V), make(B, H, T).sigmoid()
    return [q, k, v, beta, g], make(B, H, K, V)


def dplr_inputs() -> tuple[list[torch.Tensor], torch.Tensor]:
    """q, k, v, a, b, g; a and b as far from each other as they may be."""
    torch.manual_seed(1)
    a, b = deltas.unit(make(B, H, T, K)), deltas.unit(make(B, H, T, K))
    g = -torch.rand(B, H, T, K, dtype=torch.float64)
    return [make(B, H, T, K), make(B, H, T, K), make(B, H, T, V), a, b, g], make(B, H, K, V)


def compare(forms, leaves, start, marks, silent):
    """Both forms: outputs of real tokens, last state, and every gradient. ``silent`` = arguments that padding zeroes."""
    leaves, start, found = [x.requires_grad_() for x in leaves], start.requires_grad_(), []
    real = torch.ones(B, T, dtype=torch.float64) if marks.real is None else marks.real.double()
    for form in forms:
        hushed = [x * real.view(B, 1, T, *[1] * (x.ndim - 3)) if i in silent else x for i, x in enumerate(leaves)]
        o, S = form(*hushed, marks, start)
        o = o * real[:, None, :, None]
        found.append([o, S, *torch.autograd.grad(o.sin().sum() + S.cos().sum(), [*leaves, start])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


@pytest.mark.parametrize("decay", ["none", "per head", "per channel"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", CHUNKS)
def test_delta_chunks_equal_steps(decay, kind, chunk):
    leaves, start = delta_inputs(decay)
    silent = (3,) if decay == "none" else (3, 4)
    forms = deltas.delta_steps, lambda *a: deltas.delta_chunks(*a, chunk)
    compare(forms, leaves, start, Marks.of(rows(kind), True), silent)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", CHUNKS)
def test_dplr_chunks_equal_steps(kind, chunk):
    leaves, start = dplr_inputs()
    forms = dplrs.dplr_steps, lambda *a: dplrs.dplr_chunks(*a, chunk)
    compare(forms, leaves, start, Marks.of(rows(kind), True), (1, 4, 5))


@pytest.mark.parametrize("decay", ["per head", "per channel"])
def test_the_delta_rule_is_diagonal_plus_low_rank(decay):
    (q, k, v, beta, g), start = delta_inputs(decay)
    o, S = deltas.delta_steps(q, k, v, beta, g, Marks(), start)
    g = g if g.ndim == 4 else g[..., None].expand_as(k)
    other, state = dplrs.dplr_steps(q, k, beta[..., None] * v, g.exp() * k, -beta[..., None] * k, g, Marks(), start)
    torch.testing.assert_close(other, o, atol=1e-12, rtol=0)
    torch.testing.assert_close(state, S, atol=1e-12, rtol=0)


def test_without_decay_and_with_beta_1_the_last_value_of_a_key_is_read_exactly():
    (_, k, v, _, _), start = delta_inputs("none")
    k = k / k.norm(dim=-1, keepdim=True)
    o, _ = deltas.delta(k, k, v, torch.ones(B, H, T, dtype=torch.float64), None, Marks(), start, 8)
    torch.testing.assert_close(o, v, atol=1e-12, rtol=0)


@pytest.mark.parametrize("decay", ["per head", "per channel"])
def test_far_decays_neither_overflow_nor_vanish_in_fp32(decay):
    leaves, start = delta_inputs(decay)
    q, k, v, beta, g, start = (x.float() for x in (*leaves, start))
    steps, _ = deltas.delta_steps(q, k, v, beta, 40 * g, Marks(), start)
    chunks, _ = deltas.delta_chunks(q, k, v, beta, 40 * g, Marks(), start, 32)
    torch.testing.assert_close(chunks, steps, atol=5e-6, rtol=1e-4)


def test_far_decays_of_dplr_in_fp32():
    """A difference of cumulative sums is as exact as the sums: eps |G| is the relative error of a factor."""
    leaves, start = dplr_inputs()
    q, k, v, a, b, g, start = (x.float() for x in (*leaves, start))
    for scale in (1, 120):
        steps, _ = dplrs.dplr_steps(q, k, v, a, b, scale * g, Marks(), start)
        chunks, _ = dplrs.dplr_chunks(q, k, v, a, b, scale * g, Marks(), start, 32)
        deepest = (scale * g)[..., :32, :].sum(-2).abs().max().item()
        atol = torch.finfo(torch.float32).eps * max(deepest, 10.0) * steps.abs().max().item()
        torch.testing.assert_close(chunks, steps, atol=atol, rtol=0)


def test_half_precision_is_computed_in_fp32():
    leaves, start = delta_inputs("per channel")
    half = [x.bfloat16() for x in leaves]
    o, S = deltas.delta(*half, Marks(), start.float(), 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again, _ = deltas.delta(*(x.float() for x in half), Marks(), start.float(), 8)
    assert o.dtype == S.dtype == torch.float32 and torch.equal(o, again)


@pytest.mark.parametrize("pattern", [["rwkv", "rwkv", "rwkv"], ["delta", "rwkv", "rwkv"]], ids=["alone", "hybrid"])
def test_recomputed_blocks_give_the_same_gradients(pattern):
    """The first layer's values are handed on through the pass's memo, outside of what a checkpoint sees."""
    blocks = {
        "rwkv": LayerSpec(mixer=RWKV7Config(n_heads=2, chunk=8), ffn=RWKVChannelConfig(hidden=9)),
        "delta": LayerSpec(mixer=DeltaNetConfig(n_heads=2)),
    }
    blocks, layers = {name: blocks[name] for name in set(pattern)}, LayerPattern(pattern=pattern)
    model = LM(ModelConfig(vocab_size=13, d_model=8, max_len=T, layers=layers, blocks=blocks)).double()
    found = []
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.5)
    seq, tokens = rows("packed"), torch.randint(0, 13, (B, T))
    for model.recompute in (False, True):
        hidden = model(tokens, seq)[0]
        found.append([hidden, *torch.autograd.grad(hidden.sin().sum(), list(model.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert found[0][[n for n, _ in model.named_parameters()].index("blocks.2.mixer.v1") + 1].abs().max() > 0


def test_a_model_s_second_pass_does_not_see_the_values_of_the_first():
    spec = LayerSpec(mixer=RWKV7Config(n_heads=2), ffn=RWKVChannelConfig(hidden=9))
    layers = LayerPattern(pattern=["r"], repeat=2)
    model = LM(ModelConfig(vocab_size=13, d_model=8, max_len=T, layers=layers, blocks={"r": spec}))
    seq, first, second = Seq.rows(B, T), *(torch.randint(0, 13, (B, T)) for _ in range(2))
    model(first, seq)
    assert torch.equal(model(second, seq)[0], model(second, Seq.rows(B, T))[0]) and not seq.memo


def test_nearly_equal_keys_leave_the_solve_exact_in_fp32():
    """I + M is then all ones below its diagonal: the worst case for a solver."""
    k = make(1, 2, 1, 16) + 0.1 * make(1, 2, 128, 16)
    q, k, v, beta = (
        make(1, 2, 128, 16),
        k / k.norm(dim=-1, keepdim=True),
        make(1, 2, 128, 16),
        torch.ones(1, 2, 128).double(),
    )
    exact, _ = deltas.delta_steps(q, k, v, beta, torch.zeros(128).double(), Marks(), None)
    chunks, _ = deltas.delta_chunks(*(x.float() for x in (q, k, v, beta)), torch.zeros(128), Marks(), None)
    assert (chunks - exact).abs().max() < 5e-6 * exact.abs().max()


@pytest.mark.parametrize("kind", [DeltaNetConfig, GatedDeltaConfig, KDAConfig, RWKV7Config], ids=lambda c: c.kind)
def test_autocast_is_near_fp32(kind):
    module = kind(n_v_heads=2).build(32) if kind is GatedDeltaConfig else kind(n_heads=2).build(32)
    x = torch.randn(2, 20, 32, requires_grad=True)
    found = []
    for enabled in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y = module(x, Seq.rows(2, 20))[0]
        found.append([y.float(), *torch.autograd.grad(y.float().square().sum(), x)])
    for a, b, tolerance in zip(
        *found, (2e-2, 5e-2), strict=True
    ):  # RWKV-7 divides the first tokens by a tiny deviation:
        assert 0 < (a - b).norm() < tolerance * b.norm()  # noise of 2^-8 on x alone moves its gradient by 1 to 2 %
