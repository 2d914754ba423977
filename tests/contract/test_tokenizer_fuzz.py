"""Any text and any bytes come back from every tokenizer that claims it, and every engine gives the same ids."""

from __future__ import annotations

import json
import random
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Library

from zero2llm.data.sources import documents
from zero2llm.tokenizers import engines
from zero2llm.tokenizers.bytes import SPLITS, alphabet, to_chars
from zero2llm.tokenizers.chat import chatml
from zero2llm.tokenizers.engines import Tiktoken, parts_of, ranks_of, refusal, tiktoken_engine
from zero2llm.tokenizers.ladder import SmallBPE
from zero2llm.tokenizers.special import SPECIALS
from zero2llm.tokenizers.tokenizer import Tokenizer

ANYTHING = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("ab the's\n\t 关雎\u0301ｆ▁<|im_end|>0x41")), max_size=60)


@cache
def corpus() -> tuple[str, ...]:
    return (*list(documents(["embedded:zh_poetry_small"]))[:100], *list(documents(["embedded:en_moby_dick"]))[:10], "aaaaaa abab " * 20)


@cache
def own(split: str = "qwen2") -> Tokenizer:
    return Tokenizer.train(corpus(), 1200, split=split)


def qwen() -> Tokenizer:
    library = Library.from_str(own().library.to_str())
    library.normalizer = normalizers.NFC()
    return Tokenizer(library, chatml())


def blanks() -> Tokenizer:
    """SentencePiece's way: U+2581, a blank in front, byte pieces."""
    pieces = [("<unk>", 0.0), *((f"<0x{b:02X}>", 0.0) for b in range(256)), *((c, -4.0 - i / 99) for i, c in enumerate("▁abcdehint<>|m_0x41关雎"))]
    library = Library(models.Unigram([*((s, 0.0) for s in SPECIALS), *pieces, ("▁the", -3.0), ("▁▁", -5.0)], 4, True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend(" "), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    library.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in (*SPECIALS, "<unk>")])
    return Tokenizer(library, chatml())


MADE = {
    **{f"bpe, {split}": lambda split=split: own(split) for split in SPLITS},
    "bpe, more tokens": lambda: own().add_tokens(["<think>", "关关"]).add_tokens(["<|tool|>"], special=True),
    "bpe, rustbpe": lambda: pytest.importorskip("rustbpe") and Tokenizer.train(corpus(), 1200, engine="rustbpe"),
    "unigram": lambda: Tokenizer.train(corpus(), 2000, kind="unigram"),
    "unigram, library": lambda: Tokenizer.train(corpus(), 2000, kind="unigram", engine="library"),
    "blanks": blanks,
    "bpe, NFC": qwen,
}
MADE = {name: cache(make) for name, make in MADE.items()}


@pytest.mark.parametrize("name", list(MADE))
def test_any_text_comes_back(name):
    t = MADE[name]()

    @settings(max_examples=80, deadline=None)
    @given(ANYTHING)
    def back(text):
        ids = t.encode(text)
        assert not t.special_ids & set(ids) and ids == t.encode_batch([text, "x"])[0]
        stream = t.stream()
        assert "".join([stream.push(i) for i in ids]) + stream.flush() == t.decode(ids)
        assert t.loss or t.decode(ids) == text
        assert t.loss or sum(t.byte_lengths()[i] for i in ids) == len(text.encode())

    back()
    assert bool(t.loss) == (name in ("blanks", "bpe, NFC"))


@pytest.mark.parametrize("name", list(MADE))
def test_any_bytes_come_back(name):
    t = MADE[name]()

    @settings(max_examples=80, deadline=None)
    @given(st.one_of(st.binary(max_size=40), ANYTHING.map(str.encode), st.tuples(ANYTHING, st.binary(max_size=4)).map(lambda p: p[0].encode() + p[1])))
    def back(data):
        ids = t.encode_bytes(data)
        assert t.decode_bytes(ids) == data and not t.special_ids & set(ids)

    back()
    assert t.decode_bytes(t.encode_bytes(" e\u0301 ▁".encode() + bytes(range(256)))) == " e\u0301 ▁".encode() + bytes(range(256))


def test_wordpiece_says_what_it_cannot_do():
    t = Tokenizer.train(corpus(), 2300, kind="wordpiece")
    assert t.decode(t.encode("the  cat")) != "the  cat" and "decoding guesses" in t.loss
    for call in (lambda: t.encode_bytes(b"x"), lambda: t.decode_bytes([9]), t.byte_lengths):
        with pytest.raises(ValueError, match="WordPiece without bytes"):
            call()
    with pytest.raises(ValueError, match="handwritten encoder"):
        t.handwritten()
    ids = t.encode("the whale, the sea")
    stream = t.stream()
    assert "".join([stream.push(i) for i in ids]) + stream.flush() == t.decode(ids) == "the whale , the sea"


# ---------------------------------------------------------------------------------------------------------- engines


def engine_of(t: Tokenizer) -> Tiktoken:
    pytest.importorskip("tiktoken")
    assert isinstance(t.engine, Tiktoken), t.engine
    return t.engine


@pytest.mark.parametrize("name", [n for n in MADE if n.startswith("bpe")])
def test_tiktoken_gives_the_same_ids(name):
    t = MADE[name]()
    engine = engine_of(t)

    @settings(max_examples=150, deadline=None)
    @given(ANYTHING)
    def same(text):
        assert engine.encode(text) == t.core.encode(text, add_special_tokens=False).ids

    same()
    rng = random.Random(0)
    texts = ["".join(rng.choice("aab b\n关雎's1") for _ in range(rng.randrange(200))) for _ in range(300)] + list(corpus())
    assert engine.encode_batch(texts) == [t.core.encode(x, add_special_tokens=False).ids for x in texts] == t.encode_batch(texts)


def test_the_switch_to_the_fast_engine_is_not_seen():
    t = Tokenizer.train(corpus(), 500)
    few = t.encode_batch(corpus()[:3])
    assert t._fast is None  # making an engine for a sentence would take longer than the sentence
    for _ in range(30):
        t.encode_batch(corpus())
    engine_of(t)
    assert t.encode_batch(corpus()[:3]) == few == [t.encode(x) for x in corpus()[:3]]


@pytest.mark.parametrize("split", list(SPLITS))
def test_every_character_is_cut_alike(split):
    """Each code point between a letter, a digit and a blank: the libraries' Unicode tables agree, or the engine is refused."""
    t = own(split)
    engine = engine_of(t)
    codes = [*range(0xD800), *range(0xE000, 0x30000, 1), 0xE0001, 0x10FFFD]
    text = "".join(f"a{chr(c)}1{chr(c)} {chr(c)}'{chr(c)}" for c in codes[::7])
    assert engine.encode(text) == t.core.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("blank", [" ", pytest.param("\n", marks=pytest.mark.slow), pytest.param("\u3000 ", marks=pytest.mark.slow)])
def test_a_million_blanks(blank):
    """tiktoken's regular expressions overflow there."""
    t = own("gpt2")
    text = (blank * 1_100_000)[:1_100_000] + "x"
    assert engine_of(t).encode(text) == t.core.encode(text, add_special_tokens=False).ids


def bpe(merges: list[str], ids: dict[str, int] | None = None, split: str = "qwen2", **options) -> Library:
    """Bytes, then merges written as "a b"."""
    pairs = [tuple(to_chars(p.encode()) for p in m.split(" ")) for m in merges]
    vocab = dict.fromkeys([*map(to_chars, alphabet()), *(a + b for a, b in pairs)])
    vocab = {name: i for i, name in enumerate(vocab)} | (ids or {})
    library = Library(models.BPE(vocab=vocab, merges=pairs, **options))
    rule = pre_tokenizers.Split(Regex(SPLITS[split]), "isolated")
    library.pre_tokenizer = pre_tokenizers.Sequence([rule, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    library.decoder = decoders.ByteLevel()
    return library


def different(library: Library, text: str) -> bool:
    """Whether tiktoken, fed with this vocabulary regardless, would give other ids."""
    tiktoken = pytest.importorskip("tiktoken")
    ranks = ranks_of(json.loads(library.to_str()))
    encoding = tiktoken.Encoding("x", pat_str=SPLITS["qwen2"], mergeable_ranks=ranks, special_tokens={})
    return encoding.encode_ordinary(text) != library.encode(text, add_special_tokens=False).ids


REFUSED = {  # vocabulary, a text on which tiktoken would be wrong, the reason
    "ids fall": (bpe(["a b", "b c"], {"ab": 257, "bc": 256}), "abc", "do not rise"),
    "a merge is missing": (bpe(["b c", "a b", "ab c"]), "abc", "never reached"),
    "NFKC": (bpe(["a b"]), "ａｂ", "normalizer NFKC"),
    "another rule": (bpe(["1 2"], split="llama3"), "12", ""),
    "marks at word ends": (bpe(["a b"], end_of_word_suffix="</w>"), "x", "marks"),
    "a byte is missing": (bpe(["a b"]), "", "single bytes"),
    "a whole piece that could be built": (bpe(["b c"], {"abc": 257}, ignore_merges=True), "abcx", "never reached"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_vocabularies_that_tiktoken_would_encode_otherwise_are_refused(case):
    library, text, reason = REFUSED[case]
    data = json.loads(library.to_str())
    if case == "NFKC":
        data["normalizer"] = {"type": "NFKC"}
        library = Library.from_str(json.dumps(data))
    if case == "a byte is missing":
        data["model"]["vocab"].pop("z")
    split = None if case == "another rule" else "qwen2"
    assert reason in refusal(data, split) and refusal(data, split)
    if case not in ("a byte is missing", "marks at word ends"):
        assert different(library, text)
    assert isinstance(tiktoken_engine(library, data, split), str)


def test_a_vocabulary_with_every_cut_is_taken():
    """As converted from tiktoken: several merges make one token, but only one of them ever meets its parts."""
    library = bpe(["a b", "b c", "ab c", "a bc"])
    assert refusal(json.loads(library.to_str()), "qwen2") == "" and not any(different(library, t) for t in ("abc", "xabcab", "bcabcc"))


@pytest.mark.parametrize("engine", ["handwritten", "library"])
def test_ties_of_rustbpe_go_to_the_lowest_bytes(engine, monkeypatch):
    """The same rule as ours but for ties: with bytes numbered by value, the handwritten trainer gives its merges."""
    pytest.importorskip("rustbpe")
    texts = list(corpus()[:40])
    theirs = [a + b for a, b in engines.train_rustbpe(texts, 150, "qwen2")]
    if engine == "library":
        ours = [a + b for a, b in (own_pair for own_pair in SmallBPE.train(texts, 150, "qwen2").merges)]
        assert len(set(ours) & set(theirs)) > 140  # the same but for ties
        return
    from zero2llm.tokenizers import ladder

    monkeypatch.setattr(ladder, "alphabet", lambda: tuple(bytes([b]) for b in range(256)))
    assert [a + b for a, b in SmallBPE.train(texts, 150, "qwen2").merges] == theirs


def test_engines_that_are_not_installed_are_named(monkeypatch):
    import builtins

    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name in ("tiktoken", "rustbpe"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"pip install 'zero2llm\[fast\]'"):
        Tokenizer.train(corpus(), 400, engine="rustbpe")
    t = Tokenizer.train(corpus(), 400)
    assert "zero2llm[fast]" in t.engine and t.encode("hi")


def test_parts_of_a_token():
    ranks = {bytes([b]): b for b in range(256)} | {b"ab": 300, b"abc": 301, b"bc": 302}
    assert parts_of(b"abc", ranks) == [b"ab", b"c"] and parts_of(b"bc", ranks) == [b"b", b"c"]


# ------------------------------------------------------------------------------------------------------- more tokens


def test_added_tokens_change_nothing_else():
    t = own()
    more = t.add_tokens(["<think>", "关关"])
    assert more.vocab_size == t.vocab_size + 2 and more.fingerprint() != t.fingerprint() and more.own
    assert more.encode("a <think>关关雎鸠") != t.encode("a <think>关关雎鸠") and more.encode("plain 雎鸠") == t.encode("plain 雎鸠")
    assert more.encode("<think>") == [t.vocab_size] and more.decode([t.vocab_size]) == "<think>"
    control = t.add_tokens(["<|tool|>"], special=True)
    assert control.encode("<|tool|>") == t.encode("<|tool|>") and t.vocab_size in control.special_ids
    assert t.fingerprint() == own().fingerprint()


@pytest.mark.parametrize("names,match", [(["the"], "there already"), (["x y", "x y"], "given twice"), ([""], "empty"), (["<|im_end|>"], "there already")])
def test_tokens_that_cannot_be_added(names, match):
    t = own() if names != ["the"] else Tokenizer.train(["the the the"] * 9, 262)
    with pytest.raises(ValueError, match=match):
        t.add_tokens(names)
