"""WordPiece against the tokenizers library: ids and decoded text on any English and Chinese text, and its trainer's vocabulary."""

import unicodedata
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from zero2llm.data.sources import documents
from zero2llm.tokenizers.bert_words import BertWords
from zero2llm.tokenizers.special import SPECIALS
from zero2llm.tokenizers.wordpiece import INSIDE, UNKNOWN, WordPiece, train_wordpiece

CHARS = st.text("abcdefghij ABé Éüñ 0123 .,;!?'\"-_#[]()<>|$+=^`~ 中国人在上大的，。！「」 \t\n\r\u3000\u00a0 あア한 ﬁ ß İ Σς 🙂 \u0301\u200b\ufffd\x00𠀀", max_size=60)
WORDS = st.lists(st.sampled_from("the unaffable hugs 2024 关关雎鸠 窈窕淑女 café naïve [UNK] ##able <|im_end|> don't e-mail aaaaaaaaaaaaaaaaaaaaa".split()), max_size=8).map(" ".join)
STYLES = {"cased": {}, "lower": {"lower": True}, "lower with accents": {"lower": True, "strip_accents": False}, "cased, no accents": {"strip_accents": True}}


@cache
def corpus():
    return [*documents(["embedded:en_moby_dick"])][:12] + [*documents(["embedded:zh_poetry_small"])][:60] + ["Café naïve Ünïcode É", "don't [UNK] ##x"]


@cache
def pair(style, first_id=0):
    options = STYLES[style]
    ours = WordPiece(train_wordpiece(corpus(), 2500, **options), max_word=20, first_id=first_id, **options)
    return ours, ours.to_library(SPECIALS[:first_id])


@pytest.mark.parametrize("style", list(STYLES))
@settings(max_examples=150, deadline=None)
@given(text=CHARS | WORDS)
def test_same_ids_and_text(style, text):
    ours, library = pair(style)
    ids = ours.encode(text)
    assert library.encode(text).ids == ids
    assert library.decode(ids) == ours.decode(ids)


@pytest.mark.parametrize("style", list(STYLES))
def test_same_ids_on_books(style):
    ours, library = pair(style)
    for text in [*documents(["embedded:en_austen"])][:5] + [*documents(["embedded:zh_classical_prose"])][:20]:
        assert library.encode(text).ids == ours.encode(text)


def test_control_tokens_come_first_and_are_no_text():
    ours, library = pair("cased", len(SPECIALS))
    library.encode_special_tokens = True
    assert [library.token_to_id(s) for s in SPECIALS] == [0, 1, 2, 3]
    typed = f"the {SPECIALS[0]} hug"
    assert library.encode(typed).ids == ours.encode(typed) and min(ours.encode(typed)) >= 4
    again = Tokenizer.from_str(library.to_str())
    assert again.encode("the hugs 在").ids == ours.encode("the hugs 在") and again.get_vocab_size() == 2504


@pytest.mark.parametrize("min_count", [1, 3])
@pytest.mark.parametrize("lower", [False, True])
def test_the_library_learns_the_same_vocabulary(min_count, lower):
    """It numbers "##x" in the order of a salted hash, which decides ties; named beforehand, they stand where ours do."""
    ours = train_wordpiece(corpus(), 2600, min_count=min_count, lower=lower)
    single = [p for p in ours if len(p.removeprefix(INSIDE)) == 1 or p == UNKNOWN]
    library = Tokenizer(models.WordPiece({UNKNOWN: 0}, unk_token=UNKNOWN))
    library.normalizer = normalizers.BertNormalizer(lowercase=lower)
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=2600, min_frequency=min_count, special_tokens=single, show_progress=False)
    library.train_from_iterator(corpus(), trainer)
    assert sorted(library.get_vocab(), key=library.get_vocab().get) == ours


def rate(encode, texts):
    return sum(len(text.encode()) for text in texts) / sum(len(encode(text)) for text in texts)


def test_bytes_per_token_of_the_library_as_it_comes():
    """Without naming them beforehand ties fall otherwise, and the vocabulary is worth the same."""
    texts = [*documents(["embedded:en_austen"])][:60]
    library = Tokenizer(models.WordPiece({UNKNOWN: 0}, unk_token=UNKNOWN))
    library.normalizer, library.pre_tokenizer = normalizers.BertNormalizer(lowercase=False), pre_tokenizers.BertPreTokenizer()
    library.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=2000, min_frequency=2, special_tokens=[UNKNOWN], show_progress=False))
    ours = rate(WordPiece(train_wordpiece(texts, 2000)).encode, texts)
    assert ours == pytest.approx(rate(lambda text: library.encode(text).ids, texts), rel=0.02)


@settings(max_examples=200, deadline=None)
@given(CHARS)
def test_bert_s_words_are_transformers_basic_tokenizer_s(text):
    """Google's own code, as transformers carries it; that one composes characters first, and lowers words, not characters."""
    from transformers.models.bert.tokenization_bert_legacy import BasicTokenizer

    for lower in (False, True):
        plain = unicodedata.normalize("NFC", text.replace("Σ", "S"))
        assert BertWords(lower)(plain) == BasicTokenizer(do_lower_case=lower).tokenize(plain)
