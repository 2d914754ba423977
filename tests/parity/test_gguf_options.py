"""Every option of every family by itself: llama.cpp computes the same with it, or the export is refused by name.

Nothing else is allowed: a file that llama.cpp opens and computes otherwise, or does not open, is a lie about the model.
Four things that published models have and llama.cpp does otherwise are written and said: the window of Phi-3, the ramp of
gpt-oss' YaRN, and the eps inside latent attention and delta rules.
A setting that transformers' family itself does not have is no model of ours and is left out.
"""

import pytest

from tests.parity.gguf_cases import (
    CAPS,
    CASES,
    LLAMA3,
    LOCAL,
    LONG,
    ROPE,
    YARN,
    ask_llama_cpp,
    build,
    forced,  # noqa: F401  a fixture
    our_answer,
    read_back,
    tokenizer,  # noqa: F401  a fixture
    within,
)
from zero2llm.interop.families.family import differences
from zero2llm.interop.gguf.write import export_gguf, plan_gguf

FACTORS = {key: LONG["rope_parameters"][key] for key in ("short_factor", "long_factor")}
TYPES = lambda text: {"layer_types": ["full_attention" if c == "f" else "sliding_attention" for c in text], "num_hidden_layers": len(text)}
MIXED = lambda text: {"layer_types": ["full_attention" if c == "f" else "linear_attention" for c in text], "num_hidden_layers": len(text)}
BOTH = lambda full, local: {"rope_parameters": {"full_attention": full, "sliding_attention": local}}

SHARED = {  # what every model with attention is asked
    "eps": {"rms_norm_eps": 0.01}, "biases": {"attention_bias": True}, "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False}, "llama3": LLAMA3, "linear": ROPE("linear", factor=4.0), "longrope": LONG,
    "yarn": ROPE("yarn", **YARN), "yarn, amplitude": ROPE("yarn", attention_factor=1.3, **YARN),
    "yarn, mscale": ROPE("yarn", mscale=0.8, mscale_all_dim=0.8, **YARN), "yarn, two mscales": ROPE("yarn", mscale=0.8, mscale_all_dim=0.5, **YARN),
    "yarn, whole ramp": ROPE("yarn", truncate=False, **YARN), "yarn, beta": ROPE("yarn", **YARN | {"beta_slow": 2.0}), "base": ROPE("default", 77.0),
    "narrow heads": {"head_dim": 16}, "wide heads": {"head_dim": 64}, "two kv heads": {"num_key_value_heads": 2}, "window": {"sliding_window": 8},
    "window of the length": {"sliding_window": 64}, "gelu": {"hidden_act": "gelu_pytorch_tanh"}, "exact gelu": {"hidden_activation": "gelu"},
    "more layers": {"num_hidden_layers": 8}, "half turned": {"partial_rotary_factor": 0.5}, "longer": {"max_position_embeddings": 128},
}  # fmt: skip
ROUTED = {
    "one expert": {"num_experts_per_tok": 1}, "three experts": {"num_experts_per_tok": 3}, "eight experts": {"num_experts": 8, "num_local_experts": 8},
    "renormalised": {"norm_topk_prob": True}, "as they are": {"norm_topk_prob": False}, "a dense layer": {"mlp_only_layers": [0]},
    "every other": {"decoder_sparse_step": 2}, "narrow": {"moe_intermediate_size": 32},
}  # fmt: skip
LATENT = {
    "two shared": {"n_shared_experts": 2, "num_shared_experts": 2}, "no dense layer": {"first_k_dense_replace": 0}, "two dense": {"first_k_dense_replace": 2},
    "scaled": {"routed_scaling_factor": 1.7}, "renormalised": {"norm_topk_prob": True, "moe_renormalize": True},
    "as they are": {"norm_topk_prob": False, "moe_renormalize": False}, "three experts": {"num_experts_per_tok": 3, "num_experts_per_token": 3},
    "groups": {"n_group": 4, "topk_group": 2, "num_expert_group": 4}, "groups by one": {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    "whole queries": {"q_lora_rank": None}, "low-rank queries": {"q_lora_rank": 48}, "halves": {"rope_interleave": False},
    "yarn, mscale 1": ROPE("yarn", mscale=1.0, mscale_all_dim=1.0, **YARN), "rope 8": {"qk_rope_head_dim": 8}, "nope 48": {"qk_nope_head_dim": 48},
    "values 40": {"v_head_dim": 40}, "four heads": {"num_attention_heads": 4, "num_key_value_heads": 4}, "27 layers": {"num_hidden_layers": 27},
}  # fmt: skip
GEMMAS = {
    "scalar 16": {"query_pre_attn_scalar": 16}, "scalar 64": {"query_pre_attn_scalar": 64}, "caps": CAPS, "one cap": {"attn_logit_softcapping": None},
    "no caps": {"attn_logit_softcapping": None, "final_logit_softcapping": None}, "all full": TYPES("fff"), "all windows": TYPES("www"),
    "halves": TYPES("wfwf"), "full first": TYPES("fwfw"), "thirds": TYPES("wwfwwf"), "no window": {"sliding_window": None},
    "scaled windows": BOTH({"rope_type": "default", "rope_theta": 5000.0}, LOCAL | {"rope_type": "linear", "factor": 2.0}),
    "yarn on full": BOTH({"rope_type": "yarn", "rope_theta": 5000.0, **YARN}, LOCAL), "both ways": {"use_bidirectional_attention": True},
}  # fmt: skip
OWN = {
    "llama": {"longrope, amplitude": ROPE("longrope", attention_factor=1.4, original_max_position_embeddings=16, **FACTORS),
              "one head": {"num_attention_heads": 1}},
    "phi3": {"longrope, amplitude": ROPE("longrope", attention_factor=1.4, original_max_position_embeddings=16, **FACTORS)},
    "qwen2moe": {"no biases": {"qkv_bias": False}},
    "gpt-oss": {"all full": TYPES("fff"), "all windows": TYPES("www"), "thirds": TYPES("wwf"), "full first": TYPES("fwf"), "no window": {"sliding_window": None}},
    "smollm3": {"one still": {"no_rope_layers": [1, 1, 0, 1, 1]}, "all turn": {"no_rope_layers": [1] * 5}, "every other": {"no_rope_layer_interval": 2}},
    "gpt2": {"exact gelu": {"activation_function": "gelu"}, "tanh gelu": {"activation_function": "gelu_pytorch_tanh"}, "eps": {"layer_norm_epsilon": 0.01},
             "narrow": {"n_inner": 96}, "one head": {"n_head": 1}, "untied": {"tie_word_embeddings": False}, "by depth": {"scale_attn_by_inverse_layer_idx": True}},
    "mamba": {"eps": {"layer_norm_epsilon": 0.01}, "untied": {"tie_word_embeddings": False}, "rank 7": {"time_step_rank": 7}, "no expansion": {"expand": 1},
              "expansion 4": {"expand": 4}, "no bias of filters": {"use_conv_bias": False}, "biases": {"use_bias": True}, "state 8": {"state_size": 8},
              "state 32": {"state_size": 32}, "filters of 3": {"conv_kernel": 3}, "filters of 2": {"conv_kernel": 2}, "width 48": {"hidden_size": 48}},
    "mamba2": {"eps": {"layer_norm_epsilon": 0.01}, "tied": {"tie_word_embeddings": True}, "no expansion": {"num_heads": 2}, "expansion 4": {"num_heads": 8},
               "one group": {"n_groups": 1}, "four groups": {"n_groups": 4}, "no bias of filters": {"use_conv_bias": False}, "biases": {"use_bias": True},
               "state 8": {"state_size": 8}, "state 24": {"state_size": 24}, "filters of 3": {"conv_kernel": 3}, "narrow heads": {"head_dim": 16, "num_heads": 8},
               "limit": {"time_step_limit": (0.0, 0.3)}},
    "jamba": {"no expansion": {"mamba_expand": 1}, "filters of 3": {"mamba_d_conv": 3}, "state 8": {"mamba_d_state": 8}, "rank 7": {"mamba_dt_rank": 7},
              "no bias of filters": {"mamba_conv_bias": False}, "biases": {"mamba_proj_bias": True}, "all routed": {"expert_layer_period": 1, "expert_layer_offset": 0},
              "routed first": {"expert_layer_period": 2, "expert_layer_offset": 0}, "no attention": {"attn_layer_period": 9, "attn_layer_offset": 8}},
    "qwen3next": {"one value head each": {"linear_num_value_heads": 2}, "one key head": {"linear_num_key_heads": 1}, "wide values": {"linear_value_head_dim": 16},
                  "narrow": {"linear_key_head_dim": 16, "linear_value_head_dim": 16}, "filters of 3": {"linear_conv_kernel_dim": 3}, "full first": MIXED("flfl"),
                  "halves": MIXED("lflf"), "all full": MIXED("ffff"), "all linear": MIXED("llll")},
    "kimi-linear": {"filters of 3": {"linear_conv_kernel_dim": 3}, "narrow": {"linear_head_dim": 16}, "four heads there": {"linear_num_heads": 4},
                    "full first": MIXED("flfl"), "all full": MIXED("ffff"), "dense between": {"mlp_layer_types": ["sparse", "dense", "sparse", "sparse"]}},
}  # fmt: skip


def options(case):
    """Name -> keys of config.json that change."""
    keys = CASES[case][1]
    shared = SHARED if "num_attention_heads" in keys else {}
    routed = LATENT if "kv_lora_rank" in keys else ROUTED if "num_experts" in keys else {}
    return shared | routed | (GEMMAS if case in ("gemma2", "gemma3") else {}) | OWN.get(case, {})


ASKED = ("llama", "mistral", "mixtral", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "smollm3", "olmo2", "gemma", "gemma2", "gemma3", "phi3", "gpt2",
         "gpt-oss", "deepseek-v2", "deepseek-v3", "mamba", "mamba2", "jamba", "qwen3next", "kimi-linear")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", ASKED)
def test_each_option_is_the_same_or_refused(case, tokenizer, forced, tmp_path, monkeypatch):  # noqa: F811
    kind, keys = CASES[case]
    keys = keys | {"rms_norm_eps": 1e-6}  # no note about inner norms: whatever differs counts
    models, paths, refused, announced, idle = {}, {}, {}, {}, set()
    for name, changed in options(case).items():
        monkeypatch.setitem(CASES, name, (kind, keys | changed))
        try:
            model = build(name)
        except ValueError:
            continue
        file = tmp_path / f"{len(models)}.gguf"
        try:
            paths[name] = export_gguf(model.state_dict(), model.cfg, tokenizer, file, "f32", model_type=kind)
        except ValueError as error:
            refused[name] = str(error)
            assert not file.exists()
            continue
        models[name] = model
        notes = plan_gguf(model.state_dict(), model.cfg, tokenizer, "f32", model_type=kind).notes
        announced |= {name: notes} if any("differ" in note for note in notes) else {}
        idle |= {name} if any("is left out" in note for note in notes) else set()
    answers = ask_llama_cpp(paths.values(), forced)
    wrong = {}
    for name, path in paths.items():
        theirs, ours = answers[str(path)], our_answer(models[name], forced)
        if isinstance(theirs, str):
            wrong[name] = theirs[:200]
        elif not within(models[name], theirs, ours) and name not in announced:
            wrong[name] = (ours - theirs).abs().max().item()
        assert bool(differences(models[name].cfg, read_back(path)[1])) == (name in idle), name
    for what, names in (("refused", refused), ("said to differ", announced)):
        print(f"{case}, {what}: {names}")
    print(f"{case}, written: {', '.join(paths)}")
    assert not wrong and len(paths) > 2
    assert all(why.startswith(("no GGUF export: the architecture", "no Hugging Face export")) for why in refused.values())
