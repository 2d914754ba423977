"""The same tokenizer through the tokenizers library: its file format, its speed, its trainer for large corpora."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from zero2llm.tokenizers.bpe import Pair
from zero2llm.tokenizers.bytes import SPLITS, alphabet, from_chars, splitter, to_chars
from zero2llm.tokenizers.nature import Nature
from zero2llm.tokenizers.special import SPECIALS


def shell(model: models.Model, split: str) -> Tokenizer:
    """A byte-level tokenizer around a model. Raises ValueError for an unknown split rule."""
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
    tokenizer = shell(models.BPE(vocab=vocab, merges=pairs), split)
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    return tokenizer


def train_library(texts: Iterable[str], vocab_size: int, split: str) -> list[Pair]:
    """Merges learned by the library: the same rule in Rust, for corpora of gigabytes."""
    tokenizer = shell(models.BPE(), split)
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
        raise ValueError(f"the tokenizer's model is {model.get('type')!r}, which has no merges; byte-level BPE has")
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
    return [(from_chars(a), from_chars(b)) for a, b in pairs]


def is_own(tokenizer: Tokenizer, nature: Nature) -> bool:
    """Whether it is a byte-level BPE of ours: control tokens first, then bytes and merges, then what was added later.

    Raises ValueError if it would be one but is damaged.
    """
    first = [tokenizer.token_to_id(s) for s in SPECIALS]
    if first != [0, 1, 2, 3] or (nature.model, nature.form) != ("BPE", "bytes") or nature.loss:
        return False
    vocab = tokenizer.get_vocab()
    made = len({*alphabet(), *(a + b for a, b in merges_of(tokenizer))}) + len(tokenizer.get_added_tokens_decoder())
    if sorted(vocab.values()) != list(range(len(vocab))) or made != len(vocab):
        raise ValueError(
            f"the tokenizer has {len(vocab)} entries, but control tokens, bytes and merges make {made}, or its "
            "ids have a hole: the file is damaged"
        )
    return True


def with_tokens(tokenizer: Tokenizer, names: Sequence[str], special: bool, pieces: Collection[bytes]) -> Tokenizer:
    """A copy with more tokens behind the last. ``pieces``: the bytes of those so far, which files may spell otherwise.

    Raises ValueError if one is empty, given twice or there already: a second token for the same text would hide the first.
    """
    known = tokenizer.get_vocab()
    for i, name in enumerate(names):
        there = name in known or name.encode() in pieces
        if not name or there or name in names[:i]:
            raise ValueError(f"token {name!r} is {'empty' if not name else 'there already' if there else 'given twice'}")
    twin, first = Tokenizer.from_str(tokenizer.to_str()), 1 + max(known.values())
    twin.add_tokens([AddedToken(name, special=special, normalized=False) for name in names])
    if [twin.token_to_id(name) for name in names] != list(range(first, first + len(names))):
        raise ValueError("the vocabulary's ids have holes, so new tokens cannot be put at its end")
    return twin
