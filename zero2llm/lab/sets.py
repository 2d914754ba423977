"""From a recipe's files to loaders: tokenizer, shards, packed batches for training and validation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from zero2llm.core.batch import Batch
from zero2llm.core.files import new_folder
from zero2llm.core.log import console
from zero2llm.data.sources import BadRecords, documents
from zero2llm.lab.recipe import DataConfig, Recipe, TokenizerConfig
from zero2llm.parallel.plan import World
from zero2llm.tokenizers.tokenizer import Tokenizer


@dataclass
class Sets:
    """``train`` repeats for ever and knows its place; ``valid()`` is one fresh pass over held-out rows."""

    train: Iterable[Batch]
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
            Tokenizer.train(_sample(texts, cfg.sample_bytes), cfg.vocab_size, split=cfg.split, engine=cfg.engine).save(part)
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
