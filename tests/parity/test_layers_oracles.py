"""Norms, feed-forwards, embeddings and wirings against torch and transformers."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, LlamaConfig
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding

from zero2llm.core.seq import Seq
from zero2llm.layers.activations import ACTIVATIONS
from zero2llm.layers.ffns.glu import GLUConfig
from zero2llm.layers.ffns.mlp import MLPConfig
from zero2llm.layers.mixers.gqa import GQAConfig
from zero2llm.layers.norms.layer import LayerNormConfig
from zero2llm.layers.norms.rms import RMSNormConfig
from zero2llm.layers.positions.sinusoidal import SinusoidalConfig
from zero2llm.model.block import Block
from zero2llm.model.spec import LayerSpec

D = 12
CLOSE = dict(atol=2e-6, rtol=1e-5)


def copy(ours, theirs, names):
    with torch.no_grad():
        for mine, other in names.items():
            value = torch.randn_like(ours.get_parameter(mine))
            ours.get_parameter(mine).copy_(value)
            target = theirs.get_parameter(other)
            target.copy_(value if value.shape == target.shape else value.t())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.oracle("norm:rms", of="transformers Llama", way="forward")
def test_rms_norm_equals_llama(dtype):
    ours, theirs = RMSNormConfig(eps=1e-3).build(D), LlamaRMSNorm(D, 1e-3)
    copy(ours, theirs, {"weight": "weight"})
    x = (3 * torch.randn(2, 7, D)).to(dtype)
    a, b = ours.to(dtype)(x), theirs.to(dtype)(x)
    assert a.dtype == dtype
    torch.testing.assert_close(a, b, atol=2e-6 if dtype == torch.float32 else 0, rtol=1e-5 if dtype == torch.float32 else 0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.oracle("norm:layer", of="torch", way="forward")
def test_layer_norm_equals_torch(bias):
    ours, theirs = LayerNormConfig(eps=1e-3, bias=bias).build(D), nn.LayerNorm(D, 1e-3, bias=bias)
    copy(ours, theirs, {"weight": "weight"} | ({"bias": "bias"} if bias else {}))
    x = torch.randn(2, 7, D) * 3 + 1
    torch.testing.assert_close(ours(x), theirs(x), **CLOSE)


@pytest.mark.oracle("ffn:swiglu", of="transformers Llama", way="forward")
def test_glu_equals_llama():
    ours, theirs = GLUConfig(hidden=20).build(D), LlamaMLP(LlamaConfig(hidden_size=D, num_attention_heads=4, intermediate_size=20))
    copy(ours, theirs, {f"{n}_proj.weight": f"{n}_proj.weight" for n in ("gate", "up", "down")})
    x = torch.randn(2, 7, D)
    torch.testing.assert_close(ours(x, None)[0], theirs(x), atol=1e-5, rtol=1e-5)


@pytest.mark.oracle("ffn:gelu", of="transformers GPT-2", way="forward")
def test_mlp_equals_gpt2():
    ours, theirs = MLPConfig(hidden=20).build(D), GPT2MLP(20, GPT2Config(n_embd=D, resid_pdrop=0.0))
    copy(ours, theirs, {f"{a}_proj.{p}": f"{b}.{p}" for a, b in (("up", "c_fc"), ("down", "c_proj")) for p in ("weight", "bias")})
    x = torch.randn(2, 7, D)
    torch.testing.assert_close(ours(x, None)[0], theirs(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "theirs"), [("silu", "silu"), ("gelu", "gelu_new"), ("gelu_erf", "gelu"), ("relu", "relu"), ("relu2", "relu2")])
def test_activations_equal_transformers_of_that_name(name, theirs):
    from transformers.activations import ACT2FN

    x = torch.linspace(-6, 6, 63)
    torch.testing.assert_close(ACTIVATIONS[name](x), ACT2FN[theirs](x), **CLOSE)


@pytest.mark.oracle("position:sinusoidal", of="transformers Marian", way="forward")
def test_sinusoidal_equals_marian_interleaved():
    theirs = MarianSinusoidalPositionalEmbedding(63, D)
    theirs.weight = nn.Parameter(theirs.create_weight(), requires_grad=False)
    halves = theirs.weight  # (positions, D): sines, then cosines
    expected = torch.stack((halves[:, : D // 2], halves[:, D // 2 :]), -1).flatten(1)
    torch.testing.assert_close(SinusoidalConfig().build(D, 63)(Seq.rows(1, 63))[0], expected, atol=5e-6, rtol=0)


@pytest.mark.parametrize("wiring", ["pre", "post"])
@pytest.mark.oracle("wiring:pre", "wiring:post", of="torch", way="forward")
def test_blocks_equal_torch_s_encoder_layer(wiring):
    spec = LayerSpec(
        mixer=GQAConfig(n_heads=4, qkv_bias=True, out_bias=True), ffn=MLPConfig(hidden=20, act="relu"),
        norm=LayerNormConfig(), wiring=wiring,
    )  # fmt: skip
    ours = Block(spec, D)
    theirs = nn.TransformerEncoderLayer(D, 4, 20, dropout=0.0, batch_first=True, norm_first=wiring == "pre")
    names = {"mixer.o_proj": "self_attn.out_proj", "mixer_norm": "norm1", "ffn_norm": "norm2", "ffn.up_proj": "linear1", "ffn.down_proj": "linear2"}
    copy(ours, theirs, {f"{a}.{p}": f"{b}.{p}" for a, b in names.items() for p in ("weight", "bias")})
    with torch.no_grad():
        for p in ("weight", "bias"):
            parts = [getattr(layer, p).normal_() for layer in (ours.mixer.q_proj, ours.mixer.k_proj, ours.mixer.v_proj)]
            getattr(theirs.self_attn, f"in_proj_{p}").copy_(torch.cat(parts))
    x, drop = torch.randn(2, 7, D), torch.ones(7, 7, dtype=torch.bool).triu(1)
    expected = theirs(x, src_mask=drop)
    difference = (ours(x, Seq.rows(2, 7))[0] - expected).abs().max() / expected.std()
    assert difference < 2e-6
