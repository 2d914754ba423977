"""Sparse attention worked by hand: blocks, choices and sums in Python loops and float64, document by document.

A document is a list of tokens that starts at position 0; blocks count from 0 here, and from 1 where the paper's formula
does. NSA and MoBA take a few tokens more than 8: there must be blocks to choose from.
"""

import math

import pytest
import torch

from tests.golden.test_layers import affine, dot, layer_norm_by_hand, randomised
from tests.golden.test_mla import mla_by_hand, query_sources, softmax, turned
from zero2llm.core.seq import Seq
from zero2llm.layers.mixers.dsa import DSAConfig
from zero2llm.layers.mixers.mla import MLAConfig
from zero2llm.layers.mixers.moba import MoBAConfig
from zero2llm.layers.mixers.nsa import NSAConfig
from zero2llm.layers.positions.none import NoPositionConfig
from zero2llm.layers.positions.rope import RoPEConfig
from zero2llm.ops.attend import attend_plain
from zero2llm.ops.sparse_attend import attend_blocks, attend_one, best, overlap

D, T = 12, 14
NONE, ROPE = NoPositionConfig(), RoPEConfig(base=30.0)
LATENT = dict(n_heads=2, kv_rank=5, nope_dim=4, v_dim=3)
MOBA = {
    "moba": MoBAConfig(n_heads=4, n_kv_heads=2, head_dim=4, block=3, top_k=2),
    "moba rope": MoBAConfig(n_heads=2, block=2, top_k=3, position=ROPE),
    "moba own": MoBAConfig(n_heads=2, block=4, top_k=1),
}
NSA = {
    "nsa": NSAConfig(n_heads=4, n_kv_heads=2, head_dim=4, span=2, stride=1, block=2, top_k=4, window=3),
    "nsa wide": NSAConfig(n_heads=4, n_kv_heads=1, head_dim=3, span=2, stride=2, block=4, top_k=3, window=2, hidden=5),
    "nsa rope": NSAConfig(n_heads=2, head_dim=4, span=1, stride=1, block=2, top_k=4, window=4, position=ROPE),
}
DSA = {
    "dsa": DSAConfig(mla=MLAConfig(rope_dim=2, position=NONE, **LATENT), index_heads=16, index_dim=3, top_k=3),
    "dsa rope": DSAConfig(
        mla=MLAConfig(rope_dim=2, q_rank=7, position=RoPEConfig(base=30.0, layout="interleaved"), **LATENT), index_heads=16, index_dim=5, top_k=2
    ),
}  # fmt: skip
CONFIGS = MOBA | NSA | DSA
SEG = torch.tensor([[1] * 5 + [2] * 9, [3] * 11 + [0] * 3], dtype=torch.int32)
DOCUMENTS = [(0, 0, 5), (0, 5, 14), (1, 0, 11)]


def project(layer, doc, width):
    """[token][head][channel]."""
    flat = [affine(layer, x) for x in doc]
    return [[f[i : i + width] for i in range(0, len(f), width)] for f in flat]


def turn_all(position, tokens):
    return [[turned(position, h, pos) for h in heads] for pos, heads in enumerate(tokens)]


def mean(vectors):
    return [math.fsum(column) / len(vectors) for column in zip(*vectors, strict=True)]


def weighted(p, values):
    return [math.fsum(w * v[c] for w, v in zip(p, values, strict=True)) for c in range(len(values[0]))]


def first_best(scores, k):
    """The k keys of a dict with the highest values; of equal ones the smaller key."""
    return set(sorted(scores, key=lambda s: (-scores[s], s))[:k])


def moba_by_hand(module, cfg, doc):
    g, width = module.n_kv, module.head_dim
    q, k = (turn_all(cfg.position, project(p, doc, width)) for p in (module.q_proj, module.k_proj))
    v, out = project(module.v_proj, doc, width), []
    for t in range(len(doc)):
        joined, own = [], t // cfg.block
        for h in range(cfg.n_heads):
            shared = h // (cfg.n_heads // g)
            means = {b: mean([k[s][shared] for s in range(b * cfg.block, (b + 1) * cfg.block)]) for b in range(own)}
            kept = {own} | first_best({b: dot(q[t][h], m) for b, m in means.items()}, cfg.top_k - 1)
            seen = [s for s in range(t + 1) if s // cfg.block in kept]
            joined += weighted(softmax([dot(q[t][h], k[s][shared]) / math.sqrt(width) for s in seen]), [v[s][shared] for s in seen])
        out.append(affine(module.o_proj, joined))
    return out


def summary_by_hand(f, block):
    """The MLP over a block's tokens, each with its learned place added."""
    flat = [a + b for x, p in zip(block, f.places.tolist(), strict=True) for a, b in zip(x, p, strict=True)]
    return affine(f.out, [z / (1 + math.exp(-z)) for z in affine(f.hidden, flat)])


def importance_by_hand(p, cfg, n_blocks):
    """Eq. 9, which counts blocks and summaries from 1: p_slc[j] = sum_m sum_n p_cmp[(l'/d) j - m - n]."""
    at = lambda i: p[i - 1] if 1 <= i <= len(p) else 0.0
    units, reach = cfg.block // cfg.stride, cfg.span // cfg.stride
    return {j - 1: math.fsum(at(units * j - m - n) for m in range(units) for n in range(reach)) for j in range(1, n_blocks + 1)}


def nsa_by_hand(module, cfg, doc):
    g, width = module.n_kv, module.head_dim
    group, scale = cfg.n_heads // g, 1 / math.sqrt(width)
    q = turn_all(cfg.position, project(module.q_proj, doc, width))
    branches = lambda layer: [[heads[i::3] for heads in project(layer, doc, width)] for i in range(3)]
    (k_cmp, k_slc, k_win), (v_cmp, v_slc, v_win) = branches(module.k_proj), branches(module.v_proj)
    k_slc, k_win = turn_all(cfg.position, k_slc), turn_all(cfg.position, k_win)
    starts, out = range(0, max(len(doc) - cfg.span + 1, 0), cfg.stride), []
    pieces = lambda x, e: [[x[s][e] for s in range(a, a + cfg.span)] for a in starts]
    k_sum = [[turned(cfg.position, summary_by_hand(module.k_summary, b), a) for a, b in zip(starts, pieces(k_cmp, e), strict=True)] for e in range(g)]
    v_sum = [[summary_by_hand(module.v_summary, b) for b in pieces(v_cmp, e)] for e in range(g)]
    for t in range(len(doc)):
        ready = [i for i, a in enumerate(starts) if a + cfg.span - 1 <= t]
        gates = [1 / (1 + math.exp(-z)) for z in affine(module.g_proj, doc[t])]
        weights = [softmax([dot(q[t][h], k_sum[h // group][i]) * scale for i in ready]) if ready else [] for h in range(cfg.n_heads)]
        joined = []
        for h in range(cfg.n_heads):
            e, own = h // group, t // cfg.block
            scores = {j: 0.0 for j in range(own + 1)}
            for mate in range(e * group, (e + 1) * group):
                for j, value in importance_by_hand(weights[mate], cfg, own + 1).items():
                    scores[j] += value
            for j in {0, own, max(own - 1, 0)}:
                scores[j] = math.inf
            kept = first_best(scores, cfg.top_k)
            parts = [weighted(weights[h], [v_sum[e][i] for i in ready]) if ready else [0.0] * width]
            near = range(max(t - cfg.window + 1, 0), t + 1)
            for k, v, seen in ((k_slc, v_slc, [s for s in range(t + 1) if s // cfg.block in kept]), (k_win, v_win, near)):
                parts.append(weighted(softmax([dot(q[t][h], k[s][e]) * scale for s in seen]), [v[s][e] for s in seen]))
            joined += weighted(gates[3 * h : 3 * h + 3], parts)
        out.append(affine(module.o_proj, joined))
    return out


def index_scores_by_hand(module, cfg, doc):
    """I[t][s] for s <= t."""
    index, rope = module.indexer, cfg.mla.rope_dim
    half = lambda x, pos: turned(RoPEConfig(base=cfg.mla.position.base), x[:rope], pos) + x[rope:] if cfg.mla.position != NONE else x
    scale = 1 / math.sqrt(cfg.index_heads * cfg.index_dim)
    q = [[half(h, pos) for h in heads] for pos, heads in enumerate(project(index.q_proj, query_sources(module.mla, cfg.mla, doc), cfg.index_dim))]
    norm = lambda x: layer_norm_by_hand(x, index.k_norm.weight.tolist(), index.k_norm.bias.tolist(), 1e-6)
    k = [half(norm(affine(index.k_proj, x)), pos) for pos, x in enumerate(doc)]
    w = [affine(index.w_proj, x) for x in doc]
    one = lambda t, s: math.fsum(w[t][h] * max(dot(q[t][h], k[s]), 0.0) for h in range(cfg.index_heads)) * scale
    return [{s: one(t, s) for s in range(t + 1)} for t in range(len(doc))]


def dsa_by_hand(module, cfg, doc):
    scores = index_scores_by_hand(module, cfg, doc)
    return mla_by_hand(module.mla, cfg.mla, doc, [first_best(row, cfg.top_k) for row in scores])[0]


def index_loss_by_hand(module, cfg, doc):
    """KL of each token, nats."""
    scores, total = index_scores_by_hand(module, cfg, doc), []
    kept = [first_best(row, cfg.top_k) for row in scores]
    for t, heads in enumerate(mla_by_hand(module.mla, cfg.mla, doc, kept)[1]):
        seen = sorted(kept[t])
        summed = [math.fsum(p[s] for p in heads) for s in seen]
        p, q = [x / math.fsum(summed) for x in summed], softmax([scores[t][s] for s in seen])
        total.append(math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    return total


def by_hand(module, cfg, doc):
    return {"moba": moba_by_hand, "nsa": nsa_by_hand, "dsa": dsa_by_hand}[cfg.kind](module, cfg, doc)


def exact(cfg):
    return (cfg.mla if cfg.kind == "dsa" else cfg).position == NONE


def tolerance(cfg):
    return dict(atol=1e-11 if exact(cfg) else 2e-5, rtol=1e-11)  # angles are fp32 by design


@pytest.mark.parametrize("name", CONFIGS)
def test_formula(name):
    cfg = CONFIGS[name]
    module, x = randomised(cfg.build(D)), torch.randn(2, T, D, dtype=torch.float64)
    whole, packed = module(x, Seq.rows(2, T))[0], module(x, Seq.of_segments(SEG))[0]
    expected = torch.tensor(by_hand(module, cfg, x[0].tolist()), dtype=x.dtype)
    torch.testing.assert_close(whole[0], expected, **tolerance(cfg))
    for row, a, b in DOCUMENTS:
        expected = torch.tensor(by_hand(module, cfg, x[row, a:b].tolist()), dtype=x.dtype)
        torch.testing.assert_close(packed[row, a:b], expected, **tolerance(cfg))


@pytest.mark.parametrize("name", DSA)
def test_indexer_loss(name):
    cfg = DSA[name]
    module, x = randomised(cfg.build(D)), torch.randn(2, T, D, dtype=torch.float64)
    for seq, documents in ((Seq.rows(2, T), [(0, 0, T), (1, 0, T)]), (Seq.of_segments(SEG), DOCUMENTS)):
        each = [value for row, a, b in documents for value in index_loss_by_hand(module, cfg, x[row, a:b].tolist())]
        loss = module(x, seq)[1]["indexer_loss"]
        assert loss > 0.01
        torch.testing.assert_close(loss.item(), math.fsum(each) / len(each), **tolerance(cfg))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_row_without_a_past_may_open_inside_a_document(name):
    """Its blocks count from its first token: with rotary angles, which know only distances, it equals a document."""
    cfg = CONFIGS[name]
    module, x = randomised(cfg.build(D)), torch.randn(2, T, D, dtype=torch.float64)
    torch.testing.assert_close(module(x, Seq.rows(2, T, 5))[0], module(x, Seq.rows(2, T))[0], **tolerance(cfg))


# The pieces


def test_best_takes_the_first_of_equal_scores_whatever_stands_behind():
    scores = torch.tensor([[0.0, 2.0, 0.0, -1.0, 0.0, 2.0], [5.0, 5.0, 5.0, 5.0, 5.0, 5.0]])
    seen = torch.ones_like(scores, dtype=torch.bool)
    seen[0, 0] = False
    for k, rows in ((0, ([], [])), (1, ([1], [0])), (3, ([1, 2, 5], [0, 1, 2])), (4, ([1, 2, 4, 5], [0, 1, 2, 3])), (6, ([1, 2, 3, 4, 5], range(6)))):
        for more in (0, 1, 40):
            wide = torch.nn.functional.pad(scores, (0, more), value=9.0)
            found = best(wide, k, torch.nn.functional.pad(seen, (0, more)))
            assert [row.nonzero().flatten().tolist() for row in found] == [list(r) for r in rows], (k, more)


def test_overlap_is_equation_9():
    cfg = NSAConfig(n_heads=1, span=4, stride=2, block=8)
    p = torch.rand(11, dtype=torch.float64)
    found = p @ overlap(torch.arange(11)[None], 4, 2, 8, 4)[0].double()
    assert found.tolist() == pytest.approx(list(importance_by_hand(p.tolist(), cfg, 4).values()))


@pytest.mark.parametrize("rows", [1, 3, 7, 100])
def test_rows_at_a_time_change_nothing(rows):
    q, k = torch.randn(2, 4, 7, 5), torch.randn(2, 2, 7, 5)
    chosen, block = torch.rand(2, 2, 7, 3) < 0.5, (torch.arange(7) // 3).expand(2, 7)
    chosen[..., 0] = True
    seen = torch.ones(7, 7, dtype=torch.bool).tril().expand(2, 1, 7, 7)
    whole = attend_blocks(q, k, k, chosen, block, seen, 9, rows=100)
    torch.testing.assert_close(attend_blocks(q, k, k, chosen, block, seen, 9, rows=rows), whole, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shares", [1, 2, 4])  # one choice for all heads, for each group, for each head
@pytest.mark.parametrize("most", [4, 9, 20])
def test_one_token_reads_what_it_keeps_in_value_and_gradient(shares, most):
    inputs = [torch.randn(3, heads, n, 5, dtype=torch.float64, requires_grad=True) for heads, n in ((4, 1), (min(shares, 2), 11), (min(shares, 2), 11))]
    kept = torch.zeros(3, shares, 1, 11, dtype=torch.bool).scatter(3, torch.rand(3, shares, 1, 11).topk(4).indices, True)
    kept[0, 0, 0, :] = torch.arange(11) == 7  # fewer than `most`
    results = [attend_one(*inputs, kept, most, 0.4), attend_plain(*inputs, kept.repeat_interleave(4 // shares, 1), 0.4)]
    torch.testing.assert_close(*results, atol=1e-13, rtol=0)
    g = torch.randn_like(results[0])
    for a, b in zip(*(torch.autograd.grad((o * g).sum(), inputs) for o in results), strict=True):
        torch.testing.assert_close(a, b, atol=1e-13, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_cost_counts_every_parameter(name):
    assert CONFIGS[name].cost(D).params == sum(p.numel() for p in CONFIGS[name].build(D).parameters())


REFUSED = [
    (MoBAConfig(n_heads=5), "d_model = 12 .* n_heads = 5"), (MoBAConfig(n_heads=4, n_kv_heads=3), "n_heads = 4 .* n_kv_heads = 3"),
    (MoBAConfig(n_heads=2, n_kv_heads=0), "n_kv_heads = 0"), (MoBAConfig(n_heads=0), "n_heads = 0"), (MoBAConfig(n_heads=2, head_dim=0), "head_dim = 0"),
    (NSAConfig(n_heads=2, n_kv_heads=0), "n_kv_heads = 0"), (NSAConfig(n_heads=2, head_dim=0), "head_dim = 0"),
    (MoBAConfig(n_heads=2, block=0), "block = 0"), (MoBAConfig(n_heads=2, top_k=0), "top_k = 0"), (MoBAConfig(n_heads=4, position=ROPE), "head_dim = 3"),
    (NSAConfig(n_heads=5), "d_model = 12 .* n_heads = 5"), (NSAConfig(n_heads=4, n_kv_heads=3), "n_kv_heads = 3"), (NSAConfig(n_heads=2, window=0), "window = 0"),
    (NSAConfig(n_heads=2, span=33), "stride = 16 must divide span = 33"), (NSAConfig(n_heads=2, block=40), "block = 40"),
    (NSAConfig(n_heads=2, span=128), "span = 128 and block = 64"), (NSAConfig(n_heads=2, stride=0), "stride = 0"), (NSAConfig(n_heads=2, top_k=2), "top_k = 2"),
    (NSAConfig(n_heads=2, hidden=0), "hidden = 0"), (NSAConfig(n_heads=2, span=8), "stride = 16 must divide span = 8"),
    (DSAConfig(mla=DSA["dsa"].mla, top_k=0), "top_k = 0"), (DSAConfig(mla=DSA["dsa"].mla, index_heads=0), "index_heads = 0"),
    (DSAConfig(mla=DSA["dsa rope"].mla, index_dim=1), "index_dim = 1 .* rope_dim = 2"), (DSAConfig(mla=MLAConfig(rope_dim=2, n_heads=2, kv_rank=13, nope_dim=4, v_dim=3)), "kv_rank = 13"),
]  # fmt: skip


@pytest.mark.parametrize(("cfg", "says"), REFUSED, ids=[says for _, says in REFUSED])
def test_refusals(cfg, says):
    with pytest.raises(ValueError, match=says):
        cfg.build(D)
