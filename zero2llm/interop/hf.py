"""Hugging Face folders: the same model under transformers' names, or a reason why there is none.

Three families have an exact counterpart: GPT-2, Llama and Qwen3. Which one a configuration is follows from its
structure, not from its name. RoPE in interleaved layout is exported too: permuting the rows of W_q and W_k (and of
the QK-norm) turns it into the half-split layout that transformers computes.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zero2llm.core.files import load_tensors, new_folder, read_json, save_tensors
from zero2llm.interop.hf_config import family_of, from_hf_config, to_hf_config
from zero2llm.model.spec import ModelConfig
from zero2llm.tokenizers.tokenizer import Tokenizer

LAYER_NAMES = {  # ours -> theirs, below model.layers.N of Llama and Qwen3
    "mixer.q_proj": "self_attn.q_proj", "mixer.k_proj": "self_attn.k_proj", "mixer.v_proj": "self_attn.v_proj",
    "mixer.o_proj": "self_attn.o_proj", "mixer.q_norm": "self_attn.q_norm", "mixer.k_norm": "self_attn.k_norm",
    "ffn.gate_proj": "mlp.gate_proj", "ffn.up_proj": "mlp.up_proj", "ffn.down_proj": "mlp.down_proj",
    "mixer_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
GPT2_NAMES = {  # ours -> (theirs, stored transposed: transformers' Conv1D keeps (in, out))
    "mixer.o_proj": ("attn.c_proj", True), "ffn.up_proj": ("mlp.c_fc", True), "ffn.down_proj": ("mlp.c_proj", True),
    "mixer_norm": ("ln_1", False), "ffn_norm": ("ln_2", False),
}  # fmt: skip


def _name_table(cfg: ModelConfig) -> dict[str, tuple[list[str], bool]]:
    """Their tensor name -> (our names, fused along the output rows in this order; transposed)."""
    if family_of(cfg) == "gpt2":
        table: dict[str, tuple[list[str], bool]] = {"transformer.wte.weight": (["embed.weight"], False)}
        table["transformer.wpe.weight"] = (["position.table.weight"], False)
        for n in range(len(cfg.specs())):
            for kind in ("weight", "bias"):
                here, there = f"blocks.{n}.", f"transformer.h.{n}."
                table[f"{there}attn.c_attn.{kind}"] = (
                    [f"{here}mixer.{p}_proj.{kind}" for p in "qkv"],
                    kind == "weight",
                )
                for ours, (theirs, flip) in GPT2_NAMES.items():
                    table[f"{there}{theirs}.{kind}"] = ([f"{here}{ours}.{kind}"], flip and kind == "weight")
        return table | {f"transformer.ln_f.{k}": ([f"final_norm.{k}"], False) for k in ("weight", "bias")}
    table = {
        "model.embed_tokens.weight": (["embed.weight"], False),
        "model.norm.weight": (["final_norm.weight"], False),
    }
    if not cfg.tie_embeddings:
        table["lm_head.weight"] = (["head.weight"], False)
    qk_norm = family_of(cfg) == "qwen3"
    for n in range(len(cfg.specs())):
        for ours, theirs in LAYER_NAMES.items():
            if qk_norm or not ours.endswith(("q_norm", "k_norm")):
                table[f"model.layers.{n}.{theirs}.weight"] = ([f"blocks.{n}.{ours}.weight"], False)
    return table


def _pairs_to_halves(cfg: ModelConfig, name: str, tensor: Tensor, back: bool = False) -> Tensor:
    """Rows of q, k (and their norms) from interleaved to half-split order, head by head."""
    position = cfg.specs()[0].mixer.position
    if (
        position.kind != "rope"
        or position.layout != "interleaved"
        or not any(p in name for p in ("mixer.q_", "mixer.k_"))
    ):
        return tensor
    mixer = cfg.specs()[0].mixer
    width = mixer.head_dim or cfg.d_model // mixer.n_heads
    order = torch.cat((torch.arange(0, width, 2), torch.arange(1, width, 2)))
    order = order.argsort() if back else order
    return tensor.unflatten(0, (-1, width))[:, order].flatten(0, 1).contiguous()


def to_hf_tensors(state: dict[str, Tensor], cfg: ModelConfig) -> dict[str, Tensor]:
    """Our state dict under transformers' names and layouts. A tied head is not stored twice."""
    out = {}
    for theirs, (ours, flip) in _name_table(cfg).items():
        tensor = torch.cat([_pairs_to_halves(cfg, name, state[name]) for name in ours])
        out[theirs] = tensor.t().contiguous() if flip else tensor.contiguous()
    return out


def from_hf_tensors(tensors: dict[str, Tensor], cfg: ModelConfig) -> dict[str, Tensor]:
    """The inverse. Raises ValueError listing tensors that are missing, unexpected or of the wrong shape."""
    table = _name_table(cfg)
    tensors = {name: t for name, t in tensors.items() if not name.endswith((".attn.bias", ".attn.masked_bias"))}
    if cfg.tie_embeddings:
        tensors.pop("lm_head.weight", None)  # a copy of the embedding
    faults = [f"missing {n}" for n in table if n not in tensors] + [
        f"unexpected {n}" for n in tensors if n not in table
    ]
    if faults:
        raise ValueError(
            f"weights do not fit the configuration: {'; '.join(faults[:8])}{' ...' if len(faults) > 8 else ''}"
        )
    state = {}
    for theirs, (ours, flip) in table.items():
        tensor = tensors[theirs].t() if flip else tensors[theirs]
        if tensor.shape[0] % len(ours):
            raise ValueError(f"{theirs} has {tensor.shape[0]} rows, which do not divide into {', '.join(ours)}")
        for name, part in zip(ours, tensor.chunk(len(ours)), strict=True):
            state[name] = _pairs_to_halves(cfg, name, part.contiguous(), back=True)
    return state


def export_hf(
    state: dict[str, Tensor], cfg: ModelConfig, tokenizer_dir: Path, out: Path, *, overwrite: bool = False
) -> None:
    """Write a folder that `AutoModelForCausalLM` and `AutoTokenizer` open without any code of ours.

    Raises ValueError if transformers has no such architecture, or ``out`` is not empty.
    """
    config = to_hf_config(cfg)  # refuses before anything is written
    tokenizer = Tokenizer.load(tokenizer_dir)
    ids = {
        "bos_token_id": tokenizer.eos_id,
        "eos_token_id": sorted(tokenizer.stop_ids),
        "pad_token_id": tokenizer.pad_id,
    }
    with new_folder(out, overwrite) as part:
        save_tensors(to_hf_tensors(state, cfg), part)
        (part / "config.json").write_text(json.dumps(config | ids, indent=2), encoding="utf-8")
        (part / "generation_config.json").write_text(json.dumps(ids | {"do_sample": False}, indent=2), encoding="utf-8")
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copyfile(tokenizer_dir / name, part / name)


def load_hf(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Configuration and weights of a Hugging Face folder, as ours. Raises ValueError for a family that is not supported."""
    cfg = from_hf_config(read_json(Path(folder) / "config.json"))
    return cfg, from_hf_tensors(load_tensors(Path(folder)), cfg)


@torch.no_grad()
def verify_hf(folder: Path, model: torch.nn.Module, tokenizer: Tokenizer, texts: list[str]) -> dict[str, Any]:
    """Open ``folder`` with transformers and compare ids, rendered chat and logits (largest absolute difference)."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ValueError("verifying an export needs transformers: pip install transformers") from error
    from zero2llm.core.seq import Seq

    theirs, their_tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    worst = 0.0
    for text in texts:
        ids = torch.tensor([tokenizer.encode(text)])
        hidden, _ = model(ids, Seq.rows(*ids.shape))
        worst = max(worst, float((model.logits(hidden) - theirs(ids).logits).abs().max()))
    chat = [{"role": "user", "content": texts[0]}]
    return {
        "logits": worst,
        "ids": all(their_tokenizer.encode(t, add_special_tokens=False) == tokenizer.encode(t) for t in texts),
        "chat": their_tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        == tokenizer.render_text(chat, add_generation_prompt=True),
    }
