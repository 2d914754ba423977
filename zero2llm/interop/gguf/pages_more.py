"""Architectures of GGUF with experts of their own kind, latent attention or a recurrence; see arches.py.

head_count_kv is a list where layers differ: 0 for a layer without keys and values (jamba, kimi-linear).
MLA stores one key for all heads, so head_count_kv = 1, key_length = r + rope and value_length = r; the widths of a head
that our configuration has are key_length_mla and value_length_mla.
"""

from __future__ import annotations

from torch import Tensor

from zero2llm.interop.gguf import layers
from zero2llm.interop.gguf.config import (
    SIZES,
    Arch,
    Found,
    Meta,
    copied,
    copied_back,
    read_dense,
    read_windows,
    write_dense,
    write_windows,
)
from zero2llm.interop.gguf.pages_dense import EXPERTS, MIXTRAL, SHARED
from zero2llm.interop.gguf.rope import read_rope, write_rope

Written = tuple[Meta, dict[str, Tensor]]
SOFTMAX, SIGMOID = 1, 2  # expert_gating_func
LITE = (26, 27)  # layers of the models whose queries llama.cpp takes for whole; those of all others for low-rank
INNER = 1e-6  # eps of the norms inside latent attention and the delta rules
RECURRENT = {"conv_kernel": "ssm.conv_kernel", "state_size": "ssm.state_size"}
BARE = {"max_position_embeddings": "context_length", "hidden_size": "embedding_length", "num_hidden_layers": "block_count",
        "layer_norm_epsilon": "attention.layer_norm_rms_epsilon"}  # fmt: skip


def _write_gpt_oss(config: dict) -> Written:
    meta, tensors = write_dense(config)
    return meta | copied(config, MIXTRAL) | {"expert_feed_forward_length": config["intermediate_size"]} | write_windows(config, 2), tensors


def _read_gpt_oss(found: Found) -> dict:
    """YaRN's ramp of the published model does not end at whole pairs, of which the file says nothing."""
    config = read_dense(found, truncate=False) | copied_back(found, MIXTRAL) | read_windows(found, 2, 128)
    return config | {"model_type": "gpt_oss", "attention_bias": True, "intermediate_size": found.need("expert_feed_forward_length")}


def _gpt_oss_notes(config: dict) -> list[str]:
    yarn = config["rope_parameters"]["rope_type"] == "yarn"
    return ["llama.cpp ends the ramp of YaRN at whole pairs, this model does not: its logits differ there"] if yarn else []


LATENT = {"q_lora_rank": "attention.q_lora_rank", "kv_lora_rank": "attention.kv_lora_rank"}
SPARSE = {"moe_intermediate_size": "expert_feed_forward_length", "routed_scaling_factor": "expert_weights_scale",
          "first_k_dense_replace": "leading_dense_block_count"}  # fmt: skip
V3 = {"n_routed_experts": "expert_count", "num_experts_per_tok": "expert_used_count", "n_shared_experts": "expert_shared_count",
      "norm_topk_prob": "expert_weights_norm"}  # fmt: skip
KIMI = {"num_experts": "expert_count", "num_experts_per_token": "expert_used_count", "num_shared_experts": "expert_shared_count"}  # fmt: skip
GROUPS = {"n_group": "expert_group_count", "topk_group": "expert_group_used_count"}
KIMI_GROUPS = {"num_expert_group": "expert_group_count", "topk_group": "expert_group_used_count"}


def _write_latent(config: dict, names: dict[str, str], kv_heads) -> Meta:
    rope, rank = config["qk_rope_head_dim"], config["kv_lora_rank"]
    sizes = {key: file for key, file in (SIZES | LATENT | SPARSE | names).items() if config.get(key) is not None}
    return copied(config, sizes) | {
        "attention.head_count_kv": kv_heads, "attention.key_length": rank + rope, "attention.value_length": rank,
        "attention.key_length_mla": config["qk_nope_head_dim"] + rope, "attention.value_length_mla": config["v_head_dim"],
        "rope.dimension_count": rope,
    }  # fmt: skip


def _read_latent(found: Found, names: dict[str, str]) -> dict:
    """Files of before 2025 have the widths of a head as key_length and value_length."""
    rope, new = found.need("rope.dimension_count"), "attention.key_length_mla" in found.meta
    key, value = (found.need(f"attention.{n}_length{'_mla' if new else ''}") for n in ("key", "value"))
    sizes = {key: file for key, file in SIZES.items() if key != "num_key_value_heads"}
    defaults = {"routed_scaling_factor": 1.0, "first_k_dense_replace": 0, "q_lora_rank": None, "norm_topk_prob": False}
    table = LATENT | SPARSE | names
    config = copied_back(found, sizes) | {
        k: found.meta.get(file, defaults[k]) if k in defaults else found.one(file) for k, file in table.items()
    }
    heads = {"num_key_value_heads": config["num_attention_heads"], "qk_rope_head_dim": rope, "qk_nope_head_dim": key - rope}
    return config | heads | {"v_head_dim": value}


def _write_deepseek(config: dict) -> Written:
    third, rope = config["model_type"] == "deepseek_v3", config["rope_parameters"]
    if rope["rope_type"] == "yarn" and not rope.get("mscale_all_dim"):
        raise ValueError("mixer.position.scaling.mscale_all_dim: None (there yarn needs it, and mscale equal to it)")
    if (config["q_lora_rank"] is None) != (config["num_hidden_layers"] in LITE):
        raise ValueError(f"mixer.q_rank: {config['q_lora_rank']} in {config['num_hidden_layers']} layers (there None in models of 26 or 27, and only there)")
    meta = _write_latent(config, V3 | (GROUPS if third else {}), 1)
    turns, tensors = write_rope(rope, config["qk_rope_head_dim"], config["max_position_embeddings"], ("yarn",))
    return meta | turns | {"expert_gating_func": SIGMOID if third else SOFTMAX}, tensors


def _read_deepseek(found: Found) -> dict:
    config = _read_latent(found, V3)
    rope = read_rope(found.meta, found.tensors, config["qk_rope_head_dim"], config["max_position_embeddings"])
    if rope["rope_type"] == "linear":
        raise ValueError("rope.scaling.type = 'linear' is not supported for deepseek2, whose scores llama.cpp then grows as with yarn")
    if rope["rope_type"] == "yarn" and "mscale" not in rope:
        raise ValueError("yarn without rope.scaling.yarn_log_multiplier is not supported for deepseek2")
    config |= {"rope_theta": rope["rope_theta"], "rope_parameters": rope}
    groups, gating = {key: found.meta.get(file, 1) for key, file in GROUPS.items()}, found.meta.get("expert_gating_func", SOFTMAX)
    if gating not in (SOFTMAX, SIGMOID):
        raise ValueError(f"expert_gating_func = {gating!r} is not supported for deepseek2 ({SOFTMAX}, softmax, and {SIGMOID}, sigmoid, are)")
    if gating == SOFTMAX:
        return config | {"model_type": "deepseek_v2", "topk_method": "greedy" if groups["n_group"] <= 1 else "group_limited_greedy"}
    return config | groups | {"model_type": "deepseek_v3", "rope_interleave": True}


def _write_kimi(config: dict) -> Written:
    kv = [int(kind == "full_attention") for kind in config["layer_types"]]
    if config["linear_num_heads"] != config["num_attention_heads"]:
        raise ValueError(f"mixer.n_heads: {config['linear_num_heads']} in kda, {config['num_attention_heads']} in mla (there one number)")
    meta = _write_latent(config | {"max_position_embeddings": config["model_max_length"]}, KIMI | KIMI_GROUPS, kv)
    recurrent = {"kda.head_dim": config["linear_head_dim"], "ssm.conv_kernel": config["linear_conv_kernel_dim"]}
    return meta | recurrent | {"expert_gating_func": SIGMOID, "expert_weights_norm": True}, {}


def _read_kimi(found: Found) -> dict:
    config, n = _read_latent(found, KIMI), found.need("block_count")
    types = ["full_attention" if kv else "linear_attention" for kv in found.need("attention.head_count_kv")]
    sparse = ["sparse" if i >= config["first_k_dense_replace"] else "dense" for i in range(n)]
    groups = {key: found.meta.get(file, 1) for key, file in KIMI_GROUPS.items()}
    return config | groups | {
        "model_type": "kimi_linear", "layer_types": types, "mlp_layer_types": sparse, "model_max_length": config["max_position_embeddings"],
        "linear_num_heads": config["num_attention_heads"], "linear_head_dim": found.need("kda.head_dim"),
        "linear_conv_kernel_dim": found.need("ssm.conv_kernel"), "moe_router_activation_func": "sigmoid",
        "moe_renormalize": True, "q_lora_rank": None,
    }  # fmt: skip


def _write_mamba(config: dict) -> Written:
    meta = copied(config, BARE | RECURRENT) | {"feed_forward_length": 0, "attention.head_count": 0}
    if config["model_type"] == "mamba2":
        inner = config["num_heads"] * config["head_dim"]
        return meta | {"ssm.inner_size": inner, "ssm.time_step_rank": config["num_heads"], "ssm.group_count": config["n_groups"]}, {}
    _twice(config["expand"])
    inner = config["expand"] * config["hidden_size"]
    return meta | {"ssm.inner_size": inner, "ssm.time_step_rank": config["time_step_rank"], "ssm.dt_b_c_rms": False}, {}


def _twice(expand: int) -> None:
    if expand != 2:
        raise ValueError(f"mixer.expand: {expand} (there 2)")


def _read_mamba(found: Found) -> dict:
    if found.meta.get("ssm.dt_b_c_rms"):
        raise ValueError("ssm.dt_b_c_rms (Falcon-Mamba's norms) is not supported")
    config = copied_back(found, BARE | RECURRENT) | {"use_bias": False, "use_conv_bias": True, "model_type": "mamba"}
    expand = found.need("ssm.inner_size") // config["hidden_size"]
    return config | {"expand": expand, "time_step_rank": found.need("ssm.time_step_rank")}


def _read_mamba2(found: Found) -> dict:
    config, heads = copied_back(found, BARE | RECURRENT), found.need("ssm.time_step_rank")
    return config | {
        "model_type": "mamba2", "use_bias": False, "use_conv_bias": True, "num_heads": heads, "n_groups": found.need("ssm.group_count"),
        "head_dim": found.need("ssm.inner_size") // heads, "expand": found.need("ssm.inner_size") // config["hidden_size"],
    }  # fmt: skip


JAMBA = {"mamba_d_conv": "ssm.conv_kernel", "mamba_d_state": "ssm.state_size", "mamba_dt_rank": "ssm.time_step_rank",
         "num_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}  # fmt: skip


def _write_jamba(config: dict) -> Written:
    _twice(config["mamba_expand"])
    period, offset = config["attn_layer_period"], config["attn_layer_offset"]
    kv = [config["num_key_value_heads"] * (i % period == offset) for i in range(config["num_hidden_layers"])]
    return copied(config, SIZES | JAMBA) | {"ssm.inner_size": 2 * config["hidden_size"], "attention.head_count_kv": kv}, {}


def _read_jamba(found: Found) -> dict:
    kv = found.need("attention.head_count_kv")
    config = copied_back(found, {key: file for key, file in (SIZES | JAMBA).items() if key != "num_key_value_heads"})
    attends = _rhythm([n > 0 for n in kv], "attn_layer")
    routed = found.layer_has("ffn_gate_inp.weight")
    if not any(routed):
        config |= {"num_experts": 1}
    return config | attends | (_rhythm(routed, "expert_layer") if any(routed) else {}) | {
        "model_type": "jamba", "num_key_value_heads": max(kv), "mamba_expand": found.need("ssm.inner_size") // config["hidden_size"],
        "mamba_conv_bias": True, "mamba_proj_bias": False,
    }  # fmt: skip


def _rhythm(flags: list[bool], name: str) -> dict:
    for period in range(1, len(flags) + 1):
        for offset in range(period):
            if flags == [i % period == offset for i in range(len(flags))]:
                return {f"{name}_period": period, f"{name}_offset": offset}
    raise ValueError(f"{name}s do not come at a fixed distance: {flags}")


DELTA = {"linear_conv_kernel_dim": "ssm.conv_kernel", "linear_key_head_dim": "ssm.state_size",
         "linear_num_value_heads": "ssm.time_step_rank", "linear_num_key_heads": "ssm.group_count"}  # fmt: skip


def _write_qwen3next(config: dict) -> Written:
    dim, types = config["linear_value_head_dim"], config["layer_types"]
    every = next((n for n in range(1, len(types) + 1) if types == _types(n, len(types))), None)
    if every is None or dim != config["linear_key_head_dim"]:
        what = "layers.pattern: gated_delta and gqa (there every n-th is gqa)" if every is None else f"mixer.value_dim: {dim} (there head_dim)"
        raise ValueError(what)
    meta, tensors = write_dense(config, rotary_dim=int(config["head_dim"] * config["partial_rotary_factor"]))
    inner = {"ssm.inner_size": dim * config["linear_num_value_heads"], "full_attention_interval": every}
    return meta | copied(config, EXPERTS | SHARED | DELTA) | inner, tensors


def _types(every: int, n: int) -> list[str]:
    return ["linear_attention" if (i + 1) % every else "full_attention" for i in range(n)]


def _read_qwen3next(found: Found) -> dict:
    config = read_dense(found) | copied_back(found, EXPERTS | SHARED | DELTA)
    every = found.meta.get("full_attention_interval", 4)
    return config | {
        "model_type": "qwen3_next", "layer_types": _types(every, config["num_hidden_layers"]), "norm_topk_prob": True,
        "mlp_only_layers": [], "decoder_sparse_step": 1, "linear_value_head_dim": found.need("ssm.inner_size") // config["linear_num_value_heads"],
        "partial_rotary_factor": config["rope_parameters"].get("partial_rotary_factor", 1.0),
    }  # fmt: skip


def _inner_notes(config: dict) -> list[str]:
    eps = config["rms_norm_eps"]
    return [] if eps == INNER else [f"llama.cpp takes eps = {eps:g} also for the norms inside a mixer, this model {INNER:g}: logits differ a little there"]


MORE = (
    Arch("gpt-oss", ("gpt_oss",), layers.gpt_oss, _write_gpt_oss, _read_gpt_oss, "own", _gpt_oss_notes),
    Arch("deepseek2", ("deepseek_v2", "deepseek_v3"), layers.deepseek2, _write_deepseek, _read_deepseek, notes=_inner_notes),
    Arch("mamba", ("mamba",), layers.mamba, _write_mamba, _read_mamba),
    Arch("mamba2", ("mamba2",), layers.mamba, _write_mamba, _read_mamba2),
    Arch("jamba", ("jamba",), layers.jamba, _write_jamba, _read_jamba),
    Arch("qwen3next", ("qwen3_next",), layers.qwen3next, _write_qwen3next, _read_qwen3next, notes=_inner_notes),
    Arch("kimi-linear", ("kimi_linear",), layers.kimi_linear, _write_kimi, _read_kimi, "own", _inner_notes),
)
