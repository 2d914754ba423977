"""Which importer reads a path: by the names in a folder, and by content where a name says little.

    folder    tokenizer.json · vocab.json + merges.txt · encoder.json + vocab.bpe · tokenizer.model · *.model · *.tiktoken
    file      *.json  ·  *.model (SentencePiece, or Meta's ranks under that name)  ·  *.tiktoken  ·  vocab.bpe, merges.txt
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from zero2llm.tokenizers.foreign import read_foreign
from zero2llm.tokenizers.imports.found import Found
from zero2llm.tokenizers.imports.gpt2 import PAIRS, read_gpt2
from zero2llm.tokenizers.imports.hf import read_hf
from zero2llm.tokenizers.imports.ranks import read_ranks
from zero2llm.tokenizers.imports.sentencepiece import read_sentencepiece


def read(path: Path, split: str | None = None, eos: str | None = None) -> Found:
    """Raises ValueError naming the path if nothing there is a tokenizer that can be read."""
    if path.is_dir():
        return _folder(path, split, eos)
    for pair in PAIRS:
        if path.name in pair and all((path.parent / name).is_file() for name in pair):
            return read_gpt2(path.parent, pair, split, eos)
    if path.suffix == ".model":
        return read_ranks(path, split or "llama3", eos) if _is_ranks(path) else read_sentencepiece(path, eos)
    if path.suffix == ".tiktoken":
        return read_ranks(path, split, eos)
    return read_hf(path, eos)


def _folder(path: Path, split: str | None, eos: str | None) -> Found:
    if (path / "tokenizer.json").is_file():
        return read_hf(path / "tokenizer.json", eos)
    for pair in PAIRS:
        if all((path / name).is_file() for name in pair):
            return read_gpt2(path, pair, split, eos)
    files = sorted([*path.glob("*.model"), *path.glob("*.tiktoken")])
    if len(files) > 1:
        raise ValueError(f"{path}: holds several tokenizers, name one: {', '.join(f.name for f in files)}")
    if not files:
        return read_hf(path / "tokenizer.json", eos)  # says what is missing
    beside = read_foreign(path)
    return replace(read(files[0], split, eos), template=beside.choose() if beside.templates else None)


def _is_ranks(path: Path) -> bool:
    with open(path, "rb") as file:
        words = file.readline(4096).split()
    return len(words) == 2 and words[1].isdigit()
