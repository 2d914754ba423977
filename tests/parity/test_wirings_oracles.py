"""Whole blocks against the published ones: how norms and branches are wired, with norms far from their initial values."""

import pytest
import torch
from transformers import Gemma2Config, GPTJConfig, Olmo2Config
from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer
from transformers.models.gptj.modeling_gptj import GPTJBlock
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.olmo2.modeling_olmo2 import Olmo2DecoderLayer

from zero2llm.core.seq import Seq
from zero2llm.layers.ffns.glu import GLUConfig
from zero2llm.layers.ffns.mlp import MLPConfig
from zero2llm.layers.mixers.gqa import GQAConfig
from zero2llm.layers.norms.layer import LayerNormConfig
from zero2llm.layers.norms.rms import RMSNormConfig
from zero2llm.layers.positions.rope import RoPEConfig
from zero2llm.model.block import Block
from zero2llm.model.spec import LayerSpec

D, H, G, K, T = 24, 4, 2, 6, 9
SHAPE = dict(hidden_size=D, num_attention_heads=H, num_key_value_heads=G, head_dim=K, num_hidden_layers=2,
             intermediate_size=20, rms_norm_eps=1e-3, attn_implementation="eager", rope_parameters={"rope_theta": 500.0, "rope_type": "default"})  # fmt: skip
PROJECTIONS = {f"mixer.{n}_proj": f"self_attn.{n}_proj" for n in "qkvo"} | {f"ffn.{n}_proj": f"mlp.{n}_proj" for n in ("gate", "up", "down")}
MASK = torch.full((T, T), -torch.inf).triu(1)[None, None]
ROPE = RoPEConfig(base=500.0)


def copied(spec, theirs, names):
    """Our block with random weights, theirs with the same."""
    ours = Block(spec, D)
    with torch.no_grad():
        for mine, other in names.items():
            for part in ("weight", "bias"):
                if f"{mine}.{part}" in ours.state_dict():
                    p = ours.get_parameter(f"{mine}.{part}")
                    theirs.get_parameter(f"{other}.{part}").copy_(p.copy_(torch.randn_like(p) * (0.5 if p.ndim > 1 else 1.0)))
    assert len(list(ours.parameters())) == len(list(theirs.parameters()))
    return ours


def agree(ours, theirs, x):
    """theirs: a function of x. Outputs relative to their spread, and the gradient of x."""
    got, expected = ours(x, Seq.rows(2, T))[0], theirs(x)
    scale = expected.std()
    torch.testing.assert_close(got / scale, expected / scale, atol=2e-6, rtol=1e-5)
    probe = torch.randn_like(got)
    a, b = (torch.autograd.grad((out * probe).sum(), x)[0] for out in (got, expected))
    assert (a - b).abs().max() < 1e-5 * b.abs().max()


def rotated(cfg, layer):
    return lambda x: layer(x, position_embeddings=LlamaRotaryEmbedding(cfg)(x, Seq.rows(2, T).pos), attention_mask=MASK)


@pytest.mark.oracle("wiring:sandwich", "ffn:geglu", of="transformers Gemma 2", way="forward")
def test_sandwich_equals_gemma_2():
    cfg = Gemma2Config(**SHAPE, attn_logit_softcapping=3.0, query_pre_attn_scalar=7, hidden_activation="gelu_pytorch_tanh")
    mixer = GQAConfig(n_heads=H, n_kv_heads=G, head_dim=K, position=ROPE, softcap=3.0, scale=7**-0.5)
    spec = LayerSpec(mixer=mixer, ffn=GLUConfig(hidden=20, act="gelu"), norm=RMSNormConfig(eps=1e-3, plus_one=True), wiring="sandwich")
    theirs = Gemma2DecoderLayer(cfg, 1).eval()
    norms = {"mixer_norm": "input_layernorm", "mixer_out_norm": "post_attention_layernorm",
             "ffn_norm": "pre_feedforward_layernorm", "ffn_out_norm": "post_feedforward_layernorm"}  # fmt: skip
    agree(copied(spec, theirs, PROJECTIONS | norms), rotated(cfg, theirs), torch.randn(2, T, D, requires_grad=True))


@pytest.mark.oracle("wiring:branch", of="transformers OLMo 2", way="forward")
def test_branch_equals_olmo_2():
    cfg = Olmo2Config(**SHAPE)
    mixer = GQAConfig(n_heads=H, n_kv_heads=G, head_dim=K, position=ROPE, qk_norm=True, qk_norm_span="all", norm_eps=1e-3)
    spec = LayerSpec(mixer=mixer, ffn=GLUConfig(hidden=20), norm=RMSNormConfig(eps=1e-3), wiring="branch")
    theirs = Olmo2DecoderLayer(cfg, 0).eval()
    norms = {"mixer_norm": "post_attention_layernorm", "ffn_norm": "post_feedforward_layernorm"}
    norms |= {"mixer.q_norm": "self_attn.q_norm", "mixer.k_norm": "self_attn.k_norm"}
    agree(copied(spec, theirs, PROJECTIONS | norms), rotated(cfg, theirs), torch.randn(2, T, D, requires_grad=True))


@pytest.mark.parametrize("rotary_dim", [2, 4])
@pytest.mark.oracle("wiring:parallel", of="transformers GPT-J", way="forward")
def test_parallel_equals_gpt_j(rotary_dim):
    """One norm, both branches from the same input; interleaved rotation of the first channels of each head."""
    cfg = GPTJConfig(n_embd=D, n_head=H, n_inner=20, rotary_dim=rotary_dim, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, layer_norm_epsilon=1e-3, attn_implementation="eager")
    mixer = GQAConfig(n_heads=H, position=RoPEConfig(layout="interleaved", rotary_dim=rotary_dim))
    spec = LayerSpec(mixer=mixer, ffn=MLPConfig(hidden=20), norm=LayerNormConfig(eps=1e-3), wiring="parallel")
    theirs = GPTJBlock(cfg, 0).eval()
    names = {f"mixer.{n}_proj": f"attn.{o}_proj" for n, o in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "out"))}
    names |= {"ffn.up_proj": "mlp.fc_in", "ffn.down_proj": "mlp.fc_out", "mixer_norm": "ln_1"}
    run = lambda x: theirs(x, attention_mask=MASK, position_ids=Seq.rows(2, T).pos)[0]
    agree(copied(spec, theirs, names), run, torch.randn(2, T, D, requires_grad=True))
