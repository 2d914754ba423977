"""Positions worked by hand: frequencies as lists of floats, rotation and bias pair by pair, in float64."""

import math

import pytest
import torch

from tests.golden.test_layers import EXACT, affine, dot, randomised
from zero2llm.core.config import parse
from zero2llm.core.seq import Seq
from zero2llm.layers.mixers.gqa import GQAConfig
from zero2llm.layers.positions.catalog import AttentionPositionConfig
from zero2llm.layers.positions.interpolation import ScalingConfig
from zero2llm.model.catalog import MixerConfig

K, BASE, T, D = 8, 50.0, 7, 16  # width of a head, base, tokens, width of the model
ANGLE = dict(atol=1e-5, rtol=0)  # angles are computed in fp32 by design
SHORT, LONG = (1.0, 1.5, 2.0, 2.5), (1.0, 2.0, 4.0, 8.0)

SCALINGS = {
    "none": None,
    "linear": {"kind": "linear", "factor": 4.0},
    "ntk": {"kind": "ntk", "factor": 4.0},
    "yarn": {"kind": "yarn", "factor": 4.0, "original_max_len": 100, "beta_fast": 8.0, "beta_slow": 1.0},
    "yarn untruncated": {"kind": "yarn", "factor": 4.0, "original_max_len": 100, "beta_fast": 8.0, "truncate": False},
    "yarn mscale": {"kind": "yarn", "factor": 4.0, "original_max_len": 100, "beta_fast": 8.0, "mscale": 2.0},
    "llama3": {"kind": "llama3", "factor": 4.0, "original_max_len": 50},
    "longrope": {"kind": "longrope", "short_factor": SHORT, "long_factor": LONG, "original_max_len": 16, "max_len": 64},
    "longrope short": {"kind": "longrope", "short_factor": SHORT, "long_factor": LONG, "original_max_len": 64, "max_len": 64},
}


def frequencies_by_hand(name, dim, base):
    """(frequency of each pair, what cos and sin are multiplied by)"""
    plain = [base ** (-2 * m / dim) for m in range(dim // 2)]
    out, gain = [], 1.0
    if name == "ntk":
        return [(base * 4.0 ** (dim / (dim - 2))) ** (-2 * m / dim) for m in range(dim // 2)], 1.0
    if name.startswith("yarn"):  # paper: r(m) = L / wavelength; the ramp runs over the pair's number
        turns = lambda n: dim / 2 * math.log(100 / (2 * math.pi * n)) / math.log(base)
        first, last = turns(8.0), turns(1.0)
        if name != "yarn untruncated":
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dim - 1)
        gain = 0.1 * math.log(4.0) + 1
    for m, f in enumerate(plain):
        wavelength = 2 * math.pi / f
        if name.startswith("yarn"):
            ramp = min(1.0, max(0.0, (m - first) / (last - first)))
            out.append((1 - ramp) * f + ramp * f / 4.0)
        elif name == "llama3":
            if wavelength > 50 / 1.0:
                out.append(f / 4.0)
            elif wavelength < 50 / 4.0:
                out.append(f)
            else:
                smooth = (50 / wavelength - 1.0) / (4.0 - 1.0)
                out.append((1 - smooth) * f / 4.0 + smooth * f)
        elif name == "longrope":
            out.append(f / LONG[m])
        elif name == "longrope short":
            out.append(f / SHORT[m])
        else:
            out.append(f / 4.0 if name == "linear" else f)
    if name == "longrope":
        gain = math.sqrt(1 + math.log(4.0) / math.log(16))
    return out, gain


def turned_by_hand(x, clocks, freq, gain, layout):
    """One head's channels; clocks[m] is what pair m counts. Channels beyond the pairs stay."""
    out, pairs = list(x), len(freq)
    for m in range(pairs):
        i, j = (m, m + pairs) if layout == "half_split" else (2 * m, 2 * m + 1)
        cos, sin = gain * math.cos(clocks[m] * freq[m]), gain * math.sin(clocks[m] * freq[m])
        out[i], out[j] = x[i] * cos - x[j] * sin, x[j] * cos + x[i] * sin
    return out


def check_rotation(module, q, k, seq, clocks, freq, gain, layout):
    for got, given in zip(module(q, k, seq), (q, k), strict=True):
        for b in range(len(q)):
            for t in range(q.shape[1]):
                for head in range(given.shape[2]):
                    expected = turned_by_hand(given[b, t, head].tolist(), clocks(b, t), freq, gain, layout)
                    torch.testing.assert_close(got[b, t, head], torch.tensor(expected, dtype=q.dtype), **ANGLE)


def queries(width=K):
    return torch.randn(2, T, 2, width, dtype=torch.float64), torch.randn(2, T, 1, width, dtype=torch.float64)


def packed():
    return Seq.of_segments(torch.tensor([[1, 1, 1, 2, 2, 3, 3], [4, 4, 4, 4, 4, 0, 0]]))


@pytest.mark.parametrize("rotary_dim", [None, 8], ids=["all", "first 8 of 12"])
@pytest.mark.parametrize("layout", ["half_split", "interleaved"])
@pytest.mark.parametrize("name", SCALINGS)
def test_rope(name, layout, rotary_dim):
    width = 12 if rotary_dim else K
    data = {"kind": "rope", "base": BASE, "layout": layout, "rotary_dim": rotary_dim, "scaling": SCALINGS[name]}
    module, (q, k), seq = parse(AttentionPositionConfig, data).build(width), queries(width), packed()
    freq, gain = frequencies_by_hand(name, 8, BASE)
    check_rotation(module, q, k, seq, lambda b, t: [seq.pos[b, t].item()] * 4, freq, gain, layout)


def test_rope_far_from_the_start():
    module = parse(AttentionPositionConfig, {"kind": "rope", "base": BASE, "scaling": SCALINGS["linear"]}).build(K)
    (q, k), seq = queries(), Seq.rows(2, T, 90)
    check_rotation(module, q, k, seq, lambda b, t: [90 + t] * 4, *frequencies_by_hand("linear", K, BASE), "half_split")


def test_ntk_leaves_the_fastest_pair_and_slows_the_slowest_by_the_factor():
    plain, slow = (frequencies_by_hand(n, K, BASE)[0] for n in ("none", "ntk"))
    got = parse(ScalingConfig, SCALINGS["ntk"]).frequencies(BASE, K)
    assert got[0] == 1.0 and got[-1].item() == pytest.approx(plain[-1] / 4, rel=1e-6) and slow[0] == 1.0


def test_yarn_s_share_for_all_scores_is_squared():
    grown = lambda m: 0.1 * m * math.log(40.0) + 1
    scaling = {"kind": "yarn", "factor": 40.0, "original_max_len": 100, "mscale": 0.5, "mscale_all_dim": 0.8}
    rope = parse(AttentionPositionConfig, {"kind": "rope", "scaling": scaling})
    assert rope.scaling.amplitude() == pytest.approx(grown(0.5) / grown(0.8)) and rope.score_factor == pytest.approx(grown(0.8) ** 2)
    assert parse(AttentionPositionConfig, {"kind": "rope"}).score_factor == 1.0


@pytest.mark.parametrize("interleaved", [False, True])
def test_mrope(interleaved):
    config = {"kind": "mrope", "base": BASE, "sections": [4, 3, 1], "interleaved": interleaved}
    if interleaved:
        config["sections"] = [4, 2, 2]
    module, (q, k) = parse(AttentionPositionConfig, config).build(16), queries(16)
    axis = "thwthwtt" if interleaved else "tttthhhw"
    grid = torch.randint(0, 9, (2, T, 3))
    seq = Seq(packed().pos, packed().seg, grid)
    freq = [BASE ** (-2 * m / 16) for m in range(8)]
    clocks = lambda b, t: [grid[b, t, "thw".index(a)].item() for a in axis]
    check_rotation(module, q, k, seq, clocks, freq, 1.0, "half_split")
    text = packed()
    check_rotation(module, q, k, text, lambda b, t: [text.pos[b, t].item()] * 8, freq, 1.0, "half_split")


def test_a_sequence_carries_its_grid_through_every_cut():
    grid = torch.arange(2 * T * 3).view(2, T, 3)
    seq = Seq(packed().pos, packed().seg, grid)
    assert torch.equal(seq[[1]].grid, grid[[1]]) and torch.equal(seq.window(2, 5).grid, grid[:, 2:5])
    assert torch.equal(seq.fresh().grid, grid) and torch.equal(seq.to("cpu").grid, grid) and packed()[[0]].grid is None


SLOPES = {  # 2108.12409: 8 heads 1/2, 1/4 ...; otherwise the lower power's, then every other of the next power
    1: [2**-8],
    2: [2**-4, 2**-8],
    4: [2**-2, 2**-4, 2**-6, 2**-8],
    6: [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3],
    8: [2**-i for i in range(1, 9)],
}


@pytest.mark.parametrize("heads", SLOPES)
def test_alibi(heads):
    cfg = GQAConfig(n_heads=heads, head_dim=2, position=parse(AttentionPositionConfig, {"kind": "alibi"}))
    module, x, seq = randomised(cfg.build(D)), torch.randn(2, T, D, dtype=torch.float64), packed()
    weights = module.weights(x, seq)
    for b in range(2):
        q, k = ([affine(p, row) for row in x[b].tolist()] for p in (module.q_proj, module.k_proj))
        for i in range(T):
            seen = [j for j in range(i + 1) if seq.seg[b, i] == seq.seg[b, j]]
            for h, slope in enumerate(SLOPES[heads]):
                part = slice(2 * h, 2 * h + 2)
                scores = [dot(q[i][part], k[j][part]) / math.sqrt(2) - slope * (i - j) for j in seen]
                total = math.fsum(map(math.exp, scores))
                expected = torch.zeros(T, dtype=torch.float64)
                expected[seen] = torch.tensor([math.exp(s) / total for s in scores], dtype=torch.float64)
                torch.testing.assert_close(weights[b, h, i], expected, **EXACT)


REFUSED = [
    ({"kind": "rope", "rotary_dim": 3}, "rotary_dim = 3 must be even"),
    ({"kind": "rope", "rotary_dim": 10}, "rotary_dim = 10 must be between 2 and head_dim = 8"),
    ({"kind": "rope", "rotary_dim": 0}, "rotary_dim = 0 must be between"),
    ({"kind": "rope", "base": 1.0}, "base = 1.0 must be above 1"),
    ({"kind": "rope", "scaling": {"kind": "linear", "factor": 0.5}}, "factor = 0.5 must be at least 1"),
    ({"kind": "rope", "rotary_dim": 2, "scaling": {"kind": "ntk", "factor": 2.0}}, "rotary width 2 must be at least 4"),
    ({"kind": "rope", "scaling": {"kind": "yarn", "factor": 2.0, "original_max_len": 64, "beta_fast": 1, "beta_slow": 2}}, "beta_fast = 1.0 > beta_slow = 2.0"),
    ({"kind": "rope", "scaling": {"kind": "yarn", "factor": 2.0, "original_max_len": 0}}, "original_max_len = 0"),
    ({"kind": "rope", "scaling": {"kind": "llama3", "low_freq_factor": 4.0, "high_freq_factor": 4.0}}, "high_freq_factor = 4.0 > low_freq_factor = 4.0"),
    ({"kind": "rope", "scaling": {"kind": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 4, "original_max_len": 8, "max_len": 9}}, r"short_factor = \[1.0\] must be 4 positive numbers"),
    ({"kind": "rope", "scaling": {"kind": "longrope", "short_factor": [1.0] * 4, "long_factor": [0.0] * 4, "original_max_len": 8, "max_len": 9}}, "long_factor"),
    ({"kind": "rope", "scaling": {"kind": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0] * 4, "original_max_len": 1, "max_len": 9}}, "original_max_len = 1"),
    ({"kind": "mrope", "sections": [1, 1, 1]}, r"sections = \[1, 1, 1\] must sum to head_dim / 2 = 4"),
    ({"kind": "mrope", "sections": [0, 2, 2], "interleaved": True}, r"sections = \[0, 2, 2\]: interleaved needs"),
    ({"kind": "mrope", "sections": [2, 1, 1], "base": 0.5}, "base = 0.5 must be above 1"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "reason"), REFUSED, ids=[r for _, r in REFUSED])
def test_impossible_positions_are_refused_with_their_values(data, reason):
    with pytest.raises(ValueError, match=reason):
        parse(AttentionPositionConfig, data).build(8)


@pytest.mark.parametrize("mixer", [
    {"kind": "gqa", "n_heads": 2}, {"kind": "moba", "n_heads": 2}, {"kind": "nsa", "n_heads": 2},
    {"kind": "performer", "n_heads": 2}, {"kind": "gau_flash", "key_dim": 8},
], ids=lambda m: m["kind"])  # fmt: skip
def test_attention_refuses_yarn_s_share_for_all_scores(mixer):
    scaling = {"kind": "yarn", "factor": 4.0, "original_max_len": 64, "mscale": 1.0, "mscale_all_dim": 0.7}
    with pytest.raises(ValueError, match="mscale_all_dim = 0.7"):
        parse(MixerConfig, mixer | {"position": {"kind": "rope", "scaling": scaling}}).build(16)
