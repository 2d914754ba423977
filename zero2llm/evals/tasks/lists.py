"""Words moved about: find one, translate a few, repeat, reverse, count."""

from __future__ import annotations

from random import Random

from zero2llm.evals.tasks.items import Draft
from zero2llm.evals.tasks.words import ANIMALS, COLOURS, NAMES, OBJECTS, PLACES, QUALITIES, THINGS, Words, word

WORDS = THINGS + PLACES
SPACED = {"en": " ", "zh": ""}  # what stands between two words of a phrase


def listed(words: list[str], lang: str) -> str:
    """Quoted in Chinese: the split rule glues one sign to the word after it, so “、马” would not share a token with “马”."""
    return " ".join(words) if lang == "en" else "、".join(f"“{w}”" for w in words)


KINDS: tuple[tuple[Words, dict[str, str]], ...] = (
    (ANIMALS, {"en": "an animal", "zh": "动物"}),
    (COLOURS, {"en": "a colour", "zh": "颜色"}),
    (PLACES, {"en": "a place", "zh": "地方"}),
    (NAMES, {"en": "a name", "zh": "人名"}),
    (OBJECTS, {"en": "", "zh": ""}),  # never asked for
)
PICK = {
    "en": ("Which is {1}: {0}", "Which of these is {1}: {0}", "Find {1}: {0}"),
    "zh": ("哪个是{1}：{0}", "这里哪个是{1}：{0}", "找出{1}：{0}"),
}


def pick(rng: Random, lang: str) -> Draft:
    """The one word of a list that is of the kind asked for."""
    kinds = rng.sample(range(len(KINDS)), rng.randint(2, 4))
    drawn = [(kind, rng.randrange(len(KINDS[kind][0]))) for kind in kinds]
    asked = next(i for i, kind in enumerate(kinds) if kind < len(KINDS) - 1)
    words = [word(KINDS[kind][0], i, lang) for kind, i in drawn]
    name, answer, wrong = KINDS[kinds[asked]][1][lang], words[asked], words[asked - 1]
    rng.shuffle(words)
    prompt = rng.choice(PICK[lang]).format(listed(words, lang), name)
    return Draft(tuple(sorted(drawn)), prompt, answer, wrong)


TRANSLATE = {
    "en": ("Say in Chinese: {}", "What is this in Chinese: {}", "Translate: {}"),
    "zh": ("用英语说：{}", "英语怎么说：{}", "翻译：{}"),
}


def translate(rng: Random, lang: str) -> Draft:
    """A quality, a colour and a thing, into the other language; the prompt is in ``lang``."""
    pools = (QUALITIES, COLOURS, THINGS)
    drawn = [rng.randrange(len(pool)) for pool in pools]
    other = list(drawn)
    place = rng.randrange(3)
    other[place] = (drawn[place] + rng.randrange(1, len(pools[place]))) % len(pools[place])

    def phrase(indices: list[int], lang: str) -> str:
        return SPACED[lang].join(word(pool, i, lang) for pool, i in zip(pools, indices, strict=True))

    into = "zh" if lang == "en" else "en"
    prompt = rng.choice(TRANSLATE[lang]).format(phrase(drawn, lang))
    return Draft(tuple(drawn), prompt, phrase(drawn, into), phrase(other, into))


LISTS = {
    ("copy", "en"): ("Repeat: {}", "Say again: {}", "Repeat these words: {}"),
    ("copy", "zh"): ("重复：{}", "再说一次：{}", "请重复这些词：{}"),
    ("reverse", "en"): ("Reverse: {}", "Say backwards: {}", "Say these words in reverse order: {}"),
    ("reverse", "zh"): ("倒过来：{}", "反着说：{}", "请把这些词倒过来：{}"),
    ("first", "en"): ("What is the first word: {}", "Say the first word: {}", "First of these words: {}"),
    ("first", "zh"): ("第一个词是什么：{}", "说出第一个词：{}", "请说出最前面的词：{}"),
    ("last", "en"): ("What is the last word: {}", "Say the last word: {}", "Last of these words: {}"),
    ("last", "zh"): ("最后一个词是什么：{}", "说出最后一个词：{}", "请说出最后面的词：{}"),
    ("count", "en"): ("How many times does {1} appear: {0}", "Count {1} in: {0}", "How many {1} are in: {0}"),
    ("count", "zh"): ("{1}出现几次：{0}", "数一数{1}：{0}", "这里有几个{1}：{0}"),
}


def _words(rng: Random, lang: str, least: int, most: int) -> tuple[tuple[int, ...], list[str]]:
    drawn = rng.sample(range(len(WORDS)), rng.randint(least, most))
    return tuple(sorted(drawn)), [word(WORDS, i, lang) for i in drawn]


def copy(rng: Random, lang: str) -> Draft:
    """Two to four words, again."""
    key, words = _words(rng, lang, 2, 4)
    text = listed(words, lang)
    return Draft(key, rng.choice(LISTS["copy", lang]).format(text), text, listed(words[::-1], lang))


def reverse(rng: Random, lang: str) -> Draft:
    """Two to four words, backwards."""
    key, words = _words(rng, lang, 2, 4)
    text, answer = listed(words, lang), listed(words[::-1], lang)
    return Draft(key, rng.choice(LISTS["reverse", lang]).format(text), answer, text)


def first(rng: Random, lang: str) -> Draft:
    """The first of three to five words."""
    key, words = _words(rng, lang, 3, 5)
    return Draft(key, rng.choice(LISTS["first", lang]).format(listed(words, lang)), words[0], words[1])


def last(rng: Random, lang: str) -> Draft:
    """The last of three to five words."""
    key, words = _words(rng, lang, 3, 5)
    return Draft(key, rng.choice(LISTS["last", lang]).format(listed(words, lang)), words[-1], words[-2])


def count(rng: Random, lang: str) -> Draft:
    """How often one word stands in a list of up to six."""
    asked, *others = rng.sample(range(len(WORDS)), 3)
    n = rng.randint(1, 4)
    drawn = [asked] * n + [rng.choice(others) for _ in range(rng.randint(1, 6 - n))]
    rng.shuffle(drawn)
    text = listed([word(WORDS, i, lang) for i in drawn], lang)
    prompt = rng.choice(LISTS["count", lang]).format(text, word(WORDS, asked, lang))
    wrong = n + 1 if n == 1 else n + rng.choice((-1, 1))
    return Draft((asked, tuple(sorted(drawn))), prompt, str(n), str(wrong))
