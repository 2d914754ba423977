"""Short stories and a question about them: one fact, one of several like facts, or the older of two people."""

from __future__ import annotations

from random import Random

from zero2llm.evals.tasks.items import Draft
from zero2llm.evals.tasks.words import COLOURS, NAMES, PLACES, THINGS, Words, word

SPACED = {"en": " ", "zh": ""}  # what stands between two sentences

TOLD = {  # what a story may tell of one person; 0 name, 1 place, 2 thing, 3 colour, 4 age
    "en": ("{0} is in the {1}.", "{0} has the {2}.", "The {2} is {3}.", "{0} is {4} years old."),
    "zh": ("{0}在{1}里。", "{0}有{2}。", "{2}是{3}的。", "{0}{4}岁。"),
}
RECALL = {  # for each of the first three sentences: (the word to answer with, questions)
    "en": ((1, ("Where is {0}?", "Tell me where {0} is.")), (2, ("What does {0} have?", "Tell me what {0} has.")),
           (3, ("What colour is the {2}?", "Tell me the colour of the {2}."))),
    "zh": ((1, ("{0}在哪里？", "请问{0}在哪里？")), (2, ("{0}有什么？", "请问{0}有什么？")),
           (3, ("{2}是什么颜色？", "请问{2}是什么颜色？"))),
}  # fmt: skip
WHO = {"en": ("Who is in the {1}?", "Who has the {2}?"), "zh": ("谁在{1}里？", "谁有{2}？")}


def recall(rng: Random, lang: str) -> Draft:
    """A story of two to four sentences about one person, and a question that one of its words answers."""
    pools = (NAMES, PLACES, THINGS, COLOURS)
    drawn = [rng.randrange(len(pool)) for pool in pools]
    told = sorted(rng.sample(range(3), rng.randint(2, 3)))
    spoken = told + [3] * (rng.random() < 0.5)
    rng.shuffle(spoken)
    texts = [word(pool, i, lang) for pool, i in zip(pools, drawn, strict=True)] + [rng.randint(10, 99)]
    fact = rng.choice(told)
    side, questions = RECALL[lang][fact]
    if fact < 2 and rng.random() < 0.3:
        side, questions = 0, (WHO[lang][fact],)
    lines = [TOLD[lang][i] for i in spoken] + [rng.choice(questions)]
    other = (drawn[side] + rng.randrange(1, len(pools[side]))) % len(pools[side])
    told_of = (True, 0 in told, 1 in told or 2 in told, 2 in told)
    key = tuple(i if known else -1 for i, known in zip(drawn, told_of, strict=True))
    return Draft(key, SPACED[lang].join(lines).format(*texts), texts[side], word(pools[side], other, lang))


STORIES: dict[str, tuple[Words, Words, dict[str, str]]] = {  # kind -> (subjects, objects, sentence)
    "has": (NAMES, THINGS, {"en": "{0} has the {1}.", "zh": "{0}有{1}。"}),
    "where": (NAMES, PLACES, {"en": "{0} is in the {1}.", "zh": "{0}在{1}里。"}),
    "colour": (THINGS, COLOURS, {"en": "The {0} is {1}.", "zh": "{0}是{1}的。"}),
}
RECALL_HARD = {  # (kind, language) -> (questions answered by the subject, questions answered by the object)
    ("has", "en"): (("Who has the {1}?", "Tell me who has the {1}."), ("What does {0} have?", "Tell me what {0} has.")),
    ("has", "zh"): (("谁有{1}？", "请问谁有{1}？"), ("{0}有什么？", "请问{0}有什么？")),
    ("where", "en"): (("Who is in the {1}?", "Tell me who is in the {1}."), ("Where is {0}?", "Tell me where {0} is.")),
    ("where", "zh"): (("谁在{1}里？", "请问谁在{1}里？"), ("{0}在哪里？", "请问{0}在哪里？")),
    ("colour", "en"): (("What is {1}?", "Tell me what is {1}."), ("What colour is the {0}?", "Tell me the colour of the {0}.")),
    ("colour", "zh"): (("什么是{1}的？", "请问什么是{1}的？"), ("{0}是什么颜色？", "请问{0}是什么颜色？")),
}  # fmt: skip


def recall_hard(rng: Random, lang: str) -> Draft:
    """Two to four facts of one kind and a question about one: the model must bind each subject to its object."""
    kind, n = rng.choice(tuple(STORIES)), rng.randint(2, 4)
    subjects, objects, sentence = STORIES[kind]
    facts = list(zip(rng.sample(range(len(subjects)), n), rng.sample(range(len(objects)), n), strict=True))
    told = [(word(subjects, s, lang), word(objects, o, lang)) for s, o in facts]
    asked, other = rng.sample(range(n), 2)
    side = rng.randrange(2)
    story = SPACED[lang].join(sentence[lang].format(*fact) for fact in told)
    question = rng.choice(RECALL_HARD[kind, lang][side]).format(*told[asked])
    key = (kind, tuple(sorted(facts)))
    return Draft(key, story + SPACED[lang] + question, told[asked][side], told[other][side])


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
