"""Adapters by their formulas, in loops and float64: values, gradients, starts, budgets.

Importances and budgets of AdaLoRA are worked out element by element; gradients are compared with those of the formula
written plainly, where DoRA's lengths are constants.
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from zero2llm.adapters import adalora, lowrank
from zero2llm.adapters import wrap as wrapping
from zero2llm.adapters.adalora import AdaLoRAConfig, after_step, penalty
from zero2llm.adapters.dora import DoRAConfig
from zero2llm.adapters.lora import LoRAConfig
from zero2llm.adapters.pissa import PiSSAConfig
from zero2llm.adapters.wrap import adapter_state, load_adapter_state, lr_multipliers, merge, unmerge
from zero2llm.layers.linear import Linear

N, K, R = 7, 5, 3
EXACT = dict(rtol=1e-10, atol=1e-12)


def body(*sizes, bias=True, seed=0):
    """Projections one after the other, called 0, 1, ..., in float64."""
    torch.manual_seed(seed)
    return nn.Sequential(*(Linear(k, n, bias=bias) for k, n in zip(sizes, sizes[1:], strict=False))).double()


def wrap(model, cfg, name="default"):
    """On all of these bare projections, which stand in no block."""
    wrapping.wrap(model, replace(cfg, targets=("*",)) if cfg.targets == ("all-linear",) else cfg, name)


def one(cfg, bias=True, start=False):
    """A wrapped projection (N, K), its adapter off its start unless ``start``."""
    model = body(K, N, bias=bias)
    wrap(model, cfg)
    adapter = model[0].adapters["default"]
    if not start:
        with torch.no_grad():
            for p in adapter.parameters():
                p.add_(0.3 * torch.randn_like(p))
    return model, model[0].base, adapter


def inputs(rows=4, width=K):
    return torch.randn(2, rows // 2, width, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()


def by_hand(base, delta, x):
    """y_ti = sum_j (W_ij + delta_ij) x_tj + b_i, in loops."""
    y = torch.zeros(*x.shape[:-1], N, dtype=torch.float64)
    for t in torch.cartesian_prod(*map(torch.arange, x.shape[:-1])).tolist():
        for i in range(N):
            y[(*t, i)] = 0.0 if base.bias is None else base.bias[i]
            for j in range(K):
                y[(*t, i)] += (base.weight[i, j] + delta[i, j]) * x[(*t, j)]
    return y


def product(a, b):
    """(B A)_ij in loops."""
    out = torch.zeros(len(b), a.shape[1], dtype=torch.float64)
    for i in range(len(b)):
        for j in range(a.shape[1]):
            out[i, j] = sum(b[i, k] * a[k, j] for k in range(len(a)))
    return out


def same_gradients(adapter, y, formula, x):
    """d (weighed sum) / d of every parameter and of x, against autograd on the plain formula."""
    weigh = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    wanted = [*adapter.parameters(), x]
    mine = torch.autograd.grad((y * weigh).sum(), wanted)
    plain = torch.autograd.grad((formula * weigh).sum(), wanted)
    for a, b in zip(mine, plain, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def every_way(model, x, expected):
    """With gradient, without, merged, unmerged again, in evaluation: the same values."""
    torch.testing.assert_close(model(x), expected, **EXACT)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, **EXACT)
        before = model(x)
        merge(model)
        torch.testing.assert_close(model(x), expected, **EXACT)
        unmerge(model)
        assert torch.equal(model(x), before)
    torch.testing.assert_close(F.linear(x, model[0].weight, model[0].bias), expected, **EXACT)
    model.train()


# LoRA


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("stabilized", [False, True])
def test_lora_equals_the_formula(bias, stabilized):
    model, base, adapter = one(LoRAConfig(r=R, alpha=5.0, rank_stabilized=stabilized), bias)
    x = inputs()
    scale = 5.0 / (math.sqrt(3) if stabilized else 3)
    expected = by_hand(base, scale * product(adapter.a, adapter.b), x)
    every_way(model, x, expected)
    formula = F.linear(x, base.weight, base.bias) + scale * (x @ adapter.a.T @ adapter.b.T)
    same_gradients(adapter, model(x), formula, x)


def test_lora_begins_as_the_base():
    """B = 0; A uniform in +-1/sqrt(K); at the first step A has no gradient and B has."""
    torch.manual_seed(0)
    model = nn.Sequential(Linear(400, 30))
    before = model(torch.ones(2, 400))
    wrap(model, LoRAConfig(r=16))
    adapter = model[0].adapters["default"]
    assert torch.equal(model(torch.ones(2, 400)), before)
    assert adapter.b.count_nonzero() == 0
    a = adapter.a.detach()
    assert a.abs().max() <= 1 / 20 and math.isclose(float(a.std()), 1 / 20 / math.sqrt(3), rel_tol=0.03)
    model(torch.randn(3, 400)).square().sum().backward()
    assert adapter.a.grad.count_nonzero() == 0 and adapter.b.grad.count_nonzero() > 0


def test_gaussian_start():
    torch.manual_seed(0)
    model = nn.Sequential(Linear(4000, 8))
    wrap(model, LoRAConfig(r=4, init="gaussian"))
    assert math.isclose(float(model[0].adapters["default"].a.detach().std()), 1 / 4, rel_tol=0.02)


def test_lora_plus():
    model = body(K, N, K)
    wrap(model, LoRAConfig(r=2, lr_ratio=16.0))
    assert lr_multipliers(model) == {f"{i}.adapters.default.{n}": rate for i in (0, 1) for n, rate in (("a", 1.0), ("b", 16.0))}
    wrap(model, DoRAConfig(r=2, lr_ratio=4.0, targets=("1",)), "second")
    assert lr_multipliers(model) == {"1.adapters.second.a": 1.0, "1.adapters.second.b": 4.0, "1.adapters.second.m": 4.0}


@pytest.mark.parametrize("kind", [LoRAConfig, DoRAConfig])
def test_dropout_touches_the_low_rank_path_alone(kind, monkeypatch):
    """The mask is drawn once, on x; the base sees all of x, and evaluation drops nothing."""
    model, base, adapter = one(kind(r=R, alpha=5.0, dropout=0.5))
    x, drawn = inputs(), []

    def fixed(z, p, *args, **more):
        assert p == 0.5
        drawn.append((torch.rand(z.shape, generator=torch.Generator().manual_seed(8)) < 0.5).double() * 2)
        return z * drawn[-1]

    monkeypatch.setattr(F, "dropout", fixed)
    y = model(x)
    low = adapter.scale * ((x * drawn[0]) @ adapter.a.T @ adapter.b.T)
    whole = x @ base.weight.T + low
    if kind is DoRAConfig:
        whole = whole * (adapter.m / lengths_by_hand(base.weight, adapter))
    torch.testing.assert_close(y, whole + base.bias, **EXACT)
    monkeypatch.undo()
    model.eval()
    torch.testing.assert_close(model(x), F.linear(x, model[0].weight, base.bias), **EXACT)


def test_the_operator_equals_its_twin():
    torch.manual_seed(0)
    x, a, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, K), (R, K), (N, R)))
    w, bias = torch.randn(N, K, dtype=torch.float64), torch.randn(N, dtype=torch.float64)
    for b0 in (None, bias):
        both = [f(x, w, b0, a, b, 0.7) for f in (lowrank.low_rank_linear, lowrank.plain)]
        torch.testing.assert_close(*both, **EXACT)
        grads = [torch.autograd.grad(y.cos().sum(), (x, a, b)) for y in both]
        torch.testing.assert_close(*grads, **EXACT)


@pytest.mark.parametrize("kind", [LoRAConfig, DoRAConfig])
def test_a_frozen_weight_costs_no_gradient(kind):
    """FLOPs of a step: the base once each way and four thin products (h, gB, dA, dB), DoRA's lengths; no more. The two that
    accumulate in place are not seen by the counter."""
    rows, n, k, r = 64, 48, 32, 4
    model = nn.Sequential(Linear(k, n))
    wrap(model, kind(r=r))
    x = torch.randn(rows, k, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    lengths = 2 * r * (n * k + r * k + n * r) if kind is DoRAConfig else 0
    assert counter.get_total_flops() == 2 * rows * (2 * n * k + 2 * r * (n + k)) + lengths
    assert model[0].base.weight.grad is None and x.grad is not None
    with FlopCounterMode(display=False) as counter:  # nobody asks for the gradient of x: the first layer over a frozen table
        model(x.detach()).sum().backward()
    assert counter.get_total_flops() == 2 * rows * (n * k + 2 * r * (n + k)) + lengths


# DoRA


def lengths_by_hand(weight, adapter):
    v = weight + adapter.scale * product(adapter.a, adapter.b)
    return torch.stack([sum(v[i, j] ** 2 for j in range(K)).sqrt() for i in range(N)]).detach()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("stabilized", [False, True])
def test_dora_equals_the_formula(bias, stabilized):
    model, base, adapter = one(DoRAConfig(r=R, alpha=5.0, rank_stabilized=stabilized), bias)
    x, length = inputs(), lengths_by_hand(base.weight, adapter)
    c = adapter.m / length
    delta = adapter.scale * product(adapter.a, adapter.b)
    expected = by_hand(base, c[:, None] * (base.weight + delta) - base.weight, x)
    every_way(model, x, expected)
    formula = c * (x @ base.weight.T + adapter.scale * (x @ adapter.a.T @ adapter.b.T))
    formula = formula if base.bias is None else formula + base.bias
    same_gradients(adapter, model(x), formula, x)  # |V| is a constant


def test_dora_begins_as_the_base():
    model, base, adapter = one(DoRAConfig(r=R), start=True)
    torch.testing.assert_close(adapter.m.detach(), base.weight.norm(dim=1), **EXACT)
    torch.testing.assert_close(model(inputs()), base(inputs()), **EXACT)
    assert math.isclose(adapter.scale, 16 / 3)


def test_dora_bears_a_row_of_zeros():
    model = body(K, N)
    with torch.no_grad():
        model[0].weight[2] = 0
    wrap(model, DoRAConfig(r=R))
    y = model(inputs())
    y.sum().backward()
    assert y.isfinite().all() and all(p.grad.isfinite().all() for p in model[0].adapters["default"].parameters())


# PiSSA


@pytest.mark.parametrize("alpha,stabilized", [(3.0, False), (7.0, False), (7.0, True)])
def test_pissa_takes_the_principal_part(alpha, stabilized):
    model, base, adapter = one(PiSSAConfig(r=R, alpha=alpha, rank_stabilized=stabilized), start=True)
    s = alpha / (math.sqrt(R) if stabilized else R)
    torch.testing.assert_close(model(inputs()), base(inputs()), **EXACT)
    values = torch.linalg.svdvals(base.weight)
    taken = s * product(adapter.a, adapter.b)
    torch.testing.assert_close(torch.linalg.svdvals(taken)[:R], values[:R], **EXACT)
    torch.testing.assert_close(torch.linalg.svdvals(base.weight - taken)[: K - R], values[R:], **EXACT)  # the residual's
    torch.testing.assert_close(adapter.a.norm(dim=1), (values[:R] / s).sqrt(), **EXACT)  # the root on both sides
    torch.testing.assert_close(adapter.b.norm(dim=0), (values[:R] / s).sqrt(), **EXACT)


def test_pissa_equals_the_residual_with_a_lora():
    model, base, adapter = one(PiSSAConfig(r=R, alpha=5.0))
    x, s = inputs(), 5 / 3
    residual = base.weight - s * product(adapter.a0, adapter.b0)
    u, values, vh = torch.linalg.svd(base.weight.detach())  # of what A and B have become since, it knows nothing
    torch.testing.assert_close(residual, (u[:, R:K] * values[R:]) @ vh[R:], **EXACT)
    expected = by_hand(base, residual - base.weight + s * product(adapter.a, adapter.b), x)
    every_way(model, x, expected)
    formula = F.linear(x, residual, base.bias) + s * (x @ adapter.a.T @ adapter.b.T)
    same_gradients(adapter, model(x), formula, x)


def test_pissa_learns_at_once_and_leaves_the_base():
    model = body(K, N)
    before = model[0].weight.clone()
    wrap(model, PiSSAConfig(r=R))
    model(inputs()).square().sum().backward()
    adapter = model[0].adapters["default"]
    assert adapter.a.grad.abs().sum() > 0 and adapter.b.grad.abs().sum() > 0
    assert torch.equal(model[0].base.weight, before)
    assert not adapter.a0.requires_grad and not adapter.b0.requires_grad


def test_pissa_with_dropout_drops_only_what_learns(monkeypatch):
    model, base, adapter = one(PiSSAConfig(r=R, alpha=5.0, dropout=0.5))
    monkeypatch.setattr(F, "dropout", lambda z, p, *args, **more: 0 * z)
    x = inputs()
    torch.testing.assert_close(model(x), F.linear(x, base.weight - 5 / 3 * adapter.b0 @ adapter.a0, base.bias), **EXACT)


# AdaLoRA


def test_adalora_equals_the_formula():
    model, base, adapter = one(AdaLoRAConfig(init_r=R, target_r=2, alpha=5.0))
    x, s = inputs(), 5.0 / (3 + 1e-5)
    scaled = torch.stack([adapter.e[k, 0] * adapter.a[k] for k in range(R)])
    every_way(model, x, by_hand(base, s * product(scaled, adapter.b), x))
    formula = F.linear(x, base.weight, base.bias) + s * (x @ (adapter.a * adapter.e).T @ adapter.b.T)
    same_gradients(adapter, model(x), formula, x)


def test_adalora_begins_as_the_base():
    torch.manual_seed(0)
    model = nn.Sequential(Linear(900, 800))
    wrap(model, AdaLoRAConfig(init_r=12, target_r=2))
    adapter = model[0].adapters["default"]
    assert adapter.e.count_nonzero() == 0 and adapter.e.shape == (12, 1)
    for p in (adapter.a, adapter.b):
        assert math.isclose(float(p.detach().std()), 0.02, rel_tol=0.02)
    x = torch.randn(2, 900)
    assert torch.equal(model(x), model[0].base(x))


def test_budget_by_hand():
    cfg = AdaLoRAConfig(init_r=6, target_r=2, warmup=2, final=3)
    cube = lambda left: int(12 * left**3 + 6)  # 3 projections: 18 ranks to 6
    wanted = {0: 18, 1: 18, 2: 18, 3: cube(4 / 5), 4: cube(3 / 5), 5: cube(2 / 5), 6: cube(1 / 5), 7: 6, 8: 6, 10: 6}
    assert wanted[3] == 12 and wanted[4] == 8 and wanted[5] == 6
    assert {step: cfg.budget(step, 10, 3) for step in wanted} == wanted
    assert [AdaLoRAConfig(init_r=6, target_r=2).budget(t, 4, 1) for t in (1, 2, 3, 4)] == [3, 2, 2, 2]


def test_penalty_by_hand():
    model = body(K, N, K)
    wrap(model, AdaLoRAConfig(init_r=R, target_r=2, orth_weight=0.3))
    norms = []
    for i in (0, 1):
        a, b = model[i].adapters["default"].a, model[i].adapters["default"].b
        for gram in (product(a.T, a), product(b, b.T)):
            norms.append(math.sqrt(sum(float(gram[i, j] - float(i == j)) ** 2 for i in range(R) for j in range(R))))
    assert math.isclose(float(penalty(model)), 0.3 * sum(norms) / 4, rel_tol=1e-12)
    penalty(model).backward()
    assert model[0].adapters["default"].a.grad.abs().sum() > 0 and model[0].adapters["default"].e.grad is None
    assert float(penalty(body(K, N))) == 0


def trained(model, steps, total, start=1, lr=0.3, watch=lambda step: None):
    """Plain SGD on a fixed stream, with the allocation after each step."""
    params = [p for p in model.parameters() if p.requires_grad]
    for step in range(start, start + steps):
        x = torch.randn(6, K, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        (model(x).square().sum() + penalty(model)).backward()
        with torch.no_grad():
            for p in params:
                p -= lr * 0.01 * p.grad
        watch(step)
        after_step(model, step, total)
        for p in params:
            p.grad = None


def busy(cfg):
    """Three projections whose singular values are off zero."""
    model = body(K, N, K, N)
    wrap(model, cfg)
    with torch.no_grad():
        for m in model:
            m.adapters["default"].e.add_(torch.randn_like(m.adapters["default"].e))
    return model


def test_allocation_by_hand():
    """Importance, uncertainty and score of every element in loops; exactly the budget stays, the best of it."""
    cfg = AdaLoRAConfig(init_r=4, target_r=2, warmup=1, final=2, every=2, beta1=0.7, beta2=0.8)
    model, total = busy(cfg), 7
    adapters = [m.adapters["default"] for m in model]
    smooth, spread, log = {}, {}, {}

    def watch(step):
        if step < total - cfg.final:
            for n, adapter in enumerate(adapters):
                for key, p in adapter.named_parameters():
                    for at in torch.cartesian_prod(*map(torch.arange, p.shape)).tolist():
                        now, cell = abs(float(p[tuple(at)] * p.grad[tuple(at)])), (n, key, *at)
                        smooth[cell] = 0.7 * smooth.get(cell, 0.0) + 0.3 * now
                        spread[cell] = 0.8 * spread.get(cell, 0.0) + 0.2 * abs(now - smooth[cell])
        score = lambda *cell: smooth[cell] * spread[cell]
        log[step] = {
            (n, i): score(n, "e", i, 0) + sum(score(n, "a", i, k) for k in range(ad.a.shape[1])) / ad.a.shape[1]
            + sum(score(n, "b", k, i) for k in range(len(ad.b))) / len(ad.b)
            for n, ad in enumerate(adapters) for i in range(4)
        }  # fmt: skip

    alive = lambda: {(n, i) for n, ad in enumerate(adapters) for i in range(4) if ad.e[i, 0] != 0}
    for step in range(1, total + 1):
        trained(model, 1, total, step, watch=watch)
        for n, adapter in enumerate(adapters):
            assert adapter.scores().tolist() == pytest.approx([log[step][n, i] for i in range(4)], rel=1e-9)
        if step in (2, 4, 5):  # due every second step after the warm-up, and once more when the schedule ends
            best = sorted(log[step], key=log[step].get, reverse=True)[: cfg.budget(step, total, 3)]
            assert alive() == set(best)
        elif step in (1, 3):
            assert len(alive()) == 12  # in between what was put out may come back
        else:
            assert alive() == set(best) and len(best) == 6  # settled


def test_an_interrupted_allocation_goes_on_exactly():
    cfg = AdaLoRAConfig(init_r=4, target_r=2, final=2)
    whole = busy(cfg)
    trained(whole, 9, 9)
    first = busy(cfg)
    trained(first, 5, 9)
    second = body(K, N, K, N)
    wrap(second, cfg)
    load_adapter_state(second, adapter_state(first, "default"), "default")
    trained(second, 4, 9, start=6)
    for key, value in adapter_state(whole, "default").items():
        assert torch.equal(value, adapter_state(second, "default")[key]), key


def test_after_step_needs_gradients_and_room():
    model = busy(AdaLoRAConfig(init_r=4, target_r=2, warmup=3, final=3))
    with pytest.raises(ValueError, match="between the optimizer's step and zero_grad"):
        after_step(model, 1, 10)
    with pytest.raises(ValueError, match="warmup = 3 and final = 3 leave no step of 6"):
        after_step(model, 1, 6)
    adalora.after_step(body(K, N), 1, 2)  # nothing to do without an AdaLoRA
