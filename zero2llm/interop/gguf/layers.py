"""The tensors of each GGUF architecture, layer by layer, as rules from transformers' names (names.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from zero2llm.interop.families.gpt_oss import interleave, separate, turned
from zero2llm.interop.gguf.names import (
    ATTENTION,
    CONV1D,
    DECAY,
    FILTERS,
    FLAT,
    GLU,
    MLP,
    OUTER,
    PLUS_ONE,
    PRE_NORMS,
    Turn,
    experts,
    latent,
    pairs,
    renamed,
    turned_by,
)
from zero2llm.interop.hf_names import Rule

W_NAMES = ("w1", "w3", "w2")
SANDWICH = {"input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm",
            "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm"}  # fmt: skip
OLMO_NORMS = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}
LATENT = {f"self_attn.{theirs}": file for theirs, file in {
    "q_proj": "attn_q", "q_a_proj": "attn_q_a", "q_a_layernorm": "attn_q_a_norm", "q_b_proj": "attn_q_b",
    "kv_a_proj_with_mqa": "attn_kv_a_mqa", "kv_a_layernorm": "attn_kv_a_norm", "o_proj": "attn_output",
}.items()}  # fmt: skip
SHARED = ("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp")


def _every(config: dict, layer) -> list[Rule]:
    """``layer(file's prefix, transformers' prefix)`` for all layers."""
    return [rule for i in range(config["num_hidden_layers"]) for rule in layer(f"blk.{i}.", f"model.layers.{i}.")]


def _shared(file: str, theirs: str) -> list[Rule]:
    return renamed(file, theirs, dict(zip(GLU, SHARED, strict=True)))


def llama(config: dict) -> list[Rule]:
    """Llama, Mistral, SmolLM3; Mixtral where there are experts."""
    turn = pairs(config["head_dim"])
    table = ATTENTION | MLP | PRE_NORMS | {"block_sparse_moe.gate": "ffn_gate_inp"}

    def layer(file: str, theirs: str) -> list[Rule]:
        rules = renamed(file, theirs, table, {"attn_q": turn, "attn_k": turn})
        return rules + experts(file, theirs + "block_sparse_moe.", config.get("num_local_experts", 0), W_NAMES)

    return renamed("", "", OUTER) + _every(config, layer)


def plain(config: dict) -> list[Rule]:
    """Architectures that turn halves: names alone."""
    return renamed("", "", OUTER) + _every(config, lambda f, t: renamed(f, t, ATTENTION | MLP | PRE_NORMS))


def olmo2(config: dict) -> list[Rule]:
    return renamed("", "", OUTER) + _every(config, lambda f, t: renamed(f, t, ATTENTION | MLP | OLMO_NORMS))


def qwen_moe(config: dict) -> list[Rule]:
    def layer(file: str, theirs: str) -> list[Rule]:
        rules = renamed(file, theirs, ATTENTION | MLP | PRE_NORMS | {"mlp.gate": "ffn_gate_inp"})
        return rules + experts(file, theirs + "mlp.", config["num_experts"]) + _gated_shared(file, theirs)

    return renamed("", "", OUTER) + _every(config, layer)


def _gated_shared(file: str, theirs: str) -> list[Rule]:
    gate = turned_by(FLAT, file + "ffn_gate_inp_shexp.weight", theirs + "mlp.shared_expert_gate.weight")
    return [gate, *_shared(file, theirs + "mlp.shared_expert.")]


def _plus_one(table: dict[str, str]) -> dict[str, Turn]:
    return {file: PLUS_ONE for file in table.values() if file.endswith("norm")}


def _gemma(config: dict, norms: dict[str, str]) -> list[Rule]:
    table = ATTENTION | MLP | norms
    layers = _every(config, lambda f, t: renamed(f, t, table, _plus_one(table)))
    return renamed("", "", OUTER, _plus_one(OUTER)) + layers


def gemma(config: dict) -> list[Rule]:
    return _gemma(config, PRE_NORMS)


def gemma2(config: dict) -> list[Rule]:
    """And Gemma 3."""
    return _gemma(config, SANDWICH)


def phi3(config: dict) -> list[Rule]:
    """q, k, v and gate, up lie joined on both sides, in the same order."""
    table = {"self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output", "mlp.gate_up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down"}  # fmt: skip
    return renamed("", "", OUTER) + _every(config, lambda f, t: renamed(f, t, table | PRE_NORMS))


def gpt2(config: dict) -> list[Rule]:
    matrices = {"attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
    table = matrices | {"ln_1": "attn_norm", "ln_2": "ffn_norm"}
    outer = {"transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm", "lm_head": "output"}
    turns = dict.fromkeys(matrices.values(), CONV1D)
    rules = renamed("", "", outer)
    return rules + [r for i in range(config["n_layer"]) for r in renamed(f"blk.{i}.", f"transformer.h.{i}.", table, turns)]


def gpt_oss(config: dict) -> list[Rule]:
    """Experts lie (E, in, out), the columns of gate and up alternating; the file holds three tensors (E, out, in)."""
    table = ATTENTION | {"input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm", "mlp.router": "ffn_gate_inp"}

    def layer(file: str, theirs: str) -> list[Rule]:
        rules = renamed(file, theirs, table) + [Rule((file + "attn_sinks.weight",), (theirs + "self_attn.sinks",))]
        for end, name in ((".weight", ""), (".bias", "_bias")):
            pair = (f"{file}ffn_gate_exps{end}", f"{file}ffn_up_exps{end}")
            rules.append(Rule(pair, (f"{theirs}mlp.experts.gate_up_proj{name}",), separate, interleave))
        down = theirs + "mlp.experts.down_proj"
        rules.append(Rule((file + "ffn_down_exps.weight",), (down,), turned, turned))
        return [*rules, Rule((file + "ffn_down_exps.bias",), (down + "_bias",))]

    return renamed("", "", OUTER) + _every(config, layer)


def _sparse_latent(config: dict, file: str, theirs: str, count: int, names: tuple[str, ...]) -> list[Rule]:
    """Router with its bias, experts, those for all tokens."""
    rules = renamed(file, theirs, {"gate": "ffn_gate_inp"}) + experts(file, theirs, count, names)
    rules.append(Rule((file + "exp_probs_b.bias",), (theirs + "gate.e_score_correction_bias",)))
    return rules + _shared(file, theirs + "shared_experts.")


def deepseek2(config: dict) -> list[Rule]:
    def layer(file: str, theirs: str) -> list[Rule]:
        rules = renamed(file, theirs, LATENT | MLP | PRE_NORMS)
        rules += latent(file, theirs, config["num_attention_heads"], config["qk_nope_head_dim"])
        return rules + _sparse_latent(config, file, theirs + "mlp.", config["n_routed_experts"], GLU)

    return renamed("", "", OUTER) + _every(config, layer)


FIRST = {"in_proj": "ssm_in", "x_proj": "ssm_x", "dt_proj": "ssm_dt", "out_proj": "ssm_out"}
SECOND = {"in_proj": "ssm_in", "out_proj": "ssm_out"}


def _conv(file: str, theirs: str) -> list[Rule]:
    bias = Rule((file + "ssm_conv1d.bias",), (theirs + "conv1d.bias",))
    return [turned_by(FILTERS, file + "ssm_conv1d.weight", theirs + "conv1d.weight"), bias]


def mamba(config: dict) -> list[Rule]:
    """Mamba and Mamba-2, which has one A and D for a head and its norm in groups."""
    rules = renamed("", "", {"backbone.embeddings": "token_embd", "backbone.norm_f": "output_norm", "lm_head": "output"})
    second = config["model_type"] == "mamba2"
    column = Turn(lambda w: w.unsqueeze(-1), lambda w: w.squeeze(-1))
    decay = Turn(lambda a: DECAY.pack(column.pack(a)), lambda a: DECAY.unpack(column.unpack(a))) if second else DECAY
    for i in range(config["num_hidden_layers"]):
        file, theirs = f"blk.{i}.", f"backbone.layers.{i}."
        inner = theirs + "mixer."
        rules += renamed(file, theirs, {"norm": "attn_norm"}) + renamed(file, inner, SECOND if second else FIRST) + _conv(file, inner)
        rules.append(turned_by(decay, file + "ssm_a", inner + "A_log"))
        rules.append(turned_by(column, file + "ssm_d", inner + "D") if second else Rule((file + "ssm_d",), (inner + "D",)))
        if second:
            groups = config["n_groups"]
            grouped = Turn(lambda w, groups=groups: w.reshape(groups, -1), lambda w: w.flatten())
            rules.append(turned_by(grouped, file + "ssm_norm.weight", inner + "norm.weight"))
            rules.append(Rule((file + "ssm_dt.bias",), (inner + "dt_bias",)))
    return rules


def jamba(config: dict) -> list[Rule]:
    table = ATTENTION | {"input_layernorm": "attn_norm", "pre_ff_layernorm": "ffn_norm", "feed_forward.router": "ffn_gate_inp"}
    table |= {name.replace("mlp", "feed_forward"): file for name, file in MLP.items()}
    table |= {f"mamba.{n}_layernorm": f"ssm_{n}_norm" for n in ("dt", "b", "c")}

    def layer(file: str, theirs: str) -> list[Rule]:
        inner = theirs + "mamba."
        rules = [turned_by(DECAY, file + "ssm_a", inner + "A_log"), Rule((file + "ssm_d",), (inner + "D",))]
        rules += renamed(file, theirs, table) + renamed(file, inner, FIRST) + _conv(file, inner)
        return rules + experts(file, theirs + "feed_forward.", config["num_experts"])

    outer = {"model.embed_tokens": "token_embd", "model.final_layernorm": "output_norm", "lm_head": "output"}
    return renamed("", "", outer) + _every(config, layer)


def qwen3next(config: dict) -> list[Rule]:
    """q, k, v, z of a key head and its value heads lie together; the file holds all q, k, v in one tensor, all z in another."""
    heads, k = config["linear_num_key_heads"], config["linear_key_head_dim"]
    v = config["linear_num_value_heads"] // heads * config["linear_value_head_dim"]
    norms = {"input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm"}
    table = ATTENTION | norms | {"mlp.gate": "ffn_gate_inp"}

    def pack(parts: list[Tensor]) -> list[Tensor]:
        q, keys, values, z = (p.flatten(0, 1) for p in parts[0].unflatten(0, (heads, -1)).split([k, k, v, v], 1))
        return [torch.cat((q, keys, values)), z.contiguous()]

    def unpack(parts: list[Tensor]) -> list[Tensor]:
        three = parts[0].split([heads * k, heads * k, heads * v])
        return [torch.cat([p.unflatten(0, (heads, -1)) for p in (*three, parts[1])], 1).flatten(0, 1)]

    def layer(file: str, theirs: str) -> list[Rule]:
        inner = theirs + "linear_attn."
        rules = renamed(file, theirs, table, _plus_one(table)) + _gated_shared(file, theirs)
        rules += [turned_by(DECAY, file + "ssm_a", inner + "A_log"), Rule((file + "ssm_dt.bias",), (inner + "dt_bias",))]
        rules += _conv(file, inner) + renamed(file, inner, {"in_proj_ba": "ssm_ba", "norm": "ssm_norm", "out_proj": "ssm_out"})
        whole = (inner + "in_proj_qkvz.weight",)
        rules += [Rule((file + "attn_qkv.weight", file + "attn_gate.weight"), whole, pack, unpack), Rule((file + "ssm_in.weight",), whole)]
        return rules + experts(file, theirs + "mlp.", config["num_experts"])

    return renamed("", "", OUTER, _plus_one(OUTER)) + _every(config, layer)


def kimi_linear(config: dict) -> list[Rule]:
    table = ATTENTION | LATENT | MLP | PRE_NORMS | {"self_attn.b_proj": "ssm_beta", "self_attn.o_norm": "ssm_norm"}
    table |= {f"self_attn.{n}_proj": f"ssm_{n}" for n in ("f_a", "f_b", "g_a", "g_b")}
    filters = Turn(lambda w: w.reshape(1, w.shape[0], 1, -1), FILTERS.unpack)
    decay = Turn(lambda a: DECAY.pack(a), lambda a: DECAY.unpack(a).reshape(1, 1, -1, 1))

    def layer(file: str, theirs: str) -> list[Rule]:
        inner = theirs + "self_attn."
        rules = renamed(file, theirs, table) + latent(file, theirs, config["num_attention_heads"], config["qk_nope_head_dim"])
        rules += [turned_by(filters, f"{file}ssm_conv1d_{n}.weight", f"{inner}{n}_conv1d.weight") for n in "qkv"]
        rules += [turned_by(decay, file + "ssm_a", inner + "A_log"), Rule((file + "ssm_dt.bias",), (inner + "dt_bias",))]
        return rules + _sparse_latent(config, file, theirs + "block_sparse_moe.", config["num_experts"], W_NAMES)

    return renamed("", "", OUTER) + _every(config, layer)
