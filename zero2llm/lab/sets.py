"""From a recipe's files to loaders: tokenizer, shards, packed batches for training and validation."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain, islice
from pathlib import Path

from zero2llm.core.batch import Batch
from zero2llm.core.config import to_dict
from zero2llm.core.files import new_folder, write_atomic
from zero2llm.core.log import console
from zero2llm.data.chats import conversation_items, judged_items, pair_items, prompt_items
from zero2llm.data.judged_rows import JudgedRows
from zero2llm.data.loader import Loader
from zero2llm.data.pipeline.run import stamp
from zero2llm.data.prompts import PromptRows
from zero2llm.data.rows import ConversationRows, PairRows, Rows
from zero2llm.data.schemas import conversations, judged, preferences, prompts
from zero2llm.data.shapes import Prompt
from zero2llm.data.shards import TokenShards, build_shards, share
from zero2llm.data.sources import BadRecords, documents, expand
from zero2llm.data.token_writer import Item
from zero2llm.lab.corpus import corpus, corpus_rows, member_paths, training_rows
from zero2llm.lab.data_config import DataConfig
from zero2llm.lab.objectives import makes_batches
from zero2llm.lab.recipe import Recipe, TokenizerConfig
from zero2llm.parallel.plan import World
from zero2llm.tokenizers.chat import Message, Style
from zero2llm.tokenizers.starts import begin_with
from zero2llm.tokenizers.tokenizer import Tokenizer
from zero2llm.train.rl.tools import schemas


@dataclass
class Sets:
    """``train`` repeats for ever and knows its place; ``valid()`` is one fresh pass over held-out rows.

    rows : what the two read, training first. In reinforcement learning prompts, until lab/online.py makes batches of them."""

    train: Loader | PromptRows | Iterable[Batch]
    valid: Callable[[], Iterable[Batch]]
    rows: tuple[Rows, Rows] | tuple[PromptRows, PromptRows]


def read_documents(data: DataConfig, paths: tuple[str, ...]) -> tuple[list[str], BadRecords]:
    bad = BadRecords(skip=data.skip_bad_records)
    return list(islice(documents(paths, field=data.field, bad=bad), data.max_documents)), bad


def build_tokenizer(cfg: TokenizerConfig, data: DataConfig, run: Path) -> tuple[Tokenizer, Path]:
    """The tokenizer that ``cfg`` names, or one trained on the training documents and kept in ``run/tokenizer``."""
    folder = run / "tokenizer"
    if cfg.path is not None:
        found = Tokenizer.load(cfg.path)
        if not found.own and not found.start_ids:  # training puts it before each document
            begin_with(found.library, found.roles.bos)
        keep_tokenizer(found, folder)
    elif not folder.is_dir():
        console().print(f"training a tokenizer of {cfg.vocab_size} entries ({cfg.kind}, {cfg.engine})", markup=False)
        texts, _ = read_documents(data, tuple(chain(*member_paths(data).values())))
        with new_folder(folder) as part:
            sample = _sample(texts, cfg.sample_bytes)
            Tokenizer.train(sample, cfg.vocab_size, split=cfg.split, engine=cfg.engine, kind=cfg.kind).save(part)
    return Tokenizer.load(folder), folder


def keep_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """In a run's own folder, whatever it came from and whatever else stood beside it there."""
    if not folder.is_dir():
        with new_folder(folder) as part:
            tokenizer.save(part)


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
    if recipe.form != "conversations" and (recipe.data.train_on, recipe.data.too_long) != ("assistant", "turns"):
        raise ValueError(f"data.train_on and data.too_long are for conversations; objective {recipe.objective.kind} reads {recipe.form}: remove them")
    if world.rank == 0:
        _shards(recipe, tokenizer, run)
    world.barrier()
    train, valid = _shards(recipe, tokenizer, run)

    def rows(shards: TokenShards, seed: int | None) -> Rows:
        if recipe.form == "documents":
            return corpus_rows(recipe, tokenizer)(shards, seed)
        if recipe.form == "conversations":
            return ConversationRows(shards, recipe.seq_len, tokenizer.pad_id, seed)
        if recipe.form == "judged":
            return JudgedRows(shards, recipe.seq_len, tokenizer.pad_id, seed)
        return PairRows(shards, tokenizer.pad_id, seed, recipe.seq_len)

    if recipe.form == "prompts":
        asked, held_out = PromptRows(train[0], recipe.seed), PromptRows(valid, recipe.seed)
        return Sets(asked, lambda: held_out, (asked, held_out))
    held_out = rows(valid, recipe.seed)  # shuffled: `valid_rows` must not mean the first file only
    source = training_rows(recipe, tokenizer, train) if recipe.form == "documents" else rows(train[0], recipe.seed)
    return loaders(recipe, source, held_out, world)


def loaders(recipe: Recipe, source: Rows, held_out: Rows, world: World) -> Sets:
    """Batches of these rows, as many to a batch as the recipe says."""
    n = min(recipe.rows, recipe.data.valid_rows or recipe.rows)

    def one_pass() -> Iterable[Batch]:
        loader = Loader(held_out, max(n // held_out.unit, 1) * held_out.unit, seed=recipe.seed, repeat=False)
        return islice(loader, -(-(recipe.data.valid_rows or 10**9) // n))

    rows = world.size if makes_batches(recipe.objective) else recipe.rows
    return Sets(Loader(source, rows, seed=recipe.seed, rank=world.rank, world=world.size), one_pass, (source, held_out))


def _shards(recipe: Recipe, tokenizer: Tokenizer, run: Path) -> tuple[list[TokenShards], TokenShards]:
    """Training and validation token files of the recipe, in ``run/data``."""
    bad, key = BadRecords(skip=recipe.data.skip_bad_records), _key(recipe, tokenizer)
    sides = cache(lambda: _sides(recipe, tokenizer, bad))
    try:
        if recipe.form == "documents":
            train, valid = corpus(recipe, tokenizer, run, key, bad)
        else:
            train = [_samples(run / "data" / "train", 0, sides, tokenizer, key, recipe)]
            valid = _samples(run / "data" / "valid", 1, sides, tokenizer, key, recipe)
    except ValueError as error:
        if not bad.found:
            raise
        raise ValueError(f"{error}; {bad.total} bad records were left out, the first: {bad.found[0]}") from None
    for what, n in sorted(bad.noted.items()):
        console().print(f"{what}: {n}", style="yellow", markup=False)
    if bad.found:
        console().print(
            f"{bad.total} bad records left out; the first: {bad.found[0]}", style="yellow", markup=False
        )
        write_atomic(run / "data" / "bad_records.txt", "\n".join(bad.lines()) + "\n")
    return train, valid


def _samples(folder: Path, side: int, sides: Callable, tokenizer: Tokenizer, key: str, recipe: Recipe) -> TokenShards:
    """Conversations or pairs of one side, made unless they stand there already."""
    if (folder / "manifest.json").is_file():
        shards = TokenShards.open(folder, verify=True)
        if (shards.manifest["key"], shards.manifest["tokenizer"]) == (key, tokenizer.fingerprint()):
            return shards
    return build_shards(sides()[side], folder, tokenizer=tokenizer, key=key, kind=_kind(recipe))


def _kind(recipe: Recipe) -> str:
    """What token files are named by: the objective, of which those that read the same share one."""
    return {"documents": "clm", "conversations": "sft"}.get(recipe.form, recipe.objective.kind)


def _key(recipe: Recipe, tokenizer: Tokenizer) -> str:
    """Names the data that token files were made from: options, every file with its size and time, and the chat template."""
    paths = [*chain(*member_paths(recipe.data).values()), *(recipe.data.valid or ())]
    files = [(str(p), *stamp(p)) for p in expand(paths)]
    data, kind = to_dict(recipe.data), _kind(recipe)
    for name in ("workers", "packing", "curriculum", "valid_rows", "reads"):  # these change batches, not token files
        del data[name]
    data["mixture"] = [{key: part[key] for key in ("name", "train")} for part in data["mixture"]]
    length = None if kind == "clm" else recipe.seq_len  # what does not fit is cut or refused there
    template = [] if kind == "clm" else [tokenizer.template]  # no part of the tokenizer's fingerprint
    asked = [recipe.rollout.max_tokens, recipe.rollout.tools] if recipe.form == "prompts" else []
    return hashlib.sha256(json.dumps([data, kind, length, files, *template, *asked]).encode()).hexdigest()


def _sides(recipe: Recipe, tokenizer: Tokenizer, bad: BadRecords) -> tuple[Iterable[Item], Iterable[Item]]:
    """Training and held-out items; held out by content where the recipe names no files for it."""
    data = recipe.data
    readers = {"conversations": partial(conversations, schema=data.sft_schema), "judged": judged, "pairs": preferences, "prompts": prompts}
    records = lambda paths: islice(readers[recipe.form](paths, bad), data.max_documents)
    if data.valid is not None:
        return tuple(_tokenized(recipe, tokenizer, records(paths), bad) for paths in (data.train, data.valid))
    sides: tuple[list, list] = ([], [])
    for record in records(data.train):
        asked = question(record)
        sides[share(asked["content"]) < data.valid_fraction].append(record)
    if not all(sides):
        raise ValueError(
            f"data.valid_fraction = {data.valid_fraction} leaves {len(sides[0])} records for training and {len(sides[1])} "
            "for validation; give data.valid, another fraction, or more data"
        )
    return tuple(_tokenized(recipe, tokenizer, side, bad) for side in sides)


def question(record) -> Message:
    """What decides on which side a record stands: the first question of a conversation, the last of anything else."""
    if isinstance(record, list):
        return next((m for m in record if m["role"] == "user"), record[0])
    return (record.messages if isinstance(record, Prompt) else record.prompt)[-1]


def _tokenized(recipe: Recipe, tokenizer: Tokenizer, records: Iterable, bad: BadRecords) -> Iterable[Item]:
    names, thinking = recipe.data.template_names, recipe.data.train_thinking
    style = Style(names, thinking) if names or not thinking else None
    if recipe.form == "prompts":
        room, tools = recipe.seq_len - recipe.rollout.max_tokens, schemas(recipe.rollout.tools) or None
        yield from prompt_items(records, tokenizer, room, bad, style, tools=tools)
        return
    if recipe.form == "judged":
        yield from judged_items(records, tokenizer, recipe.seq_len, bad, style)
        return
    if recipe.form == "pairs":
        yield from pair_items(records, tokenizer, recipe.seq_len, bad, style, margins=recipe.objective.kind == "reward")
        return
    notes: Counter[str] = Counter()
    choice = {"too_long": recipe.data.too_long, "train_on": recipe.data.train_on}
    yield from conversation_items(records, tokenizer, recipe.seq_len, bad, style, notes, **choice)
    if notes:
        console().print(", ".join(f"{what}: {n}" for what, n in sorted(notes.items())), style="yellow", markup=False)
