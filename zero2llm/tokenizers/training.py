"""Learn a vocabulary: three kinds, by hand or with a library, all as one tokenizer file with our control tokens first.

    bpe         handwritten · library (tokenizers) · rustbpe      any text comes back
    unigram     handwritten · library                             any text comes back
    wordpiece   handwritten · library                             blanks are lost: for encoders, not for models that write
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Literal

from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

from zero2llm.tokenizers import unigram, wordpiece
from zero2llm.tokenizers.bpe import train_bpe
from zero2llm.tokenizers.bytes import SPLITS, splitter
from zero2llm.tokenizers.engines import train_rustbpe
from zero2llm.tokenizers.fast import assemble, train_library
from zero2llm.tokenizers.special import SPECIALS
from zero2llm.tokenizers.unigram import Unigram
from zero2llm.tokenizers.unigram_train import train_unigram
from zero2llm.tokenizers.wordpiece import WordPiece, train_wordpiece

Kind = Literal["bpe", "wordpiece", "unigram"]
Engine = Literal["handwritten", "library", "rustbpe"]
ENGINES = {"bpe": ("handwritten", "library", "rustbpe"), "wordpiece": ("handwritten", "library"), "unigram": ("handwritten", "library")}
Progress = Callable[[int, int], None]


def learn(texts: Iterable[str], vocab_size: int, kind: str, split: str, engine: str, progress: Progress | None) -> Library:
    """A library tokenizer of ``vocab_size`` entries, control tokens included.

    Raises ValueError for an unknown kind or engine, or a size that is too small or that the text does not yield.
    """
    if kind not in ENGINES:
        raise ValueError(f"tokenizer kind {kind!r} is unknown; there are: {', '.join(ENGINES)}")
    if engine not in ENGINES[kind]:
        raise ValueError(f"tokenizer engine {engine!r} is unknown; use {' or '.join(ENGINES[kind])}")
    splitter(split)  # refuses an unknown name
    learned = {"bpe": _bpe, "wordpiece": _wordpiece, "unigram": _unigram}[kind](texts, vocab_size, split, engine, progress)
    size = learned.get_vocab_size()
    if size > vocab_size:
        raise ValueError(f"vocab_size = {vocab_size} cannot hold the text's characters: it must be at least {size}")
    if size < vocab_size:
        raise ValueError(f"the text yields a vocabulary of {size}, not {vocab_size}: give more text or ask for less")
    return learned


def _bpe(texts: Iterable[str], vocab_size: int, split: str, engine: str, progress: Progress | None) -> Library:
    n_merges = vocab_size - len(SPECIALS) - 256
    if n_merges < 0:
        raise ValueError(f"vocab_size = {vocab_size} must be at least {len(SPECIALS) + 256}: control tokens and bytes")
    if engine == "library":
        merges = train_library(texts, vocab_size, split)
    elif engine == "rustbpe":
        merges = train_rustbpe(texts, n_merges, split)
    else:
        merges = train_bpe(texts, n_merges, split, progress)
    return assemble(merges, split)


def _wordpiece(texts: Iterable[str], vocab_size: int, split: str, engine: str, progress: Progress | None) -> Library:
    """Cut as BERT cuts: ``split`` says nothing here."""
    size = vocab_size - len(SPECIALS)
    if engine == "handwritten":
        vocab = train_wordpiece(texts, size, progress=progress)
    else:
        learner = Library(models.WordPiece(unk_token=wordpiece.UNKNOWN))
        learner.normalizer = normalizers.BertNormalizer(clean_text=True, handle_chinese_chars=True, strip_accents=False, lowercase=False)
        learner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        learner.train_from_iterator(texts, trainers.WordPieceTrainer(
            vocab_size=size, min_frequency=2, special_tokens=[wordpiece.UNKNOWN], show_progress=False))  # fmt: skip
        ids = learner.get_vocab()
        vocab = sorted(ids, key=ids.__getitem__)
    return WordPiece(vocab, first_id=len(SPECIALS)).to_library(SPECIALS)


def _unigram(texts: Iterable[str], vocab_size: int, split: str, engine: str, progress: Progress | None) -> Library:
    """With byte fallback. The library's trainer learns the pieces; bytes and control tokens are put before them."""
    size = vocab_size - len(SPECIALS)
    if engine == "handwritten":
        pieces = train_unigram(texts, size, split=split, progress=progress)
    else:
        if size <= len(unigram.BYTES):
            raise ValueError(f"vocab_size = {vocab_size} must be more than {len(SPECIALS) + 256}: control tokens and bytes")
        spelling = set().union(*unigram.BYTES, *SPECIALS)  # text that spells a control token must have pieces of its own
        learner = Library(models.Unigram())
        learner.pre_tokenizer = pre_tokenizers.Split(Regex(SPLITS[split]), "isolated")
        trainer = trainers.UnigramTrainer(
            vocab_size=size - len(unigram.BYTES), initial_alphabet=sorted(spelling), special_tokens=[], show_progress=False
        )
        try:
            learner.train_from_iterator(texts, trainer)
        except Exception as error:  # the library raises bare Exception
            if "not large enough" not in str(error):
                raise
            raise ValueError(
                f"vocab_size = {vocab_size} cannot hold {len(SPECIALS) + 256} control tokens and bytes and the text's characters: "
                "raise it, or take engine handwritten, which leaves the rarest characters to bytes"
            ) from error
        learned = json.loads(learner.to_str())["model"]["vocab"]
        pieces = [*((name, 0.0) for name in unigram.BYTES), *((piece, score) for piece, score in learned)]
    return Unigram(pieces, split=split, first_id=len(SPECIALS)).to_library(SPECIALS)
