"""A model of ours as one GGUF file for llama.cpp, Ollama, LM Studio: shape, weights, tokenizer and chat template.

    our state --pack--> transformers' tensors --pack--> the file's tensors, one at a time

What stays F32 whatever the kind: vectors (norms, biases), routers, and the small tensors of recurrences, sinks and
factors of rotation, for which llama.cpp has no other code. Blocks hold 32 weights of a row: a matrix whose rows do not
divide by 32 stays F16. Token embedding and output matrix are quantised as the rest.
Source: ggml, docs/gguf.md; ggml-org/llama.cpp, conversion/base.py for what stays F32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from zero2llm.core.lazy import lazy
from zero2llm.interop.foreign import check_names, some
from zero2llm.interop.gguf.arches import WRITERS, to_metadata
from zero2llm.interop.gguf.blocks import nbytes
from zero2llm.interop.gguf.file import write_gguf
from zero2llm.interop.gguf.names import choose, turned
from zero2llm.interop.gguf.vocab import written_vocab
from zero2llm.interop.hf_config import family, to_hf_config
from zero2llm.model.spec import ModelConfig

Kind = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]
FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q4_0": 2}  # llama_ftype
BLOCK = 32
SMALL = ("ffn_gate_inp", "ffn_gate_inp_shexp", "ssm_conv1d", "ssm_conv1d_q", "ssm_conv1d_k", "ssm_conv1d_v", "ssm_a", "ssm_d", "ssm_norm",
         "attn_sinks", "position_embd")  # fmt: skip


@dataclass(frozen=True)
class GGUFPlan:
    """What will be written. tensors : (name, shape, kind, load) in the file's order.  notes : in words for the user."""

    architecture: str
    metadata: dict[str, Any]
    tensors: list[tuple[str, tuple[int, ...], str, Callable[[], Tensor]]]
    notes: tuple[str, ...]

    def nbytes(self) -> int:
        return sum(nbytes(shape, kind) for _, shape, kind, _ in self.tensors)


def plan_gguf(state: Mapping[str, Tensor], cfg: ModelConfig, tokenizer_dir: Path, kind: Kind, *, name: str = "zero2llm",
              model_type: str | None = None) -> GGUFPlan:  # fmt: skip
    """Everything that can fail for the model's sake fails here, before a byte is written.

    name : general.name.  model_type : as in `to_hf_tensors`. Raises ValueError: a part without counterpart, by name;
    tensors that are missing or too many; a tokenizer that does not fit; another ``kind``.
    """
    if kind not in FILE_TYPES:
        raise ValueError(f"kind = {kind!r}: a GGUF file is written as {', '.join(FILE_TYPES)}")
    if cfg.score_head == "reward":
        raise ValueError("no GGUF export of a reward model: a file here holds a language model; write it for transformers (hf)")
    page = family(cfg, model_type)
    rules = page.rules(cfg)
    check_names([name for rule in rules for name in rule.ours], state, "model state")
    theirs = turned(rules, {n: lazy(t) for n, t in state.items()}, False)
    config = to_hf_config(cfg, model_type=model_type)
    arch = WRITERS.get(config["model_type"])
    ours = turned(choose(arch.rules(config), theirs, False, f"no GGUF export: the architecture {arch.name}"), theirs, False) if arch else {}
    arch, meta, factors, notes = to_metadata(config, {n: t.shape for n, t in ours.items()})
    general = {"architecture": arch.name, "type": "model", "name": name, "file_type": FILE_TYPES[kind], "quantization_version": 2}
    vocab, about_tokens = written_vocab(tokenizer_dir, cfg.vocab_size)
    metadata = {f"general.{key}": value for key, value in general.items()} | meta | vocab
    tensors = [(n, t.shape, kind_of(n, t.shape, kind), t.load) for n, t in (ours | {n: lazy(t) for n, t in factors.items()}).items()]
    return GGUFPlan(arch.name, metadata, tensors, tuple([*notes, *_odd(tensors, kind), *about_tokens]))


def export_gguf(state: Mapping[str, Tensor], cfg: ModelConfig, tokenizer_dir: Path, out: Path, kind: Kind, *, overwrite: bool = False,
                name: str = "zero2llm", model_type: str | None = None) -> Path:  # fmt: skip
    """Write one file, whole or not at all; arguments and errors as `plan_gguf`, whose ``notes`` say what is stored otherwise.

    Raises ValueError also for a file that exists (unless ``overwrite``), and for a number that ``kind`` cannot hold.
    """
    made = plan_gguf(state, cfg, tokenizer_dir, kind, name=name, model_type=model_type)
    write_gguf(Path(out), made.metadata, made.tensors, overwrite)
    return Path(out)


def kind_of(name: str, shape: tuple[int, ...], kind: Kind) -> str:
    """How a tensor is stored in a file of this kind."""
    stem = name.removeprefix("blk.").partition(".")[2] if name.startswith("blk.") else name
    if len(shape) < 2 or stem.endswith(".bias") or stem.removesuffix(".weight") in SMALL:
        return "F32"
    return "F16" if kind in ("q8_0", "q4_0") and shape[-1] % BLOCK else kind.upper()


def _odd(tensors: list, kind: Kind) -> list[str]:
    odd = [f"{name} {tuple(shape)}" for name, shape, stored, _ in tensors if stored == "F16" != kind.upper()]
    return [f"{len(odd)} tensors stay F16, their rows are no multiple of {BLOCK} weights: {some(odd, 4)}"] if odd else []
