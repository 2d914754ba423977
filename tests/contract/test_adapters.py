"""Adapters on whole models: where they go, several on one base, what is refused, and what a saved file means."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from zero2llm.adapters.adalora import AdaLoRAConfig
from zero2llm.adapters.adapted import Adapted, adapted_modules
from zero2llm.adapters.config import AdapterConfig
from zero2llm.adapters.dora import DoRAConfig
from zero2llm.adapters.lora import LoRAConfig
from zero2llm.adapters.pissa import PiSSAConfig
from zero2llm.adapters.table import lines, table
from zero2llm.adapters.targets import chosen, left_out, projections
from zero2llm.adapters.wrap import (
    adapter_state,
    disabled,
    load_adapter_state,
    merge,
    names,
    switch,
    unmerge,
    unwrap,
    wrap,
)
from zero2llm.core.config import parse, to_dict
from zero2llm.core.files import load_tensors
from zero2llm.core.seq import Seq
from zero2llm.interop.hf import from_hf_config, to_hf_tensors
from zero2llm.interop.peft.read import load_peft
from zero2llm.interop.peft.write import save_peft
from zero2llm.lab.variants import FFNS, MIXERS
from zero2llm.layers.linear import Linear
from zero2llm.layers.nf4 import NF4Linear
from zero2llm.model.lm import LM
from zero2llm.model.presets import llama
from zero2llm.model.spec import ModelConfig
from zero2llm.optim.adamw import AdamWConfig
from zero2llm.optim.build import build_optim
from zero2llm.optim.muon import MuonConfig

V, T, D = 61, 12, 32
ALL = (LoRAConfig(r=3), DoRAConfig(r=3), PiSSAConfig(r=3, alpha=3.0), AdaLoRAConfig(init_r=4, target_r=2))
KIND = lambda cfg: cfg.kind


def small(tied=True, layers=2):
    torch.manual_seed(0)
    return LM(llama(V, D, layers, 4, 2, 48, 32, tied=tied))


def logits(model, seed=1, rows=2, length=T):
    x = torch.randint(0, V, (rows, length), generator=torch.Generator().manual_seed(seed))
    return model.logits(model(x, Seq.rows(rows, length))[0])


def scramble(model, by=0.1):
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(by * torch.randn_like(p))


def apart(a, b):
    return float(((a - b).abs().max() / b.abs().max()).detach())


# Every mixer and every feed-forward


def zoo(part, name):
    table = {"mixer": MIXERS, "ffn": FFNS}[part]
    block = {"mixer": {"kind": "gqa", "n_heads": 2, "position": {"kind": "rope"}}, "ffn": {"kind": "glu", "hidden": 48}}
    block[part] = table[name](D, 2)
    torch.manual_seed(0)
    data = {"vocab_size": V, "d_model": D, "max_len": 64, "layers": {"pattern": ["a"], "repeat": 2}, "blocks": {"a": block}}
    return LM(parse(ModelConfig, data))


@pytest.mark.parametrize("part,name", [("mixer", n) for n in MIXERS] + [("ffn", n) for n in FFNS])
def test_every_mechanism_takes_adapters(part, name):
    """Its projections learn and nothing else; merged = unmerged; unwrapped it is a plain model that does the same."""
    model = zoo(part, name)
    plain, before = list(model.state_dict()), logits(model).detach()
    paths = wrap(model, LoRAConfig(r=3))
    assert paths and all(".mixer." in path or ".ffn." in path for path in paths) and not any("router" in path for path in paths)
    experts = [path for path, m in model.named_modules() if type(m).__name__ == "ExpertLinear"]
    assert left_out(model, ("all-linear",)) == experts and bool(experts) == (name in ("moe", "moe_shared", "expert_choice"))
    assert apart(logits(model), before) == 0
    learning = {key for key, p in model.named_parameters() if p.requires_grad}
    assert learning == {f"{path}.adapters.default.{n}" for path in paths for n in "ab"}
    scramble(model, 0.05)
    out, aux = model(torch.randint(0, V, (2, T)), Seq.rows(2, T))
    (out.square().mean() + sum(v for k, v in aux.items() if k.endswith("_loss"))).backward()
    for key, p in model.named_parameters():
        assert (p.grad is not None and bool(p.grad.isfinite().all())) if key in learning else p.grad is None, key
    model.eval()
    with torch.no_grad():
        y = logits(model)
        assert apart(y, before) > 1e-4
        merge(model)
        assert apart(logits(model), y) <= 1e-5
        unmerge(model)
        assert torch.equal(logits(model), y)
        unwrap(model)
        assert list(model.state_dict()) == plain and apart(logits(model), y) <= 1e-5
    LM(model.cfg).load_state_dict(model.state_dict())


@pytest.mark.parametrize("name", ["gqa", "mla", "dsa", "kda", "mamba2", "rwkv7"])
@pytest.mark.parametrize("cfg", ALL[:2], ids=KIND)
def test_decoding_token_by_token_is_the_whole_row(name, cfg):
    """MLA reads a weight itself while it decodes: it must be the adapted one."""
    model = zoo("mixer", name).eval()
    wrap(model, cfg)
    scramble(model)
    x = torch.randint(0, V, (2, T))
    with torch.no_grad():
        whole = model.logits(model(x, Seq.rows(2, T))[0])
        states = model.init_states(2, T)
        steps = [
            model.logits(model(x[:, t : t + 1], Seq(torch.full((2, 1), t)), states)[0]) for t in range(T)
        ]
    assert apart(torch.cat(steps, 1), whole) <= 2e-5


# Where


@pytest.mark.parametrize("targets,count,example", [
    (("all-linear",), 14, "blocks.0.mixer.q_proj"), (("q_proj",), 2, "blocks.1.mixer.q_proj"), (("blocks.1.*",), 7, "blocks.1.ffn.up_proj"),
    (("*.mixer.*",), 8, "blocks.0.mixer.o_proj"), (("mixer.q_proj", "ffn.up_proj"), 4, "blocks.0.ffn.up_proj"),
    (("blocks.0.mixer.v_proj",), 1, "blocks.0.mixer.v_proj"), (("head",), 1, "head"), (("*",), 14, "blocks.0.mixer.k_proj"),
    (("*.[qk]_proj", "head"), 5, "head"),
])  # fmt: skip
def test_patterns(targets, count, example):
    model = small(tied=False)
    assert len(paths := wrap(model, LoRAConfig(r=2, targets=targets))) == count and example in paths
    assert [path for path in projections(model) if path in paths] == paths == list(adapted_modules(model))


@pytest.mark.parametrize("targets,words", [
    (("q_prj",), "'q_prj' matches no projection; did you mean 'q_proj'. there are: q_proj, k_proj, v_proj, o_proj, gate_proj"),
    (("q_proj", "blocks.7.*"), "'blocks.7.*' matches no projection"), (("roj",), "'roj' matches no"), (("embed",), "'embed' matches no"),
    (("head",), "tied to the embedding"),
])  # fmt: skip
def test_a_pattern_that_matches_nothing_changes_nothing(targets, words):
    model = small()
    with pytest.raises(ValueError, match=words):
        wrap(model, LoRAConfig(r=2, targets=targets))
    assert not adapted_modules(model) and all(p.requires_grad for p in model.parameters())


def test_experts_and_routers():
    model = zoo("ffn", "moe_shared")
    with pytest.raises(ValueError, match="only blocks.0.ffn.gate_proj and the like, all experts in one tensor"):
        wrap(model, LoRAConfig(r=2, targets=("blocks.0.ffn.gate_proj",)))
    assert "blocks.0.ffn.router" not in chosen(model, ("blocks.0.*",))
    wrap(model, LoRAConfig(r=2, targets=("router", "shared.gate_proj")))
    scramble(model, 0.5)
    before = logits(model)
    with disabled(model):
        assert apart(before, logits(model)) > 1e-4
    out, aux = model(torch.randint(0, V, (2, T)), Seq.rows(2, T))
    out.square().sum().backward()
    assert model.blocks[0].ffn.router.adapters["default"].b.grad.abs().sum() > 0
    assert any("all experts in one tensor" in line for line in lines(model))


def test_an_adapted_head_reaches_the_loss():
    model = small(tied=False)
    wrap(model, LoRAConfig(r=2, targets=("head",)))
    scramble(model)
    hidden = model(torch.randint(0, V, (2, T)), Seq.rows(2, T))[0].detach()
    torch.testing.assert_close(model.logits(hidden), model.head(hidden), rtol=1e-5, atol=1e-5)
    model.logits(hidden).square().sum().backward()
    assert model.head.adapters["default"].a.grad.abs().sum() > 0 and model.head.base.weight.grad is None


# Several on one base


def test_several_adapters_switch_and_do_not_disturb_each_other():
    model = small().eval()
    base, seen = logits(model), {}
    for cfg in ALL:
        wrap(model, replace(cfg, targets=("*.mixer.*",) if cfg.kind == "dora" else cfg.targets), cfg.kind)
        scramble(model)
        seen[cfg.kind] = logits(model)
    assert names(model) == ["lora", "dora", "pissa", "adalora"]
    for name in ("pissa", "lora", "adalora", "dora", "pissa"):
        switch(model, name)
        assert torch.equal(logits(model), seen[name])
        assert {key.split(".adapters.")[1].split(".")[0] for key, p in model.named_parameters() if p.requires_grad} == {name}
        with torch.no_grad(), disabled(model):
            assert apart(logits(model), base) <= 1e-6
        merge(model)
        assert apart(logits(model), seen[name]) <= 1e-5
        with disabled(model):
            assert apart(logits(model), base) <= 1e-6
        unmerge(model)
        assert torch.equal(logits(model), seen[name])
    switch(model, None)
    assert apart(logits(model), base) <= 1e-6 and not any(p.requires_grad for p in model.parameters())
    plain = unwrap(copy.deepcopy(model))
    assert apart(logits(plain), base) <= 1e-6 and not adapted_modules(plain)


def test_what_a_merged_model_may_not():
    model = small()
    wrap(model, LoRAConfig(r=2))
    wrap(model, LoRAConfig(r=2), "other")
    merge(model)
    merge(model)  # a second time is nothing new
    with pytest.raises(ValueError, match="unmerge.model. first"):
        switch(model, "default")
    with pytest.raises(ValueError, match="unmerge.model. first"):
        wrap(model, LoRAConfig(r=2), "third")
    with pytest.raises(ValueError, match="'other' is merged and would not learn"):
        logits(model)
    with torch.no_grad():
        logits(model)
    assert not any("merged" in key for key in model.state_dict())


def test_names_that_cannot_be():
    model = small()
    wrap(model, LoRAConfig(r=2))
    for name, words in (("default", "exists already; there are: default"), ("a.b", "no dot"), ("", "no dot")):
        with pytest.raises(ValueError, match=words):
            wrap(model, LoRAConfig(r=2), name)
    with pytest.raises(ValueError, match="no adapter is called 'x'; there are: default"):
        switch(model, "x")


def test_disabled_ends_with_an_error_too():
    model = small()
    wrap(model, LoRAConfig(r=2))
    scramble(model)
    before = logits(model)
    with pytest.raises(KeyError), disabled(model), disabled(model):
        raise KeyError
    assert torch.equal(logits(model), before)


# Training


def test_optimizers_hold_the_adapter_alone():
    for cfg in (AdamWConfig(), MuonConfig()):
        model = small()
        wrap(model, DoRAConfig(r=2))
        optim = build_optim(model, cfg)
        assert {id(p) for p in optim.params} == {id(p) for p in model.parameters() if p.requires_grad}
        assert all(group["weight_decay"] == 0 for group in optim.groups if group["params"])
        before = logits(model)
        for _ in range(3):
            logits(model).square().mean().backward()
            optim.step()
            optim.zero_grad()
        assert not torch.equal(logits(model), before)
        with torch.no_grad(), disabled(model):
            assert torch.equal(logits(model), logits(small()))


@pytest.mark.parametrize("cfg", ALL, ids=KIND)
def test_recomputing_blocks_changes_nothing(cfg):
    found = []
    for recompute in (False, True):
        model = small().train()
        torch.manual_seed(3)
        wrap(model, cfg)
        scramble(model)
        model.recompute = recompute
        logits(model).square().mean().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("cfg", [*ALL, LoRAConfig(r=3, dropout=0.2)], ids=lambda c: f"{c.kind}-{c.dropout}")
def test_autocast_and_half_precision_bases(cfg):
    """Under autocast, and over a base stored in bf16: factors stay in fp32, and the result is near the fp32 one."""
    model = small()
    wrap(model, cfg)
    scramble(model)
    exact = logits(model.eval())
    with torch.autocast("cpu", torch.bfloat16):
        y = logits(model.train())
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    if not cfg.dropout:
        assert apart(y.float(), exact) < 0.1
    half = small().to(torch.bfloat16)
    wrap(half, cfg)
    assert all(p.dtype == torch.float32 for p in half.parameters() if p.requires_grad)
    y = logits(half)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16 and apart(y.float(), logits(small())) < 0.2
    merge(half.eval())
    assert logits(half).dtype == torch.bfloat16
    assert all(p.dtype == torch.bfloat16 for p in unwrap(half).parameters())


@pytest.mark.slow
@pytest.mark.parametrize("cfg", ALL[:2], ids=KIND)  # the others run LoRA's operator
def test_compiled_equals_eager(cfg):
    model = small(layers=1)
    wrap(model, cfg)
    scramble(model)
    x, seq = torch.randint(0, V, (2, T)), Seq.rows(2, T)
    run = lambda f: f(x, seq)[0].square().mean()
    params = [p for p in model.parameters() if p.requires_grad]
    eager = torch.autograd.grad(run(model), params)
    compiled = torch.autograd.grad(run(torch.compile(model, dynamic=False)), params)
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-6)


def test_state_of_one_adapter():
    model = small()
    wrap(model, PiSSAConfig(r=3))
    scramble(model)
    state = {key: value.clone() for key, value in adapter_state(model, "default").items()}
    assert len(state) == 14 * 4 and all(".adapters.default." in key for key in state)
    twin = small()
    wrap(twin, PiSSAConfig(r=3))
    load_adapter_state(twin, state, "default")
    assert torch.equal(logits(twin), logits(model))
    state["x"] = state.pop("blocks.0.mixer.q_proj.adapters.default.a")
    with pytest.raises(ValueError, match="q_proj.adapters.default.a is missing; x has no place"):
        load_adapter_state(twin, state, "default")
    whole = small()
    wrap(whole, PiSSAConfig(r=3))
    whole.load_state_dict(model.state_dict())
    assert torch.equal(logits(whole), logits(model))


# A packed base


class Halves(nn.Module):
    """A base that keeps its weight in bf16 and spells it out in fp32: what an NF4Linear is to an adapter."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("packed", linear.weight.detach().bfloat16())
        self.bias = linear.bias

    def dequantized(self):
        return self.packed.float()

    def forward(self, x):
        return nn.functional.linear(x, self.dequantized().to(x.dtype), self.bias)


@pytest.mark.parametrize("packed", [Halves, NF4Linear.of], ids=["halves", "nf4"])
@pytest.mark.parametrize("cfg", ALL, ids=KIND)
def test_a_packed_base(cfg, packed):
    model = small()
    for path in chosen(model, ("all-linear",)):
        model.set_submodule(path, packed(model.get_submodule(path)))
    plain = small()
    for path in chosen(plain, ("all-linear",)):
        plain.get_submodule(path).weight.data = model.get_submodule(path).dequantized()
    found = []
    for one in (model, plain):
        torch.manual_seed(2)
        wrap(one, cfg)
        scramble(one)
        y = logits(one)
        y.square().mean().backward()
        found.append([y.detach(), *(p.grad for p in one.parameters() if p.grad is not None)])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
    packed = model.blocks[0].mixer.q_proj.base.packed.clone()
    model.eval(), plain.eval()
    merge(model)
    assert apart(logits(model), found[0][0]) <= 1e-5
    unmerge(model)
    assert torch.equal(model.blocks[0].mixer.q_proj.base.packed, packed)
    total = table(model)[-1]
    assert total.parameters == table(plain)[-1].parameters and total.weights_mb < table(plain)[-1].weights_mb
    unwrap(model)
    assert isinstance(model.blocks[0].mixer.q_proj, Linear) and apart(logits(model), found[0][0]) <= 1e-5
    assert list(model.state_dict()) == list(small().state_dict())


# The table, and configurations


def test_table():
    model = small()
    wrap(model, LoRAConfig(r=4))
    rows = {row.group: row for row in table(model)}
    assert list(rows) == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "total"]
    assert rows["q_proj"].trainable == 2 * 4 * (D + D) and rows["k_proj"].trainable == 2 * 4 * (D + D // 2) and rows["q_proj"].modules == 2
    total = rows["total"]
    assert total.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(r.trainable for r in rows.values()) / 2
    assert total.parameters == sum(p.numel() for p in model.parameters()) and total.modules == 14
    assert math.isclose(total.weights_mb, 4 * total.parameters / 2**20)
    assert math.isclose(total.gradients_mb, 4 * total.trainable / 2**20) and total.adam_mb == 2 * total.gradients_mb
    assert len(lines(model)) == 2 + len(rows) and "| total | 14 |" in lines(model)[-1]
    model.embed.weight.requires_grad_(True)
    other = table(model)[-2]
    assert other.group == "not adapters" and other.trainable == V * D
    with pytest.raises(ValueError, match="embed.weight also learn and would be lost"):
        save_peft(model, "never", "base")


@pytest.mark.parametrize("cfg", ALL, ids=KIND)
def test_configurations_are_data(cfg):
    assert parse(AdapterConfig, to_dict(cfg)) == cfg
    assert parse(AdapterConfig, {"kind": cfg.kind}).targets == ("all-linear",)


@pytest.mark.parametrize("data,words", [
    ({"kind": "lora", "r": 0}, "r = 0 at least 1"), ({"kind": "dora", "alpha": -1}, "alpha = -1"), ({"kind": "lora", "dropout": 1.0}, "dropout = 1.0"),
    ({"kind": "lora", "targets": []}, "targets = \\[\\] must name"), ({"kind": "pissa", "lr_ratio": 0}, "lr_ratio = 0"),
    ({"kind": "adalora", "target_r": 12}, "target_r = 12 < init_r = 12"), ({"kind": "adalora", "beta1": 1.0}, "beta1 = 1.0"),
    ({"kind": "adalora", "every": 0}, "every = 0"), ({"kind": "adalora", "orth_weight": -1}, "orth_weight = -1"),
    ({"kind": "lora", "rank": 4}, "unknown key 'rank'"), ({"kind": "lora", "alpha": float("nan")}, "alpha = nan"),
])  # fmt: skip
def test_configurations_that_cannot_be(data, words):
    with pytest.raises(ValueError, match=words):
        parse(AdapterConfig, data)


def test_pissa_wants_enough_singular_values():
    model = small()
    with pytest.raises(ValueError, match="blocks.0.mixer.k_proj: pissa: r = 20, but a weight .16, 32. has 16 singular values"):
        wrap(model, PiSSAConfig(r=20))
    assert not adapted_modules(model) and all(p.requires_grad for p in model.parameters())


# Files: base + what adapter_model.safetensors says = the export of the merged model

SIZES = dict(vocab_size=V, hidden_size=24, intermediate_size=40, num_hidden_layers=2, max_position_embeddings=32, num_attention_heads=4,
             num_key_value_heads=2)  # fmt: skip
FAMILIES = {
    "llama": dict(SIZES, model_type="llama"),
    "phi3": dict(SIZES, model_type="phi3"),
    "gpt2": dict(model_type="gpt2", vocab_size=V, n_embd=24, n_layer=2, n_head=4, n_positions=32),
    "qwen3_next": dict(SIZES, model_type="qwen3_next", head_dim=8, moe_intermediate_size=12, num_experts=5, num_experts_per_tok=2,
                       linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=6, linear_value_head_dim=5,
                       shared_expert_intermediate_size=20, num_hidden_layers=4),
}  # fmt: skip


def of_family(name):
    cfg = from_hf_config(FAMILIES[name.removesuffix("-interleaved")])
    if name.endswith("-interleaved"):
        turn = lambda spec: replace(spec, mixer=replace(spec.mixer, position=replace(spec.mixer.position, layout="interleaved")))
        cfg = replace(cfg, blocks={label: turn(spec) for label, spec in cfg.blocks.items()})
    torch.manual_seed(0)
    return LM(cfg)


def written(folder):
    """Their module -> (delta of the low-rank part, magnitude), by the formulas of peft's documentation."""
    said = json.loads((folder / "adapter_config.json").read_text())
    tensors, out = load_tensors(folder, "adapter_model"), {}
    for key in tensors:
        if key.endswith(".lora_A.weight"):
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            a, b = tensors[key], tensors[key.replace("lora_A", "lora_B")]
            r, alpha = said["rank_pattern"].get(module, said["r"]), said["alpha_pattern"].get(module, said["lora_alpha"])
            assert r == len(a)
            delta = alpha / (math.sqrt(r) if said["use_rslora"] else r) * (b @ a)
            out[module] = delta, tensors.get(f"base_model.model.{module}.lora_magnitude_vector")
    return out, said["fan_in_fan_out"]


FILES = [("llama", c) for c in (*ALL, LoRAConfig(r=3, rank_stabilized=True))] + [
    (name, cfg) for name in ("llama-interleaved", "phi3", "gpt2", "qwen3_next")
    for cfg in (*ALL[:2], replace(ALL[3], targets=("o_proj",)), LoRAConfig(r=3, alpha=5.0, rank_stabilized=True), DoRAConfig(r=2, targets=("q_proj",)))
]  # fmt: skip


@pytest.mark.parametrize("name,cfg", FILES, ids=lambda v: v if isinstance(v, str) else f"{v.kind}-{v.targets[0]}")
def test_a_file_means_the_merged_model(name, cfg, tmp_path):
    model = of_family(name)
    if name == "qwen3_next" and cfg.targets == ("all-linear",):
        cfg = replace(cfg, targets=("*.mixer.*",))
    before = to_hf_tensors(copy.deepcopy(model.state_dict()), model.cfg, name.removesuffix("-interleaved"))
    wrap(model, cfg)
    scramble(model)
    save_peft(model, tmp_path / "a", "base", model_type=name.removesuffix("-interleaved"))
    y = logits(model.eval())
    plain = unwrap(copy.deepcopy(model))
    after = to_hf_tensors(plain.state_dict(), model.cfg, name.removesuffix("-interleaved"))
    told, transposed = written(tmp_path / "a")
    for key, weight in before.items():
        module = key.removesuffix(".weight")
        if module in told:
            delta, magnitude = told[module]
            new = (weight.T if transposed else weight) + delta
            new = new if magnitude is None else magnitude[:, None] * new / new.norm(dim=1, keepdim=True)
            weight = new.T if transposed else new
        torch.testing.assert_close(weight, after[key], rtol=1e-5, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")
    assert told
    again = of_family(name)
    assert set(load_peft(again, tmp_path / "a", "back")) >= set(adapted_modules(model))
    assert apart(logits(again.eval()), y) <= 1e-5
    assert names(again) == ["back"]
    save_peft(again, tmp_path / "b", "base", "back", name.removesuffix("-interleaved"))
    repeat, _ = written(tmp_path / "b")
    assert repeat.keys() == told.keys()
    for module, (delta, _) in repeat.items():
        torch.testing.assert_close(delta, told[module][0], rtol=1e-5, atol=1e-6)


def test_the_family_comes_from_the_base_folder(tmp_path):
    """Phi-3's function is Mistral's too: the names are those of the model that peft will load."""
    model = of_family("phi3")
    wrap(model, LoRAConfig(r=2))
    scramble(model)
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(FAMILIES["phi3"]))
    save_peft(model, tmp_path / "a", str(base))
    assert any("qkv_proj" in module for module in written(tmp_path / "a")[0])
    save_peft(model, tmp_path / "b", "someone/some-model")
    assert any("q_proj" in module for module in written(tmp_path / "b")[0])


# Bad files


def saved(tmp_path, cfg=LoRAConfig(r=2), model=None):
    model = model or small()
    wrap(model, cfg)
    scramble(model)
    return save_peft(model, tmp_path / "a", "base")


def change(folder, **what):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | what))


@pytest.mark.parametrize("what,words", [
    ({"modules_to_save": ["lm_head"]}, "modules_to_save = .'lm_head'.: not supported"), ({"use_qalora": True}, "use_qalora = True"),
    ({"megatron_config": {"a": 1}}, "megatron_config"), ({"bias": "all"}, "bias = 'all'"), ({"peft_type": "LOHA"}, "peft_type 'LOHA'"),
    ({"init_lora_weights": "olora"}, "init_lora_weights = 'olora' changes the base"), ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ({"loftq_config": {"bits": 4}}, "loftq_config"), ({"lora_bias": True}, "lora_bias = True"), ({"target_parameters": ["x"]}, "target_parameters"),
    ({"r": 3}, "rank 2, but adapter_config.json says 3"), ({"r": "many"}, "r = 'many' must be a positive number"), ({"lora_alpha": -1}, "lora_alpha = -1"),
    ({"use_dora": True}, "has lora_A, lora_B, not lora_A, lora_B, lora_magnitude_vector"), ({"target_modules": ["q_proj"]}, "is none of target_modules"),
    ({"rank_pattern": {"(": 2}}, "pattern '\\(' is no regular expression"), ({"something_new": 7}, "something_new = 7: not supported"),
])  # fmt: skip
def test_features_that_are_not_there_are_refused_by_name(what, words, tmp_path):
    folder, model = saved(tmp_path), small()
    change(folder, **what)
    with pytest.raises(ValueError, match=words):
        load_peft(model, folder)
    assert not adapted_modules(model) and all(p.requires_grad for p in model.parameters())


def test_an_adapter_for_another_base(tmp_path):
    folder = saved(tmp_path)
    wider, shallow = LM(llama(V, 40, 2, 4, 2, 48, 32, tied=True)), small(layers=1)
    with pytest.raises(ValueError, match=r"for another base, or incomplete: model.layers.0.self_attn.q_proj: lora_A is \(2, 32\), here \(2, 40\).*and \d+ more"):
        load_peft(wider, folder)
    with pytest.raises(ValueError, match="the model has no model.layers.1.mlp.*and 2 more"):
        load_peft(shallow, folder)
    with pytest.raises(ValueError, match="model.layers.2.self_attn.q_proj has no tensors"):
        load_peft(small(layers=3), folder)
    assert not any(adapted_modules(m) for m in (wider, shallow))


def test_damaged_files(tmp_path):
    folder, model = saved(tmp_path), small()
    file = folder / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged or cut short"):
        load_peft(model, folder)
    file.unlink()
    with pytest.raises(ValueError, match="no such file"):
        load_peft(model, folder)
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match="a pickle can run code and is not read"):
        load_peft(model, folder)
    file.write_bytes(whole)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        load_peft(model, folder)
    assert not adapted_modules(model)


def test_nothing_is_overwritten(tmp_path):
    model = small()
    folder = saved(tmp_path, model=model)
    before = (folder / "adapter_model.safetensors").read_bytes()
    scramble(model)
    with pytest.raises(ValueError, match="already exists and is not empty"):
        save_peft(model, folder, "base")
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    with pytest.raises(ValueError, match="no adapter is called 'other'; there are: default"):
        save_peft(model, tmp_path / "b", "base", "other")


def test_what_has_no_counterpart_is_not_saved(tmp_path):
    model = zoo("mixer", "kda")
    wrap(model, LoRAConfig(r=2))
    with pytest.raises(ValueError, match="no Hugging Face export"):
        save_peft(model, tmp_path / "a", "base")
    model = of_family("qwen3_next")
    wrap(model, LoRAConfig(r=2, targets=("router",)))
    with pytest.raises(ValueError, match="no projection of its own for blocks.0.ffn.router"):
        save_peft(model, tmp_path / "a", "base")
    model = small()
    wrap(model, AdaLoRAConfig(init_r=3, target_r=2))
    with pytest.raises(ValueError, match="has not learnt anything yet"):
        save_peft(model, tmp_path / "a", "base")
    assert not (tmp_path / "a").exists()


def test_the_wrapped_model_shows_itself():
    model = small()
    wrap(model, LoRAConfig(r=2))
    assert "active='default'" in repr(model) and isinstance(model.blocks[0].ffn.up_proj, Adapted)
