"""WordPiece by hand: every score against a trainer that counts everything again, the search against all ways to cut a word."""

from collections import Counter
from math import log

import pytest

from zero2llm.tokenizers import wordpiece
from zero2llm.tokenizers.bert_words import BertWords
from zero2llm.tokenizers.wordpiece import INSIDE, SCORES, UNKNOWN, WordPiece, train_wordpiece

TEXTS = [
    "the hug of a pug is a hug; the bun in the sun is fun, and the hugs are fun too",
    "banana bandana, anna and hannah; ana an na aaaa aaa",
    "关关雎鸠，在河之洲。the GDP of 中国 grew 3.5% in 2024",
    "unaffable affable unable able table stable unstable",
]


def words_of(texts):
    return Counter(word for text in texts for word in BertWords()(text))


def marked(word):
    return [char if i == 0 else INSIDE + char for i, char in enumerate(word)]


def plain_trainer(texts, size, score, min_count):
    """Everything counted anew for each merge."""
    words = {word: (marked(word), n) for word, n in words_of(texts).items()}
    vocab = [UNKNOWN, *sorted({c for w in words for c in w}), *sorted({INSIDE + c for w in words for c in w[1:]})]
    while len(vocab) < size:
        unit, pairs = Counter(), Counter()
        for pieces, n in words.values():
            for piece in pieces:
                unit[piece] += n
            for pair in zip(pieces, pieces[1:], strict=False):
                pairs[pair] += n
        pairs = {pair: n for pair, n in pairs.items() if n >= min_count}
        if not pairs:
            break
        rank = {piece: i for i, piece in enumerate(vocab)}
        value = lambda pair, pairs=pairs, unit=unit: SCORES[score](
            pairs[pair], unit[pair[0]], unit[pair[1]], unit.total(), pair[0] == pair[1]
        )
        a, b = max(pairs, key=lambda pair: (value(pair), -rank[pair[0]], -rank[pair[1]]))  # noqa: B023
        vocab.append(a + b[2:])
        for word, (pieces, n) in words.items():
            words[word] = (joined(pieces, a, b), n)
    return vocab


def joined(pieces, a, b):
    out, i = [], 0
    while i < len(pieces):
        hit = pieces[i : i + 2] == [a, b]
        out.append(a + b[2:] if hit else pieces[i])
        i += 1 + hit
    return out


@pytest.mark.parametrize("score", list(SCORES))
@pytest.mark.parametrize("min_count", [1, 2, 3])
def test_training_equals_counting_everything_again(score, min_count):
    assert train_wordpiece(TEXTS, 130, score=score, min_count=min_count) == plain_trainer(TEXTS, 130, score, min_count)


def log_likelihood(pieces):
    counts = Counter(pieces)
    return sum(n * log(n / counts.total()) for n in counts.values())


@pytest.mark.parametrize("a,b", [("h", "##u"), ("##u", "##n"), ("t", "##h"), ("##a", "##b")])
def test_likelihood_score_is_what_the_corpus_gains(a, b):
    cut = [marked(word) for text in TEXTS for word in BertWords()(text)]
    before, after = [p for w in cut for p in w], [p for w in cut for p in joined(w, a, b)]
    unit = Counter(before)
    n = len(before) - len(after)
    gain = wordpiece.likelihood_gain(n, unit[a], unit[b], len(before), a == b)
    assert n > 1 and gain == pytest.approx(log_likelihood(after) - log_likelihood(before), abs=1e-9)


def test_first_merges_by_hand():
    """hu 3 times (hug, hug, hub), ug twice, ub once; the ratio likes b ##y, seen twice and nowhere else."""
    texts = ["hug hug hub by by"]
    size = len({*"hugb", "y"}) + len({*"ugby"}) + 2
    assert train_wordpiece(texts, size)[-1] == "hu" == train_wordpiece(texts, size, min_count=1)[-1]
    assert train_wordpiece(texts, size, score="ratio")[-1] == "by"  # 2 / (2 x 2) against 3 / (3 x 3) and 2 / (3 x 2)


def test_the_longest_piece_wins_even_where_a_shorter_one_would_cover_the_word():
    model = WordPiece([UNKNOWN, "a", "ab", "abc", "##d", "##cd", "##c", "##b"])
    show = lambda word: [model.vocab[i] for i in model.encode(word)]
    assert show("abcd") == ["abc", "##d"] and show("abd") == ["ab", "##d"] and show("acd") == ["a", "##cd"]
    assert show("abce") == [UNKNOWN] and show("b") == [UNKNOWN]  # all of the word, and "##b" does not begin one
    assert show("ab abce ab") == ["ab", UNKNOWN, "ab"]
    greedy = WordPiece([UNKNOWN, "ab", "abc", "##cd"])
    assert [greedy.vocab[i] for i in greedy.encode("abcd")] == [UNKNOWN]  # ab ##cd exists; greedy search never looks back


def test_words():
    cut = BertWords()
    assert cut("It's 3.5%, no?") == ["It", "'", "s", "3", ".", "5", "%", ",", "no", "?"]
    assert cut("在中国GDP增长\u3000了") == ["在", "中", "国", "GDP", "增", "长", "了"]
    assert cut("a\tb\u00a0c\u200bd\x00e\ufffdf") == ["a", "b", "cdef"] and cut(" \n ") == []
    assert cut("ひらがな 한국어") == ["ひらがな", "한국어"]  # only Chinese characters stand alone
    assert BertWords(lower=True)("Café NAÏVE") == ["cafe", "naive"] and cut("Café") == ["Café"]
    assert BertWords(lower=True, strip_accents=False)("Café") == ["café"] and BertWords(strip_accents=True)("Café") == ["Cafe"]
    assert cut("a+b=c $5 x^2 ~|`<>") == ["a", "+", "b", "=", "c", "$", "5", "x", "^", "2", "~", "|", "`", "<", ">"]


def test_decoding_joins_words_and_cannot_give_the_text_back():
    model = WordPiece(train_wordpiece(TEXTS, 200))
    assert model.decode(model.encode("the  hugs\nare fun")) == "the hugs are fun"
    assert model.decode(model.encode("中国，")) == "中 国 ，" and model.decode(model.encode("the Ω")) == f"the {UNKNOWN}"


def test_long_words_are_unknown():
    model = WordPiece([UNKNOWN, "a", "##a"], max_word=5)
    assert model.encode("aaaaa") == [1, 2, 2, 2, 2] and model.encode("aaaaaa a") == [0, 1]


def test_alphabet_limit_leaves_out_words_that_would_be_unknown():
    vocab = train_wordpiece(["aab aab abz qab"], 40, min_count=1, max_alphabet=2)
    assert vocab == [UNKNOWN, "a", "b", "##a", "##b", "aa", "aab"]  # neither abz nor qab was looked at
    assert train_wordpiece(["ab ba cd"], 40, max_alphabet=3)[1:4] == ["a", "b", "c"]  # of equally frequent ones the lowest


def test_ids_begin_where_they_are_told():
    model = WordPiece([UNKNOWN, "a", "##b"], first_id=4)
    assert model.encode("ab x") == [5, 6, 4] and model.decode([5, 6, 4]) == f"ab {UNKNOWN}"


@pytest.mark.parametrize(
    "call,match",
    [
        (lambda: train_wordpiece(TEXTS, 20), "cannot hold the .* characters need"),
        (lambda: train_wordpiece(TEXTS, 200, score="best"), "score = 'best' is unknown; there are: count, likelihood, ratio"),
        (lambda: train_wordpiece(TEXTS, 200, min_count=0), "min_count = 0"),
        (lambda: WordPiece(["a"]), r"lacks \[UNK\]"),
        (lambda: WordPiece([UNKNOWN, "a", "a"]), "'a' twice"),
        (lambda: WordPiece([UNKNOWN, "a"], first_id=2).to_library(["<|x|>"]), "1 control tokens are given"),
        (lambda: WordPiece([UNKNOWN, "a"], first_id=1).to_library(["PAD"]), "'PAD' is a word that text can spell"),
    ],
)
def test_mistakes_are_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_progress_and_small_texts():
    heard = []
    vocab = train_wordpiece(["ab ab"], 50, progress=lambda done, of: heard.append((done, of)))
    assert vocab == [UNKNOWN, "a", "b", "##b", "ab"] and heard == [(5, 50)]
    assert train_wordpiece([], 5) == [UNKNOWN]
