"""zero2llm: build a language model from nothing and keep it.

Importing this module imports nothing heavy; each name loads what it needs on first use.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_WHERE = {
    "build": ("zero2llm.lab.api", "build"),
    "chat": ("zero2llm.lab.api", "chat"),
    "run": ("zero2llm.lab.api", "run"),
    "load": ("zero2llm.lab.talk", "load_engine"),
    "load_recipe": ("zero2llm.lab.recipe", "load_recipe"),
    "make_recipe": ("zero2llm.lab.recipe", "make_recipe"),
    "export": ("zero2llm.lab.convert", "export_checkpoint"),
    "preset": ("zero2llm.model.presets", "preset"),
    "fit": ("zero2llm.train.fit", "fit"),
    "FitConfig": ("zero2llm.train.fit", "FitConfig"),
    "LM": ("zero2llm.model.lm", "LM"),
    "ModelConfig": ("zero2llm.model.spec", "ModelConfig"),
    "Sampling": ("zero2llm.engine.sampling", "Sampling"),
    "Engine": ("zero2llm.engine.engine", "Engine"),
    "Tokenizer": ("zero2llm.tokenizers.tokenizer", "Tokenizer"),
}
__all__ = sorted(_WHERE)


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module 'zero2llm' has no attribute {name!r}; it has: {', '.join(__all__)}")
    module, attribute = _WHERE[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
