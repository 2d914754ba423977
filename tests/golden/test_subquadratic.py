"""Mamba, Performer, FLASH and log-linear attention by hand: loops over tokens and channels in float64, on at most 8 tokens."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.golden.test_layers import affine, dot, randomised, rms_by_hand
from zero2llm.core.seq import Seq
from zero2llm.layers.mixers.gau_flash import GAUFlashConfig
from zero2llm.layers.mixers.log_linear import LogLinearConfig
from zero2llm.layers.mixers.mamba1 import Mamba1Config
from zero2llm.layers.mixers.performer import PerformerConfig

D, T = 12, 8
EXACT = dict(atol=1e-11, rtol=1e-11)
SEG = torch.tensor([[1, 1, 1, 1, 1, 2, 2, 2], [3, 3, 4, 4, 4, 4, 0, 0]], dtype=torch.int32)


def silu(x):
    return x / (1 + math.exp(-x))


def softplus(x):
    return math.log1p(math.exp(x))


def add(total, row, weight):
    for i, value in enumerate(row):
        total[i] += weight * value


# The formulas, each on one document: a list of input vectors to a list of output vectors


def mamba_by_hand(m, cfg, xs):
    E, N, R, W = cfg.expand * D, cfg.state_dim, cfg.rank(D), cfg.conv_width
    taps, A = m.conv_weight.tolist(), [[-math.exp(a) for a in row] for row in m.A_log.tolist()]
    bias = m.conv_bias.tolist() if cfg.conv_bias else [0.0] * E
    h, before, out = [[0.0] * N for _ in range(E)], [], []
    for x in xs:
        both = affine(m.in_proj, x)
        before.append(both[:E])
        u = [silu(bias[e] + sum(taps[e][W - 1 - j] * before[-1 - j][e] for j in range(min(W, len(before))))) for e in range(E)]
        p = affine(m.x_proj, u)
        d, b, c = p[:R], p[R : R + N], p[R + N :]
        if cfg.dt_norms:
            d, b, c = (rms_by_hand(v, n.weight.tolist(), cfg.norm_eps) for v, n in zip((d, b, c), m.norms, strict=True))
        y = []
        for e in range(E):
            dt = softplus(dot(m.dt_proj.weight[e].tolist(), d) + m.dt_bias[e].item())
            for n in range(N):
                h[e][n] = math.exp(dt * A[e][n]) * h[e][n] + dt * b[n] * u[e]
            y.append((dot(h[e], c) + m.D[e].item() * u[e]) * silu(both[E + e]))
        out.append(affine(m.o_proj, y))
    return out


def performer_by_hand(m, cfg, xs):
    K, W, out = cfg.width(D), m.W.tolist(), []
    heads = lambda row: [row[h * K : (h + 1) * K] for h in range(cfg.n_heads)]
    q, k, v = ([heads(affine(p, x)) for x in xs] for p in (m.q_proj, m.k_proj, m.v_proj))

    def phi(x):
        x = [value / K**0.25 for value in x]
        return [math.exp(dot(w, x) - dot(x, x) / 2) / math.sqrt(len(W)) for w in W]

    for t in range(len(xs)):
        mixed = []
        for h in range(cfg.n_heads):
            weights = [dot(phi(q[t][h]), phi(k[s][h])) for s in range(t + 1)]
            mixed += [math.fsum(w * v[s][h][i] for s, w in enumerate(weights)) / math.fsum(weights) for i in range(K)]
        out.append(affine(m.o_proj, mixed))
    return out


def gau_flash_by_hand(m, cfg, xs):
    C, out = cfg.chunk, []
    u, v, z = ([[silu(value) for value in affine(p, x)] for x in xs] for p in (m.g_proj, m.v_proj, m.z_proj))
    gamma, beta = m.gamma.tolist(), m.beta.tolist()
    view = lambda i, t: [g * value + b for g, value, b in zip(gamma[i], z[t], beta[i], strict=True)]
    for t in range(len(xs)):
        mixed, first = [0.0] * len(v[0]), t // C * C
        for s in range(first, t + 1):
            add(mixed, v[s], max(dot(view(0, t), view(1, s)) / C, 0.0) ** 2)
        for s in range(first):
            add(mixed, v[s], dot(view(2, t), view(3, s)) / first)
        out.append(affine(m.o_proj, [a * b for a, b in zip(u[t], mixed, strict=True)]))
    return out


def fenwick(t, levels):
    """The paper's buckets of the tokens up to t: {token: level}, by taking the lowest set bit off, again and again."""
    found, end = {t: 0}, t
    while end:
        size = end & -end
        for s in range(end - size, end):
            found[s] = min(size.bit_length(), levels - 1)
        end -= size
    return found


def log_linear_by_hand(m, cfg, xs):
    (K, V), L, out = cfg.widths(D), cfg.levels, []
    cut = lambda row, n: [row[h * n : (h + 1) * n] for h in range(cfg.n_heads)]
    q, k, v, gate = ([cut(affine(p, x), n) for x in xs] for p, n in ((m.q_proj, K), (m.k_proj, K), (m.v_proj, V), (m.g_proj, V)))
    dt = [[softplus(a + b) for a, b in zip(affine(m.dt_proj, x), m.dt_bias.tolist(), strict=True)] for x in xs]
    for t, x in enumerate(xs):
        low, mixed, levels = cut(affine(m.l_proj, x), L), [], fenwick(t, L)
        for h in range(cfg.n_heads):
            o, decay = [0.0] * V, -math.exp(m.A_log[h].item())
            for s in range(t + 1):
                lam = softplus(m.L[h, levels[s]].item() * low[h][levels[s]])
                fade = math.exp(decay * sum(dt[r][h] for r in range(s + 1, t + 1)))
                add(o, v[s][h], lam * fade * dot(q[t][h], k[s][h]) / math.sqrt(K) * dt[s][h])
            normed = rms_by_hand(o, [1.0] * V, cfg.norm_eps)
            mixed += [silu(g) * y for g, y in zip(gate[t][h], normed, strict=True)]
        out.append(affine(m.o_proj, mixed))
    return out


CASES = {
    "mamba1": (Mamba1Config(state_dim=3, dt_rank=2), mamba_by_hand),
    "mamba1 norms": (Mamba1Config(state_dim=2, expand=3, conv_width=3, conv_bias=False, proj_bias=True, dt_norms=True, norm_eps=0.1), mamba_by_hand),
    "performer": (PerformerConfig(n_heads=2, head_dim=3, n_features=5, chunk=3), performer_by_hand),
    "gau_flash": (GAUFlashConfig(key_dim=4, chunk=2), gau_flash_by_hand),
    "gau_flash odd": (GAUFlashConfig(key_dim=3, expand=1, chunk=3), gau_flash_by_hand),
    "log_linear": (LogLinearConfig(n_heads=2, head_dim=3, value_dim=4, levels=4, norm_eps=0.1, chunk=2), log_linear_by_hand),
    "log_linear few levels": (LogLinearConfig(n_heads=3, levels=3, chunk=4), log_linear_by_hand),
}


def by_hand(module, cfg, formula, x, seq):
    """The formula on each document of each row; zeros at padding."""
    out = torch.zeros_like(x)
    seg = torch.ones(x.shape[:2], dtype=torch.int32) if seq.seg is None else seq.seg
    for row in range(len(x)):
        for number in set(seg[row].tolist()) - {0}:
            at = seg[row] == number
            out[row, at] = torch.tensor(formula(module, cfg, x[row, at].tolist()), dtype=x.dtype)
    return out


@pytest.mark.parametrize("name", CASES)
def test_mixers_equal_the_formula(name):
    cfg, formula = CASES[name]
    module, x = randomised(cfg.build(D)), torch.randn(2, T, D, dtype=torch.float64)
    for seq in (Seq.rows(2, T), Seq.of_segments(SEG)):
        want, real = by_hand(module, cfg, formula, x, seq), torch.ones(2, T) if seq.seg is None else seq.seg != 0
        torch.testing.assert_close(module(x, seq)[0] * real[..., None], want, **EXACT)
        state = module.init_state(2, T, dtype=x.dtype)
        steps = torch.cat([module(x[:, t : t + 1], seq.window(t, t + 1), state)[0] for t in range(T)], 1)
        torch.testing.assert_close(steps * real[..., None], want, **EXACT)


def test_fenwick_levels_are_the_bits_in_which_positions_differ():
    for t in range(200):
        assert fenwick(t, 99) == {s: (t ^ s).bit_length() for s in range(t + 1)}


def test_random_directions_are_orthogonal_and_as_long_as_gaussian_vectors():
    from zero2llm.layers.mixers.performer import orthogonal_gaussian

    W = orthogonal_gaussian(4000, 16).double()
    for block in W[:64].split(16):
        torch.testing.assert_close(block @ block.t(), block.square().sum(1).diag(), atol=1e-4, rtol=0)
    length = W.square().sum(1)  # chi^2 with 16 degrees of freedom: mean 16, variance 32
    assert abs(length.mean() - 16) < 0.5 and abs(length.var() - 32) < 4
    assert (W.t() @ W / 4000 - torch.eye(16)).abs().max() < 0.1 and W.mean(0).abs().max() < 0.07


def test_performer_stays_finite_where_exp_overflows():
    module = PerformerConfig(n_heads=1, n_features=8).build(D)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_().mul_(8)
    x = torch.randn(1, T, D, requires_grad=True)
    y = module(x, Seq.rows(1, T))[0]
    assert torch.isfinite(y).all() and module.exponents(module.q_proj(x)[:, :, None]).abs().max() > 100
    y.sum().backward()
    assert torch.isfinite(x.grad).all()


def test_mamba_starts_with_the_published_values():
    module = Mamba1Config().build(64)
    assert torch.equal(module.A_log.exp().round(), torch.arange(1.0, 17).expand(128, -1))
    dt = torch.nn.functional.softplus(module.dt_bias)
    assert 9e-4 < dt.min() < 4e-3 and 0.04 < dt.max() < 0.11 and abs(dt.log().mean() - math.log(1e-2)) < 0.5


@pytest.mark.parametrize(
    ("cfg", "words"),
    [
        (Mamba1Config(state_dim=0), "state_dim = 0"),
        (Mamba1Config(conv_width=0), "conv_width = 0"),
        (Mamba1Config(expand=0), "expand = 0"),
        (Mamba1Config(dt_rank=0), "dt_rank = 0"),
        (Mamba1Config(dt_rank=25), "dt_rank = 25 must be between 1 and expand [*] d_model = 24"),
        (PerformerConfig(n_heads=5), "d_model = 12 must be a multiple of n_heads = 5"),
        (PerformerConfig(n_heads=0), "n_heads = 0"),
        (PerformerConfig(n_heads=2, head_dim=0), "head_dim = 0"),
        (PerformerConfig(n_heads=2, n_features=0), "n_features = 0"),
        (PerformerConfig(n_heads=2, chunk=0), "chunk = 0"),
        (GAUFlashConfig(expand=0), "expand = 0"),
        (GAUFlashConfig(key_dim=0), "key_dim = 0"),
        (GAUFlashConfig(chunk=0), "chunk = 0"),
        (LogLinearConfig(n_heads=5), "d_model = 12 must be a multiple of n_heads = 5"),
        (LogLinearConfig(n_heads=0), "n_heads = 0"),
        (LogLinearConfig(n_heads=2, head_dim=0), "head_dim = 0"),
        (LogLinearConfig(n_heads=2, value_dim=0), "value_dim = 0"),
        (LogLinearConfig(n_heads=2, chunk=0), "chunk = 0"),
        (LogLinearConfig(n_heads=2, chunk=24), "chunk = 24 must be a power of two"),
        (LogLinearConfig(n_heads=2, levels=1), "levels = 1"),
        (LogLinearConfig(n_heads=2, levels=64), "levels = 64"),
        (LogLinearConfig(n_heads=2, norm_eps=-1.0), "norm_eps = -1.0"),
        (Mamba1Config(norm_eps=-1.0), "norm_eps = -1.0"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused(cfg, words):
    with pytest.raises(ValueError, match=words):
        cfg.build(D)


@pytest.mark.parametrize("name", CASES)
def test_parameters_equal_the_prediction(name):
    cfg, _ = CASES[name]
    assert sum(p.numel() for p in cfg.build(D).parameters()) == cfg.cost(D).params


@pytest.mark.parametrize(
    "cfg",
    [
        Mamba1Config(state_dim=5, dt_rank=3),
        PerformerConfig(n_heads=2, n_features=10, chunk=8),
        GAUFlashConfig(key_dim=6, chunk=8),
        LogLinearConfig(n_heads=2, levels=7, chunk=8),
        LogLinearConfig(n_heads=2, levels=3, chunk=16),
    ],
    ids=str,
)
def test_flops_equal_torch_s_count(cfg):
    """Of the matrix products, that is: Mamba's scan and filter are elementwise, and added here."""
    module, n = cfg.build(D), 64
    with FlopCounterMode(display=False) as counter:
        module(torch.randn(1, n, D), Seq.rows(1, n))
    pointwise = (7 * cfg.state_dim + 2 * cfg.conv_width) * cfg.expand * D if isinstance(cfg, Mamba1Config) else 0
    assert counter.get_total_flops() == (cfg.cost(D).flops - pointwise) * n
