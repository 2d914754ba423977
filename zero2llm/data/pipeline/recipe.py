"""A data recipe: where documents come from, the steps they go through in order, and what is written.

Steps that look at one document at a time run in parallel, part by part. A step that looks at the whole corpus
(deduplication) stands between two segments of them: the parts before it are signed, the signatures judged together.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from zero2llm.core.config import config, parse, read_yaml, to_dict
from zero2llm.data.sources import Source, expand
from zero2llm.data.steps.catalog import StepConfig

BUILT_IN = Path(__file__).parent.parent.parent / "recipes" / "data"


@config
class ShardsConfig:
    """Token files for training, one folder a split (``tokens/train``), made with the recipe's tokenizer."""

    tokens_per_file: int = 500_000_000

    def __post_init__(self) -> None:
        if self.tokens_per_file < 1:
            raise ValueError(f"tokens_per_file = {self.tokens_per_file} must be at least 1")


@config
class DataRecipe:
    out: str
    sources: tuple[Source, ...]
    steps: tuple[StepConfig, ...] = ()
    splits: dict[str, float] = field(default_factory=lambda: {"valid": 0.01})  # shares by content; the rest is train
    seed: int = 1
    workers: int | None = None  # None = one a core; the result is the same for any number
    engine: Literal["local", "datatrove"] = "local"
    tokenizer: str | None = None  # counts tokens in the report, and makes the shards
    shards: ShardsConfig | None = None
    compress: Literal["none", "gz", "zst"] = "none"
    file_mb: int = 256  # of a written text file, before compression
    part_mb: int = 32  # of source text that one worker reads at a time
    skip_bad_records: bool = False
    keep_work: bool = False  # the parts of every segment, for looking at

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources is empty")
        if nameless := [i for i, source in enumerate(self.sources, 1) if not source.paths]:
            raise ValueError(f"source {nameless[0]}: paths is empty; name files, folders, archives or hub data sets")
        if any(not 0 < s < 1 for s in self.splits.values()) or sum(self.splits.values()) >= 1 or "train" in self.splits:
            raise ValueError(f"splits = {self.splits} must be shares between 0 and 1 that leave some for train")
        if not all(re.fullmatch(r"[\w-]+", name) for name in self.splits):
            raise ValueError(f"splits: names {[*self.splits]} become files, so they must be of letters, digits, - and _")
        if min(self.file_mb, self.part_mb) < 1 or (self.workers is not None and self.workers < 1):
            raise ValueError(f"file_mb = {self.file_mb}, part_mb = {self.part_mb} and workers = {self.workers} must be positive")
        if self.shards is not None and self.tokenizer is None:
            raise ValueError("shards needs tokenizer: the folder of the one to encode with")


@dataclass(frozen=True)
class Segment:
    """Steps of one document at a time, by number; ``after`` and ``before`` = the corpus steps that stand around them."""

    steps: tuple[int, ...]
    after: int | None
    before: int | None


def segments(recipe: DataRecipe) -> list[Segment]:
    out, mine, after = [], [], None
    for i, step in enumerate(recipe.steps):
        if step.looks_at == "corpus":
            out.append(Segment(tuple(mine), after, i))
            mine, after = [], i
        else:
            mine.append(i)
    return [*out, Segment(tuple(mine), after, None)]


def load_data_recipe(path: str | Path, overrides: Sequence[str] = ()) -> DataRecipe:
    """A YAML file, or the name of a built-in recipe. Raises ValueError naming file, line, key and the nearest known key."""
    built_in = BUILT_IN / f"{path}.yaml"
    data, lines = read_yaml(built_in if not Path(path).is_file() and built_in.is_file() else path, overrides)
    return parse(DataRecipe, data, lines, str(path))


def prepared(recipe: DataRecipe, work: Path) -> DataRecipe:
    """The recipe as workers get it: what a step learns from reference files is learned once, here, and kept in ``work``.

    Raises ValueError naming the step that cannot be built.
    """
    steps = []
    for i, step in enumerate(recipe.steps):
        if step.kind == "perplexity" and step.cache is None:
            step = replace(step, cache=str(work / f"step-{i:02}"))
        try:
            step.build()
        except ValueError as error:
            raise ValueError(f"step {i + 1} ({step.kind}): {error}") from None
        steps.append(step)
    return replace(recipe, steps=tuple(steps))


def as_json(recipe: DataRecipe) -> str:
    return json.dumps(to_dict(recipe), sort_keys=True, ensure_ascii=False)


def files_of(recipe: DataRecipe) -> list[Path | str]:
    """Every file that the result depends on: sources, reference texts and evaluation sets of steps, tokenizers."""
    paths, tokenizers = [], []

    def look(value: Any, key: str = "") -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                look(inner, "paths" if key == "reference" else name)
        elif key == "paths":
            paths.extend(value)
        elif key == "tokenizer" and value is not None:
            folder = Path(value)
            tokenizers.extend(sorted(p for p in folder.iterdir() if p.is_file()) if folder.is_dir() else [folder])
        elif isinstance(value, list | tuple):
            for inner in value:
                look(inner)

    look(to_dict(recipe))
    return [*(file for path in paths for file in expand([path])), *tokenizers]


def result_key(recipe: DataRecipe, files: list[tuple]) -> str:
    """What the result depends on: everything but how the work is spread, this version, and files with sizes and times."""
    value = to_dict(recipe)
    for name in ("out", "workers", "engine", "keep_work"):
        del value[name]
    return hashlib.sha256(json.dumps([value, files, version("zero2llm")], sort_keys=True).encode()).hexdigest()
