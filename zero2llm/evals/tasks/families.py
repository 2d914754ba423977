"""The families with one exact answer: read a story, move words about, reckon.

Each function draws content (indices and numbers), chooses a wording, and returns (key, prompt, answer, wrong).
Keys are sorted wherever order does not change what is being learned: 3+41 and 41+3 share one, and so do all
orders of one story, so the test split holds content that training never saw in any form.
"""

from __future__ import annotations

from random import Random

from zero2llm.evals.tasks.items import Draft, Family
from zero2llm.evals.tasks.words import COLOURS, NAMES, PLACES, THINGS, Words, word

WORDS = THINGS + PLACES
LISTED = {"en": " ", "zh": "、"}  # what stands between the words of a list
SPACED = {"en": " ", "zh": ""}  # what stands between two sentences

STORIES: dict[str, tuple[Words, Words, dict[str, str]]] = {  # kind -> (subjects, objects, sentence)
    "has": (NAMES, THINGS, {"en": "{0} has the {1}.", "zh": "{0}有{1}。"}),
    "where": (NAMES, PLACES, {"en": "{0} is in the {1}.", "zh": "{0}在{1}里。"}),
    "colour": (THINGS, COLOURS, {"en": "The {0} is {1}.", "zh": "{0}是{1}的。"}),
}
RECALL = {  # (kind, language) -> (questions answered by the subject, questions answered by the object)
    ("has", "en"): (("Who has the {1}?", "Tell me who has the {1}."), ("What does {0} have?", "Tell me what {0} has.")),
    ("has", "zh"): (("谁有{1}？", "请问谁有{1}？"), ("{0}有什么？", "请问{0}有什么？")),
    ("where", "en"): (("Who is in the {1}?", "Tell me who is in the {1}."), ("Where is {0}?", "Tell me where {0} is.")),
    ("where", "zh"): (("谁在{1}里？", "请问谁在{1}里？"), ("{0}在哪里？", "请问{0}在哪里？")),
    ("colour", "en"): (("What is {1}?", "Tell me what is {1}."), ("What colour is the {0}?", "Tell me the colour of the {0}.")),
    ("colour", "zh"): (("什么是{1}的？", "请问什么是{1}的？"), ("{0}是什么颜色？", "请问{0}是什么颜色？")),
}  # fmt: skip


def recall(rng: Random, lang: str) -> Draft:
    """A story of two to four facts of one kind, and a question about one of them; the others distract."""
    kind, n = rng.choice(tuple(STORIES)), rng.randint(2, 4)
    subjects, objects, sentence = STORIES[kind]
    facts = list(zip(rng.sample(range(len(subjects)), n), rng.sample(range(len(objects)), n), strict=True))
    told = [(word(subjects, s, lang), word(objects, o, lang)) for s, o in facts]
    asked, other = rng.sample(range(n), 2)
    side = rng.randrange(2)
    story = SPACED[lang].join(sentence[lang].format(*fact) for fact in told)
    question = rng.choice(RECALL[kind, lang][side]).format(*told[asked])
    key = (kind, tuple(sorted(facts)))
    return Draft(key, story + SPACED[lang] + question, told[asked][side], told[other][side])


COMPARE = {  # language -> (questions for the smaller, questions for the larger)
    "en": (("Which is smaller, {} or {}?", "Which number is smaller: {} or {}?", "{} and {}: which is smaller?"),
           ("Which is larger, {} or {}?", "Which number is larger: {} or {}?", "{} and {}: which is larger?")),
    "zh": (("{}和{}哪个小？", "哪个数更小，{}还是{}？", "{}与{}，小的是哪个？"),
           ("{}和{}哪个大？", "哪个数更大，{}还是{}？", "{}与{}，大的是哪个？")),
}  # fmt: skip


def compare(rng: Random, lang: str) -> Draft:
    """The smaller or the larger of two numbers of two digits."""
    a, b = rng.sample(range(10, 100), 2)
    side = rng.randrange(2)
    ordered = (min(a, b), max(a, b))
    prompt = rng.choice(COMPARE[lang][side]).format(a, b)
    return Draft(ordered, prompt, str(ordered[side]), str(ordered[1 - side]))


OLDER = {  # language -> (sentence, questions for the younger, questions for the older)
    "en": ("{} is {} years old.", ("Who is younger?", "Tell me who is younger."), ("Who is older?", "Tell me who is older.")),
    "zh": ("{}{}岁。", ("谁更小？", "请问谁更小？"), ("谁更大？", "请问谁更大？")),
}  # fmt: skip


def older(rng: Random, lang: str) -> Draft:
    """Which of two people is older or younger: a comparison, and then the name that belongs to it."""
    ages = rng.sample(range(10, 100), 2)
    names = [word(NAMES, i, lang) for i in rng.sample(range(len(NAMES)), 2)]
    side = rng.randrange(2)
    story = [OLDER[lang][0].format(name, age) for name, age in zip(names, ages, strict=True)]
    prompt = SPACED[lang].join([*story, rng.choice(OLDER[lang][1 + side])])
    right = ages.index((min if side == 0 else max)(ages))
    return Draft(tuple(sorted(ages)), prompt, names[right], names[1 - right])


SUMS = {
    "en": ("What is {}?", "How much is {}?", "{} = ?"),
    "zh": ("{}等于几？", "请算：{}", "{} = ?"),
}


def _sum(rng: Random, lang: str, a: int, b: int) -> Draft:
    plus = rng.random() < 0.5
    if not plus:
        a, b = max(a, b), min(a, b)
    total = a + b if plus else a - b
    x, y = (b, a) if plus and rng.random() < 0.5 else (a, b)
    wrong = total + rng.choice([step for step in (-10, -1, 1, 10) if total + step >= 0])
    prompt = rng.choice(SUMS[lang]).format(f"{x} {'+' if plus else '-'} {y}")
    return Draft(("+" if plus else "-", *sorted((a, b))), prompt, str(total), str(wrong))


def arithmetic(rng: Random, lang: str) -> Draft:
    """A number of two digits plus or minus one of one digit: one column and a carry."""
    return _sum(rng, lang, rng.randint(10, 99), rng.randint(1, 9))


def arithmetic_hard(rng: Random, lang: str) -> Draft:
    """Two numbers of two digits. Held-out answers need far more than a few thousand examples."""
    return _sum(rng, lang, rng.randint(10, 99), rng.randint(10, 99))


LISTS = {
    ("copy", "en"): ("Repeat: {}", "Say again: {}", "Repeat these words: {}"),
    ("copy", "zh"): ("重复：{}", "再说一次：{}", "请重复这些词：{}"),
    ("reverse", "en"): ("Reverse: {}", "Say backwards: {}", "Say these words in reverse order: {}"),
    ("reverse", "zh"): ("倒过来：{}", "反着说：{}", "请把这些词倒过来：{}"),
    ("first", "en"): ("What is the first word: {}", "Say the first word: {}", "First of these words: {}"),
    ("first", "zh"): ("第一个词是什么：{}", "说出第一个词：{}", "请说出最前面的词：{}"),
    ("last", "en"): ("What is the last word: {}", "Say the last word: {}", "Last of these words: {}"),
    ("last", "zh"): ("最后一个词是什么：{}", "说出最后一个词：{}", "请说出最后面的词：{}"),
    ("sort", "en"): ("Sort: {}", "Put in order: {}", "Sort from small to large: {}"),
    ("sort", "zh"): ("排序：{}", "请排好：{}", "从小到大排列：{}"),
    ("count", "en"): ("How many times does {1} appear: {0}", "Count {1} in: {0}", "How many {1} are in: {0}"),
    ("count", "zh"): ("{1}出现几次：{0}", "数一数{1}：{0}", "这里有几个{1}：{0}"),
}


def _words(rng: Random, lang: str, least: int, most: int) -> tuple[tuple[int, ...], list[str]]:
    drawn = rng.sample(range(len(WORDS)), rng.randint(least, most))
    return tuple(sorted(drawn)), [word(WORDS, i, lang) for i in drawn]


def copy(rng: Random, lang: str) -> Draft:
    """Two to four words, again."""
    key, words = _words(rng, lang, 2, 4)
    text = LISTED[lang].join(words)
    return Draft(key, rng.choice(LISTS["copy", lang]).format(text), text, LISTED[lang].join(words[::-1]))


def reverse(rng: Random, lang: str) -> Draft:
    """Two to four words, backwards."""
    key, words = _words(rng, lang, 2, 4)
    text, answer = LISTED[lang].join(words), LISTED[lang].join(words[::-1])
    return Draft(key, rng.choice(LISTS["reverse", lang]).format(text), answer, text)


def first(rng: Random, lang: str) -> Draft:
    """The first of three to five words."""
    key, words = _words(rng, lang, 3, 5)
    return Draft(key, rng.choice(LISTS["first", lang]).format(LISTED[lang].join(words)), words[0], words[1])


def last(rng: Random, lang: str) -> Draft:
    """The last of three to five words."""
    key, words = _words(rng, lang, 3, 5)
    return Draft(key, rng.choice(LISTS["last", lang]).format(LISTED[lang].join(words)), words[-1], words[-2])


def sort(rng: Random, lang: str) -> Draft:
    """Three to five different digits in rising order."""
    digits = rng.sample(range(10), rng.randint(3, 5))
    prompt = rng.choice(LISTS["sort", lang]).format(" ".join(map(str, digits)))
    rising = sorted(digits)
    return Draft(tuple(rising), prompt, " ".join(map(str, rising)), " ".join(map(str, rising[::-1])))


def count(rng: Random, lang: str) -> Draft:
    """How often one word stands in a list of up to six."""
    asked, *others = rng.sample(range(len(WORDS)), 3)
    n = rng.randint(1, 4)
    drawn = [asked] * n + [rng.choice(others) for _ in range(rng.randint(1, 6 - n))]
    rng.shuffle(drawn)
    text = LISTED[lang].join(word(WORDS, i, lang) for i in drawn)
    prompt = rng.choice(LISTS["count", lang]).format(text, word(WORDS, asked, lang))
    wrong = n + 1 if n == 1 else n + rng.choice((-1, 1))
    return Draft((asked, tuple(sorted(drawn))), prompt, str(n), str(wrong))


EXACT = {
    write.__name__: Family(write.__name__, write)
    for write in (recall, compare, older, arithmetic, arithmetic_hard, copy, reverse, first, last, sort, count)
}
