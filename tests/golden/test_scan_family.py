"""Gated-scan mixers worked by hand: every output as an explicit sum over the tokens before it, in float64, no state.

What the papers write as a recurrence is unrolled here: token s reaches token t through the product of all decays between.
"""

import math

import pytest
import torch

from tests.golden.test_layers import affine, dot, randomised, rms_by_hand, rotated_by_hand
from zero2llm.core.seq import Seq
from zero2llm.layers.contract import ALONE, Place
from zero2llm.layers.mixers.gla import GLAConfig
from zero2llm.layers.mixers.lightning import LightningConfig
from zero2llm.layers.mixers.linear import LinearConfig
from zero2llm.layers.mixers.mamba2 import Mamba2Config
from zero2llm.layers.mixers.retnet import RetNetConfig

D, T = 12, 7
EXACT = dict(atol=1e-11, rtol=1e-11)
ANGLE = dict(atol=1e-5, rtol=0)  # angles are computed in fp32 by design
PLACE = Place(2, 5)


def sigmoid(v):
    return 1 / (1 + math.exp(-v))


def silu(v):
    return v * sigmoid(v)


def softplus(v):
    return math.log1p(math.exp(v))


def heads(flat, width):
    return [flat[i : i + width] for i in range(0, len(flat), width)]


def weighted_sum(weights, values):
    return [math.fsum(w * v[c] for w, v in zip(weights, values, strict=True)) for c in range(len(values[0]))]


def past(doc, t):
    """Tokens of t's document up to t."""
    return [s for s in range(t + 1) if doc[s] == doc[t]]


# One row each: x as lists [token][channel], doc and pos of each token -> [token][channel], padding not to be looked at


def linear_by_hand(m, cfg, place, x, doc, pos):
    phi = lambda a: a + 1 if a > 0 else math.exp(a)
    q, k = ([heads([phi(a) for a in affine(p, u)], m.head_dim) for u in x] for p in (m.q_proj, m.k_proj))
    v = [heads(affine(m.v_proj, u), m.value_dim) for u in x]
    out = []
    for t in range(len(x)):
        joined = []
        for h in range(cfg.n_heads):
            weights = [dot(q[t][h], k[s][h]) for s in past(doc, t)]
            total = math.fsum(weights) + cfg.eps
            joined += weighted_sum([w / total for w in weights], [v[s][h] for s in past(doc, t)])
        out.append(affine(m.o_proj, joined))
    return out


def retnet_by_hand(m, cfg, place, x, doc, pos):
    rotated = lambda p: [
        [rotated_by_hand(h, n, cfg.base, "interleaved") for h in heads(affine(p, u), m.head_dim)]
        for u, n in zip(x, pos, strict=True)
    ]
    q, k = rotated(m.q_proj), rotated(m.k_proj)
    v = [heads(affine(m.v_proj, u), m.value_dim) for u in x]
    out = []
    for t in range(len(x)):
        joined = []
        for h in range(cfg.n_heads):
            gamma = 1 - 2.0 ** (-5 - h)
            weights = [gamma ** (t - s) * dot(q[t][h], k[s][h]) / math.sqrt(m.head_dim) for s in past(doc, t)]
            joined += rms_by_hand(
                weighted_sum(weights, [v[s][h] for s in past(doc, t)]), [1.0] * m.value_dim, cfg.norm_eps
            )
        out.append(affine(m.o_proj, [silu(g) * o for g, o in zip(affine(m.g_proj, x[t]), joined, strict=True)]))
    return out


def lightning_by_hand(m, cfg, place, x, doc, pos):
    q, k, v = ([heads([silu(a) for a in affine(p, u)], m.head_dim) for u in x] for p in (m.q_proj, m.k_proj, m.v_proj))
    out = []
    for t in range(len(x)):
        joined = []
        for h in range(cfg.n_heads):
            slope = 2 ** (-8 * (h + 1) / cfg.n_heads) * (1 - place.layer / (place.n_layers - 1) + 1e-5)
            weights = [math.exp(-slope * (t - s)) * dot(q[t][h], k[s][h]) for s in past(doc, t)]
            joined += weighted_sum(weights, [v[s][h] for s in past(doc, t)])
        joined = rms_by_hand(joined, m.norm_weight.tolist(), cfg.norm_eps)
        out.append(affine(m.o_proj, [sigmoid(g) * o for g, o in zip(affine(m.g_proj, x[t]), joined, strict=True)]))
    return out


def gla_by_hand(m, cfg, place, x, doc, pos):
    q, k = ([heads(affine(p, u), m.head_dim) for u in x] for p in (m.q_proj, m.k_proj))
    v = [heads(affine(m.v_proj, u), m.value_dim) for u in x]
    keep = [
        heads([sigmoid(a) ** (1 / cfg.tau) for a in affine(m.f_b_proj, affine(m.f_a_proj, u))], m.head_dim) for u in x
    ]
    out = []
    for t in range(len(x)):
        joined = []
        for h in range(cfg.n_heads):
            weights = []
            for s in past(doc, t):
                kept = [math.prod(keep[i][h][c] for i in range(s + 1, t + 1)) for c in range(m.head_dim)]
                weights.append(
                    dot(q[t][h], [f * key for f, key in zip(kept, k[s][h], strict=True)]) / math.sqrt(m.head_dim)
                )
            o = weighted_sum(weights, [v[s][h] for s in past(doc, t)])
            joined += rms_by_hand(o, m.norm_weight.tolist(), cfg.norm_eps)
        out.append(affine(m.o_proj, [silu(g) * o for g, o in zip(affine(m.g_proj, x[t]), joined, strict=True)]))
    return out


def convolved_by_hand(m, rows, doc):
    """silu of the causal convolution: tap j = 0 is the token itself, stored last."""
    weight, width = m.conv_weight.tolist(), m.conv_weight.shape[1]
    bias = [0.0] * len(weight) if m.conv_bias is None else m.conv_bias.tolist()
    out = []
    for t in range(len(rows)):
        seen = [j for j in range(width) if t - j >= 0 and doc[t - j] == doc[t]]
        out.append(
            [
                silu(bias[c] + math.fsum(weight[c][width - 1 - j] * rows[t - j][c] for j in seen))
                for c in range(len(weight))
            ]
        )
    return out


def mamba2_by_hand(m, cfg, place, x, doc, pos):
    P, N, G = cfg.head_dim, cfg.state_dim, cfg.n_groups
    H = len(m.A_log)
    projected = [affine(m.in_proj, u) for u in x]
    z = [row[: H * P] for row in projected]
    mixed = convolved_by_hand(m, [row[H * P : 2 * H * P + 2 * G * N] for row in projected], doc)
    u = [heads(row[: H * P], P) for row in mixed]
    B = [heads(row[H * P : H * P + G * N], N) for row in mixed]
    C = [heads(row[H * P + G * N :], N) for row in mixed]
    low, high = cfg.dt_limit or (0.0, math.inf)
    dt = [
        [
            min(max(softplus(a + b), low), high)
            for a, b in zip(row[2 * H * P + 2 * G * N :], m.dt_bias.tolist(), strict=True)
        ]
        for row in projected
    ]
    out = []
    for t in range(len(x)):
        joined = []
        for h in range(H):
            g = h // (H // G)
            rate = math.exp(m.A_log.tolist()[h])
            fade = lambda s: math.exp(-rate * math.fsum(dt[i][h] for i in range(s + 1, t + 1)))  # noqa: B023
            weights = [fade(s) * dt[s][h] * dot(C[t][g], B[s][g]) for s in past(doc, t)]
            y = weighted_sum(weights, [u[s][h] for s in past(doc, t)])
            joined += [a + m.D.tolist()[h] * b for a, b in zip(y, u[t][h], strict=True)]
        gated = [a * silu(b) for a, b in zip(joined, z[t], strict=True)]
        share = H * P // G
        normed = [n for part in heads(gated, share) for n in rms_by_hand(part, [1.0] * share, cfg.norm_eps)]
        out.append(affine(m.o_proj, [w * n for w, n in zip(m.norm_weight.tolist(), normed, strict=True)]))
    return out


BY_HAND = {
    LinearConfig: linear_by_hand,
    RetNetConfig: retnet_by_hand,
    LightningConfig: lightning_by_hand,
    GLAConfig: gla_by_hand,
    Mamba2Config: mamba2_by_hand,
}
CASES = {
    "linear": LinearConfig(n_heads=3, chunk=3),
    "linear, widths and eps": LinearConfig(n_heads=2, head_dim=5, value_dim=3, eps=0.5),
    "retnet": RetNetConfig(n_heads=3, base=30.0, chunk=3),
    "retnet, widths and eps": RetNetConfig(n_heads=2, head_dim=4, value_dim=3, base=30.0, norm_eps=0.3),
    "lightning": LightningConfig(n_heads=4, chunk=3),
    "lightning, width and eps": LightningConfig(n_heads=3, head_dim=5, norm_eps=0.3),
    "gla": GLAConfig(n_heads=3, gate_rank=2, chunk=3),
    "gla, widths and eps": GLAConfig(n_heads=2, head_dim=5, value_dim=3, gate_rank=4, tau=1.5, norm_eps=0.3),
    "mamba2": Mamba2Config(head_dim=4, state_dim=3, n_groups=2, chunk=3, norm_eps=0.3),
    "mamba2, odd": Mamba2Config(
        n_heads=3, head_dim=5, state_dim=4, conv_width=2, conv_bias=False, proj_bias=True, dt_limit=(0.3, 1.1)
    ),
}
SEQS = {
    "row": lambda: Seq.rows(2, T),
    "packed": lambda: Seq.of_segments(torch.tensor([[1, 1, 1, 2, 2, 3, 3], [4, 4, 4, 4, 4, 0, 0]])),
}


def by_hand(module, cfg, x, seq, place=ALONE):
    """(B, T, D) from the loops above."""
    out = []
    for row, pos, doc in zip(
        x, seq.pos.tolist(), [None] * len(x) if seq.seg is None else seq.seg.tolist(), strict=True
    ):
        out.append(BY_HAND[type(cfg)](module, cfg, place, row.tolist(), doc or [1] * x.shape[1], pos))
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("kind", SEQS)
@pytest.mark.parametrize("name", CASES)
def test_the_formula(name, kind):
    cfg, seq = CASES[name], SEQS[kind]()
    module, x = randomised(cfg.build(D, PLACE)), torch.randn(2, T, D, dtype=torch.float64)
    real = torch.ones(2, T, dtype=torch.bool) if seq.seg is None else seq.seg != 0
    expected = by_hand(module, cfg, x, seq, PLACE)[real]
    tolerance = ANGLE if isinstance(cfg, RetNetConfig) else EXACT
    torch.testing.assert_close(module(x, seq)[0][real], expected, **tolerance)
    state = module.init_state(2, T, dtype=torch.float64)  # and token by token, through the state
    steps = [module(x[:, i : i + 1], seq.window(i, i + 1), state)[0] for i in range(T)]
    torch.testing.assert_close(torch.cat(steps, 1)[real], expected, **tolerance)


def test_mamba2_starts_as_published():
    torch.manual_seed(0)
    module = Mamba2Config(n_heads=400, head_dim=1, state_dim=1).build(4)
    dt, A = torch.nn.functional.softplus(module.dt_bias), module.A_log.exp()
    assert 1e-3 * 0.999 < dt.min() < 1.2e-3 and 0.08 < dt.max() < 0.1 * 1.001
    assert 0.4 < (dt < 1e-2).float().mean() < 0.6, "log-uniform: half of them lie below the geometric mean"
    assert 1 <= A.min() < 1.5 and 15 < A.max() <= 16 and 8 < A.mean() < 9
    assert (module.D == 1).all() and (module.norm_weight == 1).all()
    assert all(p.dtype == torch.float32 for p in (module.A_log, module.dt_bias, module.D))


def test_a_gla_gate_at_zero_keeps_the_factor_that_the_page_names():
    assert round(0.5 ** (1 / GLAConfig(n_heads=1).tau), 2) == 0.96


PARAMETERS = {  # what the pages promise in units of D^2, at D = 1024, within 2 %
    4.0: LinearConfig(n_heads=8),
    8.0: RetNetConfig(n_heads=8),
    5.0: LightningConfig(n_heads=8),
    4.04: GLAConfig(n_heads=4),
    6.3: Mamba2Config(),
}


@pytest.mark.parametrize("squares", PARAMETERS)
def test_parameters(squares):
    cfg = PARAMETERS[squares]
    counted = sum(p.numel() for p in cfg.build(1024).parameters())
    assert counted == cfg.cost(1024).params and abs(counted / 1024**2 / squares - 1) < 0.02


REFUSED = {  # configuration -> what the message must name
    LinearConfig(n_heads=5): ("d_model = 12", "n_heads = 5"),
    LinearConfig(n_heads=0): ("n_heads = 0",),
    LinearConfig(n_heads=2, chunk=0): ("chunk = 0",),
    LinearConfig(n_heads=2, head_dim=0): ("head_dim = 0",),
    LinearConfig(n_heads=2, value_dim=-1): ("value_dim = -1",),
    LinearConfig(n_heads=2, eps=0.0): ("eps = 0.0",),
    RetNetConfig(n_heads=5): ("d_model = 12", "n_heads = 5"),
    RetNetConfig(n_heads=4): ("head_dim = 3", "even"),
    RetNetConfig(n_heads=2, head_dim=0): ("head_dim = 0",),
    RetNetConfig(n_heads=2, value_dim=0): ("value_dim = 0",),
    RetNetConfig(n_heads=2, chunk=0): ("chunk = 0",),
    LightningConfig(n_heads=5): ("d_model = 12", "n_heads = 5"),
    LightningConfig(n_heads=2, head_dim=0): ("head_dim = 0",),
    LightningConfig(n_heads=2, chunk=-3): ("chunk = -3",),
    GLAConfig(n_heads=4): ("d_model = 12", "4 heads"),
    GLAConfig(n_heads=0): ("0 heads",),
    GLAConfig(n_heads=2, tau=0.0): ("tau = 0.0",),
    GLAConfig(n_heads=2, gate_rank=0): ("gate_rank = 0",),
    GLAConfig(n_heads=2, gate_rank=13): ("gate_rank = 13", "d_model = 12"),
    GLAConfig(n_heads=2, gate_rank=4, norm_eps=-1.0): ("norm_eps = -1.0",),
    RetNetConfig(n_heads=2, norm_eps=-1.0): ("norm_eps = -1.0",),
    LightningConfig(n_heads=2, norm_eps=-1.0): ("norm_eps = -1.0",),
    Mamba2Config(head_dim=8, norm_eps=-1.0): ("norm_eps = -1.0",),
    GLAConfig(n_heads=2, value_dim=0): ("value_dim = 0",),
    GLAConfig(n_heads=2, chunk=0): ("chunk = 0",),
    Mamba2Config(): ("d_model = 2 * 12", "head_dim = 64"),
    Mamba2Config(head_dim=8, n_groups=2): ("n_heads = 3", "n_groups = 2"),
    Mamba2Config(head_dim=8, n_heads=0): ("n_heads = 0",),
    Mamba2Config(head_dim=8, state_dim=0): ("state_dim = 0",),
    Mamba2Config(head_dim=8, conv_width=0): ("conv_width = 0",),
    Mamba2Config(head_dim=8, chunk=0): ("chunk = 0",),
    Mamba2Config(head_dim=8, dt_range=(0.0, 0.1)): ("dt_range = (0.0, 0.1)",),
    Mamba2Config(head_dim=8, dt_limit=(0.2, 0.1)): ("dt_limit = (0.2, 0.1)",),
}


@pytest.mark.parametrize("cfg", REFUSED, ids=str)
def test_what_cannot_work_is_refused_by_name(cfg):
    with pytest.raises(ValueError) as error:
        cfg.build(D)
    for words in REFUSED[cfg]:
        assert words in str(error.value)
