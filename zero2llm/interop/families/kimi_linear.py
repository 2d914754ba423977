"""Kimi Linear: three layers of Kimi Delta Attention to one of latent attention that turns nothing; DeepSeek-V3's experts."""

from __future__ import annotations

from torch import Tensor

from zero2llm.interop.families.decoder import decoder_rules, first, glu_rules, read_model, refuse, shares
from zero2llm.interop.families.deepseek import attention as latent_rules
from zero2llm.interop.families.family import Family
from zero2llm.interop.families.moe import expert_rules
from zero2llm.interop.hf_names import Rule, filters, same
from zero2llm.layers.ffns.glu import GLUConfig
from zero2llm.layers.ffns.moe import MoEConfig
from zero2llm.layers.mixers.kda import KDAConfig
from zero2llm.layers.mixers.mla import MLAConfig
from zero2llm.layers.norms.rms import RMSNormConfig
from zero2llm.layers.positions.none import NoPositionConfig
from zero2llm.model.spec import LayerSpec, ModelConfig


def write(cfg: ModelConfig) -> dict:
    """Both the keys of transformers and, where they differ (linear_attn_config), those of the published file."""
    mla, kda, moe = first(cfg, MLAConfig).mixer, first(cfg, KDAConfig).mixer, first(cfg, MoEConfig).ffn
    specs = cfg.specs()
    (k, _), linear = kda.widths(cfg.d_model), [isinstance(s.mixer, KDAConfig) for s in specs]
    dense = next((s.ffn.hidden for s in specs if isinstance(s.ffn, GLUConfig)), moe.hidden)
    sparse = [isinstance(s.ffn, MoEConfig) for s in specs]
    published = {
        "head_dim": k, "num_heads": kda.n_heads, "short_conv_kernel_size": kda.conv_width,
        "full_attn_layers": [i + 1 for i, flag in enumerate(linear) if not flag],
        "kda_layers": [i + 1 for i, flag in enumerate(linear) if flag],
    }  # fmt: skip
    return {
        "hidden_size": cfg.d_model, "num_hidden_layers": len(specs), "num_attention_heads": mla.n_heads,
        "num_key_value_heads": mla.n_heads, "q_lora_rank": mla.q_rank, "kv_lora_rank": mla.kv_rank,
        "qk_nope_head_dim": mla.nope_dim, "qk_rope_head_dim": mla.rope_dim, "v_head_dim": mla.v_dim,
        "intermediate_size": dense, "moe_intermediate_size": moe.hidden, "num_experts": moe.n_experts,
        "num_experts_per_token": moe.top_k, "num_shared_experts": shares(moe),
        "moe_renormalize": moe.renormalise, "routed_scaling_factor": moe.routed_scaling, "num_expert_group": moe.n_groups,
        "topk_group": moe.top_groups, "rms_norm_eps": specs[0].norm.eps, "hidden_act": "silu", "attention_bias": False,
        "model_max_length": cfg.max_len, "linear_head_dim": k, "linear_num_heads": kda.n_heads,
        "linear_conv_kernel_dim": kda.conv_width, "linear_attn_config": published, "first_k_dense_replace": sparse.index(True),
        "layer_types": ["linear_attention" if flag else "full_attention" for flag in linear],
        "mlp_layer_types": ["sparse" if flag else "dense" for flag in sparse],
    }  # fmt: skip


def read(data: dict) -> ModelConfig:
    refuse(data, {"attention_bias": (False,), "hidden_act": ("silu",), "mla_use_nope": (True,),
                  "moe_router_activation_func": ("sigmoid",), "moe_layer_freq": (1,)})  # fmt: skip
    n, linear = data["num_hidden_layers"], data.get("linear_attn_config") or {}
    full = [i - 1 for i in linear["full_attn_layers"]] if linear else list(range(4, n, 4))
    types = data.get("layer_types") or ["full_attention" if i in full else "linear_attention" for i in range(n)]
    dense = data.get("first_k_dense_replace", 1)
    kinds = data.get("mlp_layer_types") or ["dense" if i < dense else "sparse" for i in range(n)]
    norm = RMSNormConfig(eps=data.get("rms_norm_eps", 1e-5))
    kda = KDAConfig(
        n_heads=linear.get("num_heads", data.get("linear_num_heads", 32)), norm_eps=norm.eps,
        head_dim=linear.get("head_dim", data.get("linear_head_dim", 128)),
        conv_width=linear.get("short_conv_kernel_size", data.get("linear_conv_kernel_dim", 4)),
    )  # fmt: skip
    mla = MLAConfig(
        n_heads=data["num_attention_heads"], kv_rank=data["kv_lora_rank"], q_rank=data.get("q_lora_rank"),
        nope_dim=data["qk_nope_head_dim"], rope_dim=data["qk_rope_head_dim"], v_dim=data["v_head_dim"],
        position=NoPositionConfig(),
    )  # fmt: skip
    moe = MoEConfig(
        n_experts=data["num_experts"], top_k=data["num_experts_per_token"], hidden=data["moe_intermediate_size"],
        router="sigmoid", bias_rate=0.001, renormalise=data.get("moe_renormalize", True),
        routed_scaling=data.get("routed_scaling_factor", 2.446), n_shared=data.get("num_shared_experts", 1),
        n_groups=data.get("num_expert_group", 1), top_groups=data.get("topk_group", 1),
    )  # fmt: skip
    glu = GLUConfig(hidden=data["intermediate_size"])
    specs = [
        LayerSpec(mixer=mla if t == "full_attention" else kda, ffn=moe if kind == "sparse" else glu, norm=norm)
        for t, kind in zip(types, kinds, strict=True)
    ]
    return read_model(data, specs, max_len=data.get("model_max_length", 1_048_576))


def attention(cfg: ModelConfig, mixer: MLAConfig | KDAConfig, theirs: str, ours: str) -> list[Rule]:
    if isinstance(mixer, MLAConfig):
        return latent_rules(cfg, mixer, theirs, ours)
    theirs += "self_attn."
    rules = [filters(f"{theirs}{n}_conv1d.weight", f"{ours}{n}_conv") for n in "qkv"]
    rules.append(Rule((theirs + "dt_bias",), (ours + "dt_bias",)))
    rules.append(Rule(
        (theirs + "A_log",), (ours + "A_log",), lambda parts: [parts[0].view(1, 1, -1, 1)],
        lambda parts: [parts[0].flatten()],
    ))  # fmt: skip
    for n in ("q", "k", "v", "f_a", "f_b", "g_a", "g_b", "b", "o"):
        rules += same(f"{theirs}{n}_proj", f"{ours}{n}_proj")
    return rules + same(theirs + "o_norm", ours + "norm")


def ffn(config: MoEConfig | GLUConfig, theirs: str, ours: str) -> list[Rule]:
    if isinstance(config, GLUConfig):
        return glu_rules(config, theirs, ours)
    theirs = theirs.removesuffix("mlp.") + "block_sparse_moe."
    rules = same(theirs + "gate", ours + "router") + expert_rules(config, theirs, ours, ("w1", "w3", "w2"))
    rules.append(Rule((theirs + "gate.e_score_correction_bias",), (ours + "router_bias",)))
    return rules + glu_rules(config, theirs + "shared_experts.", ours + "shared.")


def rules(cfg: ModelConfig) -> list[Rule]:
    return decoder_rules(cfg, attention=attention, ffn=ffn)


def clean(tensors: dict[str, Tensor], cfg: ModelConfig) -> dict[str, Tensor]:
    """transformers writes dense layers under block_sparse_moe, the published file under mlp."""
    dense = tuple(f"block_sparse_moe.{n}_proj.weight" for n in ("gate", "up", "down"))
    return {n.replace("block_sparse_moe.", "mlp.") if n.endswith(dense) else n: t for n, t in tensors.items()}


PARTS = ("kda", "mla"), ("moe", "glu"), ("rms",)
KIMI_LINEAR = Family("kimi_linear", "KimiLinearForCausalLM", *PARTS, write, read, rules, clean)
