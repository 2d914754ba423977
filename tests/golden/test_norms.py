"""Norms worked by hand in floats; and why batch normalisation has no place in a language model, shown."""

import math

import pytest
import torch

from tests.golden.test_layers import EXACT, randomised
from zero2llm.core.config import parse
from zero2llm.core.log import log_once
from zero2llm.core.seq import Seq
from zero2llm.layers.norms.batch import BatchNormConfig
from zero2llm.layers.norms.dyt import DyTConfig
from zero2llm.layers.norms.layer import LayerNormConfig
from zero2llm.layers.norms.rms import RMSNormConfig
from zero2llm.model.lm import LM
from zero2llm.model.spec import ModelConfig

D = 5


def values(*shape):
    return 3 * torch.randn(*shape, dtype=torch.float64) + 1


def test_dyt():
    module, x = randomised(DyTConfig(alpha=0.3).build(D)), values(3, D)
    alpha, w, b = module.alpha.item(), module.weight.tolist(), module.bias.tolist()
    expected = [[math.tanh(alpha * v) * w[c] + b[c] for c, v in enumerate(row)] for row in x.tolist()]
    torch.testing.assert_close(module(x), torch.tensor(expected, dtype=torch.float64), **EXACT)


def test_dyt_starts_as_the_tanh_of_half():
    x = values(2, 3, D)
    torch.testing.assert_close(DyTConfig().build(D).double()(x), (x / 2).tanh(), **EXACT)


def test_rms_norm_plus_one_starts_as_plain_and_scales_by_one_plus_w():
    module, x = RMSNormConfig(eps=0.3, plus_one=True).build(D).double(), values(4, D)
    rows = [[v / math.sqrt(math.fsum(u * u for u in row) / D + 0.3) for v in row] for row in x.tolist()]
    torch.testing.assert_close(module(x), torch.tensor(rows, dtype=torch.float64), **EXACT)
    w = randomised(module).weight.tolist()
    expected = [[v * (1 + w[c]) for c, v in enumerate(row)] for row in rows]
    torch.testing.assert_close(module(x), torch.tensor(expected, dtype=torch.float64), **EXACT)


def batch_norm_by_hand(module, x, momentum, eps):
    """(outputs, running mean, running variance) after one training batch of shape (B, T, D)."""
    tokens, old = [t for row in x.tolist() for t in row], (module.running_mean.tolist(), module.running_var.tolist())
    n, w, b = len(tokens), module.weight.tolist(), module.bias.tolist()
    mean = [math.fsum(t[c] for t in tokens) / n for c in range(D)]
    square = [math.fsum((t[c] - mean[c]) ** 2 for t in tokens) for c in range(D)]
    out = [[(t[c] - mean[c]) / math.sqrt(square[c] / n + eps) * w[c] + b[c] for c in range(D)] for t in tokens]
    new = [[(1 - momentum) * o + momentum * v for o, v in zip(olds, news, strict=True)] for olds, news in zip(old, (mean, [s / (n - 1) for s in square]), strict=True)]
    return torch.tensor(out, dtype=torch.float64).view_as(x), *(torch.tensor(v, dtype=torch.float64) for v in new)


def test_batch_norm_over_two_batches_and_then_eval():
    module = randomised(BatchNormConfig(eps=0.2, momentum=0.3).build(D))
    for x in (values(2, 3, D), values(1, 4, D)):
        expected, mean, var = batch_norm_by_hand(module, x, 0.3, 0.2)
        torch.testing.assert_close(module(x), expected, **EXACT)
        torch.testing.assert_close(module.running_mean, mean, **EXACT)
        torch.testing.assert_close(module.running_var, var, **EXACT)
    x, module = values(2, 2, D), module.eval()
    before = module.running_mean.clone()
    expected = (x - mean) / (var + 0.2).sqrt() * module.weight + module.bias
    torch.testing.assert_close(module(x), expected, **EXACT)
    assert torch.equal(module.running_mean, before), "eval measures nothing"


def language_model(kind):
    block = {"mixer": {"kind": "gqa", "n_heads": 2}, "ffn": {"kind": "glu", "hidden": 8}, "norm": {"kind": kind}}
    data = {"vocab_size": 11, "d_model": 8, "max_len": 16, "layers": {"pattern": ["b"]}, "blocks": {"b": block}}
    return randomised(LM(parse(ModelConfig, data | {"final_norm": {"kind": kind}})))


def difference(model, change, seq, look):
    """How much the hidden states at ``look`` move when the tokens at ``change`` become others."""
    x = torch.arange(16).view(2, 8) % 11
    other = x.clone()
    other[change] = (other[change] + 1) % 11
    with torch.no_grad():
        return (model(x, seq)[0][look] - model(other, seq)[0][look]).abs().max().item()


LEAKS = {  # what must not matter -> (tokens that change, tokens that are looked at)
    "the future": ((0, 7), (0, slice(0, 7))),
    "another row": ((1, 2), (0, slice(None))),
    "another document": ((0, 1), (0, slice(4, 8))),
    "padding": ((1, 7), (1, slice(0, 6))),
}


@pytest.mark.parametrize("what", LEAKS)
def test_batch_norm_leaks_in_training_and_not_in_eval(what):
    change, look = LEAKS[what]
    seq = Seq.of_segments(torch.tensor([[1, 1, 1, 1, 2, 2, 2, 2], [3, 3, 3, 3, 3, 3, 0, 0]]))
    if what in ("the future", "another row"):
        seq = Seq.rows(2, 8)
    model = language_model("batch")
    assert difference(model.train(), change, seq, look) > 1e-3
    assert difference(model.eval(), change, seq, look) == 0
    for kind in ("rms", "layer", "dyt"):
        assert difference(language_model(kind).train(), change, seq, look) == 0


def test_batch_norm_says_once_that_it_leaks_and_only_if_it_trains(capsys):
    log_once.cache_clear()
    model = language_model("batch").eval()
    assert capsys.readouterr().err == ""
    model.train()
    model.train()
    assert capsys.readouterr().err.count("batch norm leaks while it trains") == 1


def test_two_micro_batches_are_not_one_batch():
    x = torch.randint(0, 11, (4, 8))
    for kind, equal in (("batch", False), ("rms", True), ("dyt", True)):
        model = language_model(kind).train()
        whole = model(x, Seq.rows(4, 8))[0]
        halves = torch.cat([model(half, Seq.rows(2, 8))[0] for half in x.chunk(2)])
        assert torch.allclose(whole, halves, atol=1e-12) == equal, kind


def test_impossible_norms_are_refused_with_their_values():
    with pytest.raises(ValueError, match="alpha = 0.0 must be positive"):
        DyTConfig(alpha=0.0).build(D)
    for momentum in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"momentum = {momentum} must be above 0"):
            BatchNormConfig(momentum=momentum).build(D)
    for cfg in (RMSNormConfig(eps=-1e-6), LayerNormConfig(eps=-1e-6), BatchNormConfig(eps=-1e-6)):
        with pytest.raises(ValueError, match="eps = -1e-06 must not be negative"):
            cfg.build(D)
    with pytest.raises(ValueError, match="single token"):
        BatchNormConfig().build(D)(torch.randn(1, 1, D))


@pytest.mark.parametrize("cfg", [DyTConfig(), BatchNormConfig(), RMSNormConfig(plus_one=True)], ids=lambda c: c.kind)
def test_gradients_equal_finite_differences(cfg):
    module = randomised(cfg.build(D))
    params = {n: p.detach().clone().requires_grad_() for n, p in module.named_parameters()}
    x = values(2, 3, D).requires_grad_()
    run = lambda x, *ps: torch.func.functional_call(module, dict(zip(params, ps, strict=True)), (x,))
    assert torch.autograd.gradcheck(run, (x, *params.values()))
