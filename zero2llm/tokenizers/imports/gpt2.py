"""GPT-2's files, vocab.json and merges.txt, also under their first names encoder.json and vocab.bpe.

    vocab.json   {piece in printable stand-ins: id}       merges.txt   "#version" and then two pieces a line, the first merge first

Source: openai/gpt-2 encoder.py. The split rule is GPT-2's unless a tokenizer.json says otherwise: the files name none.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, models

from zero2llm.core.files import read_json
from zero2llm.tokenizers.fast import shell
from zero2llm.tokenizers.imports.found import Found
from zero2llm.tokenizers.special import SPECIALS, guess_roles

PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))


def read_gpt2(folder: Path, names: tuple[str, str], split: str | None, eos: str | None) -> Found:
    """Raises ValueError naming file and line of what does not fit."""
    vocab_file, merges_file = (folder / name for name in names)
    vocab = read_json(vocab_file)
    merges = []
    for number, line in enumerate(merges_file.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        pair = line.split(" ")
        if len(pair) != 2:
            raise ValueError(f"{merges_file}, line {number}: two pieces with one blank between were expected, this is {line!r}")
        for piece in (*pair, "".join(pair)):
            if piece not in vocab:
                raise ValueError(f"{merges_file}, line {number}: {piece!r} is not in {vocab_file.name}; the files belong to two vocabularies")
        merges.append((pair[0], pair[1]))
    library = shell(models.BPE(vocab=vocab, merges=merges), split or "gpt2")
    roles = guess_roles(list(vocab), {"eos": eos} if eos else {})
    control = dict.fromkeys([roles.eos, roles.bos, *roles.stops, *(s for s in SPECIALS if s in vocab)])
    library.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in control])
    return Found(library, roles, None)
