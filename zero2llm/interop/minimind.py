"""minimind's .pth files: a bare state dict, in fp16, of one of four generations, which its names and shapes tell apart.

    v1      2024          tok_embeddings, layers.N.attention.wq ...; q has 2 x k's rows     heads 16/8, theta 1e4, max_len 512
    v2 old  2025-02       the same names; q has 4 x k's rows                                heads 8/2, theta 1e6, max_len 8192
    v2      2025-04       model.layers.N.self_attn.q_proj ...; no q_norm                    heads 8/2, theta 1e6, max_len 32768
    v3      2026-03       the same names and q_norm, k_norm                                 heads from q_norm, theta 1e6, eps 1e-6

v1 and v2 are Llama (eps 1e-5), v3 is Qwen3. With Meta's names rotary pairs are interleaved: the rows of q and k are
reordered, (2m, 2m + 1) -> (m, m + K/2). Experts: softmax, the weights of the chosen sum to 1. v3's are Qwen3-MoE's (one a
token), those of v1 and v2 (two a token) and of all tokens become Qwen2-MoE's: minimind_experts.py.

Source: github.com/jingyaogong/minimind, model/LMConfig.py, model/model.py and model/model_minimind.py at each date; RoPE
2104.09864. The file holds no configuration, so what no shape tells is the generation's default, said in the notes, or
given: SHAPE. Masks stored by v1 are passed over.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from zero2llm.core.lazy import Lazy
from zero2llm.interop.foreign import Foreign
from zero2llm.interop.hf_names import to_half_split
from zero2llm.interop.minimind_experts import SHARED, mixtral_names, one_shared
from zero2llm.interop.read_hf import tokenizer_saver
from zero2llm.interop.torch_files import read_torch
from zero2llm.tokenizers.imports.read import read
from zero2llm.tokenizers.shipped import SHIPPED, shipped
from zero2llm.tokenizers.tokenizer import Tokenizer

SHAPE = {  # what may be given; most is only compared with the tensors
    "n_heads": int, "n_kv_heads": int, "head_dim": int, "d_model": int, "n_layers": int, "hidden": int, "vocab_size": int,
    "n_experts": int, "top_k": int, "max_len": int, "rope_theta": float, "norm_eps": float,
}  # fmt: skip
META = {  # theirs, with Meta's names -> transformers'
    "tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head", "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm", "wq": "self_attn.q_proj", "wk": "self_attn.k_proj", "wv": "self_attn.v_proj",
    "wo": "self_attn.o_proj", "w1": "gate_proj", "w3": "up_proj", "w2": "down_proj", "gate": "gate",
}  # fmt: skip
META_NAME = re.compile(r"(?:layers\.(\d+)\.)?(?:(attention|feed_forward)\.)?((?:shared_)?experts\.(?:\d+\.)?)?(\w+)\.weight")
BUFFERS = (".attention.mask", "pos_cis", "freqs_cos", "freqs_sin")
LAYER = "model.layers.{}."


@dataclass(frozen=True)
class Generation:
    """label : for people.  n_heads : None if shapes tell.  template : of its chat, if its tokenizer has none."""

    label: str
    n_heads: int | None
    rope_theta: float
    max_len: int
    norm_eps: float
    top_k: int
    template: str


V1 = Generation("v1", 16, 1e4, 512, 1e-5, 2, "minimind-v1")
V2_OLD = Generation("v2 of February 2025", 8, 1e6, 8192, 1e-5, 2, "minimind-v1")
V2 = Generation("v2", 8, 1e6, 32768, 1e-5, 2, "minimind-v2")
V3 = Generation("v3", None, 1e6, 32768, 1e-6, 1, "minimind-v3")


@dataclass(frozen=True)
class Sizes:
    """What the tensors' shapes tell, by the names of SHAPE. heads : rows of q and of k."""

    known: dict[str, int]
    q_rows: int
    k_rows: int
    n_shared: int


def read_minimind(path: Path, tokenizer: Path | None, shape: Mapping[str, int | float | str]) -> Foreign:
    """tokenizer : minimind's own folder (model/, or before April 2025 model/minimind_tokenizer/).  shape : any of SHAPE.

    Raises ValueError: what `read_torch` refuses, a file that is none of minimind's or a LoRA, a shape that its tensors
    contradict, no tokenizer.
    """
    path, found = Path(path), read_torch(path)
    tensors = {name: t for name, t in found.tensors.items() if not name.endswith(BUFFERS)}
    if low_rank := [name for name in tensors if ".lora." in name or "lora_" in name]:
        raise ValueError(
            f"{path}: holds a LoRA ({low_rank[0]} ...), which is only a difference to a model; merge it into its base with "
            "minimind's scripts/convert_model.py (convert_merge_base_lora) and import the merged file"
        )
    given = _given(shape)
    tensors, meta = _renamed(tensors, path)
    sizes = _sizes(tensors, path)
    generation = _generation(sizes, meta, given, path)
    known, notes = _settled(sizes, generation, given, path)
    save, more = _tokenizer(tokenizer, generation, path)
    if meta:
        tensors = _half_split(tensors, known["head_dim"])
    tensors, config, experts = _experts(tensors, known, sizes, generation, path)
    head, embedding = tensors.get("lm_head.weight"), tensors["model.embed_tokens.weight"]
    tied = head is None or (head.shape == embedding.shape and torch.equal(head.load(), embedding.load()))
    untied = () if tied else ("lm_head differs from the embedding: the two are not tied",)
    return Foreign(str(path), config | _dense(known, tied), tensors, save, notes=(*found.notes, *notes, *experts, *untied, *more))


def _given(shape: Mapping[str, int | float | str]) -> dict[str, int | float]:
    out = {}
    for key, value in shape.items():
        if key not in SHAPE:
            raise ValueError(f"shape: there is no {key!r}; there are: {', '.join(SHAPE)}")
        try:
            out[key] = SHAPE[key](value)
        except (TypeError, ValueError):
            raise ValueError(f"shape: {key} = {value!r} is no number") from None
        if out[key] <= 0 or out[key] != float(value):
            raise ValueError(f"shape: {key} = {value!r} must be {'a whole number' if SHAPE[key] is int else 'a number'} above 0")
    return out


def _renamed(tensors: dict[str, Lazy], path: Path) -> tuple[dict[str, Lazy], bool]:
    """With transformers' names, and whether they were Meta's. Unknown names stay, for the import to list them."""
    if "tok_embeddings.weight" not in tensors:
        if "model.embed_tokens.weight" not in tensors:
            seen = ", ".join(list(tensors)[:4])
            raise ValueError(f"{path}: no minimind model: neither tok_embeddings.weight nor model.embed_tokens.weight is in it, but {seen} ...")
        return tensors, False

    def rename(name: str) -> str:
        match = META_NAME.fullmatch(name)
        if match is None or match[4] not in META:
            return name
        layer = LAYER.format(match[1]) if match[1] else ""
        return layer + ("mlp." if match[2] == "feed_forward" else "") + (match[3] or "") + META[match[4]] + ".weight"

    return {rename(name): t for name, t in tensors.items()}, True


def _sizes(tensors: dict[str, Lazy], path: Path) -> Sizes:
    def at(name: str, of: int = 0) -> int:
        if name not in tensors or len(tensors[name].shape) <= of:
            raise ValueError(f"{path}: no minimind model: {name} is missing")
        return tensors[name].shape[of]

    first = LAYER.format(0)
    experts = first + "mlp.gate.weight" in tensors
    known = {
        "d_model": at("model.embed_tokens.weight", 1), "vocab_size": at("model.embed_tokens.weight"),
        "n_layers": len({name.split(".")[2] for name in tensors if name.startswith("model.layers.")}),
        "hidden": at(first + ("mlp.experts.0." if experts else "mlp.") + "gate_proj.weight"),
    }  # fmt: skip
    if experts:
        known["n_experts"] = at(first + "mlp.gate.weight")
    if first + "self_attn.q_norm.weight" in tensors:
        known["head_dim"] = at(first + "self_attn.q_norm.weight")
    shared = [t.shape[0] for name, t in tensors.items() if name.startswith(first) and (m := SHARED.fullmatch(name)) and m[2] == "gate"]
    return Sizes(known, at(first + "self_attn.q_proj.weight"), at(first + "self_attn.k_proj.weight"), sum(shared))


def _generation(sizes: Sizes, meta: bool, given: Mapping[str, float], path: Path) -> Generation:
    if not meta:
        return V3 if "head_dim" in sizes.known else V2
    if sizes.q_rows in (2 * sizes.k_rows, 4 * sizes.k_rows):
        return V1 if sizes.q_rows == 2 * sizes.k_rows else V2_OLD
    if missing := [key for key in ("n_heads", "rope_theta", "max_len") if key not in given]:
        raise ValueError(
            f"{path}: q has {sizes.q_rows} rows and k {sizes.k_rows}, as no generation of minimind by default; give shape {', '.join(missing)}"
        )
    return replace(V2_OLD, label="v2 (Meta's names, another ratio of heads)")


def _head_dim(q_rows: int, k_rows: int, given: Mapping[str, int | float], generation: Generation) -> int:
    """From the first that is given; the others are compared with what follows from it."""
    if "head_dim" in given:
        return given["head_dim"]
    if "n_heads" in given:
        return q_rows // given["n_heads"]
    return k_rows // given["n_kv_heads"] if "n_kv_heads" in given else q_rows // generation.n_heads


def _settled(sizes: Sizes, generation: Generation, given: dict[str, float], path: Path) -> tuple[dict, list[str]]:
    """Every value of SHAPE, and which of them were assumed. Raises ValueError for one that the tensors contradict."""
    defaults = {key: getattr(generation, key) for key in ("rope_theta", "max_len", "norm_eps")}
    if "n_experts" in sizes.known:
        defaults["top_k"] = generation.top_k
    known, q, k = dict(sizes.known), sizes.q_rows, sizes.k_rows
    if "head_dim" not in known:
        if not {"head_dim", "n_heads", "n_kv_heads"} & set(given):
            defaults["n_heads"] = generation.n_heads
        known["head_dim"] = _head_dim(q, k, given, generation)
    dim = known["head_dim"]
    if not dim or not k or q % dim or k % dim or q % k:
        raise ValueError(f"{path}: heads of {dim} channels do not divide q's {q} rows and k's {k}; give shape n_heads and n_kv_heads")
    known |= {"n_heads": q // dim, "n_kv_heads": k // dim}
    for key in given:
        if key in known and given[key] != known[key]:
            raise ValueError(f"{path}: shape says {key} = {given[key]}, its tensors say {known[key]}")
        if key not in known and key not in defaults:
            raise ValueError(f"shape: {key} = {given[key]} is given, but {path} has no experts")
    if "n_experts" in known and given.get("top_k", 1) > known["n_experts"]:
        raise ValueError(f"{path}: shape says top_k = {given['top_k']}, its tensors say {known['n_experts']} experts")
    assumed = ", ".join(f"{key} {value:g}" for key, value in defaults.items() if key not in given)
    why = f"{assumed} assumed: minimind {generation.label}'s defaults, the file holds none; give shape to change" if assumed else ""
    return defaults | given | known, [f"recognised as minimind {generation.label}", *([why] if why else [])]


def _dense(known: dict, tied: bool) -> dict:
    return {
        "hidden_size": known["d_model"], "num_hidden_layers": known["n_layers"], "vocab_size": known["vocab_size"],
        "num_attention_heads": known["n_heads"], "num_key_value_heads": known["n_kv_heads"], "head_dim": known["head_dim"],
        "intermediate_size": known["hidden"], "hidden_act": "silu", "rope_theta": known["rope_theta"],
        "max_position_embeddings": known["max_len"], "rms_norm_eps": known["norm_eps"], "tie_word_embeddings": tied,
    }  # fmt: skip


def _half_split(tensors: dict[str, Lazy], dim: int) -> dict[str, Lazy]:
    def turn(t: Lazy) -> Lazy:
        return replace(t, load=lambda: to_half_split(t.load(), dim))

    return {name: turn(t) if name.endswith(("q_proj.weight", "k_proj.weight")) else t for name, t in tensors.items()}


def _experts(tensors: dict[str, Lazy], known: dict, sizes: Sizes, generation: Generation, path: Path) -> tuple[dict, dict, list[str]]:
    """Tensors, the keys of config.json about experts, and notes."""
    if "n_experts" not in known:
        return tensors, {"model_type": "qwen3" if generation is V3 else "llama"}, []
    n, k = known["n_experts"], known["top_k"]
    keys = {"num_experts": n, "num_experts_per_tok": k, "moe_intermediate_size": known["hidden"]}
    if generation is V3:
        return tensors, keys | {"model_type": "qwen3_moe", "norm_topk_prob": True}, []
    if sizes.n_shared:  # one expert a token is weighed by its softmax alone
        keys |= {"model_type": "qwen2_moe", "qkv_bias": False, "norm_topk_prob": k > 1}
        note = "experts for every token became Qwen2-MoE's shared one: its gate is 0 and its down_proj doubled, which computes the same"
        return one_shared(tensors), keys | {"shared_expert_intermediate_size": sizes.n_shared}, [note]
    if k == 1:
        raise ValueError(f"{path}: one expert a token, weighed by its softmax, and none shared: no family of transformers computes that")
    return mixtral_names(tensors), {"model_type": "mixtral", "num_local_experts": n, "num_experts_per_tok": k}, []


def _tokenizer(given: Path | None, generation: Generation, path: Path) -> tuple[Callable[[Path], None], list[str]]:
    """Read at once, before anything is written. Without a template of its own it gets its generation's."""
    if given is None:
        where = "model/minimind_tokenizer/" if generation.template == "minimind-v1" else "model/"
        raise ValueError(f"{path}: holds no tokenizer; give the folder that has it, in minimind {where} (tokenizer.json, tokenizer_config.json)")
    found, name = read(Path(given)), generation.template
    own = Tokenizer(found.library, found.template or "", found.roles)
    if found.template is None and set(SHIPPED[name].controls) <= set(own.specials):
        return Tokenizer(found.library, shipped(name), found.roles).save, [f"{given} has no chat template: {name} is used"]
    return (tokenizer_saver(Path(given)) if Path(given).is_dir() else own.save), []
