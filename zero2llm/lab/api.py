"""What a notebook needs, in a few names: build, train, chat."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from zero2llm.engine.engine import Engine
from zero2llm.engine.sampling import Sampling
from zero2llm.lab.recipe import Recipe, load_recipe
from zero2llm.lab.stage import Result, run_stage
from zero2llm.lab.talk import stream_answer
from zero2llm.model.lm import LM
from zero2llm.model.presets import preset
from zero2llm.model.spec import ModelConfig


def build(what: str | ModelConfig | Recipe) -> LM:
    """A freshly initialised model from a preset's name, a configuration, or a recipe that starts from nothing."""
    if isinstance(what, Recipe):
        if what.model is None:
            raise ValueError("the recipe starts from a checkpoint (init); load that instead")
        return LM(what.model)
    return LM(preset(what) if isinstance(what, str) else what)


def run(recipe: Recipe | str | Path, *, resume: bool = False, overwrite: bool = False, quiet: bool = False) -> Result:
    """Run one stage; the same as `zero2llm train`."""
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    return run_stage(recipe, resume=resume, overwrite=overwrite, quiet=quiet)


def chat(engine: Engine, messages: list[dict[str, str]], sampling: Sampling | None = None) -> Iterator[str]:
    """Pieces of the assistant's answer to ``messages``, as they come; greedy unless ``sampling`` says otherwise."""
    yield from stream_answer(engine, messages, sampling or Sampling(temperature=0.0, max_tokens=128))
