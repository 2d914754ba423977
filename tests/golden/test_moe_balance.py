"""What keeps experts even: losses that mean the same for every shape, and a choice bias that follows the global load."""

import pytest
import torch

from zero2llm.core.batch import Batch
from zero2llm.core.config import parse
from zero2llm.core.seq import Seq
from zero2llm.layers.ffns.moe import MoEConfig
from zero2llm.layers.ffns.routers import balance_loss, load_statistics, z_loss
from zero2llm.model.lm import LM
from zero2llm.model.spec import ModelConfig
from zero2llm.ops.route import load_of
from zero2llm.optim.adamw import AdamWConfig
from zero2llm.optim.build import build_optim, split_parameters
from zero2llm.optim.muon import Muon, MuonConfig
from zero2llm.optim.schedule import ConstantConfig
from zero2llm.optim.sign import SignSGD
from zero2llm.train.fit import FitConfig, fit
from zero2llm.train.objectives.clm import CLM

D = 16


def tiny(layers=2, **changes) -> LM:
    ffn = {"kind": "moe", "n_experts": 6, "top_k": 2, "hidden": 8, "router": "sigmoid", "bias_rate": 0.05, "balance_weight": 0.0}
    block = {"mixer": {"kind": "gqa", "n_heads": 2, "position": {"kind": "rope"}}, "ffn": ffn | changes}
    data = {"vocab_size": 31, "d_model": D, "max_len": 64, "layers": {"pattern": ["b"], "repeat": layers}, "blocks": {"b": block}}
    return LM(parse(ModelConfig, data))


def ragged(rows=6, T=12) -> Batch:
    """Rows of different length, and few targets in the long ones: neither count stands for the other."""
    tokens = torch.randint(0, 31, (rows, T))
    trainable = torch.rand(rows, T) < torch.linspace(1.0, 0.1, rows)[:, None]
    return Batch.shifted(tokens, trainable, Seq.ragged(torch.arange(rows) % 5 + 7, T))


class Repeat:
    def __init__(self, *batches):
        self.batches = batches

    def __iter__(self):
        while True:
            yield from self.batches


# The losses


@pytest.mark.parametrize(("n", "e", "k"), [(12, 4, 1), (12, 4, 2), (60, 6, 3)])
def test_balance_is_one_when_even_and_e_when_one_expert_takes_all(n, e, k):
    even = torch.full((n, e), 1 / e)
    assert float(balance_loss(even, torch.full((e,), n * k / e), None)) == pytest.approx(1)
    alone = torch.zeros(n, e)
    alone[:, 1] = 1
    assert float(balance_loss(alone, n * alone[0], None)) == pytest.approx(e)


def test_losses_do_not_depend_on_shape_or_padding():
    module = MoEConfig(n_experts=5, top_k=2, hidden=4, balance_weight=1.0, z_weight=1.0, bias_rate=0.0).build(D).double()
    x = torch.randn(2, 9, D, dtype=torch.float64)
    plain = module(x, Seq.rows(2, 9))[1]
    assert set(plain) == {"balance_loss", "router_z_loss", "moe_peak_load", "moe_idle"}
    others = {
        "one row": module(x.view(1, 18, D), Seq.rows(1, 18))[1],
        "twice": module(torch.cat((x, x)), Seq.rows(4, 9))[1],
        "padded": module(torch.cat((x, 9 * torch.randn(2, 4, D, dtype=torch.float64)), 1), Seq.ragged(torch.tensor([9, 9]), 13))[1],
    }
    for name, aux in others.items():
        for key, value in plain.items():
            torch.testing.assert_close(aux[key], value, atol=1e-12, rtol=0, msg=f"{name} {key}")


def test_nothing_but_padding_gives_no_loss_and_no_nan():
    module = MoEConfig(n_experts=5, top_k=2, hidden=4, z_weight=1.0).build(D)
    with torch.no_grad():
        y, aux = module(torch.randn(1, 4, D), Seq(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.int32)))
    assert torch.isfinite(y).all() and float(aux["balance_loss"]) == float(aux["router_z_loss"]) == 0 and float(aux["moe_idle"]) == 1


def test_balance_gradient_lowers_the_crowded_expert():
    logits = torch.tensor([[2.0, 0.0, 0.0]] * 4, requires_grad=True)
    scores = logits.softmax(-1)
    balance_loss(scores, load_of(scores.topk(1).indices, 3).float(), None).backward()
    assert (logits.grad[:, 0] > 0).all() and (logits.grad[:, 1:] < 0).all()


def test_z_loss_by_hand():
    logits = torch.tensor([[0.0, 0.0], [1.0, -1.0], [50.0, 0.0]], dtype=torch.float64)
    real = torch.tensor([True, True, False])
    want = (torch.tensor(2.0).log() ** 2 + (torch.tensor(1.0).exp() + torch.tensor(-1.0).exp()).log() ** 2) / 2
    assert float(z_loss(logits, real)) == pytest.approx(float(want))


def test_statistics():
    aux = load_statistics(torch.tensor([6.0, 2.0, 0.0, 0.0]))
    assert float(aux["moe_peak_load"]) == 3 and float(aux["moe_idle"]) == 0.5


def test_weights_multiply_the_losses_and_zero_removes_them():
    x, seq = torch.randn(1, 9, D), Seq.rows(1, 9)
    torch.manual_seed(1)
    one = MoEConfig(n_experts=4, top_k=2, hidden=4, balance_weight=1.0, z_weight=1.0).build(D)
    torch.manual_seed(1)
    part = MoEConfig(n_experts=4, top_k=2, hidden=4, balance_weight=0.25, z_weight=0.5).build(D)
    a, b = one(x, seq)[1], part(x, seq)[1]
    torch.testing.assert_close(b["balance_loss"], 0.25 * a["balance_loss"])
    torch.testing.assert_close(b["router_z_loss"], 0.5 * a["router_z_loss"])
    none = MoEConfig(n_experts=4, top_k=2, hidden=4, balance_weight=0.0).build(D)(x, seq)[1]
    assert not any(key.endswith("_loss") for key in none)


# The choice bias


def counts(model, batch):
    """(layers, E) choices of the real tokens of a batch, each layer's own."""
    found, real = [], (batch.seq.seg != 0).flatten()
    for block in model.blocks:

        def route(logits, right=block.ffn.route):
            scores, weights, experts = right(logits)
            found.append(torch.stack([(experts[real] == e).sum() for e in range(logits.shape[1])]))
            return scores, weights, experts

        block.ffn.route = route
    with torch.no_grad():
        model(batch.tokens, batch.seq)
    for block in model.blocks:
        del block.ffn.route
    return torch.stack(found)


def biases(model):
    return torch.stack([block.ffn.router_bias.detach() for block in model.blocks])


def test_one_step_moves_each_bias_against_its_load():
    model, batch = tiny(), ragged()
    load = counts(model, batch).float()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConstantConfig, "factor", lambda *_: 0.25)
        fit(model, CLM(), Repeat(batch), build_optim(model, AdamWConfig(lr=1e-9)), FitConfig(steps=1, clip=1e-3, schedule=ConstantConfig()))
    torch.testing.assert_close(biases(model), 0.05 * (load.mean(1, keepdim=True) - load).sign())
    assert (biases(model) != 0).any(), "neither warm-up nor clipping may shrink the step"


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("micro", [1, 4])
def test_micro_batches_give_the_bias_of_the_whole_batch(micro, recompute):
    model, batches = tiny(), [ragged() for _ in range(3)]
    twin = LM.clone(model)
    for m, rows in ((model, 6), (twin, micro)):
        cfg = FitConfig(steps=6, micro_rows=rows, recompute=recompute and m is twin, schedule=ConstantConfig())
        fit(m, CLM(), Repeat(*batches), build_optim(m, AdamWConfig(lr=1e-4)), cfg)
    assert torch.equal(biases(model), biases(twin)) and biases(model).abs().max() >= 0.1
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=0)


def test_gradient_is_the_global_count_whatever_the_targets():
    model, batch = tiny(), ragged()
    load = counts(model, batch)
    for part in batch.split(1):
        (3.7 * CLM()(model, part).total).backward()  # as a loss scale would
    got = torch.stack([block.ffn.router_bias.grad for block in model.blocks])
    assert torch.equal(got, (6 * load - load.sum(1, keepdim=True)).float())


def test_an_objective_that_ignores_aux_still_balances():
    model, batch = tiny(), ragged()
    model(batch.tokens, batch.seq)[0].sum().backward()
    assert all(block.ffn.router_bias.grad.abs().sum() > 0 for block in model.blocks)


def test_bias_weighs_nothing():
    """A constant added to every bias changes no choice, and so nothing at all."""
    model, batch = tiny(), ragged()
    before = model(batch.tokens, batch.seq)[0]
    with torch.no_grad():
        for block in model.blocks:
            block.ffn.router_bias.add_(5.0)
    assert torch.equal(model(batch.tokens, batch.seq)[0], before)


@pytest.mark.parametrize("router", ["sigmoid", "softmax"])
def test_bias_evens_out_a_lopsided_router(router):
    """Every token starts out preferring the same experts; after 60 steps of bias alone all are used about alike."""
    model = tiny(1, router=router, bias_rate=0.02, hidden=4)
    with torch.no_grad():
        model.blocks[0].ffn.router.weight.mul_(20)
        model.blocks[0].ffn.router_bias.copy_(torch.tensor([0.6, 0.4, 0.0, 0.0, 0.0, -0.2]))
    batch = Batch.shifted(torch.randint(0, 31, (8, 32)), torch.ones(8, 32), Seq.rows(8, 32))
    seen = []
    optim = build_optim(model, AdamWConfig(lr=1e-9))
    fit(model, CLM(), Repeat(batch), optim, FitConfig(steps=60, micro_rows=8), hooks=[lambda s: seen.append(s.metrics)])
    assert seen[0]["moe_peak_load"] > 2.5
    assert seen[-1]["moe_peak_load"] < 1.35 and seen[-1]["moe_idle"] == 0


def test_balance_loss_evens_out_a_lopsided_router():
    model = tiny(1, router="softmax", bias_rate=None, balance_weight=0.1)
    with torch.no_grad():
        model.blocks[0].ffn_norm.weight.fill_(1.0)
        model.blocks[0].ffn.router.weight[0].fill_(0.0)
        model.blocks[0].ffn.router.weight.mul_(10)
    batch = Batch.shifted(torch.randint(0, 31, (8, 32)), torch.ones(8, 32), Seq.rows(8, 32))
    seen = []
    fit(model, CLM(), Repeat(batch), build_optim(model, AdamWConfig(lr=2e-2)), FitConfig(steps=60, micro_rows=8), hooks=[lambda s: seen.append(s.metrics)])
    assert seen[-1]["balance_loss"] < seen[0]["balance_loss"] and seen[-1]["moe_peak_load"] < 1.4
    assert seen[-1]["loss"] < 0.8 * seen[0]["loss"]


def test_expert_choice_trains_without_any_balance():
    block = {"mixer": {"kind": "gqa", "n_heads": 2}, "ffn": {"kind": "expert_choice", "n_experts": 6, "hidden": 8}}
    data = {"vocab_size": 31, "d_model": D, "max_len": 64, "layers": {"pattern": ["b"]}, "blocks": {"b": block}}
    model, seen = LM(parse(ModelConfig, data)), []
    fit(model, CLM(), Repeat(ragged()), build_optim(model, AdamWConfig(lr=2e-2)), FitConfig(steps=40, micro_rows=6), hooks=[lambda s: seen.append(s.metrics)])
    assert seen[-1]["loss"] < 0.5 * seen[0]["loss"] and 0 <= seen[-1]["moe_left_out"] < 0.5


# The optimizer


@pytest.mark.parametrize("cfg", [AdamWConfig(lr=1e-2, weight_decay=0.5), MuonConfig(lr=1e-2, weight_decay=0.5)], ids=["adamw", "muon"])
def test_groups_of_a_mixture(cfg):
    model = tiny(1, bias=True)
    groups = {kind: {name.removeprefix("blocks.0.ffn.") for name, _ in group if ".ffn." in name} for kind, group in split_parameters(model).items()}
    assert groups["choice"] == {"router_bias"}
    assert groups["matrix"] == {"router.weight", "gate_proj.weight", "up_proj.weight", "down_proj.weight"}
    assert groups["vector"] == {"router.bias", "gate_proj.bias", "up_proj.bias", "down_proj.bias"}, "(E, N), but a bias"
    optim = build_optim(model, cfg)
    bias = model.blocks[0].ffn.router_bias
    assert id(bias) not in {id(p) for p in optim.params} and isinstance(optim.parts[-1], SignSGD)
    optim.set_lr(0.1)
    bias.grad = torch.tensor([1.0, -1.0, 0.0, 5.0, -7.0, 2.0])
    optim.step()
    assert bias.tolist() == pytest.approx([-0.05, 0.05, 0, -0.05, 0.05, -0.05])
    optim.zero_grad()
    assert bias.grad is None
    assert not any("router_bias" in name for name in optim.state_tensors())


def test_a_fixed_bias_is_left_alone():
    model = tiny(1, bias_rate=0.0)
    assert not model.blocks[0].ffn.router_bias.requires_grad and not split_parameters(model)["choice"]
    assert not isinstance(build_optim(model, AdamWConfig()).parts[-1], SignSGD)
    fit(model, CLM(), Repeat(ragged()), build_optim(model, AdamWConfig()), FitConfig(steps=1))
    assert (model.blocks[0].ffn.router_bias == 0).all()


def test_muon_treats_each_expert_as_a_matrix():
    stacked = torch.nn.Parameter(torch.randn(3, 5, 7))
    single = [torch.nn.Parameter(w.clone()) for w in stacked.detach()]
    a, b = Muon([{"params": [stacked]}], MuonConfig()), Muon([{"params": single}], MuonConfig())
    for _ in range(3):
        stacked.grad = torch.randn(3, 5, 7)
        for p, g in zip(single, stacked.grad, strict=True):
            p.grad = g.clone()
        a.step(), b.step()
    torch.testing.assert_close(stacked.detach(), torch.stack([p.detach() for p in single]), atol=1e-6, rtol=0)


def test_expert_weights_are_initialised_like_the_others():
    model = tiny(2, n_experts=32, hidden=64, bias=True)
    ffn = model.blocks[0].ffn
    for w, std in ((ffn.gate_proj, 0.02), (ffn.up_proj, 0.02), (ffn.down_proj, 0.02 / 2)):
        assert float(w.weight.detach().std()) == pytest.approx(std, rel=0.02) and (w.bias == 0).all()
