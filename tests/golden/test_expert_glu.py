"""The operator of all experts' gated units, by its twin: each expert alone, in plain torch, under autograd."""

import pytest
import torch

from zero2llm.layers.activations import gated
from zero2llm.layers.ffns.moe import MoEConfig
from zero2llm.ops.expert_glu import ACTS, expert_glu, glu_forward

SIZES = torch.tensor([4, 0, 1, 6])


def plain(x, gate, up, down, sizes, act):
    rows = x.split(sizes.tolist())
    return torch.cat([gated(act)(r @ g.mT, r @ u.mT) @ d.mT for r, g, u, d in zip(rows, gate, up, down, strict=True)])


def leaves(dtype=torch.float64):
    torch.manual_seed(1)
    shapes = (11, 6), (4, 5, 6), (4, 5, 6), (4, 6, 5)
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]


@pytest.mark.parametrize("act", ACTS)
def test_expert_glu_equals_its_twin(act):
    inputs = leaves()
    ours, theirs = expert_glu(*inputs, SIZES, act), plain(*inputs, SIZES, act)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    dy = torch.randn_like(theirs)
    for a, b in zip(torch.autograd.grad(ours, inputs, dy), torch.autograd.grad(theirs, inputs, dy), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_an_expert_that_nobody_chose_has_no_gradient():
    inputs = leaves()
    for g in torch.autograd.grad(expert_glu(*inputs, SIZES, "silu").sum(), inputs[1:]):
        assert (g[1] == 0).all() and (g[0] != 0).any(), "0, not memory's leavings"


def test_finite_differences():
    assert torch.autograd.gradcheck(lambda *t: expert_glu(*t, SIZES, "silu"), leaves())


def test_operator_keeps_torch_s_contract():
    parts = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(glu_forward, (*leaves(), SIZES, "gelu"), test_utils=parts)


def test_autocast_gives_full_precision_gradients():
    inputs = leaves(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = expert_glu(*inputs, SIZES, "silu")
    assert y.dtype == torch.bfloat16
    for g, t in zip(torch.autograd.grad(y.float().sum(), inputs), inputs, strict=True):
        assert g.dtype == torch.float32 and g.shape == t.shape


@pytest.mark.parametrize("act", ["silu", "gelu", "relu2"])
def test_training_equals_inference(act):
    """The layer takes this operator with gradients and three grouped products without."""
    from zero2llm.core.seq import Seq

    layer = MoEConfig(n_experts=5, top_k=2, hidden=7, act=act).build(8).double()
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    with torch.no_grad():
        alone, _ = layer(x, Seq.rows(3, 4))
    torch.testing.assert_close(layer(x, Seq.rows(3, 4))[0], alone, atol=1e-12, rtol=0)
