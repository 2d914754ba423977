"""`zero2llm data run`: a data recipe with progress, and its report."""

from __future__ import annotations

from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from zero2llm.core.log import console, err_console
from zero2llm.data.pipeline.recipe import load_data_recipe
from zero2llm.data.pipeline.run import run, run_share
from zero2llm.lab.funnel import funnel_page, funnel_table
from zero2llm.tokenizers.tokenizer import Tokenizer


def run_recipe(path: str, overrides: list[str], overwrite: bool, quiet: bool) -> None:
    """Run it, or go on where it was killed; then write report.html beside the data."""
    recipe = load_data_recipe(path, overrides)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[documents]:,} documents"),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=err_console(), disable=quiet) as progress:
        bars: dict[str, int] = {}

        def listen(title: str, done: int, parts: int, documents: int) -> None:
            if title not in bars:
                bars[title] = progress.add_task(title, total=parts, documents=0)
            progress.update(bars[title], completed=done, documents=documents)

        tokenizer = None if recipe.tokenizer is None else Tokenizer.load(recipe.tokenizer)
        funnel = run(recipe, overwrite, listen, lambda funnel: funnel_page(funnel, tokenizer))
    out = Path(recipe.out)
    console().print(funnel_table(funnel))
    for name, size in funnel["splits"].items():
        console().print(f"{name}: {size['documents']:,} documents, {size['bytes']:,} bytes", markup=False)
    console().print(f"data: {out}; what was removed and why: {out / 'report.html'}", markup=False)


def run_part(path: str, overrides: list[str], rank: int, world: int) -> None:
    """This job's share of the segment that is next; several machines may do theirs at the same time."""
    segment, n = run_share(load_data_recipe(path, overrides), rank, world)
    rest = "" if n else "; start the jobs again for the next one, or run without --rank to finish"
    console().print(f"job {rank} of {world}: {n} parts of segment {segment + 1} are done{rest}", markup=False)
