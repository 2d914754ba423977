"""The delta family worked by hand: loops over tokens, heads and channels on lists of floats, at most 8 tokens."""

import math

import pytest
import torch

from tests.golden.test_layers import EXACT, dot, randomised
from zero2llm.core.seq import Seq
from zero2llm.layers.contract import Place
from zero2llm.layers.ffns.token_shift import RWKVChannelConfig
from zero2llm.layers.mixers.deltanet import DeltaNetConfig
from zero2llm.layers.mixers.gated_delta import GatedDeltaConfig
from zero2llm.layers.mixers.kda import KDAConfig
from zero2llm.layers.mixers.rwkv7 import FIRST, RWKV7Config
from zero2llm.model.lm import LM
from zero2llm.model.spec import LayerPattern, LayerSpec, ModelConfig

D, T = 12, 8
SEG = torch.tensor([[1, 1, 1, 1, 1, 2, 2, 2], [3, 3, 4, 4, 4, 4, 0, 0]], dtype=torch.int32)

sigmoid = lambda x: 1 / (1 + math.exp(-x))
silu = lambda x: x * sigmoid(x)
softplus = lambda x: math.log1p(math.exp(x))
numbers = lambda p: p.tolist()


def times(matrix, x):
    return [dot(row, x) for row in matrix]


def apply(layer, x):
    return times(numbers(layer.weight), x)


def parts(x, n):
    """A list cut into ``n`` equal lists, one a head."""
    width = len(x) // n
    return [x[i * width : (i + 1) * width] for i in range(n)]


def unit(x):
    length = math.sqrt(math.fsum(v * v for v in x) + 1e-6)
    return [v / length for v in x]


def rms(x, weight, eps):
    scale = math.sqrt(math.fsum(v * v for v in x) / len(x) + eps)
    return [v / scale * w for v, w in zip(x, weight, strict=True)]


def filtered(layer, taps, xs):
    """silu of the causal filter over the projected tokens; the last tap weighs the token itself."""
    rows, taps = [apply(layer, x) for x in xs], numbers(taps)
    width = len(taps[0])
    at = lambda t, c: math.fsum(taps[c][width - 1 - j] * rows[t - j][c] for j in range(min(width, t + 1)))
    return [[silu(at(t, c)) for c in range(len(taps))] for t in range(len(xs))]


def delta_rule(q, k, v, beta, alpha):
    """One head over one document: lists of tokens; alpha has one factor for each channel of the key."""
    S = [[0.0] * len(v[0]) for _ in k[0]]
    out = []
    for t in range(len(q)):
        S = [[alpha[t][c] * s for s in row] for c, row in enumerate(S)]
        recalled = [math.fsum(k[t][c] * S[c][j] for c in range(len(S))) for j in range(len(v[0]))]
        S = [[s + beta[t] * k[t][c] * (v[t][j] - recalled[j]) for j, s in enumerate(row)] for c, row in enumerate(S)]
        out.append([math.fsum(q[t][c] * S[c][j] for c in range(len(S))) for j in range(len(v[0]))])
    return out


def delta_heads(m, xs, n_k, n_v, alphas):
    """For each token the outputs of all heads: [t][head][j]."""
    q, k, v = (filtered(p, c, xs) for p, c in ((m.q_proj, m.q_conv), (m.k_proj, m.k_conv), (m.v_proj, m.v_conv)))
    beta = [[sigmoid(b) for b in apply(m.b_proj, x)] for x in xs]
    heads = []
    for h in range(n_v):
        group = h // (n_v // n_k)
        keys = [unit(parts(row, n_k)[group]) for row in k]
        queries = [[c / math.sqrt(len(keys[0])) for c in unit(parts(row, n_k)[group])] for row in q]
        values = [parts(row, n_v)[h] for row in v]
        heads.append(delta_rule(queries, keys, values, [b[h] for b in beta], [a[h] for a in alphas]))
    return [[head[t] for head in heads] for t in range(len(xs))]


def deltanet_by_hand(m, cfg, xs):
    k, _ = cfg.widths(D)
    o = delta_heads(m, xs, cfg.n_heads, cfg.n_heads, [[[1.0] * k] * cfg.n_heads] * len(xs))
    return [apply(m.o_proj, [y for head in row for y in rms(head, numbers(m.norm.weight), cfg.norm_eps)]) for row in o]


def gated_delta_by_hand(m, cfg, xs):
    h_k, h_v, k, _ = cfg.widths(D)
    A, dt = numbers(m.A_log), numbers(m.dt_bias)
    alphas = []
    for x in xs:
        a = apply(m.a_proj, x)
        alphas.append([[math.exp(-math.exp(A[h]) * softplus(a[h] + dt[h]))] * k for h in range(h_v)])
    out = []
    for x, row in zip(xs, delta_heads(m, xs, h_k, h_v, alphas), strict=True):
        normed = [y for head in row for y in rms(head, numbers(m.norm.weight), cfg.norm_eps)]
        out.append(apply(m.o_proj, [y * silu(z) for y, z in zip(normed, apply(m.g_proj, x), strict=True)]))
    return out


def kda_by_hand(m, cfg, xs):
    A, dt = numbers(m.A_log), parts(numbers(m.dt_bias), cfg.n_heads)
    alphas = []
    for x in xs:
        f = parts(apply(m.f_b_proj, apply(m.f_a_proj, x)), cfg.n_heads)
        alphas.append(
            [
                [math.exp(-math.exp(A[h]) * softplus(a + b)) for a, b in zip(f[h], dt[h], strict=True)]
                for h in range(cfg.n_heads)
            ]
        )
    out = []
    for x, row in zip(xs, delta_heads(m, xs, cfg.n_heads, cfg.n_heads, alphas), strict=True):
        normed = [y for head in row for y in rms(head, numbers(m.norm.weight), cfg.norm_eps)]
        gate = apply(m.g_b_proj, apply(m.g_a_proj, x))
        out.append(apply(m.o_proj, [y * sigmoid(z) for y, z in zip(normed, gate, strict=True)]))
    return out


def low_rank(x, first, second, middle=lambda v: v):
    """x (D) through a (D, R) and an (R, D) matrix."""
    inner = [middle(v) for v in times(numbers(first.t()), x)]
    return times(numbers(second.t()), inner)


def rwkv7_token(m, x, before, first):
    """r, w, k, v, kk, a, g of one token, each a list of D; ``first`` = the first layer's values or None."""
    shift = lambda mix: [a + (b - a) * s for a, b, s in zip(x, before, numbers(mix), strict=True)]
    add = lambda p, y: [a + b for a, b in zip(numbers(p), y, strict=True)]
    r, k, v = apply(m.q_proj, shift(m.x_r)), apply(m.k_proj, shift(m.x_k)), apply(m.v_proj, shift(m.x_v))
    w = [math.exp(-math.exp(-0.5) * sigmoid(y)) for y in add(m.w0, low_rank(shift(m.x_w), m.w1, m.w2, math.tanh))]
    a = [sigmoid(y) for y in add(m.a0, low_rank(shift(m.x_a), m.a1, m.a2))]
    share = [sigmoid(y) for y in add(m.v0, low_rank(shift(m.x_v), m.v1, m.v2))]
    g = low_rank(shift(m.x_g), m.g1, m.g2, sigmoid)
    if first is not None:
        v = [y + (f - y) * s for y, f, s in zip(v, first, share, strict=True)]
    kk = []
    for head in parts([y * s for y, s in zip(k, numbers(m.k_k), strict=True)], m.n_heads):
        length = math.sqrt(math.fsum(y * y for y in head))
        kk += [y / length for y in head]
    k = [y * (1 + (rate - 1) * s) for y, rate, s in zip(k, a, numbers(m.k_a), strict=True)]
    return r, w, k, v, kk, a, g


def rwkv7_by_hand(m, cfg, xs, firsts=None):
    N, out = D // cfg.n_heads, []
    states = [[[0.0] * N for _ in range(N)] for _ in range(cfg.n_heads)]
    for t, x in enumerate(xs):
        before = xs[t - 1] if t else [0.0] * D
        r, w, k, v, kk, a, g = rwkv7_token(m, x, before, None if firsts is None else firsts[t])
        y = []
        for h in range(cfg.n_heads):
            at = lambda z, h=h: z[h * N : (h + 1) * N]
            S, R, W, K, V, U, A = states[h], at(r), at(w), at(k), at(v), at(kk), at(a)
            read = [math.fsum(U[c] * S[c][j] for c in range(N)) for j in range(N)]
            S = [[W[c] * S[c][j] - A[c] * U[c] * read[j] + K[c] * V[j] for j in range(N)] for c in range(N)]
            states[h] = S
            o = [math.fsum(R[c] * S[c][j] for c in range(N)) for j in range(N)]
            mean = math.fsum(o) / N
            scale = math.sqrt(math.fsum((z - mean) ** 2 for z in o) / N + N * 1e-5)
            bonus = math.fsum(R[c] * K[c] * at(numbers(m.r_k))[c] for c in range(N))
            weight, bias = at(numbers(m.norm_weight)), at(numbers(m.norm_bias))
            y += [(z - mean) / scale * weight[j] + bias[j] + bonus * V[j] for j, z in enumerate(o)]
        out.append(apply(m.o_proj, [z * s for z, s in zip(y, g, strict=True)]))
    return out


def channel_by_hand(m, cfg, xs):
    out = []
    for t, x in enumerate(xs):
        before = xs[t - 1] if t else [0.0] * D
        mixed = [a + (b - a) * s for a, b, s in zip(x, before, numbers(m.x_k), strict=True)]
        out.append(apply(m.down_proj, [max(0.0, y) ** 2 for y in apply(m.up_proj, mixed)]))
    return out


HAND = {  # name -> (configuration, its formula by hand)
    "deltanet": (DeltaNetConfig(n_heads=2, head_dim=5, value_dim=3, conv_width=3, chunk=3), deltanet_by_hand),
    "gated_delta": (
        GatedDeltaConfig(n_v_heads=4, n_k_heads=2, head_dim=5, value_dim=3, conv_width=4, chunk=3), gated_delta_by_hand,
    ),
    "kda": (KDAConfig(n_heads=3, head_dim=4, rank=2, conv_width=2, chunk=3), kda_by_hand),
    "rwkv7": (RWKV7Config(n_heads=3, decay_rank=2, rate_rank=3, value_rank=4, gate_rank=5, chunk=3), rwkv7_by_hand),
    "rwkv_channel": (RWKVChannelConfig(hidden=7), channel_by_hand),
}  # fmt: skip


def documents(seq):
    """(row, begin, end) of each document of a batch of rows."""
    seg = torch.ones_like(seq.pos) if seq.seg is None else seq.seg
    found = []
    for row, line in enumerate(seg.tolist()):
        for number in sorted({n for n in line if n}):
            found.append((row, line.index(number), len(line) - line[::-1].index(number)))
    return found


def by_hand(name, module, x, seq, firsts=None):
    """(B, T, D) with zeros where there is padding; each document on its own."""
    cfg, formula = HAND[name]
    y = torch.zeros_like(x)
    for row, begin, end in documents(seq):
        more = () if firsts is None else (firsts[row, begin:end].tolist(),)
        y[row, begin:end] = torch.tensor(formula(module, cfg, x[row, begin:end].tolist(), *more), dtype=x.dtype)
    return y


def setup(name):
    torch.manual_seed(3)
    return randomised(HAND[name][0].build(D)), torch.randn(2, T, D, dtype=torch.float64)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("name", HAND)
def test_equals_the_formula(name, packed):
    module, x = setup(name)
    seq = Seq.of_segments(SEG) if packed else Seq.rows(2, T)
    real = (SEG != 0)[..., None] if packed else 1
    torch.testing.assert_close(module(x, seq)[0] * real, by_hand(name, module, x, seq), **EXACT)


def test_rwkv7_mixes_in_the_first_layer_s_values():
    module, x = setup("rwkv7")
    firsts, seq = torch.randn_like(x), Seq.rows(2, T)
    seq.memo[FIRST] = firsts
    torch.testing.assert_close(module(x, seq)[0], by_hand("rwkv7", module, x, seq, firsts), **EXACT)
    assert seq.memo[FIRST] is firsts


def test_rwkv7_leaves_its_values_to_later_layers():
    module, x = setup("rwkv7")
    seq = Seq.rows(2, T)
    module(x, seq)
    before = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), 1)
    torch.testing.assert_close(seq.memo[FIRST], module.v_proj(x + (before - x) * module.x_v), **EXACT)


def test_the_first_rwkv7_layer_of_a_hybrid_provides_the_values():
    delta, rwkv = LayerSpec(mixer=DeltaNetConfig(n_heads=2)), LayerSpec(mixer=HAND["rwkv7"][0], ffn=RWKVChannelConfig())
    cfg = ModelConfig(
        vocab_size=11, d_model=D, max_len=T, layers=LayerPattern(pattern=["delta", "rwkv", "rwkv"]),
        blocks={"delta": delta, "rwkv": rwkv},
    )  # fmt: skip
    model = randomised(LM(cfg))
    model(torch.randint(0, 11, (2, T)), Seq.rows(2, T))[0].square().sum().backward()
    first, second = model.blocks[1].mixer, model.blocks[2].mixer
    for name in ("v0", "v1", "v2"):
        assert (first.get_parameter(name).grad == 0).all() and second.get_parameter(name).grad.abs().min() > 0


def test_rwkv7_starts_as_its_authors_start_it():
    """The published initial vectors, channel by channel, for layer 1 of 3."""
    width, heads = 8, 2
    module = RWKV7Config(n_heads=heads).build(width, Place(1, 3))
    N, found = width // heads, {name: p.tolist() for name, p in module.named_parameters() if p.ndim == 1}
    for c in range(width):
        wave = ((c % N) - (N - 1) / 2) / ((N - 1) / 2)
        wave, line = wave * abs(wave), c / (width - 1) - 0.5
        expected = {
            "x_r": 1 - (c / width) ** (0.2 * 2 / 3), "x_w": 1 - (c / width) ** (0.9 * 2 / 3),
            "x_k": 1 - (c / width) ** (0.7 * 2 / 3), "x_v": 1 - (c / width) ** (0.7 * 2 / 3),
            "x_a": 1 - (c / width) ** (0.9 * 2 / 3), "x_g": 1 - (c / width) ** (0.2 * 2 / 3),
            "w0": -6 + 6 * (c / (width - 1)) ** (1 + 0.5**0.3) + 0.5 + 2.5 * wave,
            "a0": -0.19 + 0.3 * wave + 0.4 * line, "v0": 0.73 - 0.4 * line, "k_k": 0.71 - 0.1 * line, "k_a": 1.02,
            "r_k": -0.04, "norm_weight": (2 / 3) ** 0.7, "norm_bias": 0.0,
        }  # fmt: skip
        assert {name: values[c] for name, values in found.items()} == pytest.approx(expected, abs=1e-6)
    assert not any(getattr(module, name).any() for name in ("w1", "a1", "v1", "g1"))
    torch.testing.assert_close(module.w2 @ module.w2.t(), 0.01 * torch.eye(width), atol=1e-7, rtol=0)
    usual = RWKV7Config(n_heads=12).ranks(768), RWKV7Config(n_heads=32).ranks(2048), RWKV7Config(n_heads=64).ranks(4096)
    assert usual == ([64, 64, 32, 128], [128, 128, 64, 224], [160, 160, 96, 320])


@pytest.mark.parametrize("config", [GatedDeltaConfig(n_v_heads=4), KDAConfig(n_heads=4)], ids=["gated_delta", "kda"])
def test_fresh_decays_forget_slowly_and_lie_in_their_ranges(config):
    module = config.build(256)
    step = torch.nn.functional.softplus(module.dt_bias)
    assert 1e-3 <= step.min() + 1e-7 and step.max() <= 0.1 + 1e-6
    assert -5 < module.A_log.min() and module.A_log.max() <= math.log(16)


@pytest.mark.parametrize("name", ["deltanet", "gated_delta", "kda", "rwkv7"])
def test_cost_counts_the_parameters_and_vectors_are_not_decayed(name):
    from zero2llm.optim.build import split_parameters

    cfg = HAND[name][0]
    module = cfg.build(D)
    assert cfg.cost(D).params == sum(p.numel() for p in module.parameters())
    assert cfg.cost(D).fixed_state * 3 * 4 == module.init_state(3, 99).nbytes()
    decayed = {n for n, _ in split_parameters(module)["matrix"]}
    special = {"A_log", "dt_bias", "w0", "a0", "v0", "k_k", "k_a", "r_k", "norm_weight", "norm.weight"}
    assert not decayed & special and "q_proj.weight" in decayed


REFUSED = [  # configuration, what the message has to name
    (DeltaNetConfig(n_heads=5), "n_heads = 5"),
    (DeltaNetConfig(n_heads=0), "n_heads = 0"),
    (DeltaNetConfig(n_heads=2, head_dim=0), "head_dim = 0"),
    (DeltaNetConfig(n_heads=2, value_dim=0), "value_dim = 0"),
    (DeltaNetConfig(n_heads=2, conv_width=0), "conv_width = 0"),
    (DeltaNetConfig(n_heads=2, chunk=0), "chunk = 0"),
    (GatedDeltaConfig(n_v_heads=4, n_k_heads=3), "n_k_heads = 3"),
    (GatedDeltaConfig(n_v_heads=4, n_k_heads=0), "n_k_heads = 0"),
    (GatedDeltaConfig(n_v_heads=5), "n_v_heads = 5"),
    (GatedDeltaConfig(n_v_heads=2, head_dim=-1), "head_dim = -1"),
    (GatedDeltaConfig(n_v_heads=2, conv_width=0), "conv_width = 0"),
    (GatedDeltaConfig(n_v_heads=2, chunk=-8), "chunk = -8"),
    (KDAConfig(n_heads=7), "n_heads = 7"),
    (KDAConfig(n_heads=2, rank=13), "rank = 13"),
    (KDAConfig(n_heads=2, rank=0), "rank = 0"),
    (KDAConfig(n_heads=2, conv_width=0), "conv_width = 0"),
    (DeltaNetConfig(n_heads=2, norm_eps=-1.0), "norm_eps = -1.0"),
    (GatedDeltaConfig(n_v_heads=2, norm_eps=-1.0), "norm_eps = -1.0"),
    (KDAConfig(n_heads=2, norm_eps=-1.0), "norm_eps = -1.0"),
    (RWKV7Config(n_heads=5), "n_heads = 5"),
    (RWKV7Config(n_heads=0), "n_heads = 0"),
    (RWKV7Config(n_heads=2, chunk=0), "chunk = 0"),
    (RWKV7Config(n_heads=2, gate_rank=13), "gate_rank = 13"),
    (RWKV7Config(n_heads=2, value_rank=0), "value_rank = 0"),
    (RWKVChannelConfig(hidden=0), "hidden = 0"),
]


@pytest.mark.parametrize(("config", "named"), REFUSED, ids=lambda x: x if isinstance(x, str) else type(x).__name__)
def test_what_cannot_work_is_refused(config, named):
    with pytest.raises(ValueError, match=named):
        config.build(D)
