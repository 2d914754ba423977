"""The architectures of GGUF, in and out: a file's metadata as config.json, and config.json as metadata.

    llama       Llama 1 to 3.3, SmolLM2, Mistral without a window, Mixtral; factors of Llama 3.1 and LongRoPE
    qwen2       qwen2moe (experts in every layer)        qwen3       qwen3moe (likewise)
    gemma       gemma2   gemma3 (text)                   phi3        with LongRoPE
    olmo2       smollm3                                  gpt2
    gpt-oss     qwen3next                                deepseek2   DeepSeek-V2-Lite to V3
    mamba       mamba2   (expansion 2)                   jamba       kimi-linear

All are read and written; any other is a ValueError that names it and these. pages_dense.py and pages_more.py say what is
called how, layers.py which tensor is which. As in families/, a model can be written if nothing is lost on the way:

    config.json -> metadata and factors -> config.json        must describe the same function

so what a file has no key for (a window in llama, another scale, a bias) is refused by name before anything is written.
Source: ggml-org/llama.cpp, src/models/*.cpp (what is assumed without a key) and conversion/*.py, as of 2026.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from zero2llm.core.lazy import Lazy, lazy
from zero2llm.interop.families.family import differences
from zero2llm.interop.gguf.config import (
    Arch,
    Found,
    Meta,
    prefixed,
    refuse_others,
    rounded,
    shared_keys,
    without_prefix,
)
from zero2llm.interop.gguf.pages_dense import DENSE
from zero2llm.interop.gguf.pages_more import MORE
from zero2llm.interop.hf_config import from_hf_config

ARCHES: dict[str, Arch] = {arch.name: arch for arch in (*DENSE, *MORE)}
MOST_EXPERTS = 1 << 14
WRITERS = {model_type: arch for arch in ARCHES.values() for model_type in arch.model_types}


def arch_of(metadata: Meta) -> Arch:
    """Raises ValueError for an architecture that is not known, or a file that holds no model."""
    if (kind := metadata.get("general.type", "model")) != "model":
        raise ValueError(f"holds a {kind!r}, not a model")
    name = metadata.get("general.architecture")
    if name not in ARCHES:
        raise ValueError(f"architecture {name!r} is not supported; there are: {', '.join(ARCHES)}")
    return ARCHES[name]


def to_config(arch: Arch, metadata: Meta, tensors: Mapping[str, Lazy]) -> dict:
    """config.json of a file. Raises ValueError naming the key that is missing or not supported."""
    found = Found(without_prefix(arch.name, metadata), tensors)
    refuse_others(arch.name, found.meta)
    for key, most in (("block_count", len(tensors)), ("expert_count", MOST_EXPERTS)):
        if not 0 <= found.one(key, 0) <= most:  # rules are made for each
            raise ValueError(f"metadata {key} = {found.one(key)}, but the file holds {len(tensors)} tensors; it is damaged")
    return shared_keys(found, arch.head) | arch.read(found)


def to_metadata(config: dict, names: Mapping[str, tuple[int, ...]]) -> tuple[Arch, Meta, dict[str, Tensor], list[str]]:
    """Architecture, metadata, factors of rotation, notes for the user.

    config : from `to_hf_config`.  names : the file's tensors and their shapes.
    Raises ValueError naming what has no counterpart.
    """
    if (arch := WRITERS.get(config["model_type"])) is None:
        raise ValueError(f"no GGUF export: llama.cpp has no counterpart of {config['model_type']}; it has one of: {', '.join(WRITERS)}")
    config, notes = _without_idle_window(arch, config)
    try:
        meta, factors = arch.write(config)
        meta = prefixed(arch.name, meta | {"vocab_size": config["vocab_size"]})
        blank = lambda shape: Lazy(tuple(shape), torch.float32, lambda: torch.empty(0))
        tensors = {name: blank(shape) for name, shape in names.items()} | {name: lazy(t) for name, t in factors.items()}
        told = {key: float(torch.tensor(value)) if isinstance(value, float) else value for key, value in meta.items()}
        faults = _lost(arch, config, to_config(arch, told, tensors))
    except ValueError as error:
        faults = [str(error).removeprefix("config.json: ")]
    if faults:
        raise ValueError(f"no GGUF export: the architecture {arch.name} has no counterpart of {'; '.join(faults)}")
    return arch, meta, factors, notes + arch.notes(config)


def _lost(arch: Arch, config: dict, back: dict) -> list[str]:
    """What reading the file would not give back."""
    faults = differences(from_hf_config(rounded(config)), from_hf_config(back))
    if arch.head == "own" and config["tie_word_embeddings"]:
        faults.append("tie_embeddings: True (there False)")
    return faults


def _without_idle_window(arch: Arch, config: dict) -> tuple[dict, list[str]]:
    """llama has no window; one that reaches over the longest text changes nothing."""
    window, longest = config.get("sliding_window"), config.get("max_position_embeddings")
    if arch.name != "llama" or not window or window < longest:
        return config, []
    return config | {"sliding_window": None}, [f"the window of {window} tokens is left out: no text is longer than {longest}"]


