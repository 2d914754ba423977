"""Unigram against SentencePiece and the tokenizers library: the same ids from the same pieces, training as good as theirs."""

import io
import random
import struct
from collections import Counter
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from zero2llm.data.sources import documents
from zero2llm.tokenizers.bytes import SPLITS
from zero2llm.tokenizers.special import SPECIALS
from zero2llm.tokenizers.unigram import BYTES, UNKNOWN, WORDS, Unigram
from zero2llm.tokenizers.unigram_train import digamma, train_unigram

ALPHABET = "abc中国▁ \n"
PIECES = st.dictionaries(st.text("abc中国▁", min_size=1, max_size=4), st.integers(-1200, -1).map(lambda n: n / 64), min_size=1, max_size=40)
TEXT = st.text(ALPHABET + "é🙂", max_size=40)


def sentencepiece(pieces, kinds, prefix):
    """A SentencePiece model with these pieces, written by hand: its own message classes want another protobuf than ours."""
    import sentencepiece

    def varint(n):
        return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)

    field = lambda number, data: varint(number << 3 | 2) + varint(len(data)) + data
    flag = lambda number, value: varint(number << 3) + varint(value)
    out = b""
    for (piece, score), kind in zip(pieces, kinds, strict=True):
        out += field(1, field(1, piece.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score) + flag(3, kind))
    trainer = flag(3, 1) + flag(35, int(6 in kinds)) + flag(40, 0) + b"".join(varint(n << 3) + varint(2**64 - 1) for n in (41, 42, 43))
    normalizer = field(1, b"identity") + flag(3, int(prefix)) + flag(4, 0) + flag(5, 1)
    return sentencepiece.SentencePieceProcessor(model_proto=out + field(2, trainer) + field(3, normalizer))


def vocabulary(pieces, with_bytes):
    bytes_ = [(b, 0.0) for b in BYTES] if with_bytes else []
    return [(UNKNOWN, 0.0), *bytes_, *pieces.items()], [2, *(6 for _ in bytes_), *(1 for _ in pieces)]


@settings(max_examples=250, deadline=None)
@given(pieces=PIECES, text=TEXT, with_bytes=st.booleans(), prefix=st.booleans())
def test_sentencepiece_gives_the_same_ids(pieces, text, with_bytes, prefix):
    """Scores are multiples of 1/64, exact in its single precision, so that ties are ties on both sides."""
    listed, kinds = vocabulary(pieces, with_bytes)
    ours = Unigram(listed, split="none", space="▁", prefix=prefix)
    theirs = sentencepiece(listed, kinds, prefix)
    assert ours.encode(text) == theirs.encode(text)
    if with_bytes and "▁" in pieces:
        assert ours.decode(ours.encode(text)) == theirs.decode(ours.encode(text)) == text.replace("▁", " ")


@settings(max_examples=150, deadline=None)
@given(pieces=PIECES, text=st.text("abc中", min_size=1, max_size=12))
def test_sentencepiece_finds_the_same_best_cuts(pieces, text):
    listed, kinds = vocabulary({c: -9.0 for c in "abc中"} | pieces, False)
    ours = Unigram(listed, split="none", space="▁").best(text, 6)
    theirs = sentencepiece(listed, kinds, False).nbest_encode(text, nbest_size=6)
    score = dict(enumerate(s for _, s in listed))
    assert [sum(score[i] for i in ids) for ids in theirs] == [s for _, s in ours]


def test_sentencepiece_draws_with_the_same_frequencies():
    listed, kinds = vocabulary({"a": -2.0, "b": -2.5, "ab": -3.0, "aba": -5.0, "ba": -3.5, "中": -4.0}, False)
    ours, theirs = Unigram(listed, split="none"), sentencepiece(listed, kinds, False)
    rng, n = random.Random(3), 4000
    a = Counter(tuple(ours.sample("abab中a", 0.4, rng)) for _ in range(n))
    b = Counter(tuple(theirs.encode("abab中a", enable_sampling=True, alpha=0.4, nbest_size=-1)) for _ in range(n))
    assert a.keys() == b.keys() and all(abs(a[cut] - b[cut]) < 0.04 * n for cut in a)


@settings(max_examples=250, deadline=None)
@given(pieces=PIECES, text=TEXT, with_bytes=st.booleans())
def test_the_library_gives_the_same_ids(pieces, text, with_bytes):
    listed, _ = vocabulary(pieces, with_bytes)
    ours = Unigram(listed, split="none")
    low = min(pieces.values())  # the library's floor is over all pieces, so control pieces must not lower it
    library = Tokenizer(models.Unigram([(p, s if p in pieces else low) for p, s in listed], 0, with_bytes))
    assert library.encode(text).ids == ours.encode(text)


# What we save is what we are.

STYLES = {
    "ours": {},
    "SentencePiece's": {"split": "space", "space": "▁", "prefix": True},
    "blanks as they are": {"split": "space"},
    "whole text, no bytes": {"split": "none", "byte_fallback": False},
}


@cache
def corpus():
    return [*documents(["embedded:en_moby_dick"])][:8] + [*documents(["embedded:zh_poetry_small"])][:60]


@cache
def saved(style):
    options = dict(STYLES[style])
    pieces = train_unigram(corpus(), 2200, **options)
    options.pop("byte_fallback", None)
    ours = Unigram(pieces, first_id=len(SPECIALS), **options)
    library = ours.to_library(SPECIALS)
    library.encode_special_tokens = True
    return ours, library


ANY = st.text(max_size=30) | st.text("the whale 窈窕淑女 <|im_end|> <0x41>▁\r\n12", max_size=40)
TYPED = st.lists(st.sampled_from(["<|im_end|>", "<0x41>", "<unk>", " ", "the", "窈窕", "▁", "<0xE4>", "\n\n", "🙂"]), max_size=8).map("".join)


@pytest.mark.parametrize("style", list(STYLES))
@settings(max_examples=150, deadline=None)
@given(text=ANY | TYPED)
def test_the_saved_tokenizer_gives_the_same_ids_and_text(style, text):
    ours, library = saved(style)
    ids = ours.encode(text)
    assert library.encode(text).ids == ids and library.decode(ids) == ours.decode(ids)
    if style in ("ours", "blanks as they are"):
        assert ours.decode(ids) == text and b"".join(map(ours.piece_bytes, ids)) == text.encode()
    assert all(i >= len(SPECIALS) for i in ids)


@pytest.mark.parametrize("style", list(STYLES))
def test_the_saved_tokenizer_on_books(style):
    ours, library = saved(style)
    again = Tokenizer.from_str(library.to_str())
    again.encode_special_tokens = True
    for text in [*documents(["embedded:en_austen"])][:3] + [*documents(["embedded:zh_classical_prose"])][:8]:
        assert ours.encode(text) == library.encode(text).ids == again.encode(text).ids
    assert again.get_vocab_size() == 2204 and [again.token_to_id(s) for s in SPECIALS] == [0, 1, 2, 3]


def test_digamma_is_torch_s():
    import torch

    x = torch.cat([torch.linspace(0.5, 10, 200, dtype=torch.float64), torch.logspace(1, 8, 50, dtype=torch.float64)])
    torch.testing.assert_close(torch.from_numpy(digamma(x.numpy())), torch.digamma(x), rtol=1e-9, atol=1e-9)


# Bytes per token.


def rate(encode, texts):
    return sum(len(text.encode()) for text in texts) / sum(len(encode(text)) for text in texts)


def ours_and_library(texts, size, split):
    rule = WORDS if split == "space" else SPLITS[split]
    library = Tokenizer(models.Unigram())
    library.pre_tokenizer, library.decoder = pre_tokenizers.Split(Regex(rule), "isolated"), decoders.Fuse()
    library.train_from_iterator(texts, trainers.UnigramTrainer(vocab_size=size, unk_token=UNKNOWN, special_tokens=[UNKNOWN], show_progress=False))
    pieces = train_unigram(texts, size, split=split, byte_fallback=False, coverage=1.0)
    assert len(pieces) == size >= library.get_vocab_size()  # it takes no seed that ends a word in each of its places
    return rate(Unigram(pieces, split=split).encode, texts), rate(lambda text: library.encode(text).ids, texts)


def ours_and_sentencepiece(texts, size):
    import sentencepiece

    lines = [line for text in texts for line in text.split("\n") if line]
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=out, vocab_size=size, model_type="unigram", character_coverage=0.9995, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, bos_id=-1, eos_id=-1, num_threads=1, minloglevel=2,
        max_sentence_length=1 << 20, split_by_unicode_script=False, split_by_number=False,
    )  # fmt: skip
    theirs = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
    options = {"split": "space", "space": "▁", "prefix": True}
    pieces = train_unigram(lines, size, **options)
    assert len(pieces) == size == theirs.vocab_size()
    return rate(Unigram(pieces, **options).encode, lines), rate(theirs.encode, lines)


@cache
def megabyte(name, size):
    texts, n = [], 0
    for text in documents([f"embedded:{name}"]):
        texts.append(text)
        n += len(text.encode())
        if n > size:
            break
    return texts


@pytest.mark.parametrize("name,size", [("en_austen", 2000), ("zh_songci", 4000)])
def test_training_is_as_good_as_the_libraries(name, size):
    texts = megabyte(name, 150_000)
    for ours, theirs in (ours_and_library(texts, size, "qwen2"), ours_and_sentencepiece(texts, size)):
        assert ours > 0.98 * theirs


@pytest.mark.slow
@pytest.mark.parametrize("name", ["en_austen", "en_moby_dick", "zh_songci", "zh_classical_prose"])
def test_training_on_a_megabyte_is_as_good_as_the_libraries(name):
    texts = megabyte(name, 1_000_000)
    for ours, theirs in (ours_and_library(texts, 8000, "qwen2"), ours_and_library(texts, 8000, "space"), ours_and_sentencepiece(texts, 8000)):
        assert ours > 0.98 * theirs
