"""Adapters against peft on the same weights: logits, gradients, schedules, and folders that go both ways.

A small model of transformers and ours from the same tensors; adapters with random factors, since a B of zeros hides errors.
fp32, as peft works; tolerances of the reference sheet (class B).
"""

import json
import math
import tempfile
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file

from zero2llm.adapters.adalora import AdaLoRAConfig, after_step, penalty
from zero2llm.adapters.adapted import adapted_modules
from zero2llm.adapters.dora import DoRAConfig
from zero2llm.adapters.lora import LoRAConfig
from zero2llm.adapters.pissa import PiSSAConfig
from zero2llm.adapters.wrap import lr_multipliers, merge, wrap
from zero2llm.core.files import load_tensors
from zero2llm.core.seq import Seq
from zero2llm.interop.hf import from_hf_config, from_hf_tensors
from zero2llm.interop.peft.places import places
from zero2llm.interop.peft.read import load_peft
from zero2llm.interop.peft.write import save_peft
from zero2llm.model.lm import LM

V, T = 61, 11
SIZES = dict(vocab_size=V, hidden_size=24, intermediate_size=40, num_hidden_layers=2, max_position_embeddings=32, num_attention_heads=4,
             num_key_value_heads=2, bos_token_id=None, eos_token_id=None, pad_token_id=None, tie_word_embeddings=False)  # fmt: skip
GPT2 = dict(vocab_size=V, n_embd=24, n_layer=2, n_head=4, n_positions=32, bos_token_id=None, eos_token_id=None)
MLA = SIZES | dict(num_hidden_layers=3, first_k_dense_replace=1, moe_intermediate_size=12, n_routed_experts=6, num_experts_per_tok=2,
                   kv_lora_rank=10, q_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=6, v_head_dim=5, num_key_value_heads=4, n_group=2,
                   topk_group=1)  # fmt: skip
NEXT = SIZES | dict(num_hidden_layers=4, head_dim=8, moe_intermediate_size=12, num_experts=5, num_experts_per_tok=2, linear_num_key_heads=2,
                    linear_num_value_heads=4, linear_key_head_dim=6, linear_value_head_dim=5, shared_expert_intermediate_size=20)  # fmt: skip
MODELS = {
    "llama": (hf.LlamaForCausalLM, SIZES),
    "llama-bias": (hf.LlamaForCausalLM, SIZES | dict(attention_bias=True)),
    "interleaved": (hf.LlamaForCausalLM, SIZES),
    "phi3": (hf.Phi3ForCausalLM, SIZES),
    "gpt2": (hf.GPT2LMHeadModel, GPT2),
    "deepseek_v3": (hf.DeepseekV3ForCausalLM, MLA),
    "qwen3_next": (hf.Qwen3NextForCausalLM, NEXT),
}
CONFIGS = {
    "lora": LoRAConfig(r=4, alpha=6.0),
    "rslora": LoRAConfig(r=4, alpha=6.0, rank_stabilized=True),
    "dora": DoRAConfig(r=4, alpha=6.0),
    "pissa": PiSSAConfig(r=4, alpha=4.0),
    "adalora": AdaLoRAConfig(init_r=5, target_r=3, alpha=6.0),
}
CLOSE = dict(rtol=1e-5, atol=5e-6)


def pair(name="llama"):
    """(theirs, ours) with equal weights."""
    kind, sizes = MODELS[name]
    torch.manual_seed(1)
    theirs = kind(kind.config_class(**sizes)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    cfg = from_hf_config(theirs.config.to_dict())
    if name == "interleaved":
        turn = lambda spec: replace(spec, mixer=replace(spec.mixer, position=replace(spec.mixer.position, layout="interleaved")))
        cfg = replace(cfg, blocks={label: turn(spec) for label, spec in cfg.blocks.items()})
    ours = LM(cfg)
    model_type = theirs.config.model_type
    state = theirs.state_dict()
    if model_type == "gpt2" or sizes.get("tie_word_embeddings"):
        state.pop("lm_head.weight", None)
    ours.load_state_dict(from_hf_tensors(saved_names(theirs, state), cfg, model_type))
    return theirs, ours.eval()


def saved_names(theirs, state):
    """Experts are one tensor in memory, and one each in a file."""
    if not any("experts" in key for key in state):
        return state
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return load_tensors(Path(folder))


def tokens(seed=3):
    return torch.randint(0, V, (2, T), generator=torch.Generator().manual_seed(seed))


def logits(model, x):
    return model.logits(model(x, Seq.rows(*x.shape))[0])


def scramble(model, by=0.1):
    """Random factors, and magnitudes off their start."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(by * torch.randn(p.shape, generator=generator))


def compare(theirs, ours, gradients=True):
    """Logits, then the gradient of a fixed weighing of them, module by module."""
    x = tokens()
    mine, other = logits(ours, x), theirs(x, use_cache=False).logits
    torch.testing.assert_close(mine, other, **CLOSE)
    if not gradients:
        return
    weigh = torch.randn(mine.shape, generator=torch.Generator().manual_seed(9)) / V
    for out in (mine, other):
        (out * weigh).sum().backward()
    found, seen = adapted_modules(ours), 0
    for module, place in places(ours, theirs.config.model_type).items():
        if place.ours[0] not in found or len(place.ours) > 1:
            continue
        target, mine = theirs.base_model.model.get_submodule(module), found[place.ours[0]].adapters["default"]
        torch.testing.assert_close(mine.a.grad, target.lora_A["default"].weight.grad, **CLOSE)
        torch.testing.assert_close(place.pack([mine.b.grad]), target.lora_B["default"].weight.grad, **CLOSE)
        if target.use_dora.get("default"):
            torch.testing.assert_close(place.pack([mine.m.grad]), target.lora_magnitude_vector["default"].weight.grad, **CLOSE)
        seen += 1
    assert seen


@pytest.mark.parametrize("name", ["llama", "llama-bias", "interleaved", "deepseek_v3"])
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_saved_folder_in_peft_gives_equal_logits_and_gradients(name, kind, tmp_path):
    theirs, ours = pair(name)
    targets = ("*.mixer.*",) if name == "deepseek_v3" else ("all-linear",)
    wrap(ours, replace(CONFIGS[kind], targets=targets))
    scramble(ours)
    save_peft(ours, tmp_path / "a", "base", model_type=theirs.config.model_type)
    opened = peft.PeftModel.from_pretrained(theirs, tmp_path / "a", is_trainable=True)
    compare(opened, ours)


def test_what_peft_would_take_for_experts_is_refused(tmp_path):
    """peft 0.21 reads gate_proj in a model with experts as the experts' own, wherever it stands."""
    _, ours = pair("deepseek_v3")
    wrap(ours, CONFIGS["lora"])
    with pytest.raises(ValueError, match="model.layers.0.mlp.gate_proj.*experts"):
        save_peft(ours, tmp_path / "a", "base")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("name,kind", [(n, k) for n in ("phi3", "gpt2", "qwen3_next") for k in CONFIGS if k != "rslora"] +
                         [("phi3", "rslora"), ("llama", "pissa"), ("llama", "adalora"), ("interleaved", "adalora")])  # fmt: skip
def test_converted_folder_in_peft_gives_equal_logits(name, kind, tmp_path):
    theirs, ours = pair(name)
    targets = ("*.mixer.*",) if name == "qwen3_next" else ("all-linear",)
    cfg = CONFIGS[kind]
    if kind == "pissa" and name == "qwen3_next":
        targets = ("*.mixer.o_proj",)  # its gates have 4 rows
    wrap(ours, replace(cfg, targets=targets))
    scramble(ours)
    save_peft(ours, tmp_path / "a", "base", model_type=theirs.config.model_type)
    compare(peft.PeftModel.from_pretrained(theirs, tmp_path / "a"), ours, gradients=False)


def theirs_config(kind, targets, **more):
    base = dict(r=4, lora_alpha=6, target_modules=targets, **more)
    return {
        "lora": lambda: peft.LoraConfig(**base),
        "rslora": lambda: peft.LoraConfig(**base, use_rslora=True),
        "dora": lambda: peft.LoraConfig(**base, use_dora=True),
        "pissa": lambda: peft.LoraConfig(**base, init_lora_weights="pissa"),
        "pattern": lambda: peft.LoraConfig(**base, rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.self_attn.v_proj": 3}),
        "adalora": lambda: peft.AdaLoraConfig(**base | {"r": 8}, init_r=5, target_r=3, total_step=10),
    }[kind]()


@pytest.mark.parametrize("name,kind", [(n, k) for n in ("llama", "interleaved") for k in ("lora", "rslora", "dora", "pissa", "pattern", "adalora")] +
                         [(n, k) for n in ("phi3", "gpt2") for k in ("lora", "dora", "adalora")])  # fmt: skip
def test_a_folder_of_peft_opens_here(name, kind, tmp_path):
    theirs, ours = pair(name)
    base = {key: value.clone() for key, value in theirs.state_dict().items()}
    targets = {"phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"], "gpt2": ["c_attn", "c_proj", "c_fc"]}
    made = peft.get_peft_model(theirs, theirs_config(kind, targets.get(name, ["q_proj", "v_proj", "o_proj", "up_proj"])))
    scramble(made)
    made.save_pretrained(tmp_path)
    paths = load_peft(ours, tmp_path)
    assert paths and set(paths) == set(adapted_modules(ours))
    compare(made, ours, gradients=False)
    again = MODELS[name][0](theirs.config).eval()
    again.load_state_dict(base)
    save_peft(ours, tmp_path / "again", "base", model_type=theirs.config.model_type)
    compare(peft.PeftModel.from_pretrained(again, tmp_path / "again"), ours, gradients=False)


def test_pissa_begins_and_learns_as_peft():
    theirs, ours = pair()
    made = peft.get_peft_model(theirs, theirs_config("pissa", ["q_proj", "down_proj"]))
    wrap(ours, PiSSAConfig(r=4, alpha=6.0, targets=("q_proj", "down_proj")))
    for module, place in places(ours).items():
        if place.ours[0] in (found := adapted_modules(ours)):
            target, mine = made.base_model.model.get_submodule(module), found[place.ours[0]].adapters["default"]
            product = target.lora_B["default"].weight @ target.lora_A["default"].weight
            torch.testing.assert_close(mine.b @ mine.a, product, **CLOSE)
            residual = found[place.ours[0]].base.weight - mine.scale * mine.b0 @ mine.a0
            torch.testing.assert_close(residual, target.base_layer.weight, **CLOSE)
            with torch.no_grad():  # the sign of a singular vector is free
                mine.a.copy_(target.lora_A["default"].weight)
                mine.b.copy_(target.lora_B["default"].weight)
    compare(made, ours)


def test_adalora_trains_as_peft_step_by_step():
    """Loss with the penalty, importance, budget, what is put out, and the weights, over a whole schedule."""
    total, lr = 9, 0.02
    theirs, ours = pair()
    other = peft.AdaLoraConfig(init_r=6, target_r=2, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"], total_step=total,
                               tinit=2, tfinal=2, deltaT=2, beta1=0.8, beta2=0.9, orth_reg_weight=0.3,
                               task_type="CAUSAL_LM")  # fmt: skip  # without a task peft leaves the penalty out
    made = peft.get_peft_model(theirs, other)
    cfg = AdaLoRAConfig(init_r=6, target_r=2, alpha=6.0, targets=("q_proj", "v_proj", "down_proj"), warmup=2, final=2, every=2, beta1=0.8,
                        beta2=0.9, orth_weight=0.3)  # fmt: skip
    wrap(ours, cfg)
    found, twins = adapted_modules(ours), []
    for module, place in places(ours).items():
        if place.ours[0] in found:
            target, mine = made.base_model.model.get_submodule(module), found[place.ours[0]].adapters["default"]
            pairs = (mine.a, target.lora_A["default"]), (mine.e, target.lora_E["default"]), (mine.b, target.lora_B["default"])
            with torch.no_grad():
                for p, q in pairs:
                    q.add_(0.05 * torch.randn_like(q)) if p is mine.e else None
                    p.copy_(q)
            twins += pairs
    optims = [torch.optim.SGD([pair[i] for pair in twins], lr=lr) for i in (0, 1)]
    ranks = []
    for step in range(1, total + 1):
        x = tokens(step)
        mine = F.cross_entropy(logits(ours, x)[:, :-1].flatten(0, 1), x[:, 1:].flatten()) + penalty(ours)
        other_loss = made(input_ids=x, labels=x, use_cache=False).loss
        torch.testing.assert_close(mine, other_loss, **CLOSE)
        mine.backward(), other_loss.backward()
        for optim in optims:
            optim.step()
        after_step(ours, step, total)
        made.base_model.update_and_allocate(step)
        for p, q in twins:
            torch.testing.assert_close(p, q, **CLOSE)
        for optim in optims:
            optim.zero_grad()
        ranks.append(sum(int((p != 0).sum()) for p, _ in twins[1::3]))
        pattern = made.peft_config["default"].rank_pattern
        if pattern and step >= 4:
            assert ranks[-1] == sum(sum(kept) for kept in pattern.values()) or step % 2
    assert ranks[:3] == [36, 36, 36] and ranks[-3:] == [12, 12, 12] and ranks[3] < 36


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_rates_of_lora_plus(kind, tmp_path):
    theirs, ours = pair()
    wrap(ours, replace(CONFIGS[kind], lr_ratio=16.0, targets=("q_proj", "down_proj")))
    save_peft(ours, tmp_path / "a", "base")
    opened = peft.PeftModel.from_pretrained(theirs, tmp_path / "a", is_trainable=True)
    optim = create_loraplus_optimizer(opened, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16)
    rate = {id(p): group["lr"] for group in optim.param_groups for p in group["params"]}
    names = {"lora_A.default.weight": "a", "lora_B.default.weight": "b", "lora_magnitude_vector.default.weight": "m"}
    where = {module: place.ours[0] for module, place in places(ours).items()}
    expected = {}
    for key, p in opened.base_model.model.named_parameters():
        for ending, mine in names.items():
            if key.endswith("." + ending) and p.requires_grad:
                expected[f"{where[key.removesuffix('.' + ending)]}.adapters.default.{mine}"] = rate[id(p)] / 1e-4
    mine = lr_multipliers(ours)
    assert mine.keys() == expected.keys()
    assert all(math.isclose(mine[key], expected[key]) for key in mine)


def test_the_files_say_what_peft_says(tmp_path):
    """Tensor names and shapes as peft itself writes them; short target names where every layer has them."""
    theirs, ours = pair()
    made = peft.get_peft_model(theirs, theirs_config("dora", ["q_proj", "up_proj"]))
    made.save_pretrained(tmp_path / "theirs")
    wrap(ours, replace(CONFIGS["dora"], targets=("q_proj", "up_proj")))
    save_peft(ours, tmp_path / "ours", "base")
    mine, other = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert {k: t.shape for k, t in mine.items()} == {k: t.shape for k, t in other.items()}
    said, they = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs"))
    assert sorted(said["target_modules"]) == sorted(they["target_modules"]) == ["q_proj", "up_proj"]
    assert not set(said) - set(they)
    assert all(said[key] == they[key] for key in ("r", "lora_alpha", "use_dora", "use_rslora", "bias", "peft_type"))


def test_merged_equals_peft_merged(tmp_path):
    theirs, ours = pair("interleaved")
    wrap(ours, CONFIGS["dora"])
    scramble(ours)
    save_peft(ours, tmp_path / "a", "base")
    opened = peft.PeftModel.from_pretrained(theirs, tmp_path / "a").merge_and_unload()
    merge(ours)
    torch.testing.assert_close(logits(ours, tokens()), opened(tokens(), use_cache=False).logits, **CLOSE)
