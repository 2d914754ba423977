"""NF4 by hand: the tables, the codes in loops, what rounding may cost, and the projection that stands on it."""

import copy
import math
import subprocess
import sys
from pathlib import Path
from statistics import NormalDist

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from zero2llm.core.batch import Batch
from zero2llm.core.seq import Seq
from zero2llm.layers.linear import Linear
from zero2llm.layers.nf4 import NF4Linear, Weights, quantize_model
from zero2llm.model.lm import LM
from zero2llm.model.presets import PRESETS, llama, preset
from zero2llm.ops import nf4
from zero2llm.ops.nf4 import absmax_of, dequantize, quantize, row_pieces
from zero2llm.train.objectives.clm import CLM

PUBLISHED = [  # QLoRA appendix E, with the digits of its code
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
WIDEST = (PUBLISHED[1] - PUBLISHED[0]) / 2  # half the widest gap: what rounding may cost, in units of absmax


def weight(*shape, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=g) * torch.rand(shape[0], 1, generator=g)).to(dtype)


def by_hand(values: list[float]) -> tuple[list[int], list[float]]:
    """(codes, absmax of each block of 64) in loops."""
    codes, scales = [], []
    for start in range(0, len(values), 64):
        block = values[start : start + 64]
        scales.append(max(abs(v) for v in block))
        for v in block:
            x = v / scales[-1] if scales[-1] else 0.0
            codes.append(min(range(16), key=lambda i: abs(x - PUBLISHED[i])))
    return codes, scales


def dynamic_by_hand() -> list[float]:
    found = [0.0, 1.0]
    for k in range(7):
        width = 0.9 / 2**k
        for i in range(2**k):
            found += [sign * 10.0 ** (k - 6) * (0.1 + (i + 0.5) * width) for sign in (1, -1)]
    return sorted(found)


def test_the_codes_are_the_published_ones_and_quantiles():
    assert nf4.CODES.tolist() == PUBLISHED
    delta = (1 / 32 + 1 / 30) / 2
    q = NormalDist().inv_cdf
    left = [-q(1 - delta + (delta - 0.5) * i / 7) for i in range(7)]
    right = [q(1 - delta + (delta - 0.5) * i / 8) for i in reversed(range(8))]
    exact = [v / right[-1] for v in (*left, 0.0, *right)]
    assert max(abs(a - b) for a, b in zip(exact, PUBLISHED, strict=True)) < 3e-7


def test_the_dynamic_codes_by_hand():
    table = nf4.DYNAMIC
    assert len(set(table.tolist())) == 256
    torch.testing.assert_close(table.double(), torch.tensor(dynamic_by_hand(), dtype=torch.float64), rtol=2e-6, atol=0)


@pytest.mark.parametrize("shape", [(4, 64), (3, 70), (5, 13), (1, 1), (2, 193)])
def test_codes_and_bytes_by_hand(shape):
    w = weight(*shape)
    q = quantize(w, double=False)
    codes, scales = by_hand(w.flatten().tolist())
    assert q.absmax.tolist() == scales
    codes += [7] * (len(codes) % 2)  # the code of 0 fills the last byte
    assert q.packed.tolist() == [16 * first + second for first, second in zip(codes[::2], codes[1::2], strict=True)]
    values = [PUBLISHED[c] * scales[i // 64] for i, c in enumerate(codes[: w.numel()])]
    torch.testing.assert_close(dequantize(q).flatten(), torch.tensor(values), rtol=1e-6, atol=0)
    assert q.shape == shape and dequantize(q).shape == shape


def test_double_quantisation_by_hand():
    w = weight(90, 256)  # 360 blocks: two scales
    q, plain = quantize(w), quantize(w, double=False).absmax.tolist()
    assert len(q.absmax) == 360 and len(q.scale) == 2
    mean = sum(plain) / len(plain)
    assert math.isclose(float(q.offset), mean, rel_tol=1e-6)
    table = dynamic_by_hand()
    for b, (r, a) in enumerate(zip(q.absmax.tolist(), plain, strict=True)):
        group = [x - mean for x in plain[b // 256 * 256 : (b // 256 + 1) * 256]]
        scale = max(abs(x) for x in group)
        assert math.isclose(float(q.scale[b // 256]), scale, rel_tol=1e-6)
        x = (a - mean) / scale
        best = min(abs(x - e) for e in table)
        assert abs(x - table[r]) <= best + 2 / 65535  # the grid may choose the neighbour of the nearest
        assert math.isclose(float(absmax_of(q)[b]), mean + scale * table[r], rel_tol=1e-5, abs_tol=1e-6)
    assert q.nbytes * 8 / w.numel() == pytest.approx(4.127, abs=3e-3)  # 4 + 8/64 + 32/16384, and the mean


@pytest.mark.parametrize("double", [True, False])
def test_error_bound_of_each_block(double):
    w = weight(64, 192)
    q = quantize(w, double)
    blocks, values = w.view(-1, 64), dequantize(q).view(-1, 64)
    true = blocks.abs().amax(1)
    lost = (absmax_of(q) - true).abs()  # what the absmax itself was rounded by
    assert ((values - blocks).abs().amax(1) <= WIDEST * true * (1 + 1e-5) + lost).all()
    assert (lost == 0).all() if not double else (lost <= 0.008 * float(q.scale.max()) + 1e-7).all()
    assert (values - blocks).square().mean() < 0.01 * blocks.square().mean()  # 20 dB; int4 with its even steps has 0.013


def test_quantising_again_changes_nothing():
    w = weight(40, 130)
    once = quantize(w, double=False)
    again = quantize(dequantize(once), double=False)
    assert torch.equal(once.packed, again.packed) and torch.equal(once.absmax, again.absmax)
    twice = quantize(w)
    assert torch.equal(quantize(dequantize(twice)).packed, once.packed)


@pytest.mark.parametrize("double", [True, False])
def test_zeros_and_constants(double):
    zeros = quantize(torch.zeros(5, 100), double)
    assert (dequantize(zeros) == 0).all()
    ones = dequantize(quantize(torch.full((5, 128), -0.37), double))
    torch.testing.assert_close(ones, torch.full((5, 128), -0.37), rtol=1e-6, atol=0)
    mixed = weight(4, 64)
    mixed[2] = 0
    assert (dequantize(quantize(mixed, double))[2] == 0).all()


def test_extreme_values():
    huge = weight(4, 64) * 1e38
    torch.testing.assert_close(dequantize(quantize(huge, double=False)) / 1e38, dequantize(quantize(huge / 1e38, double=False)))
    tiny = weight(4, 64) * 1e-42
    assert ((dequantize(quantize(tiny, double=False)) - tiny).abs() <= tiny.abs().amax()).all()
    with pytest.raises(ValueError, match=r"blocks\.0\.up\.weight: values up to 3\.4e\+38 are too large"):
        quantize(torch.full((4, 64), 3.4e38), name="blocks.0.up.weight")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_by_name(bad):
    w = weight(3, 70)
    w[2, 69] = bad
    for double in (True, False):
        with pytest.raises(ValueError, match="q_proj.weight holds NaN or infinity"):
            quantize(w, double, "q_proj.weight")


def test_what_is_no_weight_is_refused():
    for wrong in (torch.zeros(4, 4, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.int64), torch.zeros(0, 4)):
        with pytest.raises(ValueError, match="NF4 takes fp32, bf16 or fp16"):
            quantize(wrong)


@pytest.mark.parametrize("shape", [(37, 70), (11, 13), (130, 64)])
def test_pieces_are_the_whole(shape, monkeypatch):
    w = weight(*shape)
    whole, values = quantize(w), dequantize(quantize(w))
    monkeypatch.setattr(nf4, "PIECE", 128)
    parts = quantize(w)
    assert torch.equal(whole.packed, parts.packed) and torch.equal(whole.absmax, parts.absmax)
    assert torch.equal(dequantize(whole), values)
    rows = list(row_pieces(whole, torch.float32, size=1))
    assert len(rows) == -(-shape[0] // 64) and torch.equal(torch.cat([v for _, v in rows]), values)
    assert [at.start for at, _ in rows] == list(range(0, shape[0], 64)) and rows[-1][0].stop == shape[0]


def test_half_precision_goes_through_fp32():
    for dtype in (torch.bfloat16, torch.float16):
        w = weight(8, 96, dtype=dtype)
        q, wide = quantize(w), quantize(w.float())
        assert torch.equal(q.packed, wide.packed) and torch.equal(q.absmax, wide.absmax)
        assert torch.equal(dequantize(q, dtype), dequantize(wide).to(dtype))


# The projection


def pair(k=70, n=24, bias=True, seed=0):
    torch.manual_seed(seed)
    linear = nn.Linear(k, n, bias=bias)
    return linear, NF4Linear.of(linear)


@pytest.mark.parametrize("shape", [(5, 70), (2, 3, 70), (70,)])
def test_product_and_gradient_are_those_of_the_dequantised_weight(shape):
    _, packed = pair(n=200)
    x = torch.randn(*shape, requires_grad=True)
    y = packed(x)
    y.square().sum().backward()
    got, bias_grad = x.grad, packed.bias.grad
    x.grad = packed.bias.grad = None
    expected = F.linear(x, packed.dequantized(), packed.bias)
    expected.square().sum().backward()
    torch.testing.assert_close(y, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(got, x.grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(bias_grad, packed.bias.grad)
    assert torch.equal(packed.weight, packed.dequantized()) and packed.weight.shape == (200, 70)


def test_rows_in_pieces_are_the_whole(monkeypatch):
    _, packed = pair(k=14, n=130)
    x = torch.randn(2, 14, dtype=torch.float64, requires_grad=True)
    whole = packed(x)
    (gradient,) = torch.autograd.grad(whole.square().sum(), x)
    monkeypatch.setattr("zero2llm.layers.nf4.row_pieces", lambda q, dtype, kernel: row_pieces(q, dtype, kernel, size=1))
    torch.testing.assert_close(packed(x), whole)
    torch.testing.assert_close(torch.autograd.grad(packed(x).square().sum(), x)[0], gradient)
    assert torch.autograd.gradcheck(packed, x)


def test_only_the_packed_weight_is_remembered():
    _, packed = pair(640, 640, bias=False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        packed(torch.randn(4, 640, requires_grad=True))
    own = {b.data_ptr() for b in packed.buffers()}
    assert kept and all(t.data_ptr() in own for t in kept)


def test_autocast_computes_in_its_type_and_returns_the_gradient_in_x_s():
    _, packed = pair()
    x = torch.randn(5, 70, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = packed(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    dense = F.linear(x.detach().bfloat16(), packed.dequantized(torch.bfloat16)) + packed.bias.bfloat16()
    torch.testing.assert_close(y, dense)
    assert packed(x.detach().bfloat16()).dtype == torch.bfloat16


def test_constants_stay_in_fp32_whatever_the_model_is_cast_to():
    _, packed = pair()
    before = packed.dequantized()
    for cast in (packed.bfloat16(), packed.half(), packed.float(), copy.deepcopy(packed).to(torch.bfloat16)):
        assert cast.scale.dtype == cast.offset.dtype == torch.float32 and torch.equal(cast.dequantized(), before)
    assert packed.to(torch.bfloat16).bias.dtype == torch.bfloat16


@pytest.mark.parametrize("double", [True, False])
def test_state_dict_is_strict_and_survives_a_file(double, tmp_path):
    packed = NF4Linear.of(nn.Linear(70, 24), double)
    names = ["bias", "packed", "absmax", *(["scale", "offset"] if double else [])]
    assert list(packed.state_dict()) == names
    save_file(packed.state_dict(), tmp_path / "x.safetensors")
    other = NF4Linear(70, 24, bias=True, double=double)
    other.load_state_dict(load_file(tmp_path / "x.safetensors"))
    assert torch.equal(other.dequantized(), packed.dequantized()) and torch.equal(other.bias, packed.bias)
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({k: v for k, v in packed.state_dict().items() if k != "absmax"})
    with pytest.raises(RuntimeError, match="Unexpected key|Missing key"):
        NF4Linear(70, 24, bias=True, double=not double).load_state_dict(packed.state_dict())
    if double:
        assert not NF4Linear(70, 24, bias=True).dequantized().any()


def test_meta_device():
    with torch.device("meta"):
        packed = NF4Linear.of(nn.Linear(70, 24))
        x = torch.zeros(3, 70, requires_grad=True)
        y = packed(x)
        y.sum().backward()
    assert y.is_meta and y.shape == (3, 24) and x.grad.shape == (3, 70) and packed.packed.is_meta
    linear, real = pair()
    packed.load_state_dict(real.state_dict(), assign=True)
    x = torch.randn(3, 70)
    assert torch.equal(packed(x), real(x))


def test_tables_are_real_when_they_are_first_met_on_the_meta_device():
    script = "import torch\nwith torch.device('meta'):\n  from zero2llm.ops import nf4\nassert not nf4.PAIRS.is_meta\n"
    script += "with torch.device('meta'):\n  nf4.nearest_dynamic()\nassert not nf4.nearest_dynamic().is_meta"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_unknown_kernel():
    with pytest.raises(ValueError, match="kernel 'cuda' is unknown; use handwritten or bitsandbytes"):
        NF4Linear(4, 4, kernel="cuda")


# A whole model


def small():
    torch.manual_seed(0)
    return LM(llama(97, 64, 2, 4, 2, 96, 64, tied=True))


def batch(rows=2, ctx=20, vocab=97):
    data = torch.randint(0, vocab, (rows, ctx + 1), generator=torch.Generator().manual_seed(1))
    return Batch(data[:, :-1].contiguous(), data[:, 1:].contiguous(), Seq.rows(rows, ctx))


def dense_twin(model):
    """The same model with ordinary layers that hold the dequantised weights."""
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if isinstance(module, NF4Linear):
            linear = Linear(module.in_features, module.out_features, bias=False)
            linear.weight.data = module.dequantized()
            twin.set_submodule(name, linear)
    return twin


@pytest.mark.parametrize("recompute", [False, True])
def test_a_model_learns_above_it_as_above_dense_weights(recompute):
    model = small()
    names = quantize_model(model)
    assert len(names) == 14 and names[0] == "blocks.0.mixer.q_proj" and all(n.endswith("_proj") for n in names)
    twin = dense_twin(model)
    model.recompute = recompute
    for m in (model, twin):
        CLM()(m, batch()).total.backward()
    torch.testing.assert_close(model.embed.weight.grad, twin.embed.weight.grad, atol=1e-4, rtol=1e-4)
    gain = "blocks.0.mixer_norm.weight"
    torch.testing.assert_close(model.get_parameter(gain).grad, twin.get_parameter(gain).grad, atol=1e-4, rtol=1e-4)


def test_deepcopy_is_independent():
    model = small()
    quantize_model(model)
    twin = copy.deepcopy(model)
    tokens, seq = batch().tokens, batch().seq
    assert torch.equal(model(tokens, seq)[0], twin(tokens, seq)[0])
    twin.blocks[0].mixer.q_proj.packed.zero_()
    assert not torch.equal(model(tokens, seq)[0], twin(tokens, seq)[0])


def test_bytes_before_and_after():
    model = small()
    before = Weights.of(model)
    quantize_model(model)
    after = Weights.of(model)
    projections = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96)
    assert before.nf4 == 0 and before.rest - after.rest == 4 * projections
    assert projections / 2 < after.nf4 < projections * 0.53 and "in NF4" in str(after)


@pytest.mark.parametrize("name", [n for n in PRESETS if n.endswith("-nano")])
def test_every_nano_model_runs_on_it(name):
    torch.manual_seed(0)
    model = LM(preset(name))
    quantize_model(model)
    assert all(isinstance(model.get_submodule(n), NF4Linear) for n in names_of(model))
    total = CLM()(model, batch(1, 8, 100)).total
    total.backward()
    assert total.isfinite() and model.embed.weight.grad.isfinite().all()


def names_of(model):
    return [n for n, m in model.named_modules() if n.endswith("_proj") and isinstance(m, nn.Linear)]


def test_targets():
    model = small()
    assert quantize_model(model, ["mixer.q_proj", "blocks.1.ffn.*"]) == [
        "blocks.0.mixer.q_proj", "blocks.1.mixer.q_proj",
        "blocks.1.ffn.gate_proj", "blocks.1.ffn.up_proj", "blocks.1.ffn.down_proj",
    ]  # fmt: skip
    assert isinstance(model.blocks[0].ffn.up_proj, Linear) and isinstance(model.blocks[1].mixer.k_proj, Linear)
    rest = quantize_model(model)
    assert len(rest) == 9 and not set(rest) & {"blocks.0.mixer.q_proj"}
    with pytest.raises(ValueError, match="no projections in mixer or ffn left"):
        quantize_model(model)
    with pytest.raises(ValueError, match="'q_prj' names no Linear layer; the model has q_proj, k_proj"):
        quantize_model(small(), ["k_proj", "q_prj"])


def test_experts_are_named_never_passed_over(capsys):
    from zero2llm.core.log import log_once

    cfg = next(n for n in PRESETS if n.startswith("mixtral") and n.endswith("nano"))
    model = LM(preset(cfg))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"NF4 covers no stacked experts, but the targets name blocks\.0\.ffn\.gate_proj"):
        quantize_model(model, ["q_proj", "gate_proj"])
    assert model.state_dict().keys() == before.keys()
    log_once.cache_clear()
    names = quantize_model(model)
    assert names and not any(".ffn." in n for n in names)
    assert "in full precision: blocks.0.ffn.gate_proj" in " ".join(capsys.readouterr().err.split())


def test_a_layer_in_two_places_stays_one_and_a_bad_weight_is_named():
    model = small()
    model.blocks[1].mixer.q_proj = model.blocks[0].mixer.q_proj
    assert len(quantize_model(model)) == 14 and model.blocks[1].mixer.q_proj is model.blocks[0].mixer.q_proj
    model = small()
    model.blocks[1].ffn.up_proj.weight.data[3, 3] = torch.nan
    with pytest.raises(ValueError, match=r"blocks\.1\.ffn\.up_proj\.weight holds NaN"):
        quantize_model(model)


def test_the_file_of_a_mapped_model_is_let_go(tmp_path):
    model = small()
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "m.safetensors")
    with torch.device("meta"):
        mapped = LM(model.cfg)
    mapped.load_state_dict(load_file(tmp_path / "m.safetensors"), assign=True)
    quantize_model(mapped)
    quantize_model(model)
    assert "m.safetensors" not in Path("/proc/self/maps").read_text() if Path("/proc/self/maps").exists() else True
    own = [t.untyped_storage().nbytes() == t.nbytes for t in (*mapped.parameters(), *mapped.buffers())]
    assert all(own) and all(torch.equal(a, b) for a, b in zip(mapped.state_dict().values(), model.state_dict().values(), strict=True))


@pytest.mark.slow
def test_compiled_is_eager():
    model = small()
    quantize_model(model)
    eager = CLM()(model, batch()).total
    eager.backward()
    gradient = model.embed.weight.grad.clone()
    model.zero_grad()
    compiled = torch.compile(lambda b: CLM()(model, b).total, dynamic=False)(batch())
    compiled.backward()
    torch.testing.assert_close(compiled, eager, atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(model.embed.weight.grad, gradient, atol=1e-3, rtol=1e-3)
