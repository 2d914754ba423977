"""Initialisation against torch.nn.init, transformers' GPT-2 and the mup package; equal draws where both draw alike."""

import copy

import mup
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from zero2llm.core.config import parse
from zero2llm.core.seq import Seq
from zero2llm.model.lm import LM
from zero2llm.model.presets import preset
from zero2llm.model.spec import ModelConfig
from zero2llm.optim.adamw import AdamWConfig
from zero2llm.optim.build import build_optim


def config(d, init, tied=True, heads=4):
    mixer = {"kind": "gqa", "n_heads": heads, "qkv_bias": True, "position": {"kind": "rope"}}
    if init.get("kind") == "mup":
        mixer["scale"] = init["base_head_dim"] ** 0.5 / (d // heads)
    block = {"mixer": mixer, "ffn": {"kind": "mlp", "hidden": 2 * d}, "norm": {"kind": "layer"}}
    data = {"vocab_size": 31, "d_model": d, "max_len": 16, "layers": {"pattern": ["b"], "repeat": 2}, "blocks": {"b": block}}
    return parse(ModelConfig, data | {"init": init, "tie_embeddings": tied, "position": {"kind": "learned"}, "final_norm": {"kind": "layer"}})


ORACLES = {
    "xavier": nn.init.xavier_normal_,
    "kaiming": lambda w: nn.init.kaiming_normal_(w, mode="fan_in", nonlinearity="relu"),
}


@pytest.mark.parametrize("kind", ORACLES)
def test_xavier_and_kaiming_equal_torch_draw_by_draw(kind):
    model = LM(config(24, {"kind": kind}, tied=False))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            state = torch.get_rng_state()
            ORACLES[kind](module.weight)
            torch.set_rng_state(state)
            mine = torch.empty_like(module.weight).normal_(0, model.cfg.init.spread(name, module.weight, 2, 24))
            assert torch.equal(mine, module.weight), name


def test_gpt2_has_the_spreads_of_transformers():
    """Per kind of weight; theirs are named c_attn, c_fc (as drawn) and c_proj (scaled)."""
    cfg = preset("gpt2-nano")
    ours = LM(cfg)
    theirs = GPT2LMHeadModel(GPT2Config(n_embd=128, n_layer=4, n_head=4, vocab_size=4096, n_positions=512))
    spread = lambda model, part: torch.cat([p.flatten() for n, p in model.named_parameters() if part in n and p.ndim == 2]).std().item()
    pairs = {"q_proj": "c_attn", "up_proj": "c_fc", "o_proj": "attn.c_proj", "down_proj": "mlp.c_proj", "embed": "wte", "table": "wpe"}
    for mine, other in pairs.items():
        assert spread(ours, mine) == pytest.approx(spread(theirs, other), rel=0.01), mine


# muP against the mup package: the same modules given base shapes, so that the package decides which dimension is wide


def shaped(d, base, tied):
    """A model of width d that mup has compared with one of width ``base``."""
    model, small, other = (LM(config(w, {"kind": "gpt2"}, tied, heads=w // 4)) for w in (d, base, 2 * base))
    return mup.set_base_shapes(model, small, delta=other, rescale_params=False, do_assert=False)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("m", [1, 2, 4])
def test_learning_rates_and_weight_decay_equal_mup_s(m, tied):
    init = {"kind": "mup", "base_width": 16, "base_head_dim": 4}
    model = LM(config(16 * m, init, tied, heads=4 * m))
    ours = build_optim(model, AdamWConfig(lr=0.01, weight_decay=0.1), model.width_ratio)
    mine = {ours.names[id(p)]: (g["lr"], g["weight_decay"]) for g in ours.groups for p in g["params"]}
    theirs = shaped(16 * m, 16, tied)
    names = {id(p): n for n, p in theirs.named_parameters()}
    optim = mup.MuAdamW(theirs.parameters(), lr=0.01, weight_decay=0.1)
    other = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optim.param_groups for p in g["params"]}
    assert set(mine) == set(other)
    for name, (lr, decay) in mine.items():
        assert lr == pytest.approx(other[name][0]), name
        if decay:  # ours falls on matrices alone
            assert decay == pytest.approx(other[name][1]), name


@pytest.mark.parametrize("m", [1, 2, 4])
def test_spreads_equal_mup_s(m):
    init = {"kind": "mup", "base_width": 16, "base_head_dim": 4, "std": 0.1, "scale_residual": False}
    model = LM(config(16 * m, init, False, heads=4 * m))
    theirs = shaped(16 * m, 16, False)
    for name, module in theirs.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            state = torch.get_rng_state()
            mup.init.normal_(module.weight, std=0.1)
            torch.set_rng_state(state)
            spread = 0.1 if isinstance(module, nn.Embedding) else model.cfg.init.spread(name, module.weight, 2, 16 * m)
            torch.testing.assert_close(torch.empty_like(module.weight).normal_(0, spread), module.weight.data, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("m", [1, 2, 4])
def test_the_output_multiplier_equals_mup_s_readout(m):
    """Logits from the final hidden state, with the package's own head on the same weights."""
    init = {"kind": "mup", "base_width": 16, "base_head_dim": 4}
    model = LM(config(16 * m, init, False, heads=4 * m))
    readout, small = mup.MuReadout(16 * m, 31, bias=False), mup.MuReadout(16, 31, bias=False)
    mup.set_base_shapes(readout, small, delta=mup.MuReadout(32, 31, bias=False), rescale_params=False)
    with torch.no_grad():
        readout.weight.copy_(model.head.weight)
        x = torch.randint(0, 31, (2, 9))
        caught = []
        model.final_norm.register_forward_hook(lambda module, args, out: caught.append(out))
        logits = model.logits(model(x, Seq.rows(2, 9))[0])
        torch.testing.assert_close(logits, readout(caught[0]), atol=2e-6, rtol=1e-5)


def test_a_step_of_adam_equals_mup_s():
    """One step on equal weights and gradients: the update of every parameter."""
    init = {"kind": "mup", "base_width": 16, "base_head_dim": 4}
    model = LM(config(48, init, False, heads=12))
    theirs = shaped(48, 16, False)
    theirs.load_state_dict(copy.deepcopy(model.state_dict()))
    ours = build_optim(model, AdamWConfig(lr=0.01, weight_decay=0.0), model.width_ratio)
    other = mup.MuAdamW(theirs.parameters(), lr=0.01, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8)
    for p, q in zip(model.parameters(), theirs.parameters(), strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    ours.step()
    other.step()
    for (name, p), q in zip(model.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-7, rtol=1e-5, msg=name)
