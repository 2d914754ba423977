"""A model in one GGUF file, as transformers would tell it: read_gguf -> Foreign -> import_model.

Its tensors are dequantised, turned and stacked when they are asked for. Numbers of 16 bits stay what they are; blocks
become fp32, exactly what llama.cpp computes with.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from zero2llm.core.lazy import Lazy
from zero2llm.interop.foreign import Foreign, some
from zero2llm.interop.gguf.arches import arch_of, to_config
from zero2llm.interop.gguf.blocks import UNPACK
from zero2llm.interop.gguf.file import GGUF, open_gguf
from zero2llm.interop.gguf.names import choose, turned
from zero2llm.interop.gguf.rope import FACTORS, shortest
from zero2llm.interop.gguf.vocab import save_tokenizer
from zero2llm.interop.hf_config import from_hf_config

TOKEN = "tokenizer.ggml.{}_token_id"
SAMPLING = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}


def read_gguf(path: Path) -> Foreign:
    """Raises ValueError naming the file and what is not supported, before any tensor is read."""
    gguf = open_gguf(Path(path))
    try:
        config, tensors, notes = _described(gguf)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except (TypeError, ArithmeticError, LookupError, AttributeError) as error:  # a list where a number belongs, and the like
        raise ValueError(f"{path}: its metadata describe no model ({error!r}); the file is damaged") from error
    with TemporaryDirectory() as trial:  # what the vocabulary cannot say is known before the weights are read
        about_tokens = save_tokenizer(gguf, Path(trial))
        files = {file.relative_to(trial): file.read_bytes() for file in Path(trial).rglob("*") if file.is_file()}

    def save(folder: Path) -> None:
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)

    return Foreign(str(path), config, tensors, save, _generation(gguf.metadata), (*notes, *about_tokens))


def _described(gguf: GGUF) -> tuple[dict, dict[str, Lazy], list[str]]:
    """config.json, tensors by transformers' names, notes."""
    arch = arch_of(gguf.metadata)
    if unknown := [f"{t.name} ({t.kind})" for t in gguf.tensors.values() if t.kind not in UNPACK]:
        raise ValueError(f"stored in kinds that cannot be read: {some(unknown)}; these can: {', '.join(UNPACK)}")
    tensors = {name: stored.lazy for name, stored in gguf.tensors.items()}
    config = to_config(arch, gguf.metadata, tensors)
    from_hf_config(config)
    found = {name: tensor for name, tensor in tensors.items() if name not in FACTORS}
    rules = choose(arch.rules(config), found, True, "the file")
    return config, turned(rules, found, True), [*_kinds(gguf), *arch.notes(config)]


def _generation(meta: dict[str, Any]) -> dict:
    """generation_config.json: the tokens that begin, pad and end a text, and the sampling that the file recommends."""
    ids = {name: meta.get(TOKEN.format(name)) for name in ("bos", "eos", "eot", "eom", "padding")}
    ends = [i for i in dict.fromkeys((ids["eos"], ids["eot"], ids["eom"])) if i is not None]
    out = {"bos_token_id": ids["bos"], "pad_token_id": ids["padding"]}
    out = {key: value for key, value in out.items() if value is not None} | ({"eos_token_id": ends} if ends else {})
    sampling = {key: meta[f"general.sampling.{name}"] for name, key in SAMPLING.items() if f"general.sampling.{name}" in meta}
    sampling = {key: shortest(value) if isinstance(value, float) else value for key, value in sampling.items()}
    return out | ({"do_sample": True, **sampling} if sampling else {})


def _kinds(gguf: GGUF) -> list[str]:
    """How much of the file was quantised."""
    counts: dict[str, int] = {}
    for stored in gguf.tensors.values():
        counts[stored.kind] = counts.get(stored.kind, 0) + 1
    blocks = {kind: n for kind, n in counts.items() if kind not in ("F32", "F16", "BF16", "F64")}
    told = ", ".join(f"{n} as {kind}" for kind, n in blocks.items())
    return [f"{sum(blocks.values())} of {len(gguf.tensors)} tensors were quantised ({told}); they become fp32, without loss"] if blocks else []
