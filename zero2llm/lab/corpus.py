"""Token files of a pretraining recipe: one set for each source, and one of held-out documents from all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, islice
from pathlib import Path

from zero2llm.core.log import console
from zero2llm.data.encode import encode_documents
from zero2llm.data.mixture import MixtureRows, Phase
from zero2llm.data.pipeline.engines import cores
from zero2llm.data.rows import DocumentRows, FittedRows, Rows, StoredRows
from zero2llm.data.shards import TokenShards, build_shards, document_items, share, stream_items
from zero2llm.data.sources import BadRecords, Source, documents
from zero2llm.lab.data_config import DataConfig
from zero2llm.lab.recipe import Recipe
from zero2llm.tokenizers.tokenizer import Tokenizer

PACKINGS = {"concat": DocumentRows, "best_fit": FittedRows, "stored": StoredRows}


def prepared(paths: Sequence[str]) -> Path | None:
    """The folder of token files that ``paths`` names, if it is one."""
    folder = Path(paths[0])
    return folder if len(paths) == 1 and (folder / "offsets.bin").is_file() else None


def member_paths(data: DataConfig) -> dict[str, tuple[str, ...]]:
    """The training files of each source; a recipe without a mixture has one, without a name."""
    return {part.name: part.train for part in data.mixture} or {"": data.train}


def corpus(recipe: Recipe, tokenizer: Tokenizer, run: Path, key: str, bad: BadRecords) -> tuple[list[TokenShards], TokenShards]:
    """Training files of each source and validation files, made where they are missing or were made from something else."""
    data, members = recipe.data, member_paths(recipe.data)
    fraction = 0.0 if data.valid is not None else data.valid_fraction
    make = lambda name, groups, keep, bad: _files(data, tokenizer, run / "data" / name, groups, keep, key, bad)
    again = BadRecords(skip=bad.skip)  # what is bad in training files is counted where they are read for training
    try:
        train = [make("-".join(filter(None, ("train", name))), [paths], (fraction, 1.0), bad) for name, paths in members.items()]
        held = ([data.valid], (0.0, 1.0), bad) if data.valid else ([*members.values()], (0.0, fraction), again)
        valid = make("valid", *held)
    except ValueError as error:
        if "holds no usable record" in str(error) and data.valid is None:
            raise ValueError(
                f"data.valid_fraction = {fraction} leaves nothing for training or for validation; give data.valid, another "
                "fraction, or more data"
            ) from error
        raise
    return train, valid


def _files(
    data: DataConfig, tokenizer: Tokenizer, out: Path, groups: Sequence[tuple[str, ...]], keep: tuple[float, float], key: str,
    bad: BadRecords,
) -> TokenShards:  # fmt: skip
    """Token files of the documents whose share of the content's hash lies in ``keep``; ``groups`` = the paths of each source."""
    paths = tuple(path for group in groups for path in group)
    ready = _ready(data, paths, keep)
    if ready == "folder":
        return _open(Path(paths[0]), tokenizer)
    if ready == "stream":
        items = (item for path in paths for item in stream_items(Path(path), tokenizer))
        return build_shards(items, out, tokenizer=tokenizer, key=key, kind="clm")
    if data.max_documents is not None:  # the first so many of each source, which only reading in order can tell
        first = (islice(documents(group, field=data.field, bad=bad), data.max_documents) for group in groups)
        mine = (text for text in chain.from_iterable(first) if keep[0] <= share(text) < keep[1])
        return build_shards(document_items(mine, tokenizer), out, tokenizer=tokenizer, key=key, kind="clm")
    source = Source(paths=paths, field=data.field)
    return encode_documents([source], out, tokenizer, key=key, workers=data.workers or cores(), bad=bad, keep=keep)


def _ready(data: DataConfig, paths: tuple[str, ...], keep: tuple[float, float]) -> str:
    """"folder" of token files, "stream" of ids, or "" for documents. Raises ValueError for what would be read as what it is not."""
    for path in paths:
        if (Path(path) / "funnel.json").is_file():
            raise ValueError(f"{path}: all that a data recipe made; name its text ({path}/train-*.jsonl) or {path}/tokens/train")
    folders, streams = [p for p in paths if prepared([p])], [p for p in paths if str(p).endswith(".bin")]
    if not folders and not streams:
        return ""
    if len(paths) > len(streams) and len(paths) > 1:
        raise ValueError(f"{(folders or streams)[0]}: token files beside other files; give each a place of its own in data.mixture")
    if keep != (0.0, 1.0):
        raise ValueError(f"{paths[0]}: token files have no text to hold out by; give data.valid, token files too")
    if data.max_documents is not None:
        raise ValueError(f"data.max_documents = {data.max_documents}: {paths[0]} is taken whole; remove the key")
    return "folder" if folders else "stream"


def _open(folder: Path, tokenizer: Tokenizer) -> TokenShards:
    """Token files that the recipe did not make itself."""
    shards = TokenShards.open(folder)
    kind, made_with = shards.manifest["kind"], shards.manifest["tokenizer"]
    if kind == "clm" and made_with == tokenizer.fingerprint():
        return shards
    shards.close()
    if kind != "clm":
        raise ValueError(f"{folder}: token files of kind {kind!r}; pretraining takes documents ('clm')")
    raise ValueError(f"{folder}: was made with another tokenizer; name that one as tokenizer.path, or encode the text again")


def corpus_rows(recipe: Recipe, tokenizer: Tokenizer) -> Callable[[TokenShards, int | None], Rows]:
    kind = PACKINGS[recipe.data.packing]
    return lambda shards, seed: kind(shards, recipe.seq_len, tokenizer.pad_id, tokenizer.eos_id, seed)


def training_rows(recipe: Recipe, tokenizer: Tokenizer, train: list[TokenShards]) -> Rows:
    """The rows of the only source, or the mixture that the recipe describes."""
    rows = [corpus_rows(recipe, tokenizer)(shards, recipe.seed) for shards in train]
    if not recipe.data.mixture:
        return rows[0]
    names = [part.name for part in recipe.data.mixture]
    phases = [Phase(0, tuple(part.weight for part in recipe.data.mixture))]
    steps = [0, *(round(turn.at * recipe.fit.steps) for turn in recipe.data.curriculum), recipe.fit.steps]
    if any(a >= b for a, b in zip(steps, steps[1:], strict=False)):
        raise ValueError(
            f"data.curriculum: turns at {[turn.at for turn in recipe.data.curriculum]} of {recipe.fit.steps} steps begin at steps "
            f"{steps[1:-1]}: some phase would have none; move them apart, or train longer"
        )
    for turn, step in zip(recipe.data.curriculum, steps[1:], strict=False):
        phases.append(Phase(step * recipe.rows, tuple(turn.weights.get(name, 0.0) for name in names)))
    mixed = MixtureRows(rows, phases, recipe.seed)
    seen = mixed.epochs(recipe.fit.steps * recipe.rows)
    console().print(
        "mixture: " + ", ".join(f"{name} {n:.2f} epochs" for name, n in zip(names, seen, strict=True)), markup=False
    )
    return mixed
