"""The work of `zero2llm tokenizer train | encode | add`, and how all its verbs open a tokenizer."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table
from rich.text import Text

from zero2llm.core.files import new_folder
from zero2llm.core.log import console
from zero2llm.data.sources import BadRecords, documents
from zero2llm.lab.data_tools import tell_bad
from zero2llm.lab.talk import find_checkpoint
from zero2llm.model.resize import resized
from zero2llm.tokenizers.exports import write_ranks
from zero2llm.tokenizers.shipped import with_template
from zero2llm.tokenizers.tokenizer import Tokenizer
from zero2llm.train.checkpoint import save_model

SHADES = ("on grey23", "on dark_blue", "on dark_green", "on dark_magenta")  # neighbours differ


def open_tokenizer(path: str | Path, split: str | None = None, eos: str | None = None) -> Tokenizer:
    """A tokenizer in any form that can be read, or that of a checkpoint or run. Raises ValueError if there is none."""
    path = Path(path)
    if not (path / "tokenizer").is_dir() and (path / "checkpoints").is_dir():  # a run with a tokenizer from elsewhere
        return Tokenizer.load(find_checkpoint(path).tokenizer_dir)
    return Tokenizer.load(path / "tokenizer" if (path / "tokenizer").is_dir() else path, split, eos)


def train_tokenizer(
    files: list[str], out: Path, vocab_size: int, split: str, engine: str, field: str, overwrite: bool, kind: str = "bpe",
    skip: bool = False,
) -> None:  # fmt: skip
    """Train on the documents of ``files`` and write a folder that transformers opens too."""
    bad = BadRecords(skip=skip)
    with new_folder(out, overwrite) as part:
        texts = list(documents(files, field=field, bad=bad))
        tell_bad(bad)
        tokenizer = Tokenizer.train(texts, vocab_size, split=split, engine=engine, kind=kind)
        tokenizer.save(part)
    n_bytes, sample = sum(len(t.encode()) for t in texts[:500]), tokenizer.encode_batch(texts[:500])
    ratio = n_bytes / max(sum(map(len, sample)), 1)
    console().print(
        f"{out}: {tokenizer.vocab_size} tokens, {ratio:.2f} bytes per token on the first documents", markup=False
    )
    if tokenizer.loss:
        console().print(f"note: a text may not come back: {tokenizer.loss}", style="yellow", markup=False)


def show_tokens(path: Path, text: str, split: str | None = None, eos: str | None = None) -> None:
    """The text cut into its tokens, then each one: id, readable form, bytes."""
    tokenizer = open_tokenizer(path, split, eos)
    ids = tokenizer.encode(text)
    cut = Text()
    for place, i in enumerate(ids):
        cut.append(tokenizer.show(i), style=SHADES[place % len(SHADES)])
    table = Table("id", "token", "bytes")
    for i in ids:
        table.add_row(str(i), Text(tokenizer.show(i)), tokenizer.token_bytes(i).hex(" "))
    console().print(cut)
    console().print(table)
    n = len(text.encode())
    console().print(f"{len(ids)} tokens, {n} bytes: {n / max(len(ids), 1):.2f} bytes per token")
    if tokenizer.decode(ids) != text:
        console().print(f"note: it comes back as {tokenizer.decode(ids)!r}: {tokenizer.loss}", style="yellow", markup=False)


def add_tokens(checkpoint: Path, names: list[str], out: Path, special: bool, overwrite: bool) -> None:
    """A checkpoint whose model knows more tokens: everything so far stays, the new rows are the mean of the old ones."""
    source = find_checkpoint(checkpoint)
    old, model = Tokenizer.load(source.tokenizer_dir), source.load_model()
    new = old.add_tokens(names, special)
    size = max(model.cfg.vocab_size, new.vocab_size)
    model = resized(model, old.vocab_size, size)
    save_model(model, new.save, out, source, overwrite)
    first = old.vocab_size
    console().print(f"wrote {out}: {len(names)} tokens, ids {first} to {new.vocab_size - 1}, a vocabulary of {size}", markup=False)
    console().print("train it on text that holds them: until then they mean nothing to the model", style="dim", markup=False)


def convert_tokenizer(path: Path, out: Path, to: str, split: str | None, eos: str | None, template: str | None,
                      overwrite: bool) -> None:  # fmt: skip
    """Write it as a folder that transformers opens, or as tiktoken's ranks. Raises ValueError if that cannot say the same."""
    tokenizer = open_tokenizer(path, split, eos)
    tokenizer = with_template(tokenizer, template) if template else tokenizer
    if to == "hf":
        with new_folder(out, overwrite) as part:
            tokenizer.save(part)
    else:
        if out.exists() and not overwrite:
            raise ValueError(f"{out} already exists; choose another place or pass --overwrite")
        about = write_ranks(out, tokenizer.library)
        console().print(f"tiktoken.Encoding also needs pat_str={about['pat_str']!r}", markup=False, soft_wrap=True)
        console().print(f"and special_tokens={about['special_tokens']!r}", markup=False, soft_wrap=True)
        found = [token.content for token in tokenizer.added.values() if not token.special]
        for note in (
            "this tokenizer composes characters first: give tiktoken unicodedata.normalize('NFC', text)" if tokenizer.library.normalizer else "",
            f"{', '.join(found)}: found in text only with encode(text, allowed_special=...)" if found else "",
        ):
            if note:
                console().print(f"note: {note}", style="yellow", markup=False, soft_wrap=True)
    console().print(f"wrote {out}: {tokenizer.vocab_size} tokens, split rule {tokenizer.split or 'custom'}", markup=False)
    if tokenizer.split is None and tokenizer.nature.form == "bytes":
        console().print("note: llama.cpp knows split rules by name, and this one is none of ours (gpt2, llama3, qwen2); "
                        "a GGUF export will need its name", style="yellow", markup=False)  # fmt: skip
