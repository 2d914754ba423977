"""Architectures of GGUF with ordinary attention in every layer; see arches.py.

What llama.cpp's code fixes without a key (a scale, whether weights of experts are renormalised, which layers turn) is a
constant here; a model for which it is otherwise cannot be written, since config.json -> metadata -> config.json differs.
"""

from __future__ import annotations

from torch import Tensor

from zero2llm.interop.families.rope import LENGTH
from zero2llm.interop.gguf import layers
from zero2llm.interop.gguf.config import (
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

Written = tuple[Meta, dict[str, Tensor]]
EXPERTS = {"num_experts": "expert_count", "num_experts_per_tok": "expert_used_count", "moe_intermediate_size": "expert_feed_forward_length"}
MIXTRAL = {"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}
SHARED = {"shared_expert_intermediate_size": "expert_shared_feed_forward_length"}


def _write_llama(config: dict) -> Written:
    meta, tensors = write_dense(config, ("linear", "yarn", "llama3", "longrope"))
    return meta | (copied(config, MIXTRAL) if config["model_type"] == "mixtral" else {}), tensors


def _read_llama(found: Found) -> dict:
    config = read_dense(found)
    if found.meta.get("expert_count", 0):
        return config | copied_back(found, MIXTRAL) | {"model_type": "mixtral", "sliding_window": None}
    if config["hidden_size"] % config["num_attention_heads"]:  # which transformers' Llama insists on
        return config | {"model_type": "mistral", "sliding_window": None}
    return config | {"model_type": "llama", "attention_bias": "blk.0.attn_q.bias" in found.tensors}


def _read_smollm3(found: Found) -> dict:
    config = read_dense(found)
    turning = [int((i + 1) % 4 != 0) for i in range(config["num_hidden_layers"])]
    return config | {"model_type": "smollm3", "attention_bias": False, "no_rope_layers": turning}


def _named(model_type: str, **fixed):
    """Reads a dense model to which the architecture alone adds ``fixed``."""
    return lambda found: read_dense(found) | {"model_type": model_type, **fixed}


def _write_moe(config: dict) -> Written:
    meta, tensors = write_dense(config)
    shared = copied(config, SHARED) if config["model_type"] == "qwen2_moe" else {}
    return meta | copied(config, EXPERTS) | shared, tensors


def _read_moe(found: Found) -> dict:
    return read_dense(found) | copied_back(found, EXPERTS) | {"mlp_only_layers": [], "decoder_sparse_step": 1}


def _read_qwen2_moe(found: Found) -> dict:
    more = {"model_type": "qwen2_moe", "norm_topk_prob": False, "qkv_bias": "blk.0.attn_q.bias" in found.tensors}
    return _read_moe(found) | copied_back(found, SHARED) | more


def _read_qwen3_moe(found: Found) -> dict:
    return _read_moe(found) | {"model_type": "qwen3_moe", "norm_topk_prob": True, "attention_bias": False}


def _scalar(found: Found, large: int) -> float:
    """query_pre_attn_scalar: the width of a head, but in the model of 27 B, which is known by its ``large`` layers."""
    heads, dim = found.need("attention.head_count"), found.need("attention.key_length")
    return found.need("embedding_length") // heads if found.need("block_count") == large else dim


def _write_gemma2(config: dict) -> Written:
    meta, tensors = write_dense(config)
    caps = {"attn_logit_softcapping": config["attn_logit_softcapping"], "final_logit_softcapping": config["final_logit_softcapping"]}
    if None in caps.values():
        raise ValueError("mixer.softcap, logit_softcap: None (there both are needed)")
    return meta | caps | write_windows(config, 2), tensors


def _read_gemma2(found: Found) -> dict:
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    return read_dense(found) | {key: found.meta.get(key, usual) for key, usual in caps.items()} | {
        "model_type": "gemma2", "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": _scalar(found, 46),
    } | read_windows(found, 2, 4096)  # fmt: skip


def _write_gemma3(config: dict) -> Written:
    rope, windows = config["rope_parameters"], write_windows(config, 6)
    local = rope["sliding_attention"]
    if local["rope_type"] != "default":
        raise ValueError(f"mixer.position.scaling: {local['rope_type']} with a window (no counterpart there)")
    meta, tensors = write_dense(config, ("linear",), rope=rope["full_attention"])
    return meta | {"rope.freq_base_swa": float(local["rope_theta"])} | windows, tensors


def _read_gemma3(found: Found) -> dict:
    config = read_dense(found, rope_type="full_attention")
    if "rope.freq_base" not in found.meta:
        config["rope_theta"] = config["rope_parameters"]["full_attention"]["rope_theta"] = 1e6
    local = found.meta.get("rope.freq_base_swa", 10_000.0)
    config["rope_parameters"]["sliding_attention"] = {"rope_type": "default", "rope_theta": local}
    return config | {
        "model_type": "gemma3_text", "hidden_activation": "gelu_pytorch_tanh", "rope_local_base_freq": local,
        "query_pre_attn_scalar": _scalar(found, 62), "attn_logit_softcapping": None, "final_logit_softcapping": None,
    } | read_windows(found, 6, 1024)  # fmt: skip


def _write_phi3(config: dict) -> Written:
    turned = int(config["head_dim"] * config.get("partial_rotary_factor", 1.0))
    meta, tensors = write_dense(config, ("longrope",), turned)
    return meta | {"rope.scaling.original_context_length": config[LENGTH], "attention.sliding_window": config["sliding_window"] or 0}, tensors


def _read_phi3(found: Found) -> dict:
    config = read_dense(found)
    length = found.meta.get("rope.scaling.original_context_length", config["max_position_embeddings"])
    window = found.meta.get("attention.sliding_window", 0) or None
    return config | {"model_type": "phi3", "sliding_window": window, LENGTH: length}


def _phi3_notes(config: dict) -> list[str]:
    window, longest = config["sliding_window"], config["max_position_embeddings"]
    return [f"llama.cpp passes over the window of {window} tokens of phi3: longer texts differ there"] if window and window < longest else []


GPT2_SIZES = {"n_positions": "context_length", "n_embd": "embedding_length", "n_layer": "block_count", "n_inner": "feed_forward_length",
              "n_head": "attention.head_count", "layer_norm_epsilon": "attention.layer_norm_epsilon"}  # fmt: skip


def _read_gpt2(found: Found) -> dict:
    return copied_back(found, GPT2_SIZES) | {"model_type": "gpt2", "activation_function": "gelu_new"}


DENSE = (
    Arch("llama", ("llama", "mistral", "mixtral"), layers.llama, _write_llama, _read_llama),
    Arch("qwen2", ("qwen2",), layers.plain, write_dense, _named("qwen2")),
    Arch("qwen2moe", ("qwen2_moe",), layers.qwen_moe, _write_moe, _read_qwen2_moe, "own"),
    Arch("qwen3", ("qwen3",), layers.plain, write_dense, _named("qwen3", attention_bias=False)),
    Arch("qwen3moe", ("qwen3_moe",), layers.qwen_moe, _write_moe, _read_qwen3_moe),
    Arch("smollm3", ("smollm3",), layers.llama, write_dense, _read_smollm3),
    Arch("olmo2", ("olmo2",), layers.olmo2, write_dense, _named("olmo2", attention_bias=False), "own"),
    Arch("gemma", ("gemma",), layers.gemma, write_dense, _named("gemma", hidden_act="gelu_pytorch_tanh"), "tied"),
    Arch("gemma2", ("gemma2",), layers.gemma2, _write_gemma2, _read_gemma2, "tied"),
    Arch("gemma3", ("gemma3_text",), layers.gemma2, _write_gemma3, _read_gemma3),
    Arch("phi3", ("phi3",), layers.phi3, _write_phi3, _read_phi3, notes=_phi3_notes),
    Arch("gpt2", ("gpt2",), layers.gpt2, lambda config: (copied(config, GPT2_SIZES), {}), _read_gpt2, "tied"),
)
