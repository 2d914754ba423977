"""Mixture of experts by hand: token by token, in plain Python, from the papers' equations; and the dispatch by its twins."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.golden.test_layers import randomised
from zero2llm.core.seq import Seq
from zero2llm.layers.ffns.expert_choice import ExpertChoiceConfig
from zero2llm.layers.ffns.glu import GLUConfig
from zero2llm.layers.ffns.moe import MoEConfig
from zero2llm.ops.route import (
    Plan,
    collect,
    grouped_linear,
    grouped_linear_plain,
    load_of,
    mix_plain,
    rows_times,
    spread,
)

D, T = 6, 8
SEG = torch.tensor([[1, 1, 1, 1, 1, 2, 2, 2], [3, 3, 4, 4, 4, 4, 0, 0]], dtype=torch.int32)
CONFIGS = {
    "mixtral": MoEConfig(n_experts=4, top_k=2, hidden=5, balance_weight=0.3, z_weight=0.2),
    "qwen2": MoEConfig(
        n_experts=5, top_k=3, hidden=4, renormalise=False, n_shared=1, shared_hidden=7, shared_gate=True, act="gelu"
    ),
    "deepseek-v3": MoEConfig(
        n_experts=8,
        top_k=3,
        hidden=3,
        router="sigmoid",
        n_groups=4,
        top_groups=2,
        routed_scaling=2.5,
        n_shared=2,
        bias_rate=0.01,
    ),
    "gpt-oss": MoEConfig(n_experts=4, top_k=2, hidden=5, act="gptoss", bias=True),
    "top-1": MoEConfig(
        n_experts=3, top_k=1, hidden=4, renormalise=False, routed_scaling=1.5, balance_weight=1.0, z_weight=1.0
    ),
    "biased softmax": MoEConfig(n_experts=5, top_k=2, hidden=4, bias_rate=0.0, z_weight=0.5),
}


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def matvec(w, x, b=None):
    return [dot(row, x) + (0.0 if b is None else b[i]) for i, row in enumerate(w)]


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


def unit(act, g, u):
    """One hidden unit of a gated expert."""
    if act == "silu":
        return g * sigmoid(g) * u
    if act == "gelu":
        return 0.5 * g * (1 + math.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))) * u
    g, u = min(g, 7.0), max(min(u, 7.0), -7.0)
    return (u + 1) * g * sigmoid(1.702 * g)


def scores_by_hand(module, cfg, x):
    """(logits, scores) of one token."""
    z = matvec(module.router.weight.tolist(), x, module.router.bias.tolist() if cfg.bias else None)
    if cfg.router == "sigmoid":
        return z, [sigmoid(v) for v in z]
    total = sum(math.exp(v) for v in z)
    return z, [math.exp(v) / total for v in z]


def chosen_by_hand(module, cfg, s):
    """{expert: weight} of one token."""
    b = module.router_bias.tolist() if cfg.bias_rate is not None else [0.0] * cfg.n_experts
    biased = [v + w for v, w in zip(s, b, strict=True)]
    size = cfg.n_experts // cfg.n_groups
    worth = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(cfg.n_groups)]
    open_groups = sorted(range(cfg.n_groups), key=lambda g: -worth[g])[: cfg.top_groups]
    allowed = [e for e in range(cfg.n_experts) if e // size in open_groups]
    best = sorted(allowed, key=lambda e: -biased[e])[: cfg.top_k]
    total = sum(s[e] for e in best) if cfg.renormalise else 1.0
    return {e: s[e] / total * cfg.routed_scaling for e in best}


def expert_by_hand(module, cfg, e, x):
    w = [p.weight[e].tolist() for p in (module.gate_proj, module.up_proj, module.down_proj)]
    b = [p.bias[e].tolist() if cfg.bias else None for p in (module.gate_proj, module.up_proj, module.down_proj)]
    gate, up = matvec(w[0], x, b[0]), matvec(w[1], x, b[1])
    return matvec(w[2], [unit(cfg.act, g, u) for g, u in zip(gate, up, strict=True)], b[2])


def shared_by_hand(module, cfg, x):
    s = module.shared
    gate, up = matvec(s.gate_proj.weight.tolist(), x), matvec(s.up_proj.weight.tolist(), x)
    y = matvec(s.down_proj.weight.tolist(), [unit(cfg.act, g, u) for g, u in zip(gate, up, strict=True)])
    open_ = sigmoid(dot(module.shared_gate.weight[0].tolist(), x)) if cfg.shared_gate else 1.0
    return [open_ * v for v in y]


def moe_by_hand(module, cfg, x, seq):
    """Returns (y (B, T, D), aux): losses and loads over the real tokens alone."""
    y, load, mass, z2, n = torch.zeros_like(x), [0] * cfg.n_experts, [0.0] * cfg.n_experts, 0.0, 0
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            token = x[b, t].tolist()
            z, s = scores_by_hand(module, cfg, token)
            chosen = chosen_by_hand(module, cfg, s)
            out = shared_by_hand(module, cfg, token) if cfg.n_shared else [0.0] * len(token)
            for e, w in chosen.items():
                out = [o + w * v for o, v in zip(out, expert_by_hand(module, cfg, e, token), strict=True)]
            y[b, t] = torch.tensor(out, dtype=x.dtype)
            if seq.seg is None or seq.seg[b, t]:
                n += 1
                z2 += math.log(sum(math.exp(v) for v in z)) ** 2
                for e in range(cfg.n_experts):
                    mass[e] += s[e] / sum(s)
                    load[e] += e in chosen
    aux = {"moe_peak_load": max(load) / (sum(load) / cfg.n_experts), "moe_idle": load.count(0) / cfg.n_experts}
    if cfg.balance_weight:
        even = sum(c / sum(load) * m / n for c, m in zip(load, mass, strict=True))
        aux["balance_loss"] = cfg.balance_weight * cfg.n_experts * even
    if cfg.z_weight:
        aux["router_z_loss"] = cfg.z_weight * z2 / n
    return y, aux


def build(cfg, seed=3):
    torch.manual_seed(seed)
    return randomised(cfg.build(D)), 2 * torch.randn(2, T, D, dtype=torch.float64)


@pytest.mark.parametrize("name", CONFIGS)
def test_moe_equals_the_formula(name):
    cfg = CONFIGS[name]
    module, x = build(cfg)
    for seq in (Seq.rows(2, T), Seq.of_segments(SEG)):
        y, aux = module(x, seq)
        want, expected = moe_by_hand(module, cfg, x, seq)
        torch.testing.assert_close(y, want, atol=1e-11, rtol=0)
        assert {k: float(v.detach()) for k, v in aux.items()} == pytest.approx(expected, abs=1e-11)


def test_clamps_of_gptoss_are_reached():
    module, x = build(CONFIGS["gpt-oss"])
    inside = []
    module.act = lambda g, u, f=module.act: inside.append((g, u)) or f(g, u)
    module(4 * x, Seq.rows(2, T))
    gate, up = inside[0]
    assert (gate > 7).any() and (gate < -7).any() and (up.abs() > 7).any()
    torch.testing.assert_close(
        module(4 * x, Seq.rows(2, T))[0],
        moe_by_hand(module, CONFIGS["gpt-oss"], 4 * x, Seq.rows(2, T))[0],
        atol=1e-10,
        rtol=0,
    )


# The dispatch


def routed(n=11, e=5, k=3, d=4, empty=2):
    """Tokens, weights, choices of which none falls on expert ``empty``, and a projection per expert."""
    x, w = torch.randn(n, d, dtype=torch.float64), torch.rand(n, k, dtype=torch.float64)
    scores = torch.rand(n, e).index_fill(1, torch.tensor([empty]), -1.0)
    return x, w, scores.topk(k).indices, torch.randn(e, 6, d, dtype=torch.float64)


def dropless(x, weights, experts, matrices):
    plan = Plan.of(experts, len(matrices))
    rows = grouped_linear(spread(x, plan), matrices, plan.sizes).tanh()
    return collect(rows, weights, plan)


@pytest.mark.parametrize(("n", "e", "k"), [(11, 5, 3), (1, 5, 1), (7, 3, 2), (40, 9, 8)])
def test_dropless_equals_every_expert_on_every_token(n, e, k):
    x, w, experts, matrices = routed(n, e, k, empty=e - 1)
    leaves = [t.requires_grad_() for t in (x, w, matrices)]
    plain = mix_plain(x, w, experts, [lambda t, m=m: (t @ m.T).tanh() for m in matrices])
    ours = dropless(x, w, experts, matrices)
    torch.testing.assert_close(ours, plain, atol=1e-12, rtol=0)
    cotangent = torch.randn_like(plain)
    for a, b in zip(
        torch.autograd.grad(ours, leaves, cotangent), torch.autograd.grad(plain, leaves, cotangent), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_grouped_linear_equals_its_twin():
    x, _, experts, matrices = routed()
    plan = Plan.of(experts, 5)
    rows = spread(x, plan).requires_grad_()
    assert plan.sizes[2] == 0 and plan.sizes.sum() == 33
    with torch.no_grad():
        torch.testing.assert_close(
            grouped_linear(rows, matrices, plan.sizes), grouped_linear_plain(rows, matrices, plan.sizes)
        )
    matrices.requires_grad_()
    cotangent = torch.randn(33, 6, dtype=torch.float64)
    got = [
        torch.autograd.grad(f(rows, matrices, plan.sizes), (rows, matrices), cotangent)
        for f in (grouped_linear, grouped_linear_plain)
    ]
    for a, b in zip(*got, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    assert (got[0][1][2] == 0).all(), "an expert without tokens has a zero gradient, not memory's leavings"


def test_dispatch_by_finite_differences():
    x, w, experts, matrices = routed(5, 3, 2)
    assert torch.autograd.gradcheck(
        lambda a, b, m: dropless(a, b, experts, m), [t.requires_grad_() for t in (x, w, matrices)]
    )
    frozen = matrices.detach()
    assert torch.autograd.gradcheck(lambda a: dropless(a, w.detach(), experts, frozen), [x])


def test_operator_keeps_torch_s_contract():
    x, _, experts, matrices = routed(5, 3, 2)
    plan = Plan.of(experts, 3)
    parts = ("test_schema", "test_autograd_registration", "test_faketensor")  # compiling it is a law's business
    torch.library.opcheck(
        rows_times, (spread(x, plan).requires_grad_(), matrices.requires_grad_(), plan.sizes), test_utils=parts
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA: the grouped kernel in bf16")
def test_grouped_kernel_equals_the_loop():
    experts, matrices = (
        torch.rand(64, 8).topk(2).indices.cuda(),
        torch.randn(8, 32, 16).cuda().bfloat16().requires_grad_(),
    )
    plan = Plan.of(experts, 8)
    rows = torch.randn(128, 16).cuda().bfloat16().requires_grad_()
    for f in (grouped_linear, rows_times):
        torch.testing.assert_close(
            f(rows, matrices, plan.sizes), grouped_linear_plain(rows, matrices, plan.sizes), atol=2e-2, rtol=2e-2
        )
    a, b = (
        torch.autograd.grad(f(rows, matrices, plan.sizes).float().sum(), (rows, matrices))
        for f in (grouped_linear, rows_times)
    )
    for mine, theirs in zip(a, b, strict=True):
        torch.testing.assert_close(mine, theirs, atol=5e-2, rtol=5e-2)


def test_plan_sorts_and_unsorts():
    experts = torch.tensor([[2, 0], [0, 1], [2, 1]])
    plan = Plan.of(experts, 4)
    assert plan.groups.tolist() == [0, 0, 1, 1, 2, 2] and plan.sizes.tolist() == [2, 2, 2, 0]
    assert (plan.order // 2).tolist() == [0, 1, 1, 2, 0, 2], "stable: inside an expert, tokens stay in order"
    assert plan.order[plan.back].tolist() == list(range(6))
    assert load_of(experts, 4, torch.tensor([True, False, True])).tolist() == [1, 1, 2, 0]


def test_autocast_multiplies_in_half_precision():
    module = CONFIGS["deepseek-v3"].build(D)
    x, seen = torch.randn(1, 5, D), []
    module.act = lambda g, u, f=module.act: seen.append(g.dtype) or f(g, u)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = module(x, Seq.rows(1, 5))
        with torch.no_grad():
            module(x, Seq.rows(1, 5))
        assert module.logits(x[0]).dtype == torch.float32, "a choice must not hang on rounding"
    y.sum().backward()
    assert seen == [torch.bfloat16] and module.gate_proj.weight.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), module(x, Seq.rows(1, 5))[0], atol=2e-2, rtol=0)


@pytest.mark.slow
def test_compiles_to_one_graph_with_its_gradient():
    module, x = build(CONFIGS["deepseek-v3"])
    module, compiled = module.float(), torch.compile(module.float(), fullgraph=True)

    def run(f):
        module.zero_grad()
        leaf = x.float().requires_grad_()
        y, aux = f(leaf, Seq.of_segments(SEG))
        (y.square().sum() + aux["balance_loss"]).backward()
        return [y, *aux.values(), leaf.grad, *(p.grad.clone() for p in module.parameters())]

    for a, b in zip(run(compiled), run(module), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


# What must hold whatever the numbers


def test_equal_experts_are_one_dense_layer():
    cfg = MoEConfig(n_experts=5, top_k=2, hidden=7)
    module, dense = randomised(cfg.build(D)), GLUConfig(hidden=7).build(D).double()
    with torch.no_grad():
        for name in ("gate_proj", "up_proj", "down_proj"):
            getattr(dense, name).weight.copy_(getattr(module, name).weight[0])
            getattr(module, name).weight.copy_(getattr(dense, name).weight.expand(5, -1, -1))
    x = torch.randn(2, T, D, dtype=torch.float64)
    torch.testing.assert_close(module(x, Seq.rows(2, T))[0], dense(x, None)[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_are_independent(name):
    module, x = build(CONFIGS[name])
    order = torch.randperm(T)
    seq = Seq.rows(2, T)
    torch.testing.assert_close(module(x[:, order], seq)[0], module(x, seq)[0][:, order], atol=1e-12, rtol=0)
    torch.testing.assert_close(module(x[1:, 3:4], Seq.rows(1, 1))[0], module(x, seq)[0][1:, 3:4], atol=1e-12, rtol=0)


def test_no_gradient_through_the_choice_but_through_the_weight():
    module, x = build(CONFIGS["deepseek-v3"])
    (module(x, Seq.rows(2, T))[0] ** 2).sum().backward()
    assert module.router.weight.grad.abs().sum() > 0
    load = [round(v) for v in (module.router_bias.grad / 8).tolist()]  # E load - sum load, E = 8
    assert sum(load) == 0, "the bias's gradient is a count, not a slope"


# Price


@pytest.mark.parametrize("name", CONFIGS)
def test_cost_equals_the_module(name):
    cfg = CONFIGS[name]
    module, price = cfg.build(D), cfg.cost(D)
    assert price.params == sum(p.numel() for p in module.parameters())
    idle = sum(
        p.numel() // cfg.n_experts for m in (module.gate_proj, module.up_proj, module.down_proj) for p in m.parameters()
    )
    assert price.active == price.params - idle * (cfg.n_experts - cfg.top_k)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.randn(2, T, D), Seq.rows(2, T))
    assert counter.get_total_flops() == price.flops * 2 * T


@pytest.mark.parametrize("name", ["mixtral", "deepseek-v3", "top-1"])
def test_saved_values_are_what_autograd_keeps(name):
    cfg, d = MoEConfig(n_experts=8, top_k=CONFIGS[name].top_k, hidden=31, n_shared=CONFIGS[name].n_shared), 24
    module, x = cfg.build(d), torch.randn(2, 63, d, requires_grad=True)
    own, seen = {p.untyped_storage().data_ptr() for p in module.parameters()}, {}

    def pack(t):
        if (at := t.untyped_storage().data_ptr()) not in own:
            seen[at] = (t.untyped_storage().nbytes(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(x, Seq.rows(2, 63))
    assert sum(size for size, _ in seen.values()) / 4 / 126 == pytest.approx(cfg.cost(d).saved, rel=0.15)


# Expert choice


def expert_choice_by_hand(module, cfg, x, seq):
    tokens = [(b, t) for b in range(x.shape[0]) for t in range(x.shape[1])]
    s = {}
    for b, t in tokens:
        z = matvec(module.router.weight.tolist(), x[b, t].tolist())
        total = sum(math.exp(v) for v in z)
        s[b, t] = [math.exp(v) / total if seq.seg is None or seq.seg[b, t] else 0.0 for v in z]
    y, taken = torch.zeros_like(x), set()
    for e in range(cfg.n_experts):
        best = sorted(tokens, key=lambda at: -s[at][e])[: math.ceil(cfg.capacity * len(tokens) / cfg.n_experts)]
        for b, t in best:
            weights = [p.weight[e].tolist() for p in (module.gate_proj, module.up_proj, module.down_proj)]
            gate, up = matvec(weights[0], x[b, t].tolist()), matvec(weights[1], x[b, t].tolist())
            out = matvec(weights[2], [unit("silu", g, u) for g, u in zip(gate, up, strict=True)])
            y[b, t] += s[b, t][e] * torch.tensor(out, dtype=x.dtype)
            taken.add((b, t))
    real = [at for at in tokens if seq.seg is None or seq.seg[at]]
    return y, sum(at not in taken for at in real) / len(real)


@pytest.mark.parametrize("capacity", [1.0, 1.3, 2.0, 4.0])
def test_expert_choice_equals_the_formula(capacity):
    cfg = ExpertChoiceConfig(n_experts=4, hidden=5, capacity=capacity)
    module, x = build(cfg)
    for seq in (Seq.rows(2, T), Seq.of_segments(SEG)):
        y, aux = module(x, seq)
        want, left_out = expert_choice_by_hand(module, cfg, x, seq)
        torch.testing.assert_close(y, want, atol=1e-11, rtol=0)
        assert float(aux["moe_left_out"]) == pytest.approx(left_out)
    assert (y[SEG == 0] == 0).all(), "padding weighs nothing"


def test_expert_choice_sees_the_future_and_says_so(capsys):
    from zero2llm.core.log import log_once

    log_once.cache_clear()
    module, x = build(ExpertChoiceConfig(n_experts=4, hidden=5, capacity=1.0))
    assert "not causal" in capsys.readouterr().err
    changed = x.clone()
    changed[:, -1] *= -3
    assert not torch.allclose(module(x, Seq.rows(2, T))[0][:, :-1], module(changed, Seq.rows(2, T))[0][:, :-1])


def test_expert_choice_refuses_to_decode():
    from zero2llm.layers.memory import Memory
    from zero2llm.layers.mixers.gqa import GQAConfig
    from zero2llm.model.lm import LM
    from zero2llm.model.spec import LayerPattern, LayerSpec, ModelConfig

    cfg = ExpertChoiceConfig(n_experts=4, hidden=5)
    spec = LayerSpec(mixer=GQAConfig(n_heads=2), ffn=cfg)
    model = LM(ModelConfig(vocab_size=7, d_model=D, max_len=8, layers=LayerPattern(pattern=["b"]), blocks={"b": spec}))
    model(torch.zeros(1, 4, dtype=torch.long), Seq.rows(1, 4))
    with pytest.raises(ValueError, match="cannot decode.*kind: moe"):
        model.init_states(1, 8)
    with pytest.raises(ValueError, match="cannot decode"):
        cfg.build(D)(torch.zeros(1, 1, D), Seq.rows(1, 1), Memory())


def test_expert_choice_capacity_of_all_is_the_weighted_sum():
    module, x = build(ExpertChoiceConfig(n_experts=4, hidden=5, capacity=4.0))
    tokens = x.flatten(0, 1)
    s = (tokens @ module.router.weight.T).softmax(-1)
    parts = [
        F.silu(tokens @ g.T) * (tokens @ u.T) @ d.T
        for g, u, d in zip(module.gate_proj.weight, module.up_proj.weight, module.down_proj.weight, strict=True)
    ]
    torch.testing.assert_close(
        module(x, Seq.rows(2, T))[0].flatten(0, 1),
        sum(s[:, e, None] * p for e, p in enumerate(parts)),
        atol=1e-12,
        rtol=0,
    )


def test_expert_choice_cost_equals_the_module():
    cfg = ExpertChoiceConfig(n_experts=4, hidden=5, capacity=1.5)
    module, price = cfg.build(D), cfg.cost(D)
    assert price.params == sum(p.numel() for p in module.parameters()) and price.active == 4 * D + 1.5 * 3 * D * 5
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.randn(2, T, D), Seq.rows(2, T))
    assert counter.get_total_flops() == price.flops * 2 * T


# What cannot be built


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"top_k": 5}, "top_k = 5.*n_experts = 4"),
        ({"top_k": 0}, "top_k = 0"),
        ({"n_experts": 0}, "n_experts = 0"),
        ({"hidden": 0}, "hidden = 0"),
        ({"n_groups": 3, "router": "sigmoid"}, "n_experts = 4.*n_groups = 3"),
        ({"n_groups": 0, "top_groups": 0}, "n_groups = 0"),
        ({"n_groups": 2, "top_groups": 3, "router": "sigmoid"}, "top_groups = 3"),
        ({"n_groups": 2}, "router sigmoid .not softmax"),
        ({"n_groups": 4, "router": "sigmoid", "top_k": 1}, "2 experts each .not 1"),
        ({"n_groups": 2, "router": "sigmoid", "top_k": 3}, "top_k = 3 experts in the 1 best"),
        ({"shared_gate": True}, "n_shared = 0"),
        ({"shared_hidden": 8}, "n_shared = 0"),
        ({"n_shared": -1}, "n_shared = -1"),
        ({"n_shared": 1, "shared_hidden": 0}, "not 0"),
        ({"n_shared": 1, "act": "gptoss"}, "gptoss"),
        ({"balance_weight": -0.1}, "balance_weight = -0.1"),
        ({"z_weight": -0.1}, "z_weight = -0.1"),
        ({"bias_rate": -0.1}, "bias_rate = -0.1"),
        ({"routed_scaling": 0.0}, "routed_scaling = 0.0"),
    ],
    ids=str,
)
def test_moe_refuses(changes, names):
    with pytest.raises(ValueError, match=names):
        MoEConfig(**{"n_experts": 4, "top_k": 2, "hidden": 8} | changes).build(D)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"capacity": 0.0}, "capacity = 0.0"),
        ({"capacity": 4.1}, "capacity = 4.1"),
        ({"n_experts": 0}, "n_experts = 0"),
        ({"hidden": 0}, "hidden = 0"),
    ],
    ids=str,
)
def test_expert_choice_refuses(changes, names):
    with pytest.raises(ValueError, match=names):
        ExpertChoiceConfig(**{"n_experts": 4, "hidden": 8} | changes).build(D)
