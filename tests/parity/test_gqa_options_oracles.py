"""Each option of grouped-query attention against the model that has it: whole layers, weights copied, forward and backward."""

import importlib.metadata
import importlib.util

import pytest
import torch
from transformers import Gemma2Config, Gemma3TextConfig, GptOssConfig, Olmo2Config, Qwen3NextConfig
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as capped_attention
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention, Gemma3RotaryEmbedding
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, GptOssRotaryEmbedding
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as sink_attention
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.olmo2.modeling_olmo2 import Olmo2Attention
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextAttention, Qwen3NextRotaryEmbedding

from zero2llm.core.seq import Seq
from zero2llm.layers.mixers.gqa import GQAConfig
from zero2llm.layers.positions.rope import RoPEConfig
from zero2llm.ops.attend import attend, attention_weights, visible

D, H, G, K, T = 24, 4, 2, 10, 9
CLOSE = dict(atol=2e-6, rtol=1e-5)
BASE = 500.0
SHAPE = dict(hidden_size=D, num_attention_heads=H, num_key_value_heads=G, head_dim=K, num_hidden_layers=2, attn_implementation="eager")
ROPE = {"rope_theta": BASE, "rope_type": "default"}


def naive_attention():
    """fla's plain reference, loaded by path: importing the package would ask for triton."""
    path = next(p for p in importlib.metadata.files("fla-core") if str(p).endswith("ops/attn/naive.py")).locate()
    spec = importlib.util.spec_from_file_location("naive_attention", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.naive_parallel_attn


def rotary(cfg, cls=LlamaRotaryEmbedding, **kwargs):
    return lambda x, pos: cls(cfg)(x, pos, **kwargs)


def gpt_oss():
    cfg = GptOssConfig(**SHAPE, attention_bias=True, sliding_window=4, layer_types=["sliding_attention"] * 2, rope_parameters=ROPE)
    return GptOssAttention(cfg, 0), rotary(cfg, GptOssRotaryEmbedding)


def gemma2():
    cfg = Gemma2Config(**SHAPE, attn_logit_softcapping=3.0, query_pre_attn_scalar=7, rope_parameters=ROPE)
    return Gemma2Attention(cfg, 1), rotary(cfg)


def gemma3():
    both = {"full_attention": ROPE, "sliding_attention": ROPE}
    cfg = Gemma3TextConfig(
        **SHAPE, query_pre_attn_scalar=7, layer_types=["sliding_attention", "full_attention"], sliding_window=4, rope_parameters=both, rms_norm_eps=1e-3
    )
    return Gemma3Attention(cfg, 0), rotary(cfg, Gemma3RotaryEmbedding, layer_type="sliding_attention")


def olmo2():
    cfg = Olmo2Config(**SHAPE, rope_parameters=ROPE, rms_norm_eps=1e-3)
    return Olmo2Attention(cfg, 0), rotary(cfg)


def qwen3_next():
    cfg = Qwen3NextConfig(**SHAPE, rope_parameters=ROPE | {"partial_rotary_factor": 0.4}, rms_norm_eps=1e-3)
    return Qwen3NextAttention(cfg, 0), rotary(cfg, Qwen3NextRotaryEmbedding)


PLAIN = dict(n_heads=H, n_kv_heads=G, head_dim=K, position=RoPEConfig(base=BASE))
CASES = {
    "sink, biases, window: gpt-oss": (GQAConfig(**PLAIN, sink=True, qkv_bias=True, out_bias=True, window=4), gpt_oss),
    "softcap, scale: gemma 2": (GQAConfig(**PLAIN, softcap=3.0, scale=7**-0.5), gemma2),
    "qk-norm 1 + w, scale, window: gemma 3": (
        GQAConfig(**PLAIN, qk_norm=True, qk_norm_plus_one=True, norm_eps=1e-3, scale=7**-0.5, window=4),
        gemma3,
    ),
    "qk-norm over all heads: olmo 2": (
        GQAConfig(**PLAIN, qk_norm=True, qk_norm_span="all", norm_eps=1e-3),
        olmo2,
    ),
    "gate, partial rotation: qwen3-next": (
        GQAConfig(**(PLAIN | {"position": RoPEConfig(base=BASE, rotary_dim=4)}), gate=True, qk_norm=True, qk_norm_plus_one=True, norm_eps=1e-3),
        qwen3_next,
    ),
}  # fmt: skip


def copied(cfg, make):
    """Both layers with the same random weights; where theirs fuses gate and query, head by head [q, g]."""
    ours, (theirs, angles) = cfg.build(D), make()
    with torch.no_grad():
        for name, p in ours.named_parameters():
            p.copy_(torch.randn_like(p) * (0.6 if p.ndim > 1 else 1.0))
            if name == "q_proj.weight" and ours.g_proj is not None:
                continue
            if name == "g_proj.weight":
                heads = [w.unflatten(0, (H, K)) for w in (ours.q_proj.weight, p)]
                theirs.q_proj.weight.copy_(torch.cat(heads, 1).flatten(0, 1))
            else:
                theirs.get_parameter(name).copy_(p)
    return ours, theirs.eval(), angles


def both(cfg, make):
    """(ours, theirs, x, output of ours, output of theirs) on one row of unit-normal inputs; x needs gradients."""
    ours, theirs, angles = copied(cfg, make)
    x, seq = torch.randn(2, T, D, requires_grad=True), Seq.rows(2, T)
    mask = torch.zeros(T, T).masked_fill(~visible(seq, cfg.window, True)[0, 0], -torch.inf)[None, None]
    return ours, theirs, x, ours(x, seq)[0], theirs(x, position_embeddings=angles(x, seq.pos), attention_mask=mask)[0]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.oracle("mixer:gated_attention", "mixer:sink", "mixer:softcap", of="transformers gpt-oss, Gemma, Qwen3-Next", way="both")
def test_a_layer_equals_the_published_one(name):
    ours, theirs, x, got, expected = both(*CASES[name])
    scale = expected.std()
    torch.testing.assert_close(got / scale, expected / scale, **CLOSE)
    probe = torch.randn_like(got)
    mine = torch.autograd.grad((got * probe).sum(), [x, *ours.parameters()])
    other = dict(zip(["x", *(n for n, _ in theirs.named_parameters())], torch.autograd.grad((expected * probe).sum(), [x, *theirs.parameters()]), strict=True))
    for (n, _), grad in zip([("x", None), *ours.named_parameters()], mine, strict=True):
        if ours.g_proj is not None and n in ("q_proj.weight", "g_proj.weight"):
            want = other["q_proj.weight"].unflatten(0, (H, 2, K))[:, int(n[0] == "g")].flatten(0, 1)
        else:
            want = other[n]
        assert (grad - want).abs().max() < 1e-5 * want.abs().max(), n


def test_a_gate_split_before_the_heads_is_another_layer():
    """[2, H, K] instead of the published [H, 2 K]: the weights would fit and the outputs would not."""
    ours, _, x, _, expected = both(*CASES["gate, partial rotation: qwen3-next"])
    with torch.no_grad():
        fused = torch.stack((ours.q_proj.weight.unflatten(0, (H, K)), ours.g_proj.weight.unflatten(0, (H, K))), 1).flatten(0, 2)
        for p, half in zip((ours.q_proj, ours.g_proj), fused.chunk(2), strict=True):
            p.weight.copy_(half)
    assert (ours(x, Seq.rows(2, T))[0] - expected).abs().max() > 0.1 * expected.std()


def heads(*sizes):
    return [torch.randn(2, n, T, K, requires_grad=True) for n in sizes]


def agree(got, expected, wrt):
    torch.testing.assert_close(got, expected, **CLOSE)
    probe = torch.randn_like(got)
    for a, b in zip(*(torch.autograd.grad((out * probe).sum(), wrt) for out in (got, expected)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


class Module:
    num_key_value_groups, training, head_dim = H // G, False, K

    def __init__(self, sinks=None):
        self.sinks = sinks


CAUSAL = torch.full((T, T), -torch.inf).triu(1)[None, None]


def test_sinks_equal_gpt_oss_kernel():
    (q, k, v), sinks = heads(H, G, G), torch.randn(H, requires_grad=True)
    expected = sink_attention(Module(sinks), q, k, v, CAUSAL, K**-0.5)[0].transpose(1, 2)
    agree(attend(q, k, v, sinks=sinks), expected, (q, k, v, sinks))


@pytest.mark.parametrize("window", [None, 1, 4, 20])
@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.oracle("mixer:sink", "mixer:window", of="fla attn", way="both")
def test_sinks_and_windows_equal_fla(sink, window):
    (q, k, v), sinks = heads(H, G, G), torch.randn(H, requires_grad=True) if sink else None
    flip = lambda x: x.transpose(1, 2)
    expected = flip(naive_attention()(flip(q), flip(k), flip(v), window_size=window, sink_bias=sinks, scale=0.4)[0])
    mask = visible(Seq.rows(2, T), window)
    agree(attend(q, k, v, mask, 0.4, None, sinks), expected, [p for p in (q, k, v, sinks) if p is not None])


def test_a_sink_of_minus_infinity_is_none_and_one_of_zero_is_one_more_key_of_score_zero():
    q, k, v = heads(H, G, G)
    torch.testing.assert_close(attend(q, k, v, sinks=torch.full((H,), -torch.inf)), attend(q, k, v), **CLOSE)
    scores = (q @ k.repeat_interleave(2, 1).transpose(-1, -2) * K**-0.5).exp().tril()
    torch.testing.assert_close(attention_weights(q, k, sinks=torch.zeros(H)), scores / (1 + scores.sum(-1, keepdim=True)), **CLOSE)


@pytest.mark.oracle("mixer:softcap", of="transformers Gemma 2", way="both")
def test_a_softcap_equals_gemma_2_kernel():
    q, k, v = heads(H, G, G)
    expected = capped_attention(Module(), q, k, v, CAUSAL, scaling=0.7, softcap=1.5)[0].transpose(1, 2)
    agree(attend(q, k, v, None, 0.7, 1.5), expected, (q, k, v))


def test_a_softcap_comes_before_the_mask():
    """tanh(-inf) c = -c would let every hidden key back in."""
    q, k, v = heads(H, G, G)
    assert (attention_weights(q, k, None, 0.7, 1.5).triu(1) == 0).all()


def test_an_open_gate_is_no_gate():
    gated, plain = GQAConfig(n_heads=2, gate=True).build(8), GQAConfig(n_heads=2).build(8)
    plain.load_state_dict({n: p for n, p in gated.state_dict().items() if n != "g_proj.weight"})
    x = torch.rand(1, 5, 8) + 0.5
    with torch.no_grad():
        gated.g_proj.weight.fill_(1e4)
    torch.testing.assert_close(gated(x, Seq.rows(1, 5))[0], plain(x, Seq.rows(1, 5))[0], **CLOSE)
