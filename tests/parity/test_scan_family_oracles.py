"""Gated-scan mixers against fla's naive functions and transformers: values and gradients, whole rows and cached decoding.

fla's files are loaded by path: importing the package would ask for triton. Both oracles compute in fp32.
"""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import Mamba2Config as TheirMamba2Config
from transformers import Mamba2ForCausalLM, MiniMaxConfig
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from zero2llm.core.seq import Seq
from zero2llm.layers.contract import Place
from zero2llm.layers.mixers.gla import GLAConfig
from zero2llm.layers.mixers.lightning import LightningConfig
from zero2llm.layers.mixers.linear import LinearConfig
from zero2llm.layers.mixers.mamba2 import Mamba2Config
from zero2llm.layers.mixers.retnet import RetNetConfig
from zero2llm.layers.norms.rms import RMSNormConfig
from zero2llm.model.lm import LM
from zero2llm.model.spec import LayerPattern, LayerSpec, ModelConfig
from zero2llm.ops.marks import Marks
from zero2llm.ops.scan import scan

B, T, D = 2, 75, 24
CLOSE = dict(atol=2e-5, rtol=2e-5)  # recurrent against chunked, keys not normed: outputs reach 10; seen: 7e-6


def naive(mechanism: str, name: str):
    """A function of fla/ops/<mechanism>/naive.py."""
    [root] = importlib.util.find_spec("fla").submodule_search_locations
    spec = importlib.util.spec_from_file_location(f"fla_naive_{mechanism}", Path(root) / "ops" / mechanism / "naive.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def randomised(module):
    """Every parameter far from 0 and 1; matrices such that unit-normal inputs give unit-normal outputs."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) * (p.shape[1] ** -0.5 if p.ndim > 1 else 0.5) + (p.ndim == 1))
    return module


def with_gradients(y, inputs, weight):
    """y, and how a random linear function of it changes with each input, in units of the largest change."""
    grads = torch.autograd.grad((y * weight).sum(), inputs)
    return [y, *(g / g.abs().max() for g in grads)]


def agree(ours, theirs, inputs, their_inputs=None):
    weight = torch.randn_like(ours)
    for a, b in zip(
        with_gradients(ours, inputs, weight), with_gradients(theirs, their_inputs or inputs, weight), strict=True
    ):
        torch.testing.assert_close(a, b.view_as(a), **CLOSE)


def split(p, x, width):
    return F.linear(x, p.weight, p.bias).unflatten(-1, (-1, width))  # (B, T, H, K)


def check(module, oracle):
    """``oracle(x)`` gives (B, T, D) from the module's parameters and none of its code."""
    x = torch.randn(B, T, D, requires_grad=True)
    agree(module(x, Seq.rows(B, T))[0], oracle(x), [x, *module.parameters()])


def rms(o, eps, weight=1.0):
    return o * torch.rsqrt(o.square().mean(-1, keepdim=True) + eps) * weight


@pytest.mark.oracle("mixer:linear", of="fla linear_attn", way="both")
def test_linear_equals_fla():
    m = randomised(LinearConfig(n_heads=3, value_dim=5, eps=1e-10, chunk=16).build(D))
    attn = naive("linear_attn", "naive_recurrent_linear_attn")

    def oracle(x):
        q, k = (F.elu(split(p, x, m.head_dim)) + 1 for p in (m.q_proj, m.k_proj))
        o, _ = attn(q, k, split(m.v_proj, x, m.value_dim), normalize=True)
        return F.linear(o.flatten(2), m.o_proj.weight)

    check(m, oracle)


def test_linear_equals_its_masked_parallel_form():
    m = randomised(LinearConfig(n_heads=3, eps=1e-6, chunk=16).build(D))

    def oracle(x):
        q, k = (F.elu(split(p, x, m.head_dim)).transpose(1, 2) + 1 for p in (m.q_proj, m.k_proj))
        weights = (q @ k.transpose(-1, -2)).tril()
        o = weights @ split(m.v_proj, x, m.value_dim).transpose(1, 2) / (weights.sum(-1, keepdim=True) + m.eps)
        return F.linear(o.transpose(1, 2).flatten(2), m.o_proj.weight)

    check(m, oracle)


@pytest.mark.oracle("mixer:retnet", of="fla retention", way="both")
def test_retnet_equals_fla():
    m = randomised(RetNetConfig(n_heads=3, value_dim=5, base=500.0, chunk=16).build(D))
    retention = naive("retention", "naive_retention")

    def rotated(p, x):  # as complex numbers, which the page does not use
        angle = torch.arange(T)[:, None] * 500.0 ** -(torch.arange(0, m.head_dim, 2) / m.head_dim)
        pairs = torch.view_as_complex(split(p, x, m.head_dim).transpose(1, 2).unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)

    def oracle(x):
        o = retention(rotated(m.q_proj, x), rotated(m.k_proj, x), split(m.v_proj, x, m.value_dim).transpose(1, 2))
        o = rms(o, m.eps).transpose(1, 2).flatten(2)
        return F.linear(F.silu(F.linear(x, m.g_proj.weight)) * o, m.o_proj.weight)

    check(m, oracle)


def test_retention_equals_its_parallel_form():
    m, K = RetNetConfig(n_heads=4, head_dim=6).build(D), 6
    q, k, v = (torch.randn(B, 4, T, width, requires_grad=True) for width in (K, K, 9))
    g = m.log_decay(torch.zeros(B, T, D)).transpose(1, 2)
    ours, _ = scan(q * K**-0.5, k, v, g, Marks(), None, 16)
    n = torch.arange(T)
    gamma = 1 - torch.tensor([2.0**-5, 2.0**-6, 2.0**-7, 2.0**-8])
    decay = (gamma[:, None, None] ** (n[:, None] - n).clamp(min=0)).tril()
    agree(ours, (q @ k.transpose(-1, -2) * K**-0.5 * decay) @ v, [q, k, v])


@pytest.mark.parametrize("layer", [0, 2, 6])
@pytest.mark.oracle("mixer:lightning", of="transformers MiniMax", way="both")
def test_lightning_equals_minimax(layer):
    """The last layer differs by 6e-6: theirs divides l by L - 1 + 1e-5."""
    theirs = MiniMaxLightningAttention(
        MiniMaxConfig(hidden_size=D, num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=7, block_size=16),
        layer,
    )
    ours = randomised(
        LightningConfig(n_heads=4, norm_eps=theirs.norm.variance_epsilon, chunk=8).build(D, Place(layer, 7))
    )
    parts = [
        p.weight.unflatten(0, (4, -1)) for p in (ours.q_proj, ours.k_proj, ours.v_proj)
    ]  # theirs: q k v of each head
    pairs = {"output_gate": ours.g_proj, "out_proj": ours.o_proj}
    theirs.load_state_dict(
        {"qkv_proj.weight": torch.cat(parts, 1).flatten(0, 1), "norm.weight": ours.norm_weight}
        | {f"{name}.weight": p.weight for name, p in pairs.items()},
        strict=False,
    )
    x = torch.randn(B, T, D, requires_grad=True)
    expected, _ = theirs(x, None, None)
    shared = [
        (ours.norm_weight, theirs.norm.weight),
        *((p.weight, getattr(theirs, n).weight) for n, p in pairs.items()),
    ]
    agree(ours(x, Seq.rows(B, T))[0], expected, [x, *(a for a, _ in shared)], [x, *(b for _, b in shared)])


@pytest.mark.oracle("mixer:lightning", of="fla simple_gla", way="both")
def test_lightning_equals_fla():
    m = randomised(LightningConfig(n_heads=4, chunk=16).build(D, Place(1, 3)))
    simple_gla = naive("simple_gla", "naive_recurrent_simple_gla")

    def oracle(x):
        q, k, v = (F.silu(split(p, x, m.head_dim)) for p in (m.q_proj, m.k_proj, m.v_proj))
        slopes = torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8]) * (0.5 + 1e-5)
        o, _ = simple_gla(q, k, v, -slopes.expand(B, T, 4), scale=1.0)
        return F.linear(
            torch.sigmoid(F.linear(x, m.g_proj.weight)) * rms(o.flatten(2), m.eps, m.norm_weight), m.o_proj.weight
        )

    check(m, oracle)


@pytest.mark.parametrize("tau", [16.0, 1.0])
@pytest.mark.oracle("mixer:gla", of="fla gla", way="both")
def test_gla_equals_fla(tau):
    m = randomised(GLAConfig(n_heads=3, value_dim=5, gate_rank=4, tau=tau, chunk=16).build(D))
    gla = naive("gla", "naive_recurrent_gla")

    def oracle(x):
        q, k = (split(p, x, m.head_dim) for p in (m.q_proj, m.k_proj))
        g = F.logsigmoid(split(m.f_b_proj, F.linear(x, m.f_a_proj.weight), m.head_dim)) / tau
        o, _ = gla(q, k, split(m.v_proj, x, m.value_dim), g)
        o = rms(o, m.eps, m.norm_weight).flatten(2)
        return F.linear(F.silu(F.linear(x, m.g_proj.weight)) * o, m.o_proj.weight)

    check(m, oracle)


def test_state_space_duality_equals_fla():
    """Mamba-2's inside as linear attention: q = C, k = B, v = dt u, g = dt A, against keys repeated for each head."""
    G, R, N, P = 2, 3, 5, 4
    q, k = (torch.randn(B, T, G, N, requires_grad=True) for _ in range(2))
    v, g = torch.randn(B, T, G, R, P, requires_grad=True), (-torch.rand(B, T, G, R)).requires_grad_()
    shared = lambda t: t[..., None, :].movedim(1, -2)
    ours, _ = scan(shared(q), shared(k), v.movedim(1, -2), g.movedim(1, -1), Marks(), None, 16)
    repeat = lambda t: t.repeat_interleave(R, 2)
    theirs, _ = naive("simple_gla", "naive_recurrent_simple_gla")(
        repeat(q), repeat(k), v.flatten(2, 3), g.flatten(2), scale=1.0
    )
    agree(ours.movedim(-2, 1).flatten(2, 3), theirs, [q, k, v, g])


NAMES = {
    "in_proj.weight": "in_proj.weight", "in_proj.bias": "in_proj.bias", "conv_weight": "conv1d.weight", "conv_bias": "conv1d.bias",
    "dt_bias": "dt_bias", "A_log": "A_log", "D": "D", "norm_weight": "norm.weight", "o_proj.weight": "out_proj.weight",
    "o_proj.bias": "out_proj.bias",
}  # fmt: skip
MAMBA = {
    "plain": ({}, {}),
    "groups": ({"n_groups": 3}, {"n_groups": 3}),
    "biases": (
        {"proj_bias": True, "conv_bias": False, "conv_width": 3},
        {"use_bias": True, "use_conv_bias": False, "conv_kernel": 3},
    ),
    "limits": ({"dt_limit": (0.5, 1.5)}, {"time_step_limit": (0.5, 1.5)}),
}


def mamba_pair(name):
    ours, theirs = MAMBA[name]
    ours = Mamba2Config(**({"head_dim": 8, "state_dim": 5, "chunk": 8} | ours))
    theirs = TheirMamba2Config(
        **({"hidden_size": D, "num_heads": 6, "head_dim": 8, "state_size": 5, "n_groups": 1, "chunk_size": 16, "expand": 2} | theirs),
        num_hidden_layers=3, vocab_size=31, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return ours, theirs


def copy_mamba(ours, theirs):
    named = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, p in ours.named_parameters():
            named[NAMES[name]].copy_(p.view_as(named[NAMES[name]]))
    assert {NAMES[name] for name, _ in ours.named_parameters()} == set(named)


@pytest.mark.parametrize("name", MAMBA)
@pytest.mark.oracle("mixer:mamba2", of="transformers Mamba2", way="both")
def test_mamba2_equals_transformers(name):
    cfg, their_cfg = mamba_pair(name)
    ours, theirs = randomised(cfg.build(D)), Mamba2Mixer(their_cfg, 0)
    copy_mamba(ours, theirs)
    x = torch.randn(B, T, D, requires_grad=True)
    params = dict(theirs.named_parameters())
    inputs = [x, *ours.parameters()], [x, *(params[NAMES[n]] for n, _ in ours.named_parameters())]
    y, expected = ours(x, Seq.rows(B, T))[0], theirs(x)
    weight = torch.randn_like(y)
    for a, b in zip(with_gradients(y, inputs[0], weight), with_gradients(expected, inputs[1], weight), strict=True):
        torch.testing.assert_close(a, b.view_as(a), **CLOSE)


@pytest.mark.parametrize("name", ["plain", "groups"])
def test_mamba2_language_model_equals_transformers(name):
    cfg, their_cfg = mamba_pair(name)
    spec = LayerSpec(mixer=cfg, norm=RMSNormConfig(eps=1e-5))
    ours = LM(ModelConfig(
        vocab_size=31, d_model=D, max_len=T, layers=LayerPattern(pattern=["m"], repeat=3), blocks={"m": spec},
        final_norm=RMSNormConfig(eps=1e-5), tie_embeddings=False,
    ))  # fmt: skip
    randomised(ours)
    theirs = Mamba2ForCausalLM(their_cfg)
    pairs = [(ours.embed, "embeddings"), (ours.final_norm, "norm_f")]
    pairs += [(block.mixer_norm, f"layers.{i}.norm") for i, block in enumerate(ours.blocks)]
    with torch.no_grad():
        for mine, other in pairs:
            theirs.backbone.get_submodule(other).weight.copy_(mine.weight)
        theirs.lm_head.weight.copy_(ours.head.weight)
    for mine, other in zip(ours.blocks, theirs.backbone.layers, strict=True):
        copy_mamba(mine.mixer, other.mixer)
    tokens = torch.randint(0, 31, (B, T))
    logits, expected = ours.logits(ours(tokens, Seq.rows(B, T))[0]), theirs(tokens, use_cache=False).logits
    torch.testing.assert_close(logits, expected, **CLOSE)
    with torch.no_grad():  # decoding: a prompt, then token by token, both with their own memory
        n, states = T - 6, ours.init_states(B, T)
        mine = [ours.logits(ours(tokens[:, :n], Seq.rows(B, n), states)[0])[:, -1]]
        out = theirs(tokens[:, :n], use_cache=True)
        other = [out.logits[:, -1]]
        for i in range(n, T):
            mine.append(ours.logits(ours(tokens[:, i : i + 1], Seq.rows(B, 1, i), states)[0])[:, -1])
            out = theirs(tokens[:, i : i + 1], cache_params=out.cache_params, use_cache=True)
            other.append(out.logits[:, -1])
    torch.testing.assert_close(torch.stack(mine), torch.stack(other), **CLOSE)
    torch.testing.assert_close(torch.stack(mine, 1), expected[:, n - 1 :], **CLOSE)
