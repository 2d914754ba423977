"""Sparse attention against fla's naive functions and transformers; where neither has it, against the dense formula."""

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from transformers.models.deepseek_v32.configuration_deepseek_v32 import DeepseekV32Config
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Attention, DeepseekV32RotaryEmbedding

from zero2llm.core.seq import Seq
from zero2llm.layers.mixers import dsa, nsa
from zero2llm.layers.mixers.dsa import DSAConfig
from zero2llm.layers.mixers.gqa import GQAConfig
from zero2llm.layers.mixers.mla import MLAConfig
from zero2llm.layers.mixers.moba import MoBAConfig
from zero2llm.layers.mixers.nsa import NSAConfig
from zero2llm.layers.positions.rope import RoPEConfig
from zero2llm.ops.attend import visible
from zero2llm.ops.sparse_attend import best

D, T, B = 32, 37, 2
CLOSE = dict(atol=2e-6, rtol=1e-5)


def mean_pooling(x, size, cu_seqlens=None):
    """(B, T, H, K) -> (B, ceil(T / size), H, K), the last block over the tokens it has."""
    return torch.stack([part.mean(1) for part in x.split(size, 1)], 1)


@pytest.fixture(scope="module")
def naive():
    """fla's naive files, loaded by path: fla.ops itself imports triton."""
    root = Path(importlib.util.find_spec("fla").submodule_search_locations[0]) / "ops"
    stubs = {name: ModuleType(name) for name in ("fla.ops", "fla.ops.utils", "fla.ops.utils.pooling")}
    stubs["fla.ops.utils"].prepare_chunk_offsets = None  # for packed rows, which we run one by one
    stubs["fla.ops.utils.pooling"].mean_pooling = mean_pooling
    saved = {name: sys.modules.get(name) for name in stubs}
    sys.modules.update(stubs)
    try:
        loaded = {}
        for name in ("nsa", "dsa"):
            spec = importlib.util.spec_from_file_location(f"naive_{name}", root / name / "naive.py")
            loaded[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(loaded[name])
    finally:
        for name, old in saved.items():
            sys.modules.pop(name) if old is None else sys.modules.update({name: old})
    return loaded


def randomised(module):
    with torch.no_grad():
        for p in module.parameters():
            p.normal_().mul_(p.shape[-1] ** -0.5 if p.ndim > 1 else 1.0)
    return module


def gradients(y, g, *of):
    return torch.autograd.grad((y * g).sum(), of, retain_graph=True)


# NSA


def heads(layer, x, *shape):
    return layer(x).unflatten(-1, shape)


@pytest.mark.oracle("mixer:nsa", of="fla naive_nsa with mean pooling", way="both")
@pytest.mark.parametrize(("groups", "block", "top_k"), [(1, 4, 3), (2, 3, 5), (2, 16, 3), (1, 5, 8)])
@pytest.mark.filterwarnings("ignore:Flash Attention:ImportWarning")
def test_nsa_without_its_window_equals_fla(naive, monkeypatch, groups, block, top_k):
    monkeypatch.setattr(nsa.Summary, "forward", lambda self, x: x.mean(-2))
    cfg = NSAConfig(n_heads=16 * groups, n_kv_heads=groups, head_dim=6, span=block, stride=block, block=block, top_k=top_k, window=5)
    ours = randomised(cfg.build(D))
    with torch.no_grad():  # fla's branches share keys and values; its window needs another package, so ours gives 0
        for proj in (ours.k_proj, ours.v_proj):
            w = proj.weight.view(groups, 3, 6, D)
            w[:, 1] = w[:, 0]
        ours.v_proj.weight.view(groups, 3, 6, D)[:, 2] = 0
    x, g = torch.randn(B, T, D, requires_grad=True), torch.randn(B, T, D) / (B * T) ** 0.5
    q, gate = heads(ours.q_proj, x, -1, 6), heads(ours.g_proj, x, -1, 3).sigmoid()
    k, v = (heads(p, x, -1, 3, 6)[:, :, :, 0] for p in (ours.k_proj, ours.v_proj))
    o = naive["nsa"].naive_nsa(q, k, v, gate[..., 0], gate[..., 1], block_counts=top_k, block_size=block)
    expected, found = ours.o_proj(o.flatten(2)), ours(x, Seq.rows(B, T))[0]
    torch.testing.assert_close(found, expected, **CLOSE)
    torch.testing.assert_close(gradients(found, g, x), gradients(expected, g, x), **CLOSE)


def test_nsa_window_equals_gqa(monkeypatch):
    ours = randomised(NSAConfig(n_heads=4, n_kv_heads=2, span=4, stride=2, block=4, top_k=3, window=5, position=RoPEConfig()).build(D))
    twin = GQAConfig(n_heads=4, n_kv_heads=2, window=5, position=RoPEConfig()).build(D)
    with torch.no_grad():
        v = ours.v_proj.weight.view(2, 3, 8, D)
        v[:, 1] = 0
        ours.v_summary.out.weight.zero_()
        ours.v_summary.out.bias.zero_()
        ours.g_proj.weight.zero_()  # every gate 1/2
        twin.q_proj.weight.copy_(ours.q_proj.weight)
        twin.k_proj.weight.copy_(ours.k_proj.weight.view(2, 3, 8, D)[:, 2].flatten(0, 1))
        twin.v_proj.weight.copy_(v[:, 2].flatten(0, 1))
        twin.o_proj.weight.copy_(ours.o_proj.weight / 2)
    x = torch.randn(B, T, D)
    torch.testing.assert_close(ours(x, Seq.rows(B, T))[0], twin(x, Seq.rows(B, T))[0], **CLOSE)


# DSA

MLA = MLAConfig(n_heads=4, kv_rank=12, q_rank=9, nope_dim=10, rope_dim=6, v_dim=7, position=RoPEConfig(base=500.0, layout="interleaved"))
INDEX = {"q_proj": "wq_b", "k_proj": "wk", "k_norm": "k_norm", "w_proj": "weights_proj"}
NAMES = {"q_a_norm": "q_a_layernorm", "kv_a_proj": "kv_a_proj_with_mqa", "kv_a_norm": "kv_a_layernorm"}


def dsa_pair(top_k):
    cfg = DeepseekV32Config(
        hidden_size=D, num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=12, q_lora_rank=9, qk_nope_head_dim=10,
        qk_rope_head_dim=6, v_head_dim=7, index_topk=top_k, index_head_dim=8, index_n_heads=16, attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )  # fmt: skip
    theirs, rotary = DeepseekV32Attention(cfg, 0), DeepseekV32RotaryEmbedding(cfg)
    ours = randomised(DSAConfig(mla=MLA, index_heads=16, index_dim=8, top_k=top_k).build(D))
    names = {}
    for mine, p in ours.named_parameters():
        part, layer, tail = mine.split(".")
        names[mine] = f"indexer.{INDEX[layer]}.{tail}" if part == "indexer" else f"{NAMES.get(layer, layer)}.{tail}"
        theirs.get_parameter(names[mine]).data.copy_(p.data)
    mask = torch.full((T, T), -torch.inf).triu(1)[None, None].expand(B, -1, -1, -1)
    call = lambda x: theirs(x, rotary(x, torch.arange(T)[None]), mask)[0]
    return ours, theirs, call, names


@pytest.mark.oracle("mixer:dsa", of="transformers DeepSeek-V3.2", way="forward")
@pytest.mark.parametrize("top_k", [1, 5, 16, 40])
def test_dsa_equals_transformers(top_k):
    ours, _, call, _ = dsa_pair(top_k)
    x = torch.randn(B, T, D)
    torch.testing.assert_close(ours(x, Seq.rows(B, T))[0], call(x), **CLOSE)


@pytest.mark.oracle("mixer:dsa", of="transformers DeepSeek-V3.2", way="backward")
@pytest.mark.parametrize("top_k", [1, 5, 16, 40])
def test_dsa_backward_equals_transformers(top_k):
    ours, theirs, call, names = dsa_pair(top_k)
    x, g = torch.randn(B, T, D, requires_grad=True), torch.randn(B, T, D) / (B * T) ** 0.5
    found, expected = ours(x, Seq.rows(B, T))[0], call(x)
    torch.testing.assert_close(gradients(found, g, x), gradients(expected, g, x), **CLOSE)
    (found * g).sum().backward()
    (expected * g).sum().backward()
    for mine, p in ours.named_parameters():
        if mine.startswith("indexer"):
            assert p.grad is None
        else:
            torch.testing.assert_close(p.grad, theirs.get_parameter(names[mine]).grad, **CLOSE)


def test_dsa_decoding_equals_transformers():
    ours, _, call, _ = dsa_pair(6)
    x, seq, state = torch.randn(B, T, D), Seq.rows(B, T), ours.init_state(B, 40)
    first = ours(x[:, :9], seq.window(0, 9), state)[0]
    steps = [ours(x[:, t : t + 1], seq.window(t, t + 1), state)[0] for t in range(9, T)]
    torch.testing.assert_close(torch.cat((first, *steps), 1), call(x), atol=1e-5, rtol=1e-5)


@pytest.mark.oracle("mixer:dsa", of="fla naive_dsa", way="forward")
def test_indexer_and_attention_equal_fla(naive):
    ours = randomised(DSAConfig(mla=MLA, index_heads=16, index_dim=8, top_k=5).build(D))
    x, seq = torch.randn(B, T, D), Seq.rows(B, T)
    q, entry, source = ours.mla.project(x, seq)
    iq, ik, w = ours.indexer(x, source, seq)
    k, v = ours.mla.unpack(entry)
    flat = [t.transpose(1, 2) for t in (q, k, F.pad(v, (0, 9)), iq)]
    o, indices = naive["dsa"].naive_dsa(*flat, ik[:, 0], w[..., 0].transpose(1, 2), topk=5, scale=ours.mla.scale, return_indices=True)
    kept = best(dsa.index_scores(iq, ik, w), 5, visible(seq, None, True))[:, 0]
    theirs = torch.zeros(B, T, T + 1, dtype=torch.bool).scatter(2, indices.masked_fill(indices < 0, T), True)[..., :T]
    assert torch.equal(kept, theirs)
    torch.testing.assert_close(ours(x, seq)[0], ours.mla.o_proj(o[..., :7].flatten(2)), **CLOSE)


@pytest.mark.oracle("mixer:dsa", of="torch kl_div, dense", way="backward")
@pytest.mark.parametrize("top_k", [5, 64])
def test_indexer_loss_equals_torch_kl_div(top_k):
    """Only the indexer learns from it, and what it learns is torch's divergence over the gathered set."""
    ours = randomised(DSAConfig(mla=MLA, index_heads=16, index_dim=8, top_k=top_k).build(D)).double()
    x, seg = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True), torch.ones(B, T, dtype=torch.int32)
    seg[0, 11:], seg[1, 30:] = 2, 0
    seq = Seq.of_segments(seg)
    ours(x, seq)[1]["indexer_loss"].backward()
    assert x.grad is None and all(p.grad is None for p in ours.mla.parameters())
    q, entry, source = ours.mla.project(x, seq)
    scores = dsa.index_scores(*ours.indexer(x.detach(), source.detach(), seq))
    attention = (q @ ours.mla.unpack(entry)[0].transpose(-1, -2) / math.sqrt(16)).detach()
    total = []
    for b in range(B):
        for t in range(T):
            past = [s for s in range(t + 1) if seg[b, s] == seg[b, t] != 0]
            if past:
                keep = torch.tensor(past)[scores[b, 0, t, past].topk(min(top_k, len(past))).indices]
                p = attention[b, :, t, keep].softmax(-1).sum(0)
                total.append(F.kl_div(scores[b, 0, t, keep].log_softmax(-1), p / p.sum(), reduction="sum"))
    expected = torch.stack(total).mean()
    torch.testing.assert_close(ours(x, seq)[1]["indexer_loss"], expected, atol=1e-12, rtol=0)
    for (name, p), g in zip(ours.indexer.named_parameters(), torch.autograd.grad(expected, ours.indexer.parameters()), strict=True):
        assert g.abs().max() > 1e-6, name
        torch.testing.assert_close(p.grad, g, atol=1e-12, rtol=1e-9)


# MoBA: no package has it for a CPU


@pytest.mark.oracle("mixer:moba", of="gqa, all blocks kept", way="both")
def test_moba_with_every_block_is_full_attention():
    widths = dict(n_heads=4, n_kv_heads=2, position=RoPEConfig())
    ours, twin = randomised(MoBAConfig(block=5, top_k=8, **widths).build(D)), GQAConfig(**widths).build(D)
    twin.load_state_dict(ours.state_dict())
    x, g = torch.randn(B, T, D, requires_grad=True), torch.randn(B, T, D)
    a, b = ours(x, Seq.rows(B, T))[0], twin(x, Seq.rows(B, T))[0]
    torch.testing.assert_close(a, b, **CLOSE)
    torch.testing.assert_close(gradients(a, g, x, *ours.parameters()), gradients(b, g, x, *twin.parameters()), **CLOSE)


@pytest.mark.oracle("mixer:moba", of="gqa on blocks as documents", way="forward")
def test_moba_with_its_own_block_alone_is_attention_inside_blocks():
    widths = dict(n_heads=4, n_kv_heads=1)
    ours, twin = randomised(MoBAConfig(block=5, top_k=1, **widths).build(D)), GQAConfig(**widths).build(D)
    twin.load_state_dict(ours.state_dict())
    x, blocks = torch.randn(B, T, D), (torch.arange(T) // 5 + 1).to(torch.int32).expand(B, T)
    torch.testing.assert_close(ours(x, Seq.rows(B, T))[0], twin(x, Seq.of_segments(blocks))[0], **CLOSE)
