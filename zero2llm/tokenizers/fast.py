"""The same tokenizer through the tokenizers library: its file format, its speed, its trainer for large corpora."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from zero2llm.tokenizers.bpe import Pair
from zero2llm.tokenizers.bytes import SPLITS, alphabet, from_chars, splitter, to_chars
from zero2llm.tokenizers.special import SPECIALS


def _shell(model: models.Model, split: str) -> Tokenizer:
    splitter(split)  # refuses an unknown name
    tokenizer = Tokenizer(model)
    cut = pre_tokenizers.Split(Regex(SPLITS[split]), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def assemble(merges: Sequence[Pair], split: str, specials: Sequence[str] = SPECIALS) -> Tokenizer:
    """Specials, then the 256 bytes, then one token per merge."""
    tokens = dict.fromkeys([*map(to_chars, alphabet()), *(to_chars(a + b) for a, b in merges)])
    vocab = {token: i for i, token in enumerate([*specials, *tokens])}
    pairs = [(to_chars(a), to_chars(b)) for a, b in merges]
    tokenizer = _shell(models.BPE(vocab=vocab, merges=pairs), split)
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    return tokenizer


def train_library(texts: Iterable[str], vocab_size: int, split: str) -> list[Pair]:
    """Merges learned by the library: the same rule in Rust, for corpora of gigabytes."""
    tokenizer = _shell(models.BPE(), split)
    characters = [to_chars(b) for b in alphabet()]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIALS), initial_alphabet=characters, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return merges_of(tokenizer)


def merges_of(tokenizer: Tokenizer) -> list[Pair]:
    """The merges in a library tokenizer. Raises ValueError if it is no byte-level BPE."""
    model = json.loads(tokenizer.to_str())["model"]
    if model.get("type") != "BPE":
        raise ValueError(f"the tokenizer's model is {model.get('type')!r}; byte-level BPE is what this version reads")
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
    return [(from_chars(a), from_chars(b)) for a, b in pairs]


def split_of(tokenizer: Tokenizer) -> str | None:
    """The name of its split rule, None if it is none of ours."""
    text = json.dumps(json.loads(tokenizer.to_str())["pre_tokenizer"])
    return next((name for name, rule in SPLITS.items() if json.dumps(rule)[1:-1] in text), None)
