"""Look at things: batches, tokens."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from rich.table import Table

from zero2llm.core.files import new_folder, write_atomic
from zero2llm.core.log import console
from zero2llm.data.inspect import inspect_html, inspect_terminal
from zero2llm.data.sources import BadRecords, documents
from zero2llm.lab.recipe import load_recipe
from zero2llm.lab.sets import build_sets
from zero2llm.lab.stage import start_model
from zero2llm.parallel.plan import World
from zero2llm.tokenizers.tokenizer import Tokenizer


def inspect_recipe(path: Path, overrides: list[str], rows: int, html: Path | None) -> None:
    """Build the recipe's data as training would and show its first batch."""
    recipe = load_recipe(path, overrides)
    with TemporaryDirectory(ignore_cleanup_errors=True) as scratch:  # the run's own folder is not touched
        _, tokenizer, _, _ = start_model(recipe, Path(scratch))
        batch = next(iter(build_sets(recipe, tokenizer, Path(scratch), World()).train))
        inspect_terminal(batch, tokenizer, rows)
        if html is not None:
            write_atomic(html, inspect_html(batch, tokenizer, rows))
            console().print(f"wrote {html}", markup=False)


def train_tokenizer(
    files: list[str], out: Path, vocab_size: int, split: str, engine: str, field: str, overwrite: bool
) -> None:
    """Train on the documents of ``files`` and write a folder that transformers opens too."""
    with new_folder(out, overwrite) as part:
        texts = list(documents(files, field=field, bad=BadRecords(skip=False)))
        tokenizer = Tokenizer.train(texts, vocab_size, split=split, engine=engine)
        tokenizer.save(part)
    n_bytes, sample = sum(len(t.encode()) for t in texts[:500]), tokenizer.encode_batch(texts[:500])
    ratio = n_bytes / max(sum(map(len, sample)), 1)
    console().print(
        f"{out}: {tokenizer.vocab_size} tokens, {ratio:.2f} bytes per token on the first documents", markup=False
    )


def show_tokens(folder: Path, text: str) -> None:
    """Each token of ``text``: id, readable form, bytes."""
    tokenizer = Tokenizer.load(folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder)
    ids = tokenizer.encode(text)
    table = Table("id", "token", "bytes")
    for i in ids:
        table.add_row(str(i), tokenizer.show(i), tokenizer.token_bytes(i).hex(" "))
    console().print(table)
    console().print(
        f"{len(ids)} tokens, {len(text.encode())} bytes: {len(text.encode()) / max(len(ids), 1):.2f} bytes per token"
    )
