"""Look at a recipe's batches."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from zero2llm.core.files import write_atomic
from zero2llm.core.log import console
from zero2llm.data.inspect import inspect_html, inspect_terminal
from zero2llm.lab.recipe import load_recipe
from zero2llm.lab.sets import build_sets
from zero2llm.lab.stage import start_model
from zero2llm.parallel.plan import World


def inspect_recipe(path: Path, overrides: list[str], rows: int, html: Path | None) -> None:
    """Build the recipe's data as training would and show its first batch."""
    recipe = load_recipe(path, overrides)
    if recipe.form == "prompts":
        raise ValueError(f"objective {recipe.objective.kind} trains on answers that the model samples; look at its prompts with: zero2llm data inspect FILES")
    with TemporaryDirectory(ignore_cleanup_errors=True) as scratch:  # the run's own folder is not touched
        _, tokenizer, _, _ = start_model(recipe, Path(scratch))
        batch = next(iter(build_sets(recipe, tokenizer, Path(scratch), World()).train))
        inspect_terminal(batch, tokenizer, rows)
        if html is not None:
            write_atomic(html, inspect_html(batch, tokenizer, rows))
            console().print(f"wrote {html}", markup=False)
