"""GPT-2: learned positions, LayerNorm, GELU, biases everywhere, tied; Conv1D matrices lie transposed."""

from __future__ import annotations

from torch import Tensor

from zero2llm.interop.families.decoder import refuse
from zero2llm.interop.families.family import Family
from zero2llm.interop.hf_names import BOTH, Rule, conv1d, same
from zero2llm.layers.ffns.mlp import MLPConfig
from zero2llm.layers.mixers.gqa import GQAConfig
from zero2llm.layers.norms.layer import LayerNormConfig
from zero2llm.layers.positions.learned import LearnedConfig
from zero2llm.model.spec import LayerPattern, LayerSpec, ModelConfig

ACTIVATIONS = {"gelu": "gelu_new", "gelu_erf": "gelu"}  # ours -> theirs: GPT-2's tanh form, nanoGPT's exact one


def write(cfg: ModelConfig) -> dict:
    spec = cfg.specs()[0]
    return {
        "n_embd": cfg.d_model, "n_layer": len(cfg.specs()), "n_head": spec.mixer.n_heads, "n_positions": cfg.max_len,
        "n_ctx": cfg.max_len, "n_inner": spec.ffn.hidden, "activation_function": ACTIVATIONS.get(spec.ffn.act, "gelu_new"),
        "layer_norm_epsilon": spec.norm.eps, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
    }  # fmt: skip


def read(data: dict) -> ModelConfig:
    refuse(data, {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu"), "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,), "tie_word_embeddings": (True,), "add_cross_attention": (False,),
    })  # fmt: skip
    d, norm = data["n_embd"], LayerNormConfig(eps=data.get("layer_norm_epsilon", 1e-5))
    mixer = GQAConfig(n_heads=data["n_head"], qkv_bias=True, out_bias=True)
    act = "gelu_erf" if data.get("activation_function") == "gelu" else "gelu"
    spec = LayerSpec(mixer=mixer, ffn=MLPConfig(hidden=data.get("n_inner") or 4 * d, act=act), norm=norm)
    return ModelConfig(
        vocab_size=data["vocab_size"], d_model=d, max_len=data.get("n_positions", 1024), blocks={"gpt2": spec},
        layers=LayerPattern(pattern=["gpt2"], repeat=data["n_layer"]), position=LearnedConfig(), final_norm=norm, tie_embeddings=True,
    )  # fmt: skip


def rules(cfg: ModelConfig) -> list[Rule]:
    out = same("transformer.wte", "embed") + same("transformer.wpe", "position.table")
    for i in range(len(cfg.specs())):
        ours, theirs = f"blocks.{i}.", f"transformer.h.{i}."
        out += same(theirs + "ln_1", ours + "mixer_norm", BOTH) + same(theirs + "ln_2", ours + "ffn_norm", BOTH)
        out += conv1d(theirs + "attn.c_attn", [f"{ours}mixer.{n}_proj" for n in "qkv"])
        out += conv1d(theirs + "attn.c_proj", [ours + "mixer.o_proj"])
        out += conv1d(theirs + "mlp.c_fc", [ours + "ffn.up_proj"])
        out += conv1d(theirs + "mlp.c_proj", [ours + "ffn.down_proj"])
    return out + same("transformer.ln_f", "final_norm", BOTH)


def clean(tensors: dict[str, Tensor], cfg: ModelConfig) -> dict[str, Tensor]:
    """Files of the bare model lack the prefix."""
    return {f"transformer.{n}": t for n, t in tensors.items()} if "wte.weight" in tensors else tensors


GPT2 = Family("gpt2", "GPT2LMHeadModel", ("gqa",), ("mlp",), ("layer",), write, read, rules, clean, "learned")
