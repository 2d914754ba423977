"""Positions against transformers: scaled and partial rotary angles, three-dimensional positions, ALiBi's bias."""

import pytest
import torch
from transformers import BloomConfig, LlamaConfig, PreTrainedConfig, Qwen3NextConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.bloom.modeling_bloom import BloomAttention, build_alibi_tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRotaryEmbedding
from transformers.models.qwen3_next.modeling_qwen3_next import apply_rotary_pos_emb as partial_rotary
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

from zero2llm.core.config import parse
from zero2llm.core.seq import Seq
from zero2llm.layers.mixers.gqa import GQAConfig
from zero2llm.layers.positions.alibi import ALiBiConfig
from zero2llm.layers.positions.catalog import AttentionPositionConfig
from zero2llm.layers.positions.interpolation import ScalingConfig
from zero2llm.layers.positions.rope import RoPEConfig

CLOSE = dict(atol=2e-6, rtol=1e-5)
K = 24  # width of a head
FACTORS = [1.0 + 0.3 * i for i in range(12)]

CASES = {  # name -> (ours, theirs)
    "linear": ({"kind": "linear", "factor": 3.0}, {"rope_type": "linear", "factor": 3.0}),
    "llama3": (
        {"kind": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_len": 64},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    ),
    "yarn": ({"kind": "yarn", "factor": 4.0, "original_max_len": 200}, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 200}),
    "yarn untruncated": (
        {"kind": "yarn", "factor": 32.0, "original_max_len": 300, "truncate": False},
        {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 300, "truncate": False},
    ),
    "yarn deepseek": (
        {"kind": "yarn", "factor": 40.0, "original_max_len": 4096, "beta_fast": 16, "beta_slow": 2, "mscale": 1.0, "mscale_all_dim": 0.7},
        {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 16, "beta_slow": 2, "mscale": 1.0, "mscale_all_dim": 0.7},
    ),
    "yarn given amplitude": (
        {"kind": "yarn", "factor": 2.0, "original_max_len": 64, "attention_factor": 0.8},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "attention_factor": 0.8},
    ),
    "longrope long": (
        {"kind": "longrope", "short_factor": FACTORS, "long_factor": FACTORS[::-1], "original_max_len": 64, "max_len": 256},
        {"rope_type": "longrope", "short_factor": FACTORS, "long_factor": FACTORS[::-1], "original_max_position_embeddings": 64, "factor": 4.0},
    ),
    "longrope short": (
        {"kind": "longrope", "short_factor": FACTORS, "long_factor": FACTORS[::-1], "original_max_len": 64, "max_len": 64},
        {"rope_type": "longrope", "short_factor": FACTORS, "long_factor": FACTORS[::-1], "original_max_position_embeddings": 64, "factor": 1.0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_scaled_frequencies_equal_transformers(name):
    ours, theirs = CASES[name]
    scaling = parse(ScalingConfig, ours)
    cfg = PreTrainedConfig(head_dim=K, hidden_size=4 * K, num_attention_heads=4, max_position_embeddings=256, rope_parameters={"rope_theta": 500.0, **theirs})
    seq_len = {"longrope long": 256, "longrope short": 64}.get(name)
    freq, amplitude = ROPE_INIT_FUNCTIONS[theirs["rope_type"]](cfg, None, **({"seq_len": seq_len} if seq_len else {}))
    torch.testing.assert_close(scaling.frequencies(500.0, K), freq, atol=1e-7, rtol=1e-6)
    assert scaling.amplitude() == pytest.approx(amplitude, rel=1e-12)


@pytest.mark.oracle("position:rope_ntk", of="transformers dynamic", way="forward")
def test_ntk_equals_transformers_dynamic_form_at_that_length():
    """Dynamic: base (s n / L - (s - 1))^(K/(K-2)); with s = 3 and n = 2 L the bracket is the factor 4."""
    rope = {"rope_theta": 500.0, "rope_type": "dynamic", "factor": 3.0}
    cfg = PreTrainedConfig(head_dim=K, hidden_size=4 * K, num_attention_heads=4, max_position_embeddings=64, rope_parameters=rope)
    freq, _ = ROPE_INIT_FUNCTIONS["dynamic"](cfg, None, seq_len=128)
    torch.testing.assert_close(parse(ScalingConfig, {"kind": "ntk", "factor": 4.0}).frequencies(500.0, K), freq, atol=1e-7, rtol=1e-6)


def agree(ours, cos, sin, q, k, seq, **close):
    """Rotated queries and keys and their gradients against apply_rotary_pos_emb."""
    pairs = zip(ours(q, k, seq), apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, **close)
        probe = torch.randn_like(theirs)
        for given in (q, k):
            if given.shape == mine.shape:
                grads = [torch.autograd.grad((out * probe).sum(), given, allow_unused=True)[0] for out in (mine, theirs)]
                assert (grads[0] is None) == (grads[1] is None)
                if grads[0] is not None:
                    torch.testing.assert_close(*grads, **close)


def rows(heads=4, kv=2, T=7):
    return torch.randn(2, T, heads, K, requires_grad=True), torch.randn(2, T, kv, K, requires_grad=True)


@pytest.mark.parametrize("name", ["linear", "llama3", "yarn", "yarn deepseek", "yarn given amplitude"])
@pytest.mark.oracle("position:rope_linear", "position:rope_llama3", "position:rope_yarn", of="transformers Llama", way="forward")
def test_rotation_with_scaling_equals_llama(name):
    ours, theirs = CASES[name]
    cfg = LlamaConfig(hidden_size=4 * K, num_attention_heads=4, max_position_embeddings=256, rope_parameters={"rope_theta": 500.0, **theirs})
    (q, k), seq = rows(), Seq.rows(2, 7)
    cos, sin = LlamaRotaryEmbedding(cfg)(q, seq.pos)
    rope = parse(AttentionPositionConfig, {"kind": "rope", "base": 500.0, "scaling": ours}).build(K)
    agree(rope, cos, sin, q, k, seq, **CLOSE)


@pytest.mark.parametrize("rotary_dim", [2, 6, 12, 24])
@pytest.mark.oracle("position:rope_half", of="transformers Qwen3-Next", way="forward")
def test_partial_rotation_equals_qwen3_next(rotary_dim):
    rope = {"rope_theta": 500.0, "rope_type": "default", "partial_rotary_factor": rotary_dim / K}
    cfg = Qwen3NextConfig(hidden_size=4 * K, num_attention_heads=4, head_dim=K, rope_parameters=rope)
    q, k, seq = torch.randn(2, 7, 4, K), torch.randn(2, 7, 2, K), Seq.rows(2, 7)
    cos, sin = Qwen3NextRotaryEmbedding(cfg)(q, seq.pos)
    assert cos.shape[-1] == rotary_dim
    expected = partial_rotary(q, k, cos, sin, unsqueeze_dim=2)
    for mine, theirs in zip(RoPEConfig(base=500.0, rotary_dim=rotary_dim).build(K)(q, k, seq), expected, strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)


@pytest.mark.parametrize("text", [True, False], ids=["text", "pictures"])
@pytest.mark.parametrize(("interleaved", "theirs", "config"), [(False, Qwen2VLRotaryEmbedding, Qwen2VLTextConfig), (True, Qwen3VLTextRotaryEmbedding, Qwen3VLTextConfig)])
@pytest.mark.oracle("position:mrope", of="transformers Qwen2-VL, Qwen3-VL", way="forward")
def test_three_dimensional_positions_equal_qwen_vl(interleaved, theirs, config, text):
    sections = [6, 3, 3] if interleaved else [2, 7, 3]
    rope = {"rope_theta": 500.0, "rope_type": "default", "mrope_section": sections}
    cfg = config(hidden_size=4 * K, num_attention_heads=4, head_dim=K, rope_parameters=rope)
    (q, k), seq = rows(), Seq.rows(2, 7)
    grid = seq.pos[..., None].expand(2, 7, 3) if text else torch.randint(0, 9, (2, 7, 3))
    cos, sin = theirs(cfg)(q, grid.permute(2, 0, 1))
    ours = parse(AttentionPositionConfig, {"kind": "mrope", "base": 500.0, "sections": sections, "interleaved": interleaved}).build(K)
    agree(ours, cos, sin, q, k, Seq(seq.pos, None, None if text else grid), **CLOSE)


@pytest.mark.parametrize("heads", [1, 6, 8, 12])
def test_alibi_slopes_equal_bloom(heads):
    theirs = build_alibi_tensor(torch.ones(1, 9, dtype=torch.long), heads, torch.float32).view(heads, 9)  # m_h j
    seq = Seq.rows(1, 9)
    bias = ALiBiConfig().build(4, heads).bias(seq.pos, seq.pos, torch.ones(1, 1, 9, 9, dtype=torch.bool), torch.float32)
    torch.testing.assert_close(bias[0], theirs[:, None] - theirs[:, :, None], **CLOSE)


@pytest.mark.parametrize("heads", [6, 8])
@pytest.mark.oracle("position:alibi", of="transformers BLOOM", way="forward")
def test_attention_with_alibi_equals_bloom(heads):
    D, T = 4 * heads, 9
    cfg = BloomConfig(hidden_size=D, n_head=heads, hidden_dropout=0.0, attention_dropout=0.0)
    ours, theirs = GQAConfig(n_heads=heads, qkv_bias=True, out_bias=True, position=ALiBiConfig()).build(D), BloomAttention(cfg, 0)
    with torch.no_grad():
        for p in ("weight", "bias"):
            parts = [getattr(m, p).normal_() for m in (ours.q_proj, ours.k_proj, ours.v_proj)]
            fused = torch.stack([x.unflatten(0, (heads, 4)) for x in parts], 1)  # (H, 3, K, ...): alternating per head
            getattr(theirs.query_key_value, p).copy_(fused.flatten(0, 2))
            getattr(theirs.dense, p).copy_(getattr(ours.o_proj, p).normal_())
    x = torch.randn(2, T, D, requires_grad=True)
    alibi = build_alibi_tensor(torch.ones(2, T, dtype=torch.long), heads, torch.float32)
    mask = torch.full((T, T), -torch.inf).triu(1)[None, None]
    expected = theirs(x, torch.zeros(2, T, D), alibi, mask)[0]
    got = ours(x, Seq.rows(2, T))[0]
    scale = expected.std()
    torch.testing.assert_close(got / scale, expected / scale, **CLOSE)
    probe = torch.randn_like(got)
    grads = [torch.autograd.grad((out * probe).sum(), x)[0] for out in (got, expected)]
    assert (grads[0] - grads[1]).abs().max() < 1e-5 * grads[1].abs().max()
