"""Published architectures by name, from nano to their real sizes; a name is a promise about the parameter count.

A name that ends in -like says that something differs from the original; the comment beside it says what.
"""

from __future__ import annotations

import difflib

from zero2llm.model.presets import dense, experts, gemma, recurrent
from zero2llm.model.presets.dense import gpt2, llama, qwen3
from zero2llm.model.spec import ModelConfig

PRESETS = {**dense.PRESETS, **gemma.PRESETS, **experts.PRESETS, **recurrent.PRESETS}
__all__ = ["PRESETS", "gpt2", "llama", "preset", "qwen3"]


def preset(name: str) -> ModelConfig:
    """The configuration of a published (or nano) model. Raises ValueError naming the nearest preset."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "`zero2llm presets` lists them"
        raise ValueError(f"unknown preset {name!r}; {hint}")
    return PRESETS[name]()
