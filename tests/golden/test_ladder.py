"""Each rung of the ladder gives the ids of the next: bytes, the forty-line BPE, the fast one."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zero2llm.tokenizers.bpe import BPE, train_bpe
from zero2llm.tokenizers.bytes import SPLITS
from zero2llm.tokenizers.ladder import ByteTokenizer, SmallBPE

TEXTS = ["the cat sat on the mat; the hat sat\n\n", "关关雎鸠，在河之洲。窈窕淑女，君子好逑。", "参差荇菜，左右流之。窈窕淑女，寤寐求之。" * 3, "aaaa aaab abab 2024!"]


def test_a_bpe_without_merges_is_the_byte_tokenizer():
    for text in TEXTS:
        assert SmallBPE([]).encode(text) == ByteTokenizer().encode(text)
        assert len(ByteTokenizer().encode(text)) == len(text.encode())
        assert ByteTokenizer().decode(ByteTokenizer().encode(text)) == text


@pytest.mark.parametrize("split", list(SPLITS))
def test_the_small_bpe_is_the_fast_one(split):
    small = SmallBPE.train(TEXTS, 60, split)
    fast = BPE(train_bpe(TEXTS, 60, split), split)
    assert small.merges == train_bpe(TEXTS, 60, split) and len(small.merges) == 60
    for text in [*TEXTS, "mat hat 窈窕 aaa\r\n"]:
        assert small.encode(text) == fast.encode(text) and small.decode(small.encode(text)) == text == fast.decode(fast.encode(text))


def test_merges_by_hand():
    """ab twice, bc once: ab first; then abc, which both words hold."""
    assert SmallBPE.train(["abc", "ab", "abc"], 9).merges == [(b"a", b"b"), (b"ab", b"c")]
    small = SmallBPE([(b"a", b"b"), (b"b", b"c")])
    assert [small.tokens[i] for i in small.encode("abcbc")] == [b"ab", b"c", b"bc"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("abc 中", max_size=12), max_size=6), st.text("abcd 中文", max_size=20))
def test_rungs_agree_on_any_text(texts, text):
    small = SmallBPE.train(texts, 20)
    assert small.merges == train_bpe(texts, 20)
    assert small.encode(text) == BPE(small.merges, "qwen2").encode(text) and small.decode(small.encode(text)) == text
