"""Mamba, Performer, FLASH and log-linear attention against transformers, mambapy, performer-pytorch, FLASH-pytorch and fla."""

import importlib.metadata
import importlib.util
import math

import pytest
import torch
from torch import nn
from transformers import JambaConfig, MambaConfig
from transformers.models.jamba.modeling_jamba import JambaMambaMixer
from transformers.models.mamba.modeling_mamba import MambaMixer, mamba_selective_scan

from zero2llm.core.seq import Seq
from zero2llm.layers.mixers.gau_flash import GAUFlashConfig
from zero2llm.layers.mixers.mamba1 import Mamba1Config
from zero2llm.layers.mixers.performer import PerformerConfig, orthogonal_gaussian
from zero2llm.layers.positions.rope import RoPEConfig
from zero2llm.ops.log_linear import log_linear
from zero2llm.ops.marks import Marks
from zero2llm.ops.selective_scan import selective_scan

B, T, D = 2, 37, 12
SCAN = dict(atol=5e-5, rtol=1e-4)  # sums in another order, outputs of O(10)
CLOSE = dict(atol=2e-6, rtol=1e-5)


def scrambled(module):
    """No parameter where it started: zeros and ones hide errors."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) / (p.shape[-1] ** 0.5 if p.ndim > 1 else 2))
    return module


def both_ways(ours, theirs, pairs, x, tolerance):
    """Outputs, and gradients of the input and of each pair of parameters."""
    seed = torch.randn(B, T, D)
    found = []
    for run, parameters in ((lambda x: ours(x, Seq.rows(B, T))[0], [p for p, _ in pairs]), (theirs, [p for _, p in pairs])):
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        found.append([y, *torch.autograd.grad((y * seed).sum(), [leaf, *parameters])])
    for i, (a, b) in enumerate(zip(*found, strict=True)):
        scale = b.abs().max()  # small outputs must not hide behind the absolute tolerance
        torch.testing.assert_close(a / scale, b.view_as(a) / scale, **tolerance, msg=lambda m, i=i: f"{i}: {m}")


MAMBA = {"in_proj": "in_proj", "x_proj": "x_proj", "dt_proj": "dt_proj", "o_proj": "out_proj"}


def mamba_pairs(ours, theirs):
    pairs = [(getattr(ours, a).weight, getattr(theirs, b).weight) for a, b in MAMBA.items()]
    pairs += [(ours.conv_weight, theirs.conv1d.weight), (ours.dt_bias, theirs.dt_proj.bias)]
    pairs += [(getattr(ours, n), getattr(theirs, n)) for n in ("A_log", "D")]
    if ours.conv_bias is not None:
        pairs.append((ours.conv_bias, theirs.conv1d.bias))
    if ours.in_proj.bias is not None:
        pairs += [(ours.in_proj.bias, theirs.in_proj.bias), (ours.o_proj.bias, theirs.out_proj.bias)]
    return pairs


def copied(pairs):
    with torch.no_grad():
        for ours, theirs in pairs:
            theirs.copy_(ours.view_as(theirs))
    return pairs


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.oracle("mixer:mamba1", of="transformers Mamba", way="both")
def test_mamba_equals_transformers(bias):
    ours = scrambled(Mamba1Config(state_dim=5, dt_rank=3, conv_bias=not bias, proj_bias=bias).build(D))
    config = MambaConfig(hidden_size=D, state_size=5, time_step_rank=3, use_conv_bias=not bias, use_bias=bias, num_hidden_layers=1)
    theirs = MambaMixer(config, 0).eval()
    both_ways(ours, theirs, copied(mamba_pairs(ours, theirs)), torch.randn(B, T, D), SCAN)


def test_norms_on_dt_b_and_c_equal_jamba():
    ours = scrambled(Mamba1Config(state_dim=5, dt_rank=3, dt_norms=True, norm_eps=1e-3).build(D))
    config = JambaConfig(hidden_size=D, mamba_d_state=5, mamba_dt_rank=3, rms_norm_eps=1e-3, use_mamba_kernels=False, num_hidden_layers=1)
    theirs = JambaMambaMixer(config, 0).eval()
    norms = [theirs.dt_layernorm, theirs.b_layernorm, theirs.c_layernorm]
    pairs = mamba_pairs(ours, theirs) + [(a.weight, b.weight) for a, b in zip(ours.norms, norms, strict=True)]
    both_ways(ours, theirs, copied(pairs), torch.randn(B, T, D), SCAN)


@pytest.mark.parametrize("oracle", ["transformers", "mambapy"])
def test_selective_scan_equals(oracle):
    x, dt, b, c = (torch.randn(B, T, n) for n in (D, D, 4, 4))
    A, skip, h = -torch.randn(D, 4).exp(), torch.randn(D), torch.randn(B, D, 4)
    dt = dt.exp()
    ours, last = selective_scan(x, dt, A, b, c, skip, Marks(), h)
    zero = torch.zeros_like(h)
    without = selective_scan(x, dt, A, b, c, skip, Marks(), zero)
    if oracle == "transformers":
        theirs = mamba_selective_scan(*(v.transpose(1, 2) for v in (x, dt)), A, *(v.transpose(1, 2) for v in (b, c)), skip, return_last_state=True)
        torch.testing.assert_close(without[0], theirs[0].transpose(1, 2), **SCAN)
        torch.testing.assert_close(without[1], theirs[1], **SCAN)
        return
    from mambapy.pscan import pscan

    decay, written = (dt[..., None] * A).exp(), (dt * x)[..., None] * b[:, :, None]
    written[:, 0] += decay[:, 0] * h  # what is carried in comes with the first token
    states = pscan(decay, written)
    torch.testing.assert_close(ours, (states @ c[..., None]).squeeze(-1) + skip * x, **SCAN)
    torch.testing.assert_close(last, states[:, -1], **SCAN)


def fla_naive(name: str):
    """fla's naive functions by their file: the package itself wants triton."""
    file = next(f for f in importlib.metadata.files("fla-core") if f.as_posix().endswith(f"fla/ops/{name}/naive.py"))
    spec = importlib.util.spec_from_file_location(f"fla_naive_{name}", file.locate())
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("length", "chunk"), [(37, 8), (64, 16), (63, 64), (5, 1)])
@pytest.mark.oracle("mixer:log_linear", of="fla log_linear_attn", way="both")
def test_log_linear_attention_equals_fla(length, chunk):
    naive = fla_naive("log_linear_attn").naive_log_linear_attn
    levels = math.ceil(math.log2(length)) + 1
    q, k, v = (torch.randn(B, 3, length, n, requires_grad=True) for n in (4, 4, 5))
    g, lam = (-torch.rand(B, 3, length)).requires_grad_(), torch.rand(B, 3, length, levels).requires_grad_()
    ours, _ = log_linear(q, k, v, g, lam, Seq.rows(B, length).pos, Marks(), None, chunk)
    theirs = naive(*(x.transpose(1, 2) for x in (q, k, v, g, lam))).transpose(1, 2)
    torch.testing.assert_close(ours, theirs, **SCAN)
    seed = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad((y * seed).sum(), (q, k, v, g, lam)) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, **SCAN)


@pytest.mark.oracle("mixer:performer", of="performer-pytorch", way="both")
def test_performer_equals_performer_pytorch():
    from performer_pytorch.performer_pytorch import linear_attention, softmax_kernel

    module = scrambled(PerformerConfig(n_heads=3, n_features=20, chunk=8).build(D))

    def theirs(x):
        q, k, v = (p(x).unflatten(-1, (3, -1)).transpose(1, 2) for p in (module.q_proj, module.k_proj, module.v_proj))
        q, k = (softmax_kernel(part, projection_matrix=module.W, is_query=part is q, eps=0.0) for part in (q, k))
        rows = [linear_attention(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1]) for t in range(T)]  # it has no mask
        return module.o_proj(torch.cat(rows, 2).transpose(1, 2).flatten(2))

    weights = [getattr(module, f"{name}_proj").weight for name in "qkvo"]
    both_ways(module, theirs, [(w, w) for w in weights], torch.randn(B, T, D), CLOSE)


def test_performer_approaches_softmax_attention_as_one_over_root_m():
    """Queries and keys of half length: at full length rare features carry the sum, and the law sets in only past M = 4096."""
    q, k, v = (scale * torch.randn(2, 40, 16, dtype=torch.float64) for scale in (0.5, 0.5, 1.0))
    exact = torch.nn.functional.scaled_dot_product_attention(*(x[:, None] for x in (q, k, v)), is_causal=True)[:, 0]
    errors, draws = [], 24
    for m in (32, 256, 2048):
        module = PerformerConfig(n_heads=1, head_dim=16, n_features=m).build(16).double()
        module.q_proj, module.k_proj, module.v_proj, module.o_proj = Fixed(q), Fixed(k), Fixed(v), nn.Identity()
        total = 0.0
        for _ in range(draws):
            module.W = orthogonal_gaussian(m, 16).double()
            total += (module(torch.zeros_like(q), Seq.rows(2, 40))[0] - exact).square().mean()
        errors.append((total / draws).sqrt().item())
    slope = math.log(errors[2] / errors[1]) / math.log(8)
    assert errors[0] > errors[1] > errors[2] and abs(slope + 0.5) < 0.1, (errors, slope)


def test_features_estimate_the_exponential_without_bias():
    module = PerformerConfig(n_heads=1, head_dim=4, n_features=50_000).build(4).double()
    q, k = torch.randn(2, 6, 1, 1, 4, dtype=torch.float64) * 0.7
    estimate = (module.exponents(q) + module.exponents(k)).exp().mean(-1).flatten()
    torch.testing.assert_close(estimate, ((q * k).sum(-1) / 2).exp().flatten(), atol=0, rtol=0.04)


class Fixed(nn.Module):
    """A projection that gives what it was told."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return self.value


def flash_pairs(ours, theirs, offsets, views):
    """Parameters that correspond; the oracle's biases are set to 0, its views are rows of ours."""
    with torch.no_grad():
        theirs.rel_pos_bias.relative_attention_bias.weight.zero_()
        for layer in (theirs.to_hidden[0], theirs.to_qk[0]):
            layer.bias.zero_()
        out = theirs.to_out[0] if isinstance(theirs.to_out, nn.Sequential) else theirs.to_out
        out.bias.zero_()
        theirs.to_hidden[0].weight.copy_(torch.cat((ours.v_proj.weight, ours.g_proj.weight)))
        offsets.gamma.copy_(ours.gamma[views])
        offsets.beta.copy_(ours.beta[views])
    return copied([(ours.z_proj.weight, theirs.to_qk[0].weight), (ours.o_proj.weight, out.weight)])


@pytest.mark.oracle("mixer:gau_flash", of="FLASH-pytorch GAU", way="both")
def test_one_chunk_equals_flash_pytorch_s_gated_attention_unit():
    from flash_pytorch import GAU

    ours = scrambled(GAUFlashConfig(key_dim=6, chunk=T).build(D))
    theirs = GAU(dim=D, query_key_dim=6, causal=True, add_residual=False, norm_klass=nn.Identity)
    with torch.no_grad():
        ours.gamma.mul_(4)
    pairs = flash_pairs(ours, theirs, theirs.offsetscale, [0, 1])
    both_ways(ours, theirs, pairs, torch.randn(B, T, D), CLOSE)


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("part", ["near", "far"])
@pytest.mark.oracle("mixer:gau_flash", of="FLASH-pytorch FLASH", way="both")
def test_chunks_equal_flash_pytorch(part, rotary):
    """Its two sums share a divisor, ours do not: each is compared with the other switched off."""
    from flash_pytorch import FLASH
    from rotary_embedding_torch import RotaryEmbedding

    C, off = 8, [2, 3] if part == "near" else [0, 1]
    position = {"position": RoPEConfig(layout="interleaved")} if rotary else {}
    ours = scrambled(GAUFlashConfig(key_dim=6, chunk=C, **position).build(D))
    with torch.no_grad():
        for p in (ours.gamma, ours.beta):
            p.mul_(4)[off] = 0
    theirs = FLASH(
        dim=D, group_size=C, query_key_dim=6, causal=True, norm_klass=nn.Identity,
        rotary_pos_emb=RotaryEmbedding(dim=6) if rotary else None,
    )  # fmt: skip
    pairs = flash_pairs(ours, theirs, theirs.qk_offset_scale, [0, 2, 1, 3])
    chunks_before = (torch.arange(T) // C)[:, None]
    ours_over = (1 / chunks_before.clamp_min(1)) if part == "far" else 1  # its sum is over C, ours over all tokens summed
    both_ways(ours, lambda x: (theirs(x) - x) * ours_over, pairs, torch.randn(B, T, D), CLOSE)
