"""Attention and rotation against torch and transformers: unit-normal inputs, fp32, odd sizes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from zero2llm.core.seq import Seq
from zero2llm.interop.hf_names import to_half_split, to_interleaved
from zero2llm.layers.mixers.gqa import GQAConfig
from zero2llm.layers.positions.rope import RoPEConfig
from zero2llm.ops.attend import attend, attend_plain, attention_weights, visible
from zero2llm.ops.rotary import rotate_half_split, rotate_interleaved

CLOSE = dict(atol=2e-6, rtol=1e-5)
SEG = lambda T: torch.stack((torch.arange(T) // 5 + 1, torch.where(torch.arange(T) < T - 3, 1, 0)))


@pytest.mark.parametrize("T", [7, 63])
@pytest.mark.parametrize("kv", [1, 2, 4])
@pytest.mark.parametrize("kind", ["causal", "window", "packed", "packed window"])
@pytest.mark.oracle("mixer:mqa", "mixer:nope", of="torch SDPA", way="forward")
def test_fused_equals_plain_equals_torch(T, kv, kind):
    q, k, v = (torch.randn(2, h, T, 6, requires_grad=True) for h in (4, kv, kv))
    mask = visible(Seq.of_segments(SEG(T)) if "packed" in kind else Seq.rows(2, T), 3 if "window" in kind else None)
    wide = [x.repeat_interleave(4 // kv, 1) for x in (k, v)]
    torchs = F.scaled_dot_product_attention(q, *wide, attn_mask=mask, is_causal=mask is None)
    outs = [attend(q, k, v, mask), attend_plain(q, k, v, mask), torchs]
    probe = torch.randn_like(torchs)
    grads = [torch.autograd.grad((o * probe).sum(), (q, k, v), retain_graph=True) for o in outs]
    for out, grad in zip(outs[:2], grads[:2], strict=True):
        torch.testing.assert_close(out, torchs, **CLOSE)
        for a, b in zip(grad, grads[2], strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_scale_and_a_value_width_of_their_own():
    q, k, v = torch.randn(2, 4, 7, 6), torch.randn(2, 2, 7, 6), torch.randn(2, 2, 7, 10)
    torch.testing.assert_close(attend(q, k, v, scale=0.3), attend_plain(q, k, v, scale=0.3), **CLOSE)


def test_a_mask_is_needed_where_queries_and_keys_differ_in_number():
    with pytest.raises(AssertionError, match="explicit mask"):
        attend(torch.randn(1, 2, 1, 4), torch.randn(1, 2, 7, 4), torch.randn(1, 2, 7, 4))


@pytest.mark.parametrize("window", [None, 1, 4, 63])
def test_visibility_equals_transformers_masks(window):
    cfg = LlamaConfig(num_attention_heads=2, hidden_size=8, attn_implementation="eager")
    if window:
        cfg.sliding_window = window
    T = 17
    make = create_sliding_window_causal_mask if window else create_causal_mask
    theirs = make(config=cfg, inputs_embeds=torch.zeros(1, T, 8), attention_mask=None, past_key_values=None,
                  position_ids=torch.arange(T)[None])  # fmt: skip
    ours = visible(Seq.rows(1, T), window)
    expected = torch.ones(T, T, dtype=torch.bool).tril()[None, None] if ours is None else ours
    assert torch.equal(theirs == 0 if theirs.is_floating_point() else theirs, expected)


def test_padding_rows_stay_finite_and_see_only_padding():
    weights = attention_weights(torch.randn(2, 4, 9, 6), torch.randn(2, 2, 9, 6), visible(Seq.ragged(torch.tensor([9, 4]), 9)))
    assert torch.isfinite(weights).all() and (weights[1, :, :4, 4:] == 0).all() and (weights[1, :, 4:, :4] == 0).all()


def test_multi_head_attention_equals_torch_s_module():
    ours = GQAConfig(n_heads=4, qkv_bias=True, out_bias=True).build(12)
    theirs = nn.MultiheadAttention(12, 4, batch_first=True)
    nn.init.normal_(theirs.in_proj_bias)
    with torch.no_grad():
        for p, w, b in zip((ours.q_proj, ours.k_proj, ours.v_proj), theirs.in_proj_weight.chunk(3), theirs.in_proj_bias.chunk(3), strict=True):
            p.weight.copy_(w)
            p.bias.copy_(b)
        ours.o_proj.load_state_dict(theirs.out_proj.state_dict())
    x = torch.randn(2, 7, 12)
    drop = torch.ones(7, 7, dtype=torch.bool).triu(1)  # True = hidden, there
    expected, weights = theirs(x, x, x, attn_mask=drop, average_attn_weights=False)
    torch.testing.assert_close(ours(x, Seq.rows(2, 7))[0], expected, **CLOSE)
    torch.testing.assert_close(ours.weights(x, Seq.rows(2, 7)), weights, **CLOSE)


def test_grouped_heads_equal_tied_full_heads():
    grouped, full = (GQAConfig(n_heads=6, n_kv_heads=kv, head_dim=4).build(12) for kv in (2, None))
    state = grouped.state_dict()
    for name in ("k_proj.weight", "v_proj.weight"):
        state[name] = state[name].unflatten(0, (2, 4)).repeat_interleave(3, 0).flatten(0, 1)
    full.load_state_dict(state)
    x = torch.randn(2, 7, 12)
    torch.testing.assert_close(grouped(x, Seq.rows(2, 7))[0], full(x, Seq.rows(2, 7))[0], **CLOSE)


def test_a_token_at_the_window_s_edge_has_no_gradient():
    module, x = GQAConfig(n_heads=2, window=4).build(8), torch.randn(1, 9, 8, requires_grad=True)
    module(x, Seq.rows(1, 9))[0][0, 7].sum().backward()
    assert (x.grad[0].abs().sum(-1) > 0).tolist() == [False] * 4 + [True] * 4 + [False]


# Rotation


@pytest.mark.parametrize("start", [0, 5000])
def test_half_split_equals_llama(start):
    cfg = LlamaConfig(hidden_size=40, num_attention_heads=4, rope_theta=500.0, max_position_embeddings=8192)
    q, k, seq = torch.randn(2, 7, 4, 10), torch.randn(2, 7, 2, 10), Seq.rows(2, 7, start)
    cos, sin = LlamaRotaryEmbedding(cfg)(q, seq.pos)
    expected = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    for ours, theirs in zip(RoPEConfig(base=500.0).build(10)(q, k, seq), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6 if start == 0 else 2e-3, rtol=0)  # fp32 angle: 5000 * 2^-24


def test_interleaved_equals_deepseek():
    cfg = LlamaConfig(hidden_size=40, num_attention_heads=4, rope_theta=500.0)
    q, k, seq = torch.randn(2, 7, 4, 10), torch.randn(2, 7, 4, 10), Seq.rows(2, 7)
    cos, sin = LlamaRotaryEmbedding(cfg)(q, seq.pos)
    expected = apply_rotary_pos_emb_interleave(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    ours = RoPEConfig(base=500.0, layout="interleaved").build(10)(q, k, seq)
    for mine, theirs in zip(ours, expected, strict=True):  # their result comes out de-interleaved
        apart = torch.cat((mine[..., ::2], mine[..., 1::2]), -1).transpose(1, 2)
        torch.testing.assert_close(apart, theirs, **CLOSE)


def test_one_layout_is_a_permutation_of_the_other():
    x, theta = torch.randn(1, 7, 4, 10), torch.randn(1, 7, 1, 5)
    cos, sin = theta.cos(), theta.sin()
    apart = lambda x: torch.cat((x[..., ::2], x[..., 1::2]), -1)
    assert torch.equal(rotate_half_split(apart(x), cos, sin), apart(rotate_interleaved(x, cos, sin)))
    rows = torch.randn(40, 3)
    assert torch.equal(to_interleaved(to_half_split(rows, 10), 10), rows)
    assert not torch.equal(to_half_split(rows, 10), rows)


@pytest.mark.parametrize("layout", ["half_split", "interleaved"])
def test_scores_depend_on_the_distance_alone(layout):
    rope = RoPEConfig(layout=layout).build(10)
    q, k = torch.randn(1, 7, 2, 10), torch.randn(1, 7, 2, 10)
    here, there = (torch.einsum("bihk,bjhk->bhij", *rope(q, k, Seq.rows(1, 7, start))) for start in (0, 100))
    torch.testing.assert_close(here, there, atol=2e-4, rtol=0)
    norms = rope(q, k, Seq.rows(1, 7, 9))[0].norm(dim=-1)
    torch.testing.assert_close(norms, q.norm(dim=-1), **CLOSE)


def test_angles_stay_in_full_precision_under_autocast():
    rope, q = RoPEConfig().build(10), torch.randn(1, 1, 2, 10)
    seq = Seq(torch.full((1, 1), 4001))
    with torch.autocast("cpu", torch.bfloat16):
        half = rope(q.bfloat16(), q.bfloat16(), seq)[0]
    torch.testing.assert_close(half.float(), rope(q, q, seq)[0], atol=5e-2, rtol=0)
