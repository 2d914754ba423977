"""Norms against torch and transformers, in full and half precision, forward and backward."""

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm

from zero2llm.layers.norms.batch import BatchNormConfig
from zero2llm.layers.norms.dyt import DyTConfig
from zero2llm.layers.norms.rms import RMSNormConfig

D = 12
CLOSE = dict(atol=2e-6, rtol=1e-5)


def grads(module, x, probe):
    return torch.autograd.grad((module(x) * probe).sum(), [x, *module.parameters()])


def agree(ours, theirs, x, **close):
    torch.testing.assert_close(ours(x), theirs(x), **close)
    probe = torch.randn_like(x)
    for a, b in zip(grads(ours, x, probe), grads(theirs, x, probe), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("oracle", [GemmaRMSNorm, Qwen3NextRMSNorm])
@pytest.mark.oracle("norm:rms_plus_one", of="transformers Gemma, Qwen3-Next", way="forward")
def test_plus_one_equals_gemma_and_qwen3_next(oracle, dtype):
    ours, theirs = RMSNormConfig(eps=1e-3, plus_one=True).build(D), oracle(D, 1e-3)
    with torch.no_grad():
        theirs.weight.copy_(ours.weight.normal_())
    x = (3 * torch.randn(2, 7, D)).to(dtype).requires_grad_()
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    assert ours(x).dtype == dtype
    if dtype == torch.float32:
        agree(ours, theirs, x, **CLOSE)
    else:
        assert torch.equal(ours(x), theirs(x)), "one rounding, at the same place"


def test_one_plus_w_multiplies_before_the_cast_and_w_behind_it():
    """In bfloat16 the two orders differ in the last bit of many values: the variants are not one formula."""
    plus, plain = RMSNormConfig(plus_one=True).build(D).bfloat16(), RMSNormConfig().build(D).bfloat16()
    with torch.no_grad():
        plus.weight.copy_(torch.randn(D))
        plain.weight.copy_(1 + plus.weight)
        plus.weight.copy_(plain.weight - 1)
    keep = (1 + plus.weight) == plain.weight
    x = 3 * torch.randn(200, D).bfloat16()
    a, b = plus(x)[:, keep], plain(x)[:, keep]
    assert keep.sum() > 3 and (a != b).any()
    torch.testing.assert_close(a, b, atol=0, rtol=2**-7)


@pytest.mark.oracle("norm:batch", of="torch", way="both")
def test_batch_norm_equals_torch_over_several_steps():
    ours, theirs = BatchNormConfig(eps=1e-3, momentum=0.3).build(D), nn.BatchNorm1d(D, 1e-3, 0.3)
    with torch.no_grad():
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            q.copy_(p.normal_())

    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = theirs

        def forward(self, x):
            return self.norm(x.flatten(0, 1)).view_as(x)

    for n in (2, 5, 3):
        agree(ours, Rows(), (torch.randn(n, 7, D) * 2 + 1).requires_grad_(), **CLOSE)
        torch.testing.assert_close(ours.running_mean, theirs.running_mean, **CLOSE)
        torch.testing.assert_close(ours.running_var, theirs.running_var, **CLOSE)
    agree(ours.eval(), Rows().eval(), torch.randn(2, 7, D, requires_grad=True), **CLOSE)


def test_a_batch_norm_state_is_torch_s_but_for_the_counter():
    theirs = nn.BatchNorm1d(D).state_dict()
    assert {n: p.shape for n, p in BatchNormConfig().build(D).state_dict().items()} == {
        n: p.shape for n, p in theirs.items() if n != "num_batches_tracked"
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cfg", [DyTConfig(), BatchNormConfig()], ids=lambda c: c.kind)
def test_half_precision_is_near_full(cfg, dtype):
    module, x = cfg.build(D), torch.randn(2, 7, D)
    full, half = module(x), cfg.build(D).to(dtype)(x.to(dtype))
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), full, atol=2e-2, rtol=2e-2)
