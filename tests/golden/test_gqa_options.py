"""The options of attention by hand: which weight each pair of tokens gets, in loops over floats, on a packed row."""

import math

import pytest
import torch

from tests.golden.test_layers import EXACT, affine, dot, randomised, rms_by_hand
from zero2llm.core.seq import Seq
from zero2llm.layers.mixers.gqa import GQAConfig
from zero2llm.layers.positions.alibi import ALiBiConfig

D, T = 12, 8
SHAPE = dict(n_heads=4, n_kv_heads=2, head_dim=3)
CASES = {
    "scale": GQAConfig(**SHAPE, scale=0.2),
    "sink": GQAConfig(**SHAPE, sink=True),
    "sink in a window": GQAConfig(**SHAPE, sink=True, window=2, qkv_bias=True, out_bias=True),
    "softcap": GQAConfig(**SHAPE, softcap=0.7),
    "gate": GQAConfig(**SHAPE, gate=True),
    "qk-norm 1 + w": GQAConfig(**SHAPE, qk_norm=True, qk_norm_plus_one=True, norm_eps=0.1),
    "qk-norm over all": GQAConfig(**SHAPE, qk_norm=True, qk_norm_span="all", norm_eps=0.1),
    "qk-norm over all 1 + w": GQAConfig(**SHAPE, qk_norm=True, qk_norm_span="all", qk_norm_plus_one=True, norm_eps=0.1),
    "sink, softcap, gate, scale": GQAConfig(**SHAPE, sink=True, softcap=2.0, gate=True, scale=1.3),
    "sink, softcap, alibi": GQAConfig(**SHAPE, sink=True, softcap=2.0, position=ALiBiConfig()),
}
SLOPES = [2**-2, 2**-4, 2**-6, 2**-8]  # of ALiBi with four heads


def packed():
    return Seq.of_segments(torch.tensor([[1, 1, 1, 1, 1, 2, 2, 2], [3, 3, 4, 4, 4, 4, 0, 0]]))


def normed(flat, norm, cfg, width):
    """Queries or keys of one token, all heads in a row."""
    if not cfg.qk_norm:
        return flat
    weight = [w + 1 if cfg.qk_norm_plus_one else w for w in norm.weight.tolist()]
    if cfg.qk_norm_span == "all":
        return rms_by_hand(flat, weight, cfg.norm_eps)
    return [v for i in range(0, len(flat), width) for v in rms_by_hand(flat[i : i + width], weight, cfg.norm_eps)]


def weight_of_each_key(cfg, module, q, k, seen, i, head):
    """Probabilities of the tokens ``seen`` by token i; with a sink they sum to less than one."""
    width = module.head_dim
    query = q[i][head * width : (head + 1) * width]
    shared = head // (cfg.n_heads // cfg.n_kv_heads) * width
    scores = []
    for j in seen:
        score = dot(query, k[j][shared : shared + width]) * (cfg.scale or 1 / math.sqrt(width))
        if cfg.softcap:
            score = cfg.softcap * math.tanh(score / cfg.softcap)
        if isinstance(cfg.position, ALiBiConfig):
            score -= SLOPES[head] * (i - j)
        scores.append(math.exp(score))
    total = math.fsum(scores) + (math.exp(module.sinks[head].item()) if cfg.sink else 0.0)
    return [s / total for s in scores]


def by_hand(module, cfg, x, seq):
    out, width = torch.zeros_like(x), module.head_dim
    for b in range(len(x)):
        tokens, doc = x[b].tolist(), seq.seg[b].tolist()
        q = [normed(affine(module.q_proj, t), module.q_norm, cfg, width) for t in tokens]
        k = [normed(affine(module.k_proj, t), module.k_norm, cfg, width) for t in tokens]
        v = [affine(module.v_proj, t) for t in tokens]
        for i in range(T):
            seen = [j for j in range(i + 1) if doc[j] == doc[i] and (cfg.window is None or i - j < cfg.window)]
            joined = []
            for head in range(cfg.n_heads):
                weights = weight_of_each_key(cfg, module, q, k, seen, i, head)
                at = head // (cfg.n_heads // cfg.n_kv_heads) * width
                joined += [math.fsum(w * v[j][at + c] for w, j in zip(weights, seen, strict=True)) for c in range(width)]
            if cfg.gate:
                joined = [o / (1 + math.exp(-g)) for o, g in zip(joined, affine(module.g_proj, tokens[i]), strict=True)]
            out[b, i] = torch.tensor(affine(module.o_proj, joined), dtype=x.dtype)
    return out


def both(cfg):
    """(layer, inputs, packed row, what the formula gives)."""
    torch.manual_seed(3)
    module, x, seq = randomised(cfg.build(D)), torch.randn(2, T, D, dtype=torch.float64), packed()
    return module, x, seq, by_hand(module, cfg, x, seq)


@pytest.mark.parametrize("name", CASES)
def test_options(name):
    module, x, seq, expected = both(CASES[name])
    torch.testing.assert_close(module(x, seq)[0], expected, **EXACT)
    state = module.init_state(2, 16, dtype=torch.float64)  # and token by token, through the cache
    steps = torch.cat([module(x[:, i : i + 1], seq.window(i, i + 1), state)[0] for i in range(T)], 1)
    torch.testing.assert_close(steps[seq.seg != 0], expected[seq.seg != 0], **EXACT)


@pytest.mark.parametrize("name", ["sink", "softcap", "sink, softcap, alibi"])
def test_weights_to_look_at_are_those_of_the_formula(name):
    cfg = CASES[name]
    module, x, seq, _ = both(cfg)
    q, k = ([affine(p, t) for t in x[0].tolist()] for p in (module.q_proj, module.k_proj))
    weights = module.weights(x, seq)
    for head in range(4):
        expected = weight_of_each_key(cfg, module, q, k, [5, 6, 7], 7, head)
        torch.testing.assert_close(weights[0, head, 7], torch.tensor([0.0] * 5 + expected, dtype=torch.float64), **EXACT)


def test_heads_are_not_for_sharding_where_one_norm_or_table_spans_them():
    assert GQAConfig(n_heads=2, sink=True).build(8).tp["sinks"] == "col"
    for spans in ({"qk_norm": True, "qk_norm_span": "all"}, {"position": ALiBiConfig()}):
        assert GQAConfig(n_heads=2, **spans).build(8).tp is None


def test_impossible_options_are_refused_with_their_values():
    with pytest.raises(ValueError, match="softcap = 0.0 must be positive"):
        GQAConfig(n_heads=2, softcap=0.0).build(8)
    with pytest.raises(ValueError, match="scale = 0.0 must be positive"):
        GQAConfig(n_heads=2, scale=0.0).build(8)
    with pytest.raises(ValueError, match="qk_norm_plus_one and qk_norm_span need qk_norm"):
        GQAConfig(n_heads=2, qk_norm_plus_one=True).build(8)
    with pytest.raises(ValueError, match="qk_norm_plus_one and qk_norm_span need qk_norm"):
        GQAConfig(n_heads=2, qk_norm_span="all").build(8)
