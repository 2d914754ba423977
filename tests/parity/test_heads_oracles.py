"""Heads against transformers: a depth of multi-token prediction, and which token a classifier reads."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification
from transformers.modeling_layers import MtpLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from zero2llm.core.config import parse
from zero2llm.core.seq import Seq
from zero2llm.model.heads import row_scores
from zero2llm.model.lm import LM
from zero2llm.model.spec import ModelConfig

D, T, VOCAB = 24, 9, 31
ROPE = {"rope_theta": 500.0, "rope_type": "default"}


def language_model(depth):
    mixer = {"kind": "gqa", "n_heads": 4, "n_kv_heads": 2, "position": {"kind": "rope", "base": 500.0}}
    norm = {"kind": "rms", "eps": 1e-3}
    block = {"mixer": mixer, "ffn": {"kind": "glu", "hidden": 20}, "norm": norm}
    data = {"vocab_size": VOCAB, "d_model": D, "max_len": 32, "layers": {"pattern": ["b"]}, "blocks": {"b": block}}
    return LM(parse(ModelConfig, data | {"mtp": {"depth": depth}, "final_norm": norm}))


def copied(depth, hidden_first):
    """transformers' layer with random weights that ours shares; its projection reads [embedding, hidden] by default."""
    cfg = LlamaConfig(
        hidden_size=D, num_attention_heads=4, num_key_value_heads=2, intermediate_size=20, rms_norm_eps=1e-3,
        rope_parameters=ROPE, attn_implementation="eager", mtp_hidden_states_first=hidden_first,
    )  # fmt: skip
    theirs = MtpLayer(cfg, LlamaDecoderLayer, LlamaRMSNorm, 0)
    names = {"hidden_norm": "hnorm", "embed_norm": "enorm", "join_proj": "eh_proj", "final_norm": "post_norm"}
    names |= {f"block.mixer.{n}_proj": f"mtp_block.self_attn.{n}_proj" for n in "qkvo"}
    names |= {f"block.ffn.{n}_proj": f"mtp_block.mlp.{n}_proj" for n in ("gate", "up", "down")}
    names |= {"block.mixer_norm": "mtp_block.input_layernorm", "block.ffn_norm": "mtp_block.post_attention_layernorm"}
    pairs = [(depth.get_parameter(f"{a}.weight"), theirs.get_parameter(f"{b}.weight")) for a, b in names.items()]
    with torch.no_grad():
        for mine, other in pairs:
            mine.copy_(torch.randn_like(mine) * (0.5 if mine.ndim > 1 else 1.0))
            swap = mine.shape[-1] == 2 * D and not hidden_first
            other.copy_(torch.cat((mine[:, D:], mine[:, :D]), 1) if swap else mine)
    assert len(pairs) == len(list(depth.parameters())) == len(list(theirs.parameters()))
    return theirs, lambda x, pos: LlamaRotaryEmbedding(cfg)(x, pos), pairs


@pytest.mark.parametrize("hidden_first", [True, False])
def test_a_depth_equals_transformers_mtp_layer(hidden_first):
    model = language_model(2)
    tokens, hidden = torch.randint(0, VOCAB, (2, T)), torch.randn(2, T, D)
    with torch.no_grad():
        model.embed.weight.normal_()
    for k, depth in enumerate(model.mtp.depths, 1):
        theirs, angles, pairs = copied(depth, hidden_first)
        states = [hidden, *model.ahead(hidden, tokens, Seq.rows(2, T))[0]]
        n = T - k  # positions with a token k ahead; their own positions count from k, which no score can tell
        embeds, previous = model.embed(tokens[:, k:]), states[k - 1][:, :n].detach().requires_grad_()
        mask = torch.full((n, n), -torch.inf).triu(1)[None, None]
        pos = torch.arange(k, T).expand(2, n)
        expected = theirs(embeds, previous, angles(embeds, pos), mask, pos, None)
        got = depth(previous, embeds, Seq.rows(2, n))[0]
        scale = expected.std()
        torch.testing.assert_close(got / scale, expected / scale, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(states[k][:, :n] / scale, expected / scale, atol=2e-6, rtol=1e-5)
        probe = torch.randn_like(got)
        mine = torch.autograd.grad((got * probe).sum(), [previous, *(p for p, _ in pairs)], retain_graph=True)
        other = torch.autograd.grad((expected * probe).sum(), [previous, *(q for _, q in pairs)])
        for a, b in zip(mine, other, strict=True):
            if a.shape[-1] == 2 * D and not hidden_first:
                b = torch.cat((b[:, D:], b[:, :D]), 1)
            assert (a - b).abs().max() < 1e-5 * b.abs().max()


def test_row_scores_read_the_token_that_transformers_classifier_reads():
    """Right padding, left padding and none; the trunk is a stub that returns given states."""
    hidden, tokens = torch.randn(4, T, D), torch.randint(1, VOCAB, (4, T))
    tokens[1, 5:], tokens[2, :3], tokens[3, 1:] = 0, 0, 0

    class Stub(nn.Module):
        def forward(self, *args, **kwargs):
            return SimpleNamespace(last_hidden_state=hidden, past_key_values=None, hidden_states=None, attentions=None)

    cfg = LlamaConfig(hidden_size=D, num_attention_heads=4, num_hidden_layers=1, vocab_size=VOCAB, num_labels=1, pad_token_id=0)
    theirs = LlamaForSequenceClassification(cfg)
    theirs.model = Stub()
    expected = theirs(tokens).logits.squeeze(1)
    scores = theirs.score(hidden).squeeze(2)
    torch.testing.assert_close(row_scores(scores, Seq.of_segments((tokens != 0).int())), expected)
