"""GGUF files that are none of ours, damaged or of another model, and models that llama.cpp has no counterpart of.

Each is one ValueError that names what is wrong, before anything is written.
"""

import dataclasses

import pytest
import torch

from tests.parity.gguf_cases import CAPS, CASES, DELTA, GEMMA, KIMI, MLA, MOE, OSS, ROPE, SIZES, SSM, YARN, build
from zero2llm.core.config import parse, to_dict
from zero2llm.interop.foreign import import_model, plan
from zero2llm.interop.gguf.arches import ARCHES
from zero2llm.interop.gguf.file import open_gguf, write_gguf
from zero2llm.interop.gguf.read import read_gguf
from zero2llm.interop.gguf.write import export_gguf, plan_gguf
from zero2llm.interop.hf_config import from_hf_config
from zero2llm.model.lm import LM
from zero2llm.model.spec import ModelConfig
from zero2llm.tokenizers.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    Tokenizer.train(["the cat sat on the mat; the dog sat on the cat. " * 9], 272).save(folder)
    return folder


@pytest.fixture(scope="module")
def whole(tokenizer, tmp_path_factory):
    """A file per architecture that the tests change."""
    folder, out = tmp_path_factory.mktemp("whole"), {}
    for name in ("llama", "mixtral", "mamba", "gpt2", "deepseek-v2", "jamba"):
        model = build(name)
        out[name] = export_gguf(model.state_dict(), model.cfg, tokenizer, folder / f"{name}.gguf", "f32", model_type=CASES[name][0])
    return out


def changed(source, target, metadata=(), without=(), **tensors):
    """A copy with other metadata (None removes a key), without some tensors, with others besides."""
    file = open_gguf(source)
    meta = {key: value for key, value in (file.metadata | dict(metadata)).items() if value is not None}
    kept = {name: t.lazy.load() for name, t in file.tensors.items() if name not in without} | tensors
    write_gguf(target, meta, [(name, tuple(t.shape), "F32", lambda t=t: t) for name, t in kept.items()])
    return target


BROKEN = {  # what is done to which file -> what the error says
    "another architecture": ("llama", {"general.architecture": "rwkv7"}, "'rwkv7' is not supported; there are: llama, qwen2, .*mamba"),
    "no architecture": ("llama", {"general.architecture": None}, "architecture None is not supported"),
    "an adapter": ("llama", {"general.type": "adapter"}, "holds a 'adapter', not a model"),
    "no number of heads": ("llama", {"llama.attention.head_count": None}, "key attention.head_count is missing"),
    "no heads": ("llama", {"llama.attention.head_count": 0}, "attention.head_count = 0"),
    "text for a number": ("llama", {"llama.block_count": "two"}, "block_count = 'two': one number"),
    "widths that differ": ("llama", {"llama.feed_forward_length": [96, 96, 64]}, "feed_forward_length = .*one number for all layers"),
    "billions of layers": ("llama", {"llama.block_count": 2_000_000_000}, "block_count = 2000000000, but the file holds"),
    "billions of experts": ("mixtral", {"llama.expert_count": 2_000_000_000}, "expert_count = 2000000000"),
    "other experts": ("mixtral", {"llama.expert_count": 3}, "do not fit .*ffn_gate_exps"),
    "other heads": ("llama", {"llama.attention.key_length": 30, "llama.attention.value_length": 30, "llama.rope.dimension_count": 30}, "do not fit .*attn_q"),
    "another width": ("llama", {"llama.embedding_length": 32}, r"do not fit the configuration: .*embed_tokens.weight is \(300, 64\)"),
    "fewer layers": ("llama", {"llama.block_count": 2}, "no counterpart for the tensors blk.2.attn_q"),
    "values narrower than keys": ("llama", {"llama.attention.value_length": 16}, "keys of 32 with values of 16"),
    "rotation of another kind": ("llama", {"llama.rope.scaling.type": "su"}, "rope.scaling.type = 'su'"),
    "yarn half told": ("deepseek-v2", {"deepseek2.rope.scaling.yarn_log_multiplier": None}, "without rope.scaling.yarn_log_multiplier"),
    "falcon-mamba": ("mamba", {"mamba.ssm.dt_b_c_rms": True}, "Falcon-Mamba"),
    "a scale of its own": ("llama", {"llama.attention.scale": 0.25}, "attention.scale = 0.25: not supported for llama"),
    "scaled logits": ("llama", {"llama.logit_scale": 8.0}, "logit_scale = 8.0: not supported"),
    "soft-caps elsewhere": ("mixtral", {"llama.final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0: not supported for llama"),
    "sigmoid in mixtral": ("mixtral", {"llama.expert_gating_func": 2}, "expert_gating_func = 2: not supported for llama"),
    "another gate": ("deepseek-v2", {"deepseek2.expert_gating_func": 3}, "expert_gating_func = 3 is not supported"),
    "groups of DeepSeek-V2": ("deepseek-v2", {"deepseek2.expert_group_count": 4, "deepseek2.expert_group_used_count": 2}, "topk_method = 'group_limited_greedy'"),
    "attention now and then": ("jamba", {"jamba.attention.head_count_kv": [0, 1, 1, 0]}, "fixed distance"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_a_file_says_is_checked(whole, tmp_path, case):
    name, metadata, message = BROKEN[case]
    path = changed(whole[name], tmp_path / "bad.gguf", metadata)
    with pytest.raises(ValueError, match=message) as error:
        import_model(read_gguf(path), tmp_path / "out")
    assert str(path) in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.gguf"]


def test_missing_and_unknown_tensors_are_listed(whole, tmp_path):
    lost = changed(whole["llama"], tmp_path / "lost.gguf", without=("blk.1.attn_k.weight", "blk.1.ffn_norm.weight"))
    with pytest.raises(ValueError, match=r"missing model\.layers\.1\.self_attn\.k_proj\.weight; model\.layers\.1\.post_att"):
        import_model(read_gguf(lost), tmp_path / "out")
    more = changed(whole["llama"], tmp_path / "more.gguf", **{"blk.0.attn_z.weight": torch.ones(3, 3)})
    with pytest.raises(ValueError, match="no counterpart for the tensors blk.0.attn_z.weight"):
        read_gguf(more)
    with pytest.raises(ValueError, match="holds no token_embd.weight"):
        read_gguf(changed(whole["llama"], tmp_path / "part.gguf", without=("token_embd.weight",)))
    half = changed(whole["deepseek-v2"], tmp_path / "half.gguf", without=("blk.1.attn_k_b.weight",))
    with pytest.raises(ValueError, match="no counterpart for the tensors blk.1.attn_v_b.weight"):
        read_gguf(half)
    assert not (tmp_path / "out").exists()


def test_a_head_that_repeats_the_embedding_is_passed_over_and_another_is_refused(whole, tmp_path):
    """Older GPT-2 files hold it."""
    embedding = open_gguf(whole["gpt2"]).tensors["token_embd.weight"].lazy.load()
    import_model(read_gguf(changed(whole["gpt2"], tmp_path / "same.gguf", **{"output.weight": embedding})), tmp_path / "out")
    other = changed(whole["gpt2"], tmp_path / "other.gguf", **{"output.weight": embedding + 1})
    with pytest.raises(ValueError, match="lm_head.weight differs from"):
        import_model(read_gguf(other), tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


def test_old_and_fused_forms_are_read(whole, tmp_path):
    """kv_b_proj whole, as before 2025; gate and up of the experts in one tensor, as new converters write."""
    load = lambda name, tensor: open_gguf(whole[name]).tensors[tensor].lazy.load()
    state = lambda path: {n: t.load() for n, t in read_gguf(path).tensors.items()}
    k, v = (load("deepseek-v2", f"blk.0.attn_{n}_b.weight") for n in "kv")
    joined = torch.cat((k.transpose(1, 2), v), 1).flatten(0, 1)
    old_keys = {"deepseek2.attention.key_length": 48, "deepseek2.attention.value_length": 24, "deepseek2.attention.key_length_mla": None,
                "deepseek2.attention.value_length_mla": None}  # fmt: skip
    split = ("blk.0.attn_k_b.weight", "blk.0.attn_v_b.weight")
    old = changed(whole["deepseek-v2"], tmp_path / "old.gguf", old_keys, split, **{"blk.0.attn_kv_b.weight": joined})
    new = state(whole["deepseek-v2"])
    assert all(torch.equal(value, new[name]) for name, value in state(old).items())
    assert read_gguf(old).config["v_head_dim"] == 24 and read_gguf(old).config["qk_nope_head_dim"] == 32
    both = torch.cat([load("mixtral", f"blk.2.ffn_{n}_exps.weight") for n in ("gate", "up")], 1)
    names = tuple(f"blk.2.ffn_{n}_exps.weight" for n in ("gate", "up"))
    fused = changed(whole["mixtral"], tmp_path / "fused.gguf", without=names, **{"blk.2.ffn_gate_up_exps.weight": both})
    new = state(whole["mixtral"])
    again = state(fused)
    assert again.keys() == new.keys() and all(torch.equal(value, new[name]) for name, value in again.items())


def test_reading_loads_no_weights(whole, monkeypatch):
    from zero2llm.interop.gguf import file

    monkeypatch.setattr(file, "dequantize", lambda *args: pytest.fail("a tensor was read"))
    found = read_gguf(whole["mixtral"])
    cfg = from_hf_config(found.config)
    assert len(plan(found.tensors, cfg, "mixtral").ours()) == len(LM(cfg).state_dict())


def test_recommended_sampling_comes_along(whole, tmp_path):
    told = {"general.sampling.temp": 0.6, "general.sampling.top_k": 20, "general.sampling.top_p": 0.95, "tokenizer.ggml.eot_token_id": 7}
    found = read_gguf(changed(whole["llama"], tmp_path / "m.gguf", told)).generation
    assert {k: found[k] for k in ("temperature", "top_k", "top_p", "do_sample")} == {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "do_sample": True}
    assert found["eos_token_id"][-1] == 7


GPT2 = CASES["gpt2"][1]
NONE_THERE = {  # what llama.cpp cannot compute -> what the error names
    "exact GELU in gpt2": ("gpt2", GPT2 | dict(activation_function="gelu"), r"architecture gpt2 has no counterpart of ffn.act: gelu_erf \(there gelu\)"),
    "a window in llama": ("mistral", SIZES | dict(sliding_window=8), r"architecture llama has no counterpart of mixer.window: 8 \(there None\)"),
    "biases in qwen3": ("qwen3", SIZES | dict(attention_bias=True), "mixer.qkv_bias: True"),
    "llama3 factors in qwen2": ("qwen2", SIZES | ROPE("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
                                r"mixer.position.scaling: llama3 \(none or linear or yarn there\)"),
    "another ramp": ("llama", SIZES | ROPE("yarn", **YARN | dict(beta_fast=16.0)), r"scaling.beta_fast: 16.0 \(there 32.0\)"),
    "an untied gemma": ("gemma", GEMMA | dict(tie_word_embeddings=False, sliding_window=None), r"tie_embeddings: False \(there True\)"),
    "a tied gpt-oss": ("gpt_oss", OSS | dict(tie_word_embeddings=True) | ROPE("default"), r"tie_embeddings: True \(there False\)"),
    "a whole ramp in gpt-oss": ("gpt_oss", OSS | ROPE("yarn", **YARN), r"scaling.truncate: True \(there False\)"),
    "another scale": ("gemma2", GEMMA | dict(query_pre_attn_scalar=7, attn_logit_softcapping=5.0, final_logit_softcapping=5.0), "mixer.scale"),
    "no soft-cap": ("gemma2", GEMMA | dict(attn_logit_softcapping=None, final_logit_softcapping=5.0), "softcap"),
    "windows anyhow": ("gemma3_text", GEMMA | dict(layer_types=["full_attention", "sliding_attention", "sliding_attention"]), r"mixer.window: .* \[0\]"),
    "no window in gemma3": ("gemma3_text", GEMMA | dict(layer_types=["full_attention"] * 3), "window: None in every layer"),
    "weights renormalised": ("qwen2_moe", MOE | dict(norm_topk_prob=True, shared_expert_intermediate_size=64), r"ffn.renormalise: True \(there False\)"),
    "weights not renormalised": ("qwen3_moe", MOE | dict(norm_topk_prob=False), r"ffn.renormalise: False \(there True\)"),
    "a dense layer": ("qwen3_moe", MOE | dict(norm_topk_prob=True, mlp_only_layers=[1]), "ffn: glu"),
    "other layers without rotation": ("smollm3", SIZES | dict(no_rope_layers=[1, 0, 1]), "mixer.position: none"),
    "whole queries": ("deepseek_v2", MLA | dict(q_lora_rank=None), "mixer.q_rank: None in 3 layers"),
    "low-rank queries in 27 layers": ("deepseek_v2", MLA | dict(num_hidden_layers=27), "mixer.q_rank: 48 in 27 layers"),
    "linear scaling in deepseek": ("deepseek_v2", MLA | ROPE("linear", factor=4.0), r"scaling: linear \(none or yarn there\)"),
    "kimi's weights as they are": ("kimi_linear", KIMI | dict(moe_renormalize=False), r"ffn.renormalise: False \(there True\)"),
    "kimi's low-rank queries": ("kimi_linear", KIMI | dict(q_lora_rank=48), r"mixer.q_rank: 48 \(there None\)"),
    "a tied qwen2moe": ("qwen2_moe", MOE | dict(norm_topk_prob=False, shared_expert_intermediate_size=64, tie_word_embeddings=True), "tie_embeddings: True"),
    "a tied olmo2": ("olmo2", SIZES | dict(tie_word_embeddings=True), "tie_embeddings: True"),
    "a biased smollm3": ("smollm3", SIZES | dict(num_hidden_layers=5, attention_bias=True), "qkv_bias: True"),
    "no window in gemma2": ("gemma2", GEMMA | CAPS | dict(layer_types=["full_attention"] * 3), "mixer.window: None in every layer"),
    "no window in gpt-oss": ("gpt_oss", OSS | dict(sliding_window=None) | ROPE("default"), "mixer.window: None in every layer"),
    "yarn without mscale": ("deepseek_v3", MLA | ROPE("yarn", **YARN), "mscale_all_dim: None"),
    "halves in deepseek": ("deepseek_v3", MLA | dict(rope_interleave=False), r"layout: half_split \(there interleaved\)"),
    "a wide mamba": ("mamba", SSM | dict(expand=3, time_step_rank=4), r"mixer.expand: 3 \(there 2\)"),
    "a limit in mamba2": ("mamba2", SSM | dict(num_heads=4, head_dim=32, n_groups=1, time_step_limit=(0.1, 0.5)), "mixer.dt_limit"),
    "a biased mamba": ("mamba", SSM | dict(time_step_rank=4, use_bias=True), "mixer.proj_bias: True"),
    "wide values": ("qwen3_next", MOE | DELTA | dict(shared_expert_intermediate_size=64, num_hidden_layers=4, linear_value_head_dim=16), "mixer.value_dim: 16"),
}  # fmt: skip


@pytest.mark.parametrize("case", NONE_THERE)
def test_what_has_no_counterpart_is_refused_by_name(tokenizer, tmp_path, case):
    kind, keys, message = NONE_THERE[case]
    model = LM(from_hf_config({"model_type": kind} | keys))
    with pytest.raises(ValueError, match=f"no GGUF export.*{message}"):
        export_gguf(model.state_dict(), model.cfg, tokenizer, tmp_path / "m.gguf", "f32", model_type=kind)
    assert not any(tmp_path.iterdir())


def test_a_mixer_that_exists_nowhere_else_is_refused(tokenizer, tmp_path):
    data = to_dict(build("llama").cfg)
    for block in data["blocks"].values():
        block["mixer"] = {"kind": "retnet", "n_heads": 2}
    model = LM(parse(ModelConfig, data))
    with pytest.raises(ValueError, match="no counterpart of mixer: retnet"):
        export_gguf(model.state_dict(), model.cfg, tokenizer, tmp_path / "m.gguf", "f32")
    assert not any(tmp_path.iterdir())


def test_a_window_over_the_longest_text_is_left_out_and_said(tokenizer):
    model = LM(from_hf_config({"model_type": "mistral"} | SIZES | dict(sliding_window=64)))
    assert any("window of 64 tokens" in note for note in plan_gguf(model.state_dict(), model.cfg, tokenizer, "f16", model_type="mistral").notes)
    model = LM(from_hf_config({"model_type": "phi3"} | SIZES | dict(sliding_window=16, original_max_position_embeddings=64)))
    assert any("passes over the window of 16" in note for note in plan_gguf(model.state_dict(), model.cfg, tokenizer, "f16", model_type="phi3").notes)


def test_a_target_in_use_another_kind_and_a_wrong_tokenizer_are_refused(tokenizer, tmp_path):
    model = build("llama")
    state, out = model.state_dict(), tmp_path / "m.gguf"
    with pytest.raises(ValueError, match="q4_k.*f32, f16, bf16, q8_0, q4_0"):
        export_gguf(state, model.cfg, tokenizer, out, "q4_k")
    with pytest.raises(ValueError, match="missing embed.weight"):
        export_gguf({n: t for n, t in state.items() if n != "embed.weight"}, model.cfg, tokenizer, out, "f32")
    small = dataclasses.replace(model.cfg, vocab_size=271)
    with pytest.raises(ValueError, match="272 tokens, the model 271"):
        export_gguf(LM(small).state_dict(), small, tokenizer, out, "f32")
    assert not out.exists()
    out.write_bytes(b"mine")
    with pytest.raises(ValueError, match="already exists"):
        export_gguf(state, model.cfg, tokenizer, out, "f32")
    assert out.read_bytes() == b"mine"
    export_gguf(state, model.cfg, tokenizer, out, "f32", overwrite=True)
    assert open_gguf(out).metadata["general.architecture"] == "llama"


def test_a_number_that_a_half_cannot_hold_leaves_no_file(tokenizer, tmp_path):
    model = build("llama")
    state = model.state_dict()
    state["blocks.2.ffn.up_proj.weight"][0, 0] = 1e6
    with pytest.raises(ValueError, match="blk.2.ffn_up.weight: its largest value"):
        export_gguf(state, model.cfg, tokenizer, tmp_path / "m.gguf", "f16")
    assert not any(tmp_path.iterdir())


def test_the_list_of_architectures_is_the_one_in_the_docstring():
    from zero2llm.interop.gguf import arches

    for name in ARCHES:
        assert f"{name} " in arches.__doc__ or f"{name}\n" in arches.__doc__, name
