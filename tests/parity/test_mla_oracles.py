"""Latent attention against transformers: DeepSeek-V2, DeepSeek-V3 and Kimi Linear, forward, backward and decoding."""

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention, DeepseekV2RotaryEmbedding
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding
from transformers.models.kimi_linear.configuration_kimi_linear import KimiLinearConfig
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearAttention

from zero2llm.core.seq import Seq
from zero2llm.layers.mixers.mla import MLAConfig
from zero2llm.layers.positions.interpolation import YaRNConfig
from zero2llm.layers.positions.none import NoPositionConfig
from zero2llm.layers.positions.rope import RoPEConfig

D, T, B = 32, 37, 2
CLOSE = dict(atol=2e-6, rtol=1e-5)
NAMES = {  # ours -> theirs
    "q_proj": "q_proj", "q_a_proj": "q_a_proj", "q_a_norm": "q_a_layernorm", "q_b_proj": "q_b_proj", "kv_a_proj": "kv_a_proj_with_mqa",
    "kv_a_norm": "kv_a_layernorm", "kv_b_proj": "kv_b_proj", "o_proj": "o_proj",
}  # fmt: skip
WIDTHS = dict(n_heads=4, kv_rank=12, nope_dim=10, rope_dim=6, v_dim=7)
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 8.0, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 0.6}
OURS = {
    "v3": MLAConfig(q_rank=9, position=RoPEConfig(base=500.0, layout="interleaved"), **WIDTHS),
    "v3 direct": MLAConfig(position=RoPEConfig(base=500.0, layout="interleaved"), **WIDTHS),
    "v3 halves": MLAConfig(q_rank=9, position=RoPEConfig(base=500.0), **WIDTHS),
    "v3 yarn": MLAConfig(q_rank=9, position=RoPEConfig(base=500.0, layout="interleaved", scaling=YaRNConfig(factor=8.0, original_max_len=64, mscale=1.0, mscale_all_dim=0.6)), **WIDTHS),
    "v2": MLAConfig(q_rank=9, position=RoPEConfig(base=500.0, layout="interleaved"), **WIDTHS),
    "kimi": MLAConfig(q_rank=9, position=NoPositionConfig(), **WIDTHS),
}  # fmt: skip


def oracle(name):
    """A function of x (B, T, D) and an additive mask, and the module inside."""
    shared = dict(
        hidden_size=D, num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=12, q_lora_rank=OURS[name].q_rank, qk_nope_head_dim=10,
        qk_rope_head_dim=6, v_head_dim=7, attn_implementation="eager",
    )  # fmt: skip
    if name == "kimi":
        layer = KimiLinearAttention(KimiLinearConfig(**shared), 0)
        return lambda x, mask: layer(x, mask)[0], layer
    rope = YARN if "yarn" in name else {"rope_type": "default", "rope_theta": 500.0}
    if name == "v2":
        cfg = DeepseekV2Config(rope_parameters=rope, **shared)
        layer, rotary = DeepseekV2Attention(cfg, 0), DeepseekV2RotaryEmbedding(cfg)
        return lambda x, mask: layer(x, mask, position_embeddings=rotary(x, torch.arange(x.shape[1])[None]))[0], layer
    cfg = DeepseekV3Config(rope_parameters=rope, rope_interleave="halves" not in name, **shared)
    layer, rotary = DeepseekV3Attention(cfg, 0), DeepseekV3RotaryEmbedding(cfg)
    return lambda x, mask: layer(x, rotary(x, torch.arange(x.shape[1])[None]), mask)[0], layer


def pair(name):
    """Our module and the oracle with equal random weights that keep activations near 1."""
    ours, (theirs, layer) = OURS[name].build(D), oracle(name)
    with torch.no_grad():
        for mine, p in ours.named_parameters():
            p.normal_().mul_(p.shape[-1] ** -0.5 if p.ndim > 1 else 1.0)
            head, _, tail = mine.rpartition(".")
            layer.get_parameter(f"{NAMES[head]}.{tail}").copy_(p)
    return ours, theirs, layer


def causal(T):
    return torch.full((T, T), -torch.inf).triu(1)[None, None]


@pytest.mark.oracle("mixer:mla", of="transformers DeepSeek-V2, V3, Kimi Linear", way="forward")
@pytest.mark.parametrize("name", OURS)
def test_forward(name):
    ours, theirs, _ = pair(name)
    x = torch.randn(B, T, D)
    expected = theirs(x, causal(T))
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(x, Seq.rows(B, T))[0], expected, **CLOSE)


@pytest.mark.oracle("mixer:mla", of="transformers DeepSeek-V2, V3, Kimi Linear", way="backward")
@pytest.mark.parametrize("name", OURS)
def test_backward(name):
    ours, theirs, layer = pair(name)
    x, g = torch.randn(B, T, D, requires_grad=True), torch.randn(B, T, D) / (B * T) ** 0.5
    a, b = ours(x, Seq.rows(B, T))[0], theirs(x, causal(T))
    (dx,) = torch.autograd.grad((a * g).sum(), x, retain_graph=True)
    (dy,) = torch.autograd.grad((b * g).sum(), x, retain_graph=True)
    torch.testing.assert_close(dx, dy, **CLOSE)
    (a * g).sum().backward()
    (b * g).sum().backward()
    for mine, p in ours.named_parameters():
        head, _, tail = mine.rpartition(".")
        torch.testing.assert_close(p.grad, layer.get_parameter(f"{NAMES[head]}.{tail}").grad, **CLOSE)


@pytest.mark.parametrize("name", OURS)
def test_absorbed_decoding_after_a_prefill(name):
    ours, theirs, _ = pair(name)
    x, seq = torch.randn(B, T, D), Seq.rows(B, T)
    state, expected = ours.init_state(B, 50), theirs(x, causal(T))
    first = ours(x[:, :20], seq.window(0, 20), state)[0]
    steps = [ours(x[:, t : t + 1], seq.window(t, t + 1), state)[0] for t in range(20, T)]
    torch.testing.assert_close(torch.cat((first, *steps), 1), expected, atol=1e-5, rtol=1e-5)


def test_packed_documents_against_a_block_mask():
    ours, theirs, _ = pair("kimi")  # no positions, so that a mask says it all
    seg = torch.tensor([1] * 11 + [2] * 26, dtype=torch.int32).expand(B, T)
    x = torch.randn(B, T, D)
    mask = causal(T).masked_fill(seg[:, None, :, None] != seg[:, None, None, :], -torch.inf)
    torch.testing.assert_close(ours(x, Seq.of_segments(seg))[0], theirs(x, mask), **CLOSE)
