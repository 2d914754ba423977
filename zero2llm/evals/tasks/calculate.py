"""Sums that are too much for a small model's head and nothing for a calculator: what tool use is practised on."""

from __future__ import annotations

from random import Random

from zero2llm.evals.tasks.items import Draft, Family

ASKED = {
    "en": ("What is {}?", "Work out {}.", "Please calculate {}."),
    "zh": ("{}等于多少？", "计算：{}", "请算出{}。"),
}
FORMS = ("{0} * {1} + {2}", "{0} * {1} - {2}", "({0} + {1}) * {2}", "{0} + {1} * {2}", "{0} - {1} * {2}")


def calculate(rng: Random, lang: str) -> Draft:
    """Three numbers of one digit, a product among them."""
    form, (a, b, c) = rng.randrange(len(FORMS)), [rng.randint(1, 9) for _ in range(3)]
    value = (a * b + c, a * b - c, (a + b) * c, a + b * c, a - b * c)[form]
    key, text = (form, a, b, c), FORMS[form].format(a, b, c)
    wrong = value + rng.choice((-10, -1, 1, 10))
    return Draft(key, rng.choice(ASKED[lang]).format(text), str(value), str(wrong), text)


CALCULATED = {"calculate": Family("calculate", calculate)}
