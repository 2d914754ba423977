"""DeepSeek-V2 and V3: latent attention, a few dense layers first, then many narrow experts and some for all tokens.

V2   softmax over all experts, the chosen weights not renormalised; without groups (V2-Lite)
V3   sigmoid scores, a choice bias, groups of experts
The layers for multi-token prediction of published V3 files are no part of the language model and are passed over.
"""

from __future__ import annotations

import re

from torch import Tensor

from zero2llm.interop.families.decoder import decoder_rules, divides, glu_rules, read_model, refuse, shares
from zero2llm.interop.families.family import Family
from zero2llm.interop.families.moe import expert_rules
from zero2llm.interop.families.rope import read_rope, rope_keys
from zero2llm.interop.hf_names import Rule, same
from zero2llm.layers.ffns.glu import GLUConfig
from zero2llm.layers.ffns.moe import MoEConfig
from zero2llm.layers.mixers.mla import MLAConfig
from zero2llm.layers.norms.rms import RMSNormConfig
from zero2llm.model.spec import LayerSpec, ModelConfig


def _write(cfg: ModelConfig) -> dict:
    """What V2 and V3 share."""
    specs, mixer = cfg.specs(), cfg.specs()[0].mixer
    dense = next((i for i, s in enumerate(specs) if not isinstance(s.ffn, GLUConfig)), len(specs))
    if dense == len(specs):
        raise ValueError("ffn: glu in every layer (moe is needed in the last)")
    moe = specs[dense].ffn
    return rope_keys(mixer.position) | {
        "hidden_size": cfg.d_model, "num_hidden_layers": len(specs), "num_attention_heads": mixer.n_heads,
        "num_key_value_heads": mixer.n_heads, "q_lora_rank": mixer.q_rank, "kv_lora_rank": mixer.kv_rank,
        "qk_nope_head_dim": mixer.nope_dim, "qk_rope_head_dim": mixer.rope_dim, "v_head_dim": mixer.v_dim,
        "intermediate_size": specs[0].ffn.hidden if dense else moe.hidden, "first_k_dense_replace": dense,
        "moe_intermediate_size": moe.hidden, "n_routed_experts": moe.n_experts, "num_experts_per_tok": moe.top_k,
        "n_shared_experts": shares(moe), "routed_scaling_factor": moe.routed_scaling,
        "norm_topk_prob": moe.renormalise, "hidden_act": "silu", "rms_norm_eps": specs[0].norm.eps,
        "max_position_embeddings": cfg.max_len, "attention_bias": False, "attention_dropout": 0.0,
    }  # fmt: skip


def _read(data: dict, layout: str, length: int, **moe) -> ModelConfig:
    refuse(data, {"attention_bias": (False,), "mlp_bias": (False,), "hidden_act": ("silu",), "moe_layer_freq": (1,)})
    norm, position = RMSNormConfig(eps=data.get("rms_norm_eps", 1e-6)), read_rope(data)
    mixer = MLAConfig(
        n_heads=data["num_attention_heads"], kv_rank=data["kv_lora_rank"], q_rank=data.get("q_lora_rank"),
        nope_dim=data["qk_nope_head_dim"], rope_dim=data["qk_rope_head_dim"], v_dim=data["v_head_dim"],
        position=type(position)(base=position.base, scaling=position.scaling, layout=layout),
    )  # fmt: skip
    experts = MoEConfig(
        n_experts=data["n_routed_experts"], top_k=data["num_experts_per_tok"], hidden=data["moe_intermediate_size"],
        n_shared=data["n_shared_experts"], routed_scaling=float(data.get("routed_scaling_factor", 1.0)), **moe,
    )  # fmt: skip
    ffn = lambda i: GLUConfig(hidden=data["intermediate_size"]) if i < data.get("first_k_dense_replace", 0) else experts
    specs = [LayerSpec(mixer=mixer, ffn=ffn(i), norm=norm) for i in range(data["num_hidden_layers"])]
    return read_model(data, specs, length=length)


def write_v2(cfg: ModelConfig) -> dict:
    divides(cfg)
    return _write(cfg) | {"topk_method": "greedy", "n_group": 1, "topk_group": 1, "mlp_bias": False}


def read_v2(data: dict) -> ModelConfig:
    refuse(data, {"topk_method": (None, "greedy"), "norm_topk_prob": (False,), "scoring_func": (None, "softmax")})
    return _read(data, "interleaved", 2048, renormalise=False)


def write_v3(cfg: ModelConfig) -> dict:
    moe = cfg.specs()[-1].ffn
    layout = getattr(cfg.specs()[0].mixer.position, "layout", "interleaved")
    groups = {"n_group": moe.n_groups, "topk_group": moe.top_groups} if isinstance(moe, MoEConfig) else {}
    method = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "rope_interleave": layout == "interleaved"}
    return _write(cfg) | groups | method | {"num_nextn_predict_layers": 0}


def read_v3(data: dict) -> ModelConfig:
    refuse(data, {"topk_method": (None, "noaux_tc"), "scoring_func": (None, "sigmoid")})
    layout = "interleaved" if data.get("rope_interleave", True) else "half_split"
    groups = {"n_groups": data.get("n_group", 8), "top_groups": data.get("topk_group", 4)}
    renormalise = data.get("norm_topk_prob", True)
    return _read(data, layout, 4096, router="sigmoid", bias_rate=0.001, renormalise=renormalise, **groups)


NAMES = {"q_proj": "q_proj", "q_a_proj": "q_a_proj", "q_a_layernorm": "q_a_norm", "q_b_proj": "q_b_proj",
         "kv_a_proj_with_mqa": "kv_a_proj", "kv_a_layernorm": "kv_a_norm", "kv_b_proj": "kv_b_proj", "o_proj": "o_proj"}  # fmt: skip


def attention(cfg: ModelConfig, mixer: MLAConfig, theirs: str, ours: str) -> list[Rule]:
    absent = ("q_a_proj", "q_a_layernorm", "q_b_proj") if mixer.q_rank is None else ("q_proj",)
    named = [(t, o) for t, o in NAMES.items() if t not in absent]
    return [rule for t, o in named for rule in same(f"{theirs}self_attn.{t}", ours + o)]


def ffn(config: MoEConfig | GLUConfig, theirs: str, ours: str) -> list[Rule]:
    if isinstance(config, GLUConfig):
        return glu_rules(config, theirs, ours)
    rules = same(theirs + "gate", ours + "router") + expert_rules(config, theirs, ours)
    if config.bias_rate is not None:
        rules.append(Rule((theirs + "gate.e_score_correction_bias",), (ours + "router_bias",)))
    return rules + glu_rules(config, theirs + "shared_experts.", ours + "shared.")


def rules(cfg: ModelConfig) -> list[Rule]:
    return decoder_rules(cfg, attention=attention, ffn=ffn)


def clean(tensors: dict[str, Tensor], cfg: ModelConfig) -> dict[str, Tensor]:
    """Without the layers behind the last."""
    spare = re.compile(r"model\.layers\.(\d+)\.")
    number = {name: int(found[1]) for name in tensors if (found := spare.match(name))}
    return {name: t for name, t in tensors.items() if number.get(name, 0) < len(cfg.specs())}


PARTS = ("mla",), ("moe", "glu"), ("rms",)
DEEPSEEK_V2 = Family("deepseek_v2", "DeepseekV2ForCausalLM", *PARTS, write_v2, read_v2, rules)
DEEPSEEK_V3 = Family("deepseek_v3", "DeepseekV3ForCausalLM", *PARTS, write_v3, read_v3, rules, clean)
