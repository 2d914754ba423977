"""Gopher, repetition, C4 and FineWeb rules at their limits, counted by hand; Chinese by its own numbers, not by English ones."""

import json
import lzma
import random
from collections import Counter
from dataclasses import replace
from importlib import resources

import pytest

from zero2llm.core.config import parse
from zero2llm.data.document import Document, Removed
from zero2llm.data.steps import fineweb, gopher, repetition
from zero2llm.data.steps.c4 import C4Config
from zero2llm.data.steps.fineweb import FineWebConfig, FineWebRules
from zero2llm.data.steps.gopher import GopherConfig, GopherRules
from zero2llm.data.steps.repetition import RepetitionConfig, RepetitionRules
from zero2llm.data.steps.words import language_of, sentences, words

MODERN = (
    "昨天下午，我和朋友去了城里的图书馆。那里的书很多，我们在二楼找到了一本关于黄河的旧书。\n"
    "管理员说：“这本书是五十年前一位老师留下的，他希望后来的人也能读到它。”我们坐在窗边，一直读到天黑才回家。\n"
    "路上下起了小雨，朋友说他明年想去看看那条河，我也很想和他一起去！你愿意来吗？"
)
TRADITIONAL = (
    "昨天下午，我和朋友去了城裡的圖書館。那裡的書很多，我們在二樓找到了一本關於黃河的舊書。\n"
    "管理員說：「這本書是五十年前一位老師留下的，他希望後來的人也能讀到它。」我們坐在窗邊，一直讀到天黑才回家。\n"
    "路上下起了小雨，朋友說他明年想去看看那條河，我也很想和他一起去！你願意來嗎？"
)
EVERY = [GopherConfig(), RepetitionConfig(), C4Config(), FineWebConfig()]


def embedded(name):
    path = resources.files("zero2llm") / "data" / "embedded" / f"{name}.jsonl.xz"
    with path.open("rb") as file, lzma.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def answer(cfg, text, language="en"):
    """The reason for which a document goes, or None."""
    result = cfg.build()(Document(text, "here", {"language": language}))
    return result.reason if isinstance(result, Removed) else None


def reason(module, text, rules):
    found = module.fault(text, rules)
    return found and found.reason


def kept_share(cfg, texts, language=None):
    meta = {} if language is None else {"language": language}
    step = cfg.build()
    return sum(isinstance(step(Document(text, "", dict(meta))), Document) for text in texts) / len(texts)


# Words


def test_words_and_sentences():
    assert words('He said, "no".') == ["He", "said,", '"no".']
    assert words("初，鄭武公曰：“都城”。") == ["初，", "鄭", "武", "公", "曰：“", "都", "城”。"]
    assert words("用Python 3写，好！") == ["用", "Python", "3", "写，", "好！"]
    assert words("カタ, 한국어 กา") == ["カ", "タ,", "한국어", "ก", "า"]
    assert len(sentences("Mr. Bennet paid 3.5 pounds. J. Smith did not! Why?")) == 3
    assert len(sentences("初，鄭武公娶於申。曰：「善。」公弗許！")) == 3


def test_language_is_the_step_s_or_the_script_s():
    assert language_of(Document("x", "", {"language": "zh-Hant"})) == "zh"
    assert language_of(Document("x", "", {"language": "cmn_Hani"})) == "zh"
    assert language_of(Document(MODERN, "")) == language_of(Document(TRADITIONAL, "")) == "zh"
    assert language_of(Document("これは日本語の文章です。", "")) == "ja"
    assert language_of(Document("Ein Satz über Peking (北京).", "")) == "en"


# Gopher

ANY = GopherRules(
    min_words=None,
    max_words=None,
    min_mean_word_length=None,
    max_mean_word_length=None,
    max_symbols_per_word=None,
    max_bullet_lines=None,
    max_ellipsis_lines=None,
    min_alphabetic_words=None,
    min_stop_words=None,
)


def test_gopher_word_count():
    prose = lambda n: " ".join(["the", "of", *["stone"] * (n - 2)])
    assert reason(gopher, prose(50), gopher.ENGLISH) is None
    assert reason(gopher, prose(49), gopher.ENGLISH) == "too few words"
    assert reason(gopher, prose(49) + " — * ...", gopher.ENGLISH) == "too few words"  # marks are no words
    assert reason(gopher, prose(100_000), gopher.ENGLISH) is None
    assert reason(gopher, prose(100_001), gopher.ENGLISH) == "too many words"


def test_gopher_word_length():
    rules = replace(ANY, min_mean_word_length=3, max_mean_word_length=10)
    assert reason(gopher, "cat dog", rules) is None
    assert reason(gopher, "cat do", rules) == "words too short"
    assert reason(gopher, "cat dog — — —", rules) is None  # marks alone have no part in the mean
    assert reason(gopher, "abcdefghij " * 3, rules) is None
    assert reason(gopher, "abcdefghij " * 3 + "abcdefghijk", rules) == "words too long"


def test_gopher_symbols():
    rules = replace(ANY, max_symbols_per_word=0.1)
    assert reason(gopher, "cat " * 18 + "#cat #cat", rules) is None  # 2 of 20
    assert reason(gopher, "cat " * 18 + "#cat ##cat", rules) == "too many #"  # 3 of 20 words
    assert reason(gopher, "cat " * 18 + "cat... cat…", rules) is None
    assert reason(gopher, "cat " * 17 + "cat... cat… ...", rules) == "too many ellipses"
    assert reason(gopher, "cat " * 18 + "cat…… cat……", rules) is None  # Chinese: two characters, one ellipsis


def test_gopher_lines():
    rules = replace(ANY, max_bullet_lines=0.9, max_ellipsis_lines=0.3)
    assert reason(gopher, "\n".join(["- a"] * 8 + ["  • b", "c"]), rules) is None
    assert reason(gopher, "\n".join(["- a"] * 9 + ["  • b"]), rules) == "too many bullet lines"
    assert reason(gopher, "\n".join(["a ... a"] * 7 + ["b...", "b… ", "b……"]), rules) is None
    assert reason(gopher, "\n".join(["a ... a"] * 6 + ["b..."] * 4), rules) == "too many lines end with an ellipsis"


def test_gopher_letters_and_stop_words():
    rules = replace(ANY, min_alphabetic_words=0.8)
    assert reason(gopher, "cat 3rd 'tis —b x2 dog a1 é 12 —", rules) is None  # 8 of 10
    assert reason(gopher, "cat 3rd 'tis —b x2 dog a1 33 12 —", rules) == "too few words with a letter"
    rules = replace(ANY, min_stop_words=2)
    assert reason(gopher, "the cat of x", rules) is None
    assert reason(gopher, "cat (of) x the,", rules) is None
    assert reason(gopher, "the the cat the", rules) == "too few stop words"
    assert reason(gopher, "theory office", rules) == "too few stop words"


def test_gopher_chinese():
    assert len(words(MODERN)) >= 80 and answer(GopherConfig(), MODERN, "zh") is None
    assert answer(GopherConfig(), TRADITIONAL, "zh") is None
    assert answer(GopherConfig(), MODERN[:60], "zh") == "too few words"
    assert answer(GopherConfig(), "的是 https://example.com/a/very/long/address " * 60, "zh") == "words too long"
    assert answer(GopherConfig(), "山水花鸟日月星辰" * 12, "zh") == "too few stop words"


# Repetition

FREE = RepetitionRules(
    paragraphs=None, paragraph_characters=None, lines=None, line_characters=None, top_grams=(), duplicate_grams=()
)


def test_repeated_lines_and_paragraphs():
    lines = [f"line {i}" for i in range(7)]
    rules = replace(FREE, lines=0.3)
    assert reason(repetition, "\n".join(lines + lines[:3]), rules) is None  # 3 of 10 stood before
    assert reason(repetition, "\n".join(lines[:6] + lines[:3]), rules) == "repeated lines"  # 3 of 9
    assert reason(repetition, "\n\n".join(lines + lines[:3]), replace(FREE, paragraphs=0.3)) is None
    assert (
        reason(repetition, "\n\n".join(lines[:6] + lines[:3]), replace(FREE, paragraphs=0.3)) == "repeated paragraphs"
    )
    assert reason(repetition, "a\nb\n\na\nb\n\nc", replace(FREE, paragraphs=0.3)) == "repeated paragraphs"
    rules = replace(FREE, line_characters=0.2)
    assert reason(repetition, "aaaaaaa\nccc\nccc", rules) is None  # 3 of 15 characters
    assert reason(repetition, "aaaaaa\nccc\nccc", rules) == "characters in repeated lines"  # 3 of 14
    assert repetition.repeated(["ab", "c", "ab", "ab", "d"]) == (2, 4)


def test_top_grams():
    text = "big cat " * 2 + "one two three four five six seven"  # "big cat" twice, a blank inside: 14 of 49
    assert len(text) == 49
    assert reason(repetition, text, replace(FREE, top_grams=((2, 14 / 49),))) is None
    assert reason(repetition, text, replace(FREE, top_grams=((2, 13.9 / 49),))) == "most frequent 2-gram"
    assert reason(repetition, "only five words stand here", replace(FREE, top_grams=((2, 0.1),))) is None  # none twice
    chinese = replace(FREE, top_grams=((2, 0.4),), gap=0)  # 4 of 10 characters
    assert reason(repetition, "明月春江明月花夜山水", chinese) is None
    assert reason(repetition, "明月春江明月花夜山", chinese) == "most frequent 2-gram"


def test_duplicate_grams():
    assert repetition.duplicate_characters("a b c d e a b c d e".split(), 5) == 5
    assert repetition.duplicate_characters("a b c d e f a b c d e f".split(), 5) == 5  # not 10: overlaps count once
    assert (
        repetition.duplicate_characters("a a a a a a a a a a a a".split(), 5) == 10
    )  # 2 .. 6 stood before, then 7 .. 11
    assert repetition.duplicate_characters("aa bb aa bb aa bb".split(), 2) == 8
    rules = replace(FREE, duplicate_grams=((2, 0.25),))
    assert reason(repetition, "aa bb cc aa bb d", rules) is None  # 4 of 16 characters
    assert reason(repetition, "aa bb cc aa bb ", rules) == "repeated 2-grams"  # 4 of 15


def slow_fault(text, r):
    """The table with nothing skipped."""
    tokens = words(text)
    for n, limit in r.top_grams:
        grams = Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
        if grams:
            gram, count = max(grams.items(), key=lambda pair: pair[1])
            if count > 1 and count * (len("".join(gram)) + r.gap * (n - 1)) / len(text) > limit:
                return f"most frequent {n}-gram"
    for n, limit in r.duplicate_grams:
        if repetition.duplicate_characters(tokens, n) / len(text) > limit:
            return f"repeated {n}-grams"
    return None


def test_shortcuts_change_nothing():
    rng, found = random.Random(0), Counter()
    for _ in range(400):
        vocabulary = [f"w{'x' * rng.randrange(5)}{i}" for i in range(rng.choice([12, 40, 200]))]
        tokens = [rng.choice(vocabulary) for _ in range(rng.randrange(1, 150))]
        for _ in range(rng.randrange(3)):
            at, n = rng.randrange(len(tokens)), rng.randrange(4, 14)
            tokens += tokens[at : at + n]
        rules = replace(repetition.ENGLISH, lines=None, paragraphs=None)
        expected = slow_fault(" ".join(tokens), rules)
        found[expected] += 1
        assert reason(repetition, " ".join(tokens), rules) == expected
    assert len(found) > 6, found


# C4


def cleaned(text, language="en", **keys):
    result = C4Config(**keys).build()(Document(text, "here", {"language": language}))
    return (result.reason, None) if isinstance(result, Removed) else (result.text, result.notes)


GOOD = "This line has five words. So does this line here! Is this one a sentence?"


def test_c4_lines():
    text, notes = cleaned(
        "\n".join(
            [
                "Menu Home About us Contact More",  # no mark at its end
                GOOD,
                "Only four words here.",
                'He said: "these are five words."',
                "This line goes on and on...",
                "Please enable JavaScript to see it.",
                "We use cookies to serve you well.",
                f"A very long word {'x' * 1001} stands here.",
                f"A long enough word {'x' * 1000} stands here.",
            ]
        )
    )
    assert text.split("\n") == [
        GOOD,
        'He said: "these are five words."',
        f"A long enough word {'x' * 1000} stands here.",
    ]
    assert notes == {
        "c4: line dropped: no terminal punctuation": 2,
        "c4: line dropped: too few words": 1,
        "c4: line dropped: javascript": 1,
        "c4: line dropped: policy notice": 1,
        "c4: line dropped: word too long": 1,
    }


def test_c4_keeps_paragraphs_and_takes_citations_out():
    text, notes = cleaned(f"{GOOD}\n\nmenu\n\nIt was found in Kent.[12][edit]\n")
    assert text == f"{GOOD}\n\nIt was found in Kent."
    assert notes == {"c4: line dropped: no terminal punctuation": 1, "c4: citation mark": 2}


def test_c4_documents():
    assert cleaned("This is one sentence here. And here is another one.")[0] == "too few sentences"
    assert cleaned("This is one sentence here. And another one. And a third.")[1] == {}
    assert cleaned(GOOD + "\nHere stands a Lorem Ipsum text.")[0] == "lorem ipsum"
    assert cleaned(GOOD + "\nIf (x) { return these five words.")[0] == "curly bracket"
    assert cleaned(GOOD + "\nif (x) {")[0] == GOOD  # the line goes, the document stays: as in the code that made C4
    assert (
        cleaned(GOOD + "\nif (x) {", terminal_punctuation=False, languages={"en": {"min_line_words": 1}})[0]
        == "curly bracket"
    )


def test_c4_bad_words(tmp_path):
    (tmp_path / "en.txt").write_text("rude\nfoul play\n")
    (tmp_path / "zh.txt").write_text("坏话\n")
    keys = {"bad_words": {"en": str(tmp_path / "en.txt"), "zh": str(tmp_path / "zh.txt")}}
    assert cleaned(GOOD + " That was Rude of him.", **keys)[0] == "bad word"
    assert cleaned(GOOD + " There was foul play.", **keys)[0] == "bad word"
    assert cleaned(GOOD + " The crude oil price fell.", **keys)[0].endswith("fell.")
    assert cleaned(MODERN + "他说了一句坏话就走了。", "zh", **keys)[0] == "bad word"
    with pytest.raises(ValueError, match="none.txt cannot be read"):
        C4Config(bad_words={"en": str(tmp_path / "none.txt")}).build()


def test_c4_chinese():
    for text in (MODERN, TRADITIONAL):
        assert cleaned(text, "zh") == (text, {})
    text, notes = cleaned(
        MODERN + "\n首页 新闻 体育 财经\n请阅读我们的隐私政策和使用条款。\n短短一行字。\n他一直在那里等着她……", "zh"
    )
    assert text == MODERN
    assert notes == {
        "c4: line dropped: no terminal punctuation": 2,
        "c4: line dropped: policy notice": 1,
        "c4: line dropped: too few words": 1,
    }
    long = "春" * 600 + "，" + "秋" * 600 + "。一句话。又一句话。"
    assert cleaned(long, "zh") == (long, {})  # a line without blanks is no long word


# FineWeb

LOOSE = FineWebRules(
    min_punctuated_lines=None, max_short_lines=None, max_repeated_characters=None, max_line_ends_per_word=None
)


def test_fineweb_lines():
    rules = replace(LOOSE, min_punctuated_lines=0.12)
    assert reason(fineweb, "\n".join(["a."] * 3 + ["a"] * 22) + "\n\n \n", rules) is None  # 3 of 25
    assert reason(fineweb, "\n".join(["a."] * 3 + ["a"] * 23), rules) == "too few lines end with punctuation"
    assert reason(fineweb, "\n".join(['"a."', "a?”", "a!)"] + ["a"] * 22), rules) is None
    bare = replace(rules, closing="")
    assert reason(fineweb, "\n".join(['"a."', "a?”", "a!)"] + ["a"] * 22), bare) == "too few lines end with punctuation"
    rules = replace(LOOSE, max_short_lines=0.67)
    assert reason(fineweb, "\n".join(["x" * 30] * 67 + ["x" * 31] * 33), rules) is None
    assert reason(fineweb, "\n".join(["x" * 30] * 68 + ["x" * 31] * 32), rules) == "too many short lines"
    assert reason(fineweb, "  \n\n", rules) == "no text"


def test_fineweb_repetition_and_lists():
    rules = replace(LOOSE, max_repeated_characters=0.1)
    assert (
        reason(fineweb, "x" * 17 + "y\n\nab\nab\n", replace(rules, max_repeated_characters=2 / 22)) is None
    )  # 2 of 22
    assert reason(fineweb, "x" * 16 + "\nab\nab", rules) is None  # 2 of 20
    assert reason(fineweb, "x" * 15 + "\nab\nab", rules) == "characters in repeated lines"  # 2 of 19
    rules = replace(LOOSE, max_line_ends_per_word=0.3)
    assert reason(fineweb, "a b c d\ne f g\nh i\nj", rules) is None  # 3 ends, 10 words
    assert reason(fineweb, "a b c d\ne f g\nh i\n", rules) == "a list"  # 3 ends, 9 words


def test_fineweb_chinese():
    for text in (MODERN, TRADITIONAL):
        assert answer(FineWebConfig(), text, "zh") is None
    assert answer(FineWebConfig(), "首页\n新闻\n体育\n财经\n" * 3, "zh") == "too few lines end with punctuation"
    assert answer(FineWebConfig(), "今天天气好。\n我们去公园。\n风很大很冷。", "zh") == "too many short lines"
    assert answer(FineWebConfig(), "他说：“今天我们一起去城外的河边走走。”\n", "zh") is None


# Languages


def test_chinese_is_not_dropped():
    """The classic bug: rules for Latin words applied to Chinese. Ours keep it, whether or not a language step ran."""
    prose, songs = embedded("zh_classical_prose"), embedded("zh_songci")[:800]
    for text in prose[:50]:
        assert reason(gopher, text, gopher.ENGLISH)  # what English numbers would do
    for language in ("zh", None):
        assert kept_share(GopherConfig(), prose, language) > 0.8
        assert kept_share(RepetitionConfig(), prose + songs, language) > 0.97
        assert kept_share(C4Config(), prose, language) > 0.9
        assert kept_share(FineWebConfig(), prose, language) > 0.95
    verse = GopherConfig(languages={"zh": {"min_words": 20, "min_stop_words": 1}})
    assert kept_share(verse, songs) > 0.9 > kept_share(GopherConfig(), songs)


def test_english_is_not_dropped():
    novels = embedded("en_moby_dick")[:150] + embedded("en_austen")[:250]
    for cfg in EVERY:
        assert kept_share(cfg, novels) > 0.97


def test_other_languages_are_judged_without_english_words_and_counted():
    text = (
        "Ein Satz mit vielen Wörtern steht hier, und er ist nicht englisch. "
        + " ".join(f"Wort{i}" for i in range(60))
        + "."
    )
    doc = Document(text, "", {"language": "de"})
    assert GopherConfig().build()(doc) is doc
    assert doc.notes == {"gopher: no thresholds of its own for this language": 1}
    german = GopherConfig(languages={"de": {"stop_words": ["der", "die", "und"], "min_stop_words": 2}})
    assert answer(german, text, "de") == "too few stop words"


def test_a_recipe_changes_single_thresholds():
    cfg = parse(GopherConfig, {"kind": "gopher", "languages": {"zh": {"min_words": 20}}})
    table = gopher.tables("gopher", gopher.DEFAULTS, cfg.languages)
    assert table["zh"] == replace(gopher.CHINESE, min_words=20) and table["en"] == gopher.ENGLISH
    with pytest.raises(ValueError, match="did you mean 'min_words'"):
        GopherConfig(languages={"zh": {"min_word": 20}})
    with pytest.raises(ValueError, match="languages.zh.*bullet"):
        GopherConfig(languages={"zh": {"max_bullet_lines": 90}})
    with pytest.raises(ValueError, match="n must rise"):
        RepetitionConfig(languages={"en": {"top_grams": [[3, 0.1], [2, 0.1]]}})
    with pytest.raises(ValueError, match="share"):
        FineWebConfig(languages={"en": {"max_short_lines": 67}})


def test_empty_and_odd_texts_raise_nothing():
    for cfg in EVERY:
        step = cfg.build()
        for text in ("", " ", "\n\n", "。", "…", "###", "\ud800", "a", "\x00\n\x85", "•\n•\n•"):
            step(Document(text, ""))
