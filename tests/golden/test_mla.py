"""Latent attention worked by hand: loops over tokens, heads and channels in float64, document by document."""

import math

import pytest
import torch

from tests.golden.test_layers import affine, dot, randomised, rms_by_hand, rotated_by_hand
from zero2llm.core.seq import Seq
from zero2llm.layers.contract import Cost
from zero2llm.layers.mixers.mla import MLAConfig
from zero2llm.layers.positions.interpolation import YaRNConfig
from zero2llm.layers.positions.none import NoPositionConfig
from zero2llm.layers.positions.rope import RoPEConfig

D, T = 12, 8
WIDTHS = dict(n_heads=3, kv_rank=5, nope_dim=4, rope_dim=2, v_dim=3)
NONE = NoPositionConfig()
CONFIGS = {
    "direct": MLAConfig(position=NONE, **WIDTHS),
    "query latent": MLAConfig(q_rank=7, position=NONE, norm_eps=0.1, **WIDTHS),
    "interleaved": MLAConfig(q_rank=7, position=RoPEConfig(base=30.0, layout="interleaved"), **WIDTHS | {"rope_dim": 4}),
    "halves": MLAConfig(position=RoPEConfig(base=30.0), **WIDTHS | {"rope_dim": 4}),
    "no shared key": MLAConfig(position=NONE, scale=0.7, **WIDTHS | {"rope_dim": 0, "v_dim": 6}),
}
SEG = torch.tensor([[1, 1, 1, 1, 1, 2, 2, 2], [3, 3, 4, 4, 4, 4, 0, 0]], dtype=torch.int32)
DOCUMENTS = [(0, 0, 5), (0, 5, 8), (1, 0, 2), (1, 2, 6)]


def softmax(scores):
    top = max(scores)
    exps = [math.exp(s - top) for s in scores]
    return [e / math.fsum(exps) for e in exps]


def turned(position, x, pos):
    return rotated_by_hand(x, pos, position.base, position.layout) if isinstance(position, RoPEConfig) else x


def query_sources(module, cfg, doc):
    """What the queries are made of: x, or its normed latent."""
    if cfg.q_rank is None:
        return doc
    return [rms_by_hand(affine(module.q_a_proj, x), module.q_a_norm.weight.tolist(), cfg.norm_eps) for x in doc]


def mla_by_hand(module, cfg, doc, kept=None):
    """(outputs, probabilities[token][head][key]) of one document that starts at position 0; ``kept[t]`` = the keys token t
    may read, all up to t if None."""
    h, nope, rope, v_dim, rank = cfg.n_heads, cfg.nope_dim, cfg.rope_dim, cfg.v_dim, cfg.kv_rank
    scale = cfg.scale or 1 / math.sqrt(nope + rope)
    queries, keys, values, out, weights = [], [], [], [], []
    for pos, (x, source) in enumerate(zip(doc, query_sources(module, cfg, doc), strict=True)):
        flat = affine(module.q_proj if cfg.q_rank is None else module.q_b_proj, source)
        heads = [flat[i * (nope + rope) : (i + 1) * (nope + rope)] for i in range(h)]
        queries.append([q[:nope] + turned(cfg.position, q[nope:], pos) for q in heads])
        low = affine(module.kv_a_proj, x)
        shared = turned(cfg.position, low[rank:], pos)
        unpacked = affine(module.kv_b_proj, rms_by_hand(low[:rank], module.kv_a_norm.weight.tolist(), cfg.norm_eps))
        rows = [unpacked[i * (nope + v_dim) : (i + 1) * (nope + v_dim)] for i in range(h)]
        keys.append([r[:nope] + shared for r in rows])
        values.append([r[nope:] for r in rows])
    for t in range(len(doc)):
        seen = range(t + 1) if kept is None else sorted(kept[t])
        joined, probabilities = [], []
        for i in range(h):
            p = softmax([dot(queries[t][i], keys[s][i]) * scale for s in seen])
            joined += [math.fsum(w * values[s][i][c] for w, s in zip(p, seen, strict=True)) for c in range(v_dim)]
            probabilities.append(dict(zip(seen, p, strict=True)))
        out.append(affine(module.o_proj, joined))
        weights.append(probabilities)
    return out, weights


def tolerance(cfg):
    return dict(atol=1e-12 if cfg.position == NONE else 1e-5, rtol=1e-12)  # angles are fp32 by design


@pytest.mark.parametrize("name", CONFIGS)
def test_formula(name):
    cfg = CONFIGS[name]
    module, x = randomised(cfg.build(D)), torch.randn(2, T, D, dtype=torch.float64)
    whole, packed = module(x, Seq.rows(2, T))[0], module(x, Seq.of_segments(SEG))[0]
    for row in range(2):
        expected = torch.tensor(mla_by_hand(module, cfg, x[row].tolist())[0], dtype=x.dtype)
        torch.testing.assert_close(whole[row], expected, **tolerance(cfg))
    for row, a, b in DOCUMENTS:
        expected = torch.tensor(mla_by_hand(module, cfg, x[row, a:b].tolist())[0], dtype=x.dtype)
        torch.testing.assert_close(packed[row, a:b], expected, **tolerance(cfg))


@pytest.mark.parametrize("name", CONFIGS)
def test_absorbed_equals_expanded_and_the_cache_holds_the_latent_alone(name):
    cfg = CONFIGS[name]
    module, x = randomised(cfg.build(D)), torch.randn(2, T, D, dtype=torch.float64)
    seq, state = Seq.rows(2, T), module.init_state(2, 9, dtype=x.dtype)
    steps = torch.cat([module(x[:, t : t + 1], seq.window(t, t + 1), state)[0] for t in range(T)], 1)
    torch.testing.assert_close(steps, module(x, seq)[0], atol=1e-13, rtol=1e-12)
    width = cfg.kv_rank + cfg.rope_dim
    assert state.k.shape == (2, 1, 10, width) and state.v.numel() == 0 and state.nbytes() == 2 * 9 * width * 8
    q, entry, _ = module.project(x[:, -1:], seq.window(T - 1, T))
    mask = torch.ones(2, 1, 1, T, dtype=torch.bool)
    form = [f(q, state.k[:, :, :T], mask, *more) for f, more in ((module.absorbed, (T,)), (module.expanded, ()))]
    torch.testing.assert_close(*form, atol=1e-13, rtol=1e-12)
    torch.testing.assert_close(state.k[:, :, T - 1 : T], entry)


@pytest.mark.parametrize("name", CONFIGS)
def test_absorbed_equals_expanded_in_its_gradients(name):
    module = randomised(CONFIGS[name].build(D))
    x, past = (torch.randn(2, n, D, dtype=torch.float64, requires_grad=True) for n in (1, T))
    q, entry = module.project(x, Seq.rows(2, 1, T))[0], module.project(past, Seq.rows(2, T))[1]
    mask, of = torch.arange(T).expand(2, 1, 1, T) != 3, [x, past, *module.parameters()]
    forms = [module.mix(module.absorbed(q, entry, mask, T)), module.mix(module.expanded(q, entry, mask))]
    g = torch.randn_like(forms[0])
    for a, b in zip(*(torch.autograd.grad((y * g).sum(), of, retain_graph=True) for y in forms), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-11)


@pytest.mark.parametrize("name", CONFIGS)
def test_cost_counts_every_parameter(name):
    assert CONFIGS[name].cost(D).params == sum(p.numel() for p in CONFIGS[name].build(D).parameters())


def test_yarn_turns_the_latent_slower_and_scales_the_scores():
    scaling = YaRNConfig(factor=16.0, original_max_len=32, mscale=1.0, mscale_all_dim=0.5)
    cfg = MLAConfig(position=RoPEConfig(scaling=scaling), **WIDTHS)
    assert cfg.build(D).scale == pytest.approx((0.1 * 0.5 * math.log(16) + 1) ** 2 / math.sqrt(6), rel=1e-12)


def test_cost_of_deepseek_v3():
    """The numbers of the page: 576 values a token where MHA keeps 40,960, and 187 million parameters a layer."""
    cost = MLAConfig(n_heads=128, kv_rank=512, q_rank=1536, nope_dim=128, rope_dim=64, v_dim=128).cost(7168)
    assert isinstance(cost, Cost) and cost.state == 576 and 128 * (192 + 128) == 40_960
    assert cost.params == 1536 * (7168 + 128 * 192) + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168 + 512 + 1536
    assert round(cost.params / 1e6) == 187 and cost.flops_per_key == 2 * 128 * (192 + 128)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"n_heads": 0}, "n_heads = 0"), ({"kv_rank": 0}, "kv_rank = 0"), ({"kv_rank": 13}, "kv_rank = 13 .* d_model = 12"),
        ({"q_rank": 0}, "q_rank = 0"), ({"q_rank": 13}, "q_rank = 13 .* d_model = 12"), ({"nope_dim": 0}, "nope_dim = 0"),
        ({"v_dim": 0}, "v_dim = 0"), ({"rope_dim": 0}, "rope_dim = 0"), ({"rope_dim": 3}, "head_dim = 3 must be even"),
        ({"rope_dim": -1, "position": NONE}, "rope_dim = -1"), ({"scale": 0.0}, "scale = 0.0 must be positive"),
        ({"scale": -0.5}, "scale = -0.5"), ({"norm_eps": -1e-6}, "norm_eps = -1e-06 must not be negative"),
    ],
)  # fmt: skip
def test_refusals(change, says):
    with pytest.raises(ValueError, match=says):
        MLAConfig(**WIDTHS | change).build(D)
