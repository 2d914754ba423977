"""A GGUF file's metadata as the keys of config.json, and back: what a page of pages_*.py is made of.

Keys are told without their prefix: "attention.head_count" stands in a file as "llama.attention.head_count". Numbers with a
fraction are fp32 there; they come back as the shortest decimal that rounds to them.
Source: ggml, docs/gguf.md; ggml-org/llama.cpp, gguf-py constants.py (names) and src/models/ (what is read, what is assumed).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from zero2llm.core.lazy import Lazy
from zero2llm.interop.gguf.rope import read_rope, shortest, write_rope
from zero2llm.interop.hf_names import Rule

SIZES = {
    "max_position_embeddings": "context_length", "hidden_size": "embedding_length", "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length", "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv", "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}  # fmt: skip
Meta = dict[str, Any]


@dataclass(frozen=True)
class Found:
    """meta : without prefix.  tensors : what the file holds."""

    meta: Meta
    tensors: Mapping[str, Lazy]

    def need(self, key: str) -> Any:
        if key not in self.meta:
            raise ValueError(f"metadata key {key} is missing; the file is damaged or of another architecture")
        return self.meta[key]

    def one(self, key: str, usual: Any = None) -> Any:
        """A number; ``usual`` where the file does not say. A list, one for each layer, must hold the same number for all."""
        value = self.meta.get(key, usual) if usual is not None else self.need(key)
        if isinstance(value, list) and len(set(map(str, value))) == 1:
            value = value[0]
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"metadata {key} = {value!r}: one number for all layers is needed")
        return value

    def layer_has(self, name: str) -> list[bool]:
        """For each layer, whether it has the tensor ``name``."""
        return [f"blk.{i}.{name}" in self.tensors for i in range(self.need("block_count"))]


@dataclass(frozen=True)
class Arch:
    """One value of general.architecture.

    model_types : the families of transformers that it stands for.  rules : which tensor is which, from a config.json.
    write : config.json as metadata, and further tensors (factors of rotation).  read : the inverse.
    head : whether the file may leave out the output matrix, must ("tied"), or must not ("own").
    notes : of a config.json, where llama.cpp would compute otherwise, in words for the user.
    """

    name: str
    model_types: tuple[str, ...]
    rules: Callable[[dict], list[Rule]]
    write: Callable[[dict], tuple[Meta, dict[str, Tensor]]]
    read: Callable[[Found], dict]
    head: Literal["optional", "tied", "own"] = "optional"
    notes: Callable[[dict], list[str]] = lambda config: []


IDLE = {  # settings of other architectures -> the values with which they change nothing
    "logit_scale": (0.0, 1.0), "residual_scale": (0.0, 1.0), "embedding_scale": (0.0, 1.0), "router_logit_softcapping": (0.0,),
    "attention.scale": (0.0,), "attention.output_scale": (0.0, 1.0), "attention.value_scale": (0.0, 1.0), "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,), "attention.temperature_scale": (0.0,), "attention.causal": (True,), "swin_norm": (False,),
    "use_parallel_residual": (False,), "rope.scaling.alpha": (0.0, 1.0), "nextn_predict_layers": (0,), "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,), "expert_gating_func": (1,), "expert_group_count": (0, 1), "expert_weights_scale": (0.0, 1.0),
}  # fmt: skip
OBEYED = {  # by which architectures of ours some of them are read
    "attn_logit_softcapping": ("gemma2",), "final_logit_softcapping": ("gemma2",),
} | dict.fromkeys(("expert_gating_func", "expert_group_count", "expert_weights_scale"), ("deepseek2", "kimi-linear"))  # fmt: skip


def refuse_others(arch: str, meta: Meta) -> None:
    """Raises ValueError for a setting that changes the function computed and that nothing of ours reads."""
    odd = [key for key, idle in IDLE.items() if arch not in OBEYED.get(key, ()) and meta.get(key, idle[0]) not in idle]
    if odd:
        raise ValueError(f"metadata {', '.join(f'{key} = {meta[key]!r}' for key in odd)}: not supported for {arch}, and passing it over would give another model")


def copied(config: dict, table: Mapping[str, str]) -> Meta:
    return {file: config[key] for key, file in table.items()}


def copied_back(found: Found, table: Mapping[str, str]) -> dict:
    return {key: found.one(file) for key, file in table.items()}


def write_dense(config: dict, scalings: tuple[str, ...] = ("linear", "yarn"), rotary_dim: int | None = None,
                rope: dict | None = None) -> tuple[Meta, dict[str, Tensor]]:  # fmt: skip
    """What attention of every kind has. rope : the entry of rope_parameters to write, where layers differ."""
    dim = config["head_dim"]
    turns, tensors = write_rope(rope or config["rope_parameters"], rotary_dim or dim, config["max_position_embeddings"], scalings)
    return copied(config, SIZES) | {"attention.key_length": dim, "attention.value_length": dim} | turns, tensors


def read_dense(found: Found, truncate: bool = True, rope_type: str | None = None) -> dict:
    """rope_type : under which name rope_parameters goes, where layers differ."""
    config = copied_back(found, {key: file for key, file in SIZES.items() if key != "num_key_value_heads"})
    if (heads := config["num_attention_heads"]) < 1:
        raise ValueError(f"metadata attention.head_count = {heads}: must be at least 1")
    dim = found.one("attention.key_length", config["hidden_size"] // heads)
    if found.meta.get("attention.value_length", dim) != dim:
        raise ValueError(f"keys of {dim} with values of {found.meta['attention.value_length']} channels are not supported")
    rotary = found.one("rope.dimension_count", dim)
    rope = read_rope(found.meta, found.tensors, rotary, config["max_position_embeddings"], truncate)
    if rotary != dim:
        rope |= {"partial_rotary_factor": rotary / dim}
    return config | {
        "num_key_value_heads": found.one("attention.head_count_kv", heads), "head_dim": dim,
        "rope_theta": rope["rope_theta"], "rope_parameters": {rope_type: rope} if rope_type else rope,
    }  # fmt: skip


def shared_keys(found: Found, head: str) -> dict:
    """vocab_size and whether the embedding is the output matrix too."""
    if "token_embd.weight" not in found.tensors:
        raise ValueError("holds no token_embd.weight: it is no whole language model (an adapter, or one part of several)")
    tied = head == "tied" or "output.weight" not in found.tensors
    return {"vocab_size": found.tensors["token_embd.weight"].shape[0], "tie_word_embeddings": tied}


def prefixed(arch: str, meta: Meta) -> Meta:
    return {f"{arch}.{key}": value for key, value in meta.items()}


def without_prefix(arch: str, metadata: Meta) -> Meta:
    prefix = arch + "."
    plain = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    return {key: shortest(value) if isinstance(value, float) else value for key, value in plain.items()}


def rounded(value: Any) -> Any:
    """A config.json whose numbers are what fp32 can hold, as they come back from a file."""
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(v) for v in value]
    return shortest(value) if isinstance(value, float) else value


PATTERN = "attention.sliding_window_pattern"


def write_windows(config: dict, usual: int) -> Meta:
    """usual : each so-manieth layer sees everything, which the architecture assumes; another rhythm is told."""
    if not config["sliding_window"]:
        raise ValueError("mixer.window: None in every layer (there some have one)")
    seen = [kind == "full_attention" for kind in config["layer_types"]]
    fits = [p for p in (usual, *range(len(seen) + 1)) if seen == _full(p, len(seen))]
    if not fits:
        raise ValueError(f"mixer.window: layers without one at {[i for i, full in enumerate(seen) if full]} (there every n-th)")
    return {"attention.sliding_window": config["sliding_window"]} | ({} if fits[0] == usual else {PATTERN: fits[0]})


def read_windows(found: Found, usual: int, window: int) -> dict:
    """window : assumed where the file does not say."""
    n, told = found.need("block_count"), found.meta.get(PATTERN, usual)
    full = [not flag for flag in told] if isinstance(told, list) else _full(told, n)
    if len(full) != n:
        raise ValueError(f"{PATTERN} tells of {len(full)} layers, but there are {n}")
    types = ["full_attention" if flag else "sliding_attention" for flag in full]
    return {"layer_types": types, "sliding_window": None if all(full) else found.meta.get("attention.sliding_window", window)}


def _full(period: int, n: int) -> list[bool]:
    """Which layers see everything; 0 = none."""
    return [period > 0 and (i + 1) % period == 0 for i in range(n)]
