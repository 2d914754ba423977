"""The verbs of `zero2llm tokenizer`. TOKENIZER is anything that can be read: our folder or a checkpoint, tokenizer.json,
SentencePiece's .model, tiktoken's ranks, GPT-2's vocab.json with merges.txt."""

from __future__ import annotations

from pathlib import Path

import click

HELP = {"context_settings": {"help_option_names": ["-h", "--help"], "show_default": True}}
PATH = click.Path(path_type=Path)

overwrite = click.option("--overwrite", is_flag=True, help="Replace what the output folder holds.")
field = click.option("--field", default="text", help="Field of JSON records that holds the text.")
skip = click.option("--skip-bad-records", is_flag=True, help="Leave bad records out and list them, instead of stopping at the first.")
rule = click.option("--split", help="How the text was cut, for tiktoken ranks whose name does not tell: cl100k_base, qwen ...")


@click.group(**HELP)
def tokenizer() -> None:
    """Train a tokenizer, read anyone's, see what they do to a text.

    TOKENIZER: a folder of ours, a checkpoint, a run, tokenizer.json, SentencePiece's .model, tiktoken ranks, or GPT-2's files.
    """


@tokenizer.command("train", **HELP)
@click.argument("files", nargs=-1, required=True, metavar="FILES...")
@click.option("--out", type=PATH, required=True, help="Folder to write.")
@click.option("--vocab-size", default=4096, help="Entries, special tokens included.")
@click.option("--kind", default="bpe", help="bpe or unigram (any text comes back), or wordpiece (blanks are lost).")
@click.option("--split", default="qwen2", help="How text is cut before merging: qwen2, llama3 or gpt2.")
@click.option("--engine", default="handwritten",
              help="handwritten (pure Python), library (tokenizers, for large text) or, for bpe, rustbpe (the fastest).")  # fmt: skip
@field
@skip
@overwrite
def train(files: tuple[str, ...], out: Path, vocab_size: int, kind: str, split: str, engine: str, field: str,
          skip_bad_records: bool, overwrite: bool) -> None:  # fmt: skip
    """Train a tokenizer on text files, folders, globs, or 'embedded'."""
    from zero2llm.lab.tokens import train_tokenizer

    train_tokenizer(list(files), out, vocab_size, split, engine, field, overwrite, kind, skip_bad_records)


@tokenizer.command("encode", **HELP)
@click.argument("path", type=PATH, metavar="TOKENIZER")
@click.argument("text")
@rule
def encode(path: Path, text: str, split: str | None) -> None:
    """Show TEXT cut into its tokens, then each token: id, readable form, bytes."""
    from zero2llm.lab.tokens import show_tokens

    show_tokens(path, text, split)


@tokenizer.command("view", **HELP)
@click.argument("path", type=PATH, metavar="TOKENIZER")
@click.option("--search", help="Only tokens that hold this: characters, bytes in hexadecimal, or the file's own spelling.")
@click.option("--ids", help="Only these: 300 or 300:400.")
@click.option("--sort", "order", type=click.Choice(["id", "frequency", "length"]), default="id")
@click.option("--limit", type=click.IntRange(1), default=40, help="Rows in the terminal.")
@click.option("--text", multiple=True, metavar="FILE", help="Count tokens in this text ('embedded', a file); may be repeated.")
@click.option("--token", help="How this token was merged: an id, or text that is one token.")
@click.option("--html", type=PATH, help="Also write a page with all of them.")
@field
@skip
@rule
def view(path: Path, search: str | None, ids: str | None, order: str, limit: int, text: tuple[str, ...], token: str | None,
         html: Path | None, field: str, skip_bad_records: bool, split: str | None) -> None:  # fmt: skip
    """Browse a vocabulary: why does the file look garbled, and what is in it?"""
    from zero2llm.lab.token_view import view as run

    run(path, search=search, ids=ids, order=order, limit=limit, text=text, field=field, token=token, html=html, split=split,
        skip=skip_bad_records)  # fmt: skip


@tokenizer.command("compare", **HELP)
@click.argument("paths", nargs=-1, required=True, metavar="[NAME=]TOKENIZER...")
@click.option("--text", multiple=True, metavar="FILE", help="Texts to encode; may be repeated. Without it: the embedded ones.")
@click.option("--sample-bytes", type=click.IntRange(1), default=200_000, help="About so much of each text.")
@click.option("--speed", is_flag=True, help="Also MB a second on one core.")
@click.option("--html", type=PATH, help="Also write a page with a chart.")
@field
@skip
@rule
def compare(paths: tuple[str, ...], text: tuple[str, ...], sample_bytes: int, speed: bool, html: Path | None, field: str,
            skip_bad_records: bool, split: str | None) -> None:  # fmt: skip
    """Bytes per token by language and domain, for several tokenizers side by side."""
    from zero2llm.lab.token_compare import compare as run

    run(paths, text=text, sample=sample_bytes, field=field, speed=speed, html=html, split=split, skip=skip_bad_records)


@tokenizer.command("convert", **HELP)
@click.argument("path", type=PATH, metavar="TOKENIZER")
@click.option("--out", type=PATH, required=True, help="Folder to write; with --to tiktoken a file.")
@click.option("--to", default="hf", type=click.Choice(["hf", "tiktoken"]), help="tokenizer.json for transformers, or tiktoken's ranks.")
@click.option("--eos", help="The token that ends a document, where the files do not say.")
@click.option("--template", help="Another chat template: a shipped name (chatml, qwen3, llama-3 ...) or a .jinja file.")
@rule
@overwrite
def convert(path: Path, out: Path, to: str, eos: str | None, template: str | None, split: str | None, overwrite: bool) -> None:
    """Write anyone's tokenizer as tokenizer.json (or tiktoken ranks) with the same ids."""
    from zero2llm.lab.tokens import convert_tokenizer

    convert_tokenizer(path, out, to, split, eos, template, overwrite)


@tokenizer.command("add", **HELP)
@click.argument("checkpoint", type=PATH)
@click.argument("tokens", nargs=-1, required=True, metavar="TOKENS...")
@click.option("--out", type=PATH, required=True, help="Folder of the new checkpoint.")
@click.option("--special", is_flag=True, help="Control tokens, which no text can spell; without it they are found in text.")
@overwrite
def add(checkpoint: Path, tokens: tuple[str, ...], out: Path, special: bool, overwrite: bool) -> None:
    """Give the model in CHECKPOINT more tokens; everything it knows stays."""
    from zero2llm.lab.tokens import add_tokens

    add_tokens(checkpoint, list(tokens), out, special, overwrite)
