"""NF4 against bitsandbytes on a CPU: the same codes, scales and values to the bit, the same product and gradient."""

import importlib.util

import pytest
import torch
from torch import nn

from tests.golden.test_nf4 import batch, small, weight
from zero2llm.layers.nf4 import NF4Linear, quantize_model
from zero2llm.ops import nf4
from zero2llm.ops.nf4 import CODES, DYNAMIC, absmax_of, dequantize, nearest, quantize, quantize_absmax
from zero2llm.train.objectives.clm import CLM

bnb = pytest.importorskip("bitsandbytes")
functional = bnb.functional

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def test_tables():
    assert torch.equal(CODES, functional.get_4bit_type("nf4", "cpu"))
    assert torch.equal(DYNAMIC, functional.create_dynamic_map())


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 6), (3, 70), (64, 64), (63, 66), (576, 192), (1024, 1100)])
def test_codes_scales_and_values(shape, dtype, double):
    w = weight(*shape, dtype=dtype)
    ours = quantize(w, double)
    packed, state = functional.quantize_4bit(w, compress_statistics=double, quant_type="nf4")
    assert torch.equal(ours.packed, packed.view(-1)) and torch.equal(ours.absmax, state.absmax)
    if double:
        assert torch.equal(ours.scale, state.state2.absmax) and torch.equal(ours.offset, state.offset)
        restored = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        assert torch.equal(absmax_of(ours), restored)
    for out in DTYPES:
        state.dtype = out
        assert torch.equal(dequantize(ours, out), functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize("shape", [(5, 13), (33, 65)])
def test_odd_numbers_of_weights(shape):
    w = weight(*shape)
    packed, state = functional.quantize_4bit(w, quant_type="nf4")
    assert torch.equal(quantize(w, double=False).packed, packed.view(-1))
    assert torch.equal(quantize(w, double=False).absmax, state.absmax)


@pytest.mark.parametrize("case", ["zeros", "constant", "one block of zeros", "denormal", "huge"])
def test_degenerate_weights(case):
    w = weight(300, 64)
    w = {
        "zeros": torch.zeros_like(w),
        "constant": torch.full_like(w, 0.3),
        "one block of zeros": w * (torch.arange(300) != 7)[:, None],
        "denormal": w * 1e-42,
        "huge": w * 1e35,
    }[case]
    for double in (True, False):
        packed, state = functional.quantize_4bit(w, compress_statistics=double, quant_type="nf4")
        ours = quantize(w, double)
        assert torch.equal(ours.packed, packed.view(-1))
        assert torch.equal(dequantize(ours), functional.dequantize_4bit(packed, state))


def test_many_scales_and_how_far_the_exact_neighbour_is():
    """Codes of absmax equal the CPU kernel's; the nearest code without its grid (CUDA's rule) is at most one away."""
    torch.manual_seed(0)
    table, different, total = DYNAMIC, 0, 0
    for spread in (0.01, 1.0, 30.0):
        a = torch.randn(100_000).abs() * spread
        a -= a.mean()
        ours, scale = quantize_absmax(a)
        theirs, state = functional.quantize_blockwise(a, blocksize=256)
        assert torch.equal(ours, theirs) and torch.equal(scale, state.absmax)
        x = a * scale.reciprocal().repeat_interleave(256)[: len(a)]
        exact = torch.bucketize(x.clamp(-1, 1), (table[:-1] + table[1:]) / 2)
        far = (exact - ours.int()).abs()
        near_zero = x.abs() < 2e-4  # where codes are closer together than the grid
        assert far[~near_zero].max() <= 1
        different, total = different + int((far > 0).sum()), total + len(a)
    assert 0 < different / total < 0.005


def test_ties_go_to_the_lower_code():
    table = CODES
    middles = (table[:-1] + table[1:]) / 2
    block = torch.cat((torch.ones(1), middles, torch.zeros(48)))
    packed, _ = functional.quantize_4bit(block[None], quant_type="nf4")
    assert torch.equal(quantize(block[None], double=False).packed, packed.view(-1))
    assert nearest(middles).tolist() == list(range(15))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("double", [True, False])
def test_linear4bit_forward_and_gradient(bias, double):
    torch.manual_seed(0)
    linear = nn.Linear(128, 40, bias=bias)
    ours = NF4Linear.of(linear, double)
    theirs = bnb.nn.Linear4bit(128, 40, bias=bias, compute_dtype=torch.float32, compress_statistics=double, quant_type="nf4")
    theirs.load_state_dict(linear.state_dict())
    theirs.to("cpu")  # what makes it quantise
    if theirs.weight.quant_state is None:
        theirs.weight = theirs.weight._quantize("cpu")
    x = torch.randn(2, 5, 128)
    found = []
    for module in (ours, theirs):
        at = x.clone().requires_grad_()
        y = module(at)
        y.square().sum().backward()
        found.append((y, at.grad))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


def test_the_optional_kernel_is_the_same_layer():
    torch.manual_seed(0)
    linear = nn.Linear(96, 640)
    ours, fast = NF4Linear.of(linear), NF4Linear.of(linear, kernel="bitsandbytes")
    assert fast.state_dict().keys() == ours.state_dict().keys()
    for dtype in DTYPES:
        assert torch.equal(fast.dequantized(dtype), ours.dequantized(dtype))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        found = []
        for module in (ours, fast):
            x = torch.randn(7, 96, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
            y = module(x)
            y.sum().backward()
            found.append((y, x.grad))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    model = small()
    names = quantize_model(model, kernel="bitsandbytes")
    assert all(model.get_submodule(n).kernel == "bitsandbytes" for n in names)
    other = small()
    quantize_model(other)
    assert torch.equal(CLM()(model, batch()).total, CLM()(other, batch()).total)


@pytest.mark.parametrize("k", [16, 70, 80, 96, 112])
def test_the_optional_kernel_keeps_its_place_in_rows_that_are_no_whole_blocks(k):
    """bitsandbytes 0.50's own AVX512 path takes the scales of wrong blocks where k is a multiple of 16 and not of 64."""
    q = quantize(weight(40, k))
    assert torch.equal(dequantize(q, kernel="bitsandbytes"), dequantize(q))


def test_without_the_package_the_kernel_is_refused(monkeypatch):
    monkeypatch.setattr(nf4, "find_spec", lambda name: None)
    model = small()
    with pytest.raises(ValueError, match=r'kernel bitsandbytes needs the package: pip install "zero2llm\[bitsandbytes\]"'):
        quantize_model(model, kernel="bitsandbytes")
    assert not any(isinstance(m, NF4Linear) for m in model.modules())


def test_quantiles_are_scipy_s():
    if importlib.util.find_spec("scipy") is None:
        pytest.skip("scipy is not installed")
    found = functional.create_normal_map()
    nonzero = found[found != 0]
    assert torch.equal(nonzero, CODES[CODES != 0])
