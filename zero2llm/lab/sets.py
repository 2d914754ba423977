"""From a recipe's files to loaders: tokenizer, shards, packed batches for training and validation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path

from zero2llm.core.batch import Batch
from zero2llm.core.config import to_dict
from zero2llm.core.files import new_folder, write_atomic
from zero2llm.core.log import console
from zero2llm.data.chats import conversation_items, pair_items
from zero2llm.data.loader import ConversationRows, DocumentRows, Loader, PairRows
from zero2llm.data.schemas import conversations, preferences
from zero2llm.data.shards import Item, TokenShards, build_shards, document_items, share, split_documents
from zero2llm.data.sources import BadRecords, documents, expand
from zero2llm.lab.recipe import DataConfig, Recipe, TokenizerConfig
from zero2llm.parallel.plan import World
from zero2llm.tokenizers.tokenizer import Tokenizer


@dataclass
class Sets:
    """``train`` repeats for ever and knows its place; ``valid()`` is one fresh pass over held-out rows."""

    train: Loader
    valid: Callable[[], Iterable[Batch]]


def read_documents(data: DataConfig, paths: tuple[str, ...]) -> tuple[list[str], BadRecords]:
    bad = BadRecords(skip=data.skip_bad_records)
    return list(islice(documents(paths, field=data.field, bad=bad), data.max_documents)), bad


def build_tokenizer(cfg: TokenizerConfig, data: DataConfig, run: Path) -> tuple[Tokenizer, Path]:
    """The tokenizer that ``cfg`` names, or one trained on the training documents and kept in ``run/tokenizer``."""
    if cfg.path is not None:
        return Tokenizer.load(cfg.path), Path(cfg.path)
    folder = run / "tokenizer"
    if not folder.is_dir():
        console().print(f"training a tokenizer of {cfg.vocab_size} entries ({cfg.engine})", markup=False)
        texts, _ = read_documents(data, data.train)
        with new_folder(folder) as part:
            Tokenizer.train(_sample(texts, cfg.sample_bytes), cfg.vocab_size, split=cfg.split, engine=cfg.engine).save(
                part
            )
    return Tokenizer.load(folder), folder


def _sample(texts: list[str], n_bytes: int | None) -> list[str]:
    """Documents spread evenly over ``texts``, about ``n_bytes`` in all."""
    total = sum(len(t.encode()) for t in texts)
    if n_bytes is None or total <= n_bytes:
        return texts
    keep, taken, passed = [], 0, 0
    for text in texts:
        passed += len(text.encode())
        if taken < passed * n_bytes / total:
            keep.append(text)
            taken += len(text.encode())
    return keep


def build_sets(recipe: Recipe, tokenizer: Tokenizer, run: Path, world: World) -> Sets:
    """Loaders for ``recipe``; token files are made once, by rank 0, and reused while files and options stay the same."""
    if world.rank == 0:
        _shards(recipe, tokenizer, run)
    world.barrier()
    train, valid = _shards(recipe, tokenizer, run)
    kind, ranks = recipe.objective.kind, {"rank": world.rank, "world": world.size}

    def rows(shards: TokenShards, seed: int | None):
        if kind == "clm":
            return DocumentRows(shards, recipe.seq_len, tokenizer.pad_id, tokenizer.eos_id, seed)
        if kind == "sft":
            return ConversationRows(shards, recipe.seq_len, tokenizer.pad_id, seed)
        return PairRows(shards, tokenizer.pad_id, seed)

    held_out = rows(valid, recipe.seed)  # shuffled: `valid_rows` must not mean the first file only
    n = min(recipe.rows, recipe.data.valid_rows or recipe.rows)

    def one_pass() -> Iterable[Batch]:
        loader = Loader(held_out, max(n // held_out.unit, 1) * held_out.unit, seed=recipe.seed, repeat=False)
        return islice(loader, -(-(recipe.data.valid_rows or 10**9) // n))

    return Sets(Loader(rows(train, recipe.seed), recipe.rows, seed=recipe.seed, **ranks), one_pass)


def _shards(recipe: Recipe, tokenizer: Tokenizer, run: Path) -> tuple[TokenShards, TokenShards]:
    """Training and validation token files of the recipe, in ``run/data``."""
    data, bad = recipe.data, BadRecords(skip=recipe.data.skip_bad_records)
    key = _key(recipe)
    if data.valid is not None:
        parts = [
            (name, lambda paths=paths: _items(recipe, tokenizer, paths, bad))
            for name, paths in (("train", data.train), ("valid", data.valid))
        ]
    else:
        split = cache(lambda: _split(recipe, tokenizer, bad))
        parts = [("train", lambda: split()[0]), ("valid", lambda: split()[1])]
    made = []
    for name, items in parts:
        folder = run / "data" / name
        made.append(
            _reuse(folder, tokenizer, key)
            or build_shards(items(), folder, tokenizer=tokenizer, key=key, kind=recipe.objective.kind)
        )
    if bad.found:
        console().print(
            f"{len(bad.found)} bad records left out; the first: {bad.found[0]}", style="yellow", markup=False
        )
        write_atomic(run / "data" / "bad_records.txt", "\n".join(bad.found) + "\n")
    return made[0], made[1]


def _key(recipe: Recipe) -> str:
    """Names the data that token files were made from: options, and every file with its size and time."""
    paths = [*recipe.data.train, *(recipe.data.valid or ())]
    files = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in expand(paths)]
    return hashlib.sha256(
        json.dumps([to_dict(recipe.data), recipe.objective.kind, recipe.seq_len, files]).encode()
    ).hexdigest()


def _reuse(folder: Path, tokenizer: Tokenizer, key: str) -> TokenShards | None:
    if not (folder / "manifest.json").is_file():
        return None
    shards = TokenShards.open(folder, verify=True)
    return shards if (shards.manifest["key"], shards.manifest["tokenizer"]) == (key, tokenizer.fingerprint()) else None


def _split(recipe: Recipe, tokenizer: Tokenizer, bad: BadRecords) -> tuple[Iterable[Item], Iterable[Item]]:
    """Held-out data by content where the recipe names none: documents, or whole conversations and pairs."""
    fraction = recipe.data.valid_fraction
    if recipe.objective.kind == "clm":
        texts = list(islice(documents(recipe.data.train, field=recipe.data.field, bad=bad), recipe.data.max_documents))
        train, valid = split_documents(texts, fraction)
        _check_split(len(train), len(valid), fraction)
        return document_items(train, tokenizer), document_items(valid, tokenizer)
    read = conversations if recipe.objective.kind == "sft" else preferences
    records = list(islice(read(recipe.data.train, bad), recipe.data.max_documents))
    sides: tuple[list, list] = ([], [])
    for record in records:
        asked = record[0] if recipe.objective.kind == "sft" else record.prompt[-1]
        sides[share(asked["content"]) < fraction].append(record)
    _check_split(len(sides[0]), len(sides[1]), fraction)
    return _tokenized(recipe, tokenizer, sides[0], bad), _tokenized(recipe, tokenizer, sides[1], bad)


def _check_split(n_train: int, n_valid: int, fraction: float) -> None:
    if not n_train or not n_valid:
        raise ValueError(
            f"data.valid_fraction = {fraction} leaves {n_train} records for training and {n_valid} for validation; "
            "give data.valid, another fraction, or more data"
        )


def _items(recipe: Recipe, tokenizer: Tokenizer, paths: tuple[str, ...], bad: BadRecords) -> Iterable[Item]:
    if recipe.objective.kind == "clm":
        return document_items(
            islice(documents(paths, field=recipe.data.field, bad=bad), recipe.data.max_documents), tokenizer
        )
    read = conversations if recipe.objective.kind == "sft" else preferences
    return _tokenized(recipe, tokenizer, islice(read(paths, bad), recipe.data.max_documents), bad)


def _tokenized(recipe: Recipe, tokenizer: Tokenizer, records: Iterable, bad: BadRecords) -> Iterable[Item]:
    make = conversation_items if recipe.objective.kind == "sft" else pair_items
    return make(records, tokenizer, recipe.seq_len, bad)
