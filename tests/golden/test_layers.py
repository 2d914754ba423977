"""Every formula worked by hand: loops over tokens, heads and channels in float64, on at most 8 tokens."""

import math

import pytest
import torch
from torch import nn

from zero2llm.core.seq import Seq
from zero2llm.layers.contract import Place
from zero2llm.layers.ffns.glu import GLUConfig
from zero2llm.layers.ffns.mlp import MLPConfig
from zero2llm.layers.mixers.gqa import GQAConfig
from zero2llm.layers.norms.layer import LayerNormConfig
from zero2llm.layers.norms.rms import RMSNormConfig
from zero2llm.layers.positions.alibi import ALiBiConfig
from zero2llm.layers.positions.learned import LearnedConfig
from zero2llm.layers.positions.none import NoPositionConfig
from zero2llm.layers.positions.rope import RoPEConfig
from zero2llm.layers.positions.sinusoidal import SinusoidalConfig
from zero2llm.model.block import Block
from zero2llm.model.spec import LayerSpec

D, T = 12, 7
EXACT = dict(atol=1e-12, rtol=1e-12)
ANGLE = dict(atol=1e-5, rtol=0)  # angles are computed in fp32 by design


def randomised(module):
    """float64, with no parameter at a value (0 or 1) that would hide it."""
    module = module.double()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) * (1.0 if p.ndim == 1 else 0.7))
    return module


# The formulas, on lists of floats


def dot(a, b):
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def affine(layer, x):
    bias = layer.bias.tolist() if layer.bias is not None else [0.0] * layer.out_features
    return [dot(row, x) + b for row, b in zip(layer.weight.tolist(), bias, strict=True)]


def rms_by_hand(x, weight, eps):
    scale = math.sqrt(math.fsum(v * v for v in x) / len(x) + eps)
    return [v / scale * w for v, w in zip(x, weight, strict=True)]


def layer_norm_by_hand(x, weight, bias, eps):
    mean = math.fsum(x) / len(x)
    scale = math.sqrt(math.fsum((v - mean) ** 2 for v in x) / len(x) + eps)
    return [(v - mean) / scale * w + b for v, w, b in zip(x, weight, bias, strict=True)]


def rotated_by_hand(x, pos, base, layout):
    out, half = list(x), len(x) // 2
    for m in range(half):
        i, j = (m, m + half) if layout == "half_split" else (2 * m, 2 * m + 1)
        angle = pos * base ** (-2 * m / len(x))
        out[i] = x[i] * math.cos(angle) - x[j] * math.sin(angle)
        out[j] = x[j] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def act_by_hand(name, v):
    match name:
        case "silu":
            return v / (1 + math.exp(-v))
        case "gelu":
            return 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))
        case "gelu_erf":
            return 0.5 * v * (1 + math.erf(v / math.sqrt(2)))
        case "relu":
            return max(0.0, v)
        case "relu2":
            return max(0.0, v) ** 2


def heads_by_hand(layer, norm, tokens, pos, cfg, width):
    """[token][head][channel] of queries or keys: projected, normed, rotated."""
    out = []
    for x, p in zip(tokens, pos, strict=True):
        flat = affine(layer, x)
        heads = [flat[i : i + width] for i in range(0, len(flat), width)]
        if cfg.qk_norm and norm is not None:
            heads = [rms_by_hand(h, norm.weight.tolist(), cfg.norm_eps) for h in heads]
        if isinstance(cfg.position, RoPEConfig) and norm is not None:
            heads = [rotated_by_hand(h, p, cfg.position.base, cfg.position.layout) for h in heads]
        out.append(heads)
    return out


def gqa_by_hand(module, cfg, x, seq):
    """(B, T, D) by loops: which keys each query sees is decided pair by pair."""
    out = torch.zeros_like(x)
    h, g = cfg.n_heads, cfg.n_kv_heads or cfg.n_heads
    width = module.head_dim
    for b in range(len(x)):
        tokens, pos = x[b].tolist(), seq.pos[b].tolist()
        doc = [1] * len(tokens) if seq.seg is None else seq.seg[b].tolist()
        q = heads_by_hand(module.q_proj, module.q_norm, tokens, pos, cfg, width)
        k = heads_by_hand(module.k_proj, module.k_norm, tokens, pos, cfg, width)
        v = heads_by_hand(module.v_proj, None, tokens, pos, cfg, width)
        for i in range(len(tokens)):
            seen = [j for j in range(i + 1) if doc[j] == doc[i] and (cfg.window is None or i - j < cfg.window)]
            joined = []
            for head in range(h):
                shared = head // (h // g)
                scores = [dot(q[i][head], k[j][shared]) / math.sqrt(width) for j in seen]
                top = max(scores)
                weights = [math.exp(s - top) for s in scores]
                total = math.fsum(weights)
                joined += [math.fsum(w * v[j][shared][c] for w, j in zip(weights, seen, strict=True)) / total for c in range(width)]
            out[b, i] = torch.tensor(affine(module.o_proj, joined), dtype=x.dtype)
    return out


# The modules against them

ROTARY = {"none": NoPositionConfig(), "half_split": RoPEConfig(base=50.0), "interleaved": RoPEConfig(base=50.0, layout="interleaved")}
GQA_CASES = {
    "mha": {},
    "mqa": {"n_kv_heads": 1},
    "gqa": {"n_kv_heads": 2},
    "gqa biases": {"n_kv_heads": 2, "qkv_bias": True, "out_bias": True},
    "window 1": {"window": 1},
    "window 3": {"window": 3, "n_kv_heads": 2},
    "window = T": {"window": T},
    "qk-norm": {"qk_norm": True, "n_kv_heads": 2, "norm_eps": 0.1},
    "wide head": {"head_dim": 10, "n_kv_heads": 1},
}
SEQS = {
    "row": lambda: Seq.rows(2, T),
    "later": lambda: Seq.rows(2, T, 5),
    "packed": lambda: Seq.of_segments(torch.tensor([[1, 1, 1, 2, 2, 3, 3], [4, 4, 4, 4, 4, 0, 0]])),
}


@pytest.mark.parametrize("seq", SEQS)
@pytest.mark.parametrize("rotary", ROTARY)
@pytest.mark.parametrize("name", GQA_CASES)
def test_gqa(name, rotary, seq):
    width = {"head_dim": 4} if rotary != "none" else {}
    cfg = GQAConfig(n_heads=4, position=ROTARY[rotary], **(width | GQA_CASES[name]))
    module, seq = randomised(cfg.build(D)), SEQS[seq]()
    x = torch.randn(2, T, D, dtype=torch.float64)
    expected = gqa_by_hand(module, cfg, x, seq)
    tolerance = EXACT if rotary == "none" else ANGLE
    torch.testing.assert_close(module(x, seq)[0], expected, **tolerance)
    states = module.init_state(2, 16, dtype=torch.float64)  # and token by token, through the cache
    steps = [module(x[:, i : i + 1], seq.window(i, i + 1), states)[0] for i in range(T)]
    real = torch.ones(2, T, dtype=torch.bool) if seq.seg is None else seq.seg != 0
    if seq.pos[0, 0] == 0:  # a cache that starts later than 0 would miss what came before
        torch.testing.assert_close(torch.cat(steps, 1)[real], expected[real], **tolerance)


def test_attention_weights_are_those_of_the_output():
    cfg = GQAConfig(n_heads=4, n_kv_heads=2, window=3)
    module, x, seq = randomised(cfg.build(D)), torch.randn(2, T, D, dtype=torch.float64), Seq.rows(2, T)
    weights = module.weights(x, seq)  # (B, H, T, T)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, T, dtype=torch.float64))
    v = module.v_proj(x).unflatten(-1, (2, 3)).transpose(1, 2).repeat_interleave(2, 1)
    torch.testing.assert_close(module.o_proj((weights @ v).transpose(1, 2).flatten(2)), module(x, seq)[0], **EXACT)


def test_rms_norm():
    module, x = randomised(RMSNormConfig(eps=0.3).build(D)), torch.randn(3, D, dtype=torch.float64)
    expected = [rms_by_hand(row, module.weight.tolist(), 0.3) for row in x.tolist()]
    torch.testing.assert_close(module(x), torch.tensor(expected, dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm(bias):
    module, x = randomised(LayerNormConfig(eps=0.3, bias=bias).build(D)), torch.randn(3, D, dtype=torch.float64)
    shift = module.bias.tolist() if bias else [0.0] * D
    expected = [layer_norm_by_hand(row, module.weight.tolist(), shift, 0.3) for row in x.tolist()]
    torch.testing.assert_close(module(x), torch.tensor(expected, dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_erf", "relu", "relu2"])
def test_glu(act):
    module, x = randomised(GLUConfig(hidden=5, act=act).build(D)), torch.randn(3, D, dtype=torch.float64)
    for row, got in zip(x.tolist(), module(x, None)[0], strict=True):
        gate, up = affine(module.gate_proj, row), affine(module.up_proj, row)
        hidden = [act_by_hand(act, a) * b for a, b in zip(gate, up, strict=True)]
        torch.testing.assert_close(got, torch.tensor(affine(module.down_proj, hidden), dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_erf", "relu", "relu2"])
def test_mlp(act, bias):
    module, x = randomised(MLPConfig(hidden=5, act=act, bias=bias).build(D)), torch.randn(3, D, dtype=torch.float64)
    for row, got in zip(x.tolist(), module(x, None)[0], strict=True):
        hidden = [act_by_hand(act, a) for a in affine(module.up_proj, row)]
        torch.testing.assert_close(got, torch.tensor(affine(module.down_proj, hidden), dtype=torch.float64), **EXACT)


def test_sinusoidal():
    seq = Seq.of_segments(torch.tensor([[1, 1, 1, 2, 2, 2, 2]]))
    got = SinusoidalConfig().build(D, 64)(seq)
    for t, pos in enumerate([0, 1, 2, 0, 1, 2, 3]):
        for m in range(D // 2):
            angle = pos / 10000 ** (2 * m / D)
            assert got[0, t, 2 * m].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert got[0, t, 2 * m + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_learned():
    module, seq = randomised(LearnedConfig().build(D, 8)), Seq.of_segments(torch.tensor([[1, 1, 1, 2, 2, 2, 2]]))
    assert torch.equal(module(seq)[0], module.table.weight[[0, 1, 2, 0, 1, 2, 3]])
    with pytest.raises(IndexError):
        module(Seq.rows(1, 9))


class Half(nn.Module):
    """A mixer or feed-forward simple enough to follow on paper."""

    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x, *_):
        return self.a * x.square() + self.b, {"seen": x.new_tensor(self.a)}


WIRINGS = {
    "branch": lambda x, m, f, n: (h := x + n[0](m(x))) + n[1](f(h)),
    "deepnorm": lambda x, m, f, n: n[1](24**0.25 * (h := n[0](24**0.25 * x + m(x))) + f(h)),
    "pre": lambda x, m, f, n: (h := x + m(n[0](x))) + f(n[1](h)),
    "post": lambda x, m, f, n: n[1]((h := n[0](x + m(x))) + f(h)),
    "sandwich": lambda x, m, f, n: (h := x + n[2](m(n[0](x)))) + n[3](f(n[1](h))),
    "parallel": lambda x, m, f, n: x + m(n[0](x)) + f(n[0](x)),
}


@pytest.mark.parametrize("wiring", WIRINGS)
def test_wirings(wiring):
    block = randomised(Block(LayerSpec(mixer=GQAConfig(n_heads=2), ffn=GLUConfig(hidden=4), wiring=wiring), D, Place(3, 12)))
    names = ["mixer_norm", "ffn_norm", "mixer_out_norm", "ffn_out_norm"][: {"parallel": 1, "sandwich": 4}.get(wiring, 2)]
    assert [n for n, _ in block.named_children() if n.endswith("norm")] == names
    norms = []
    for i, name in enumerate(names):  # distinguishable: x -> (i + 2) x + 1
        norms.append(lambda x, i=i: (i + 2) * x + 1)
        module = nn.Linear(1, 1)
        module.forward = norms[-1]
        setattr(block, name, module)
    block.mixer, block.ffn = Half(0.5, 1.0), Half(0.25, -2.0)
    x = torch.randn(1, T, D, dtype=torch.float64)
    got, aux = block(x, Seq.rows(1, T))
    mixer, ffn = lambda x: 0.5 * x.square() + 1, lambda x: 0.25 * x.square() - 2
    torch.testing.assert_close(got, WIRINGS[wiring](x, mixer, ffn, norms), **EXACT)
    assert aux["seen"] == 0.5  # the larger of both halves


SMALL = {
    "gqa sink softcap gate": lambda: GQAConfig(n_heads=4, n_kv_heads=2, sink=True, softcap=2.0, gate=True, position=ALiBiConfig()),
    "rms plus one": lambda: RMSNormConfig(plus_one=True),
    "gqa": lambda: GQAConfig(n_heads=4, n_kv_heads=2, window=3, qk_norm=True, qkv_bias=True, out_bias=True),
    "gqa rope": lambda: GQAConfig(n_heads=2, n_kv_heads=1, position=RoPEConfig()),
    "glu": lambda: GLUConfig(hidden=5),
    "mlp": lambda: MLPConfig(hidden=5),
    "rms": lambda: RMSNormConfig(),
    "layer": lambda: LayerNormConfig(),
}


@pytest.mark.parametrize("name", SMALL)
def test_gradients_equal_finite_differences(name):
    module, seq = randomised(SMALL[name]().build(8)), SEQS["packed"]()
    params = {n: p.detach().clone().requires_grad_() for n, p in module.named_parameters()}
    x = torch.randn(2, T, 8, dtype=torch.float64, requires_grad=True)
    more = () if name in ("rms", "rms plus one", "layer") else (seq,)

    def run(x, *values):
        out = torch.func.functional_call(module, dict(zip(params, values, strict=True)), (x, *more))
        return out[0] if isinstance(out, tuple) else out

    assert torch.autograd.gradcheck(run, (x, *params.values()), fast_mode=True)


REFUSED = [
    (lambda: GQAConfig(n_heads=4, n_kv_heads=3).build(12), "n_heads = 4 must be a multiple of n_kv_heads = 3"),
    (lambda: GQAConfig(n_heads=5).build(12), "d_model = 12 must be a multiple of n_heads = 5"),
    (lambda: GQAConfig(n_heads=4, window=0).build(12), "window = 0"),
    (lambda: GQAConfig(n_heads=4, position=RoPEConfig()).build(12), "head_dim = 3 must be even"),
    (lambda: GQAConfig(n_heads=0).build(12), "n_heads = 0"),
    (lambda: GQAConfig(n_heads=4, n_kv_heads=0).build(12), "n_kv_heads = 0"),
    (lambda: GQAConfig(n_heads=4, n_kv_heads=0).cost(12), "n_kv_heads = 0, both at least 1"),
    (lambda: GQAConfig(n_heads=4, head_dim=0).build(12), "head_dim = 0"),
    (lambda: GQAConfig(n_heads=4, head_dim=0).cost(12), "head_dim = 0 must be at least 1"),
    (lambda: GQAConfig(n_heads=4, head_dim=-4).build(12), "head_dim = -4"),
    (lambda: GQAConfig(n_heads=4, norm_eps=-1e-6).build(12), "norm_eps = -1e-06"),
    (lambda: GLUConfig(hidden=0).build(12), "hidden = 0"),
    (lambda: MLPConfig(hidden=0).build(12), "hidden = 0"),
    (lambda: SinusoidalConfig().build(7, 8), "d_model = 7 must be even"),
]


@pytest.mark.parametrize(("make", "reason"), REFUSED, ids=[r for _, r in REFUSED])
def test_impossible_shapes_are_refused_with_their_values(make, reason):
    with pytest.raises(ValueError, match=reason):
        make()
