"""Compare, sort, add and subtract."""

from __future__ import annotations

from random import Random

from zero2llm.evals.tasks.items import Draft

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


SORT = {
    "en": ("Sort: {}", "Put in order: {}", "Sort from small to large: {}"),
    "zh": ("排序：{}", "请排好：{}", "从小到大排列：{}"),
}


def sort(rng: Random, lang: str) -> Draft:
    """Three to five different digits in rising order."""
    digits = rng.sample(range(10), rng.randint(3, 5))
    prompt = rng.choice(SORT[lang]).format(" ".join(map(str, digits)))
    rising = sorted(digits)
    slip, at = list(rising), rng.randrange(len(rising) - 1)
    slip[at : at + 2] = slip[at + 1], slip[at]  # a near miss: a reply that is wrong all over teaches to avoid its digits
    return Draft(tuple(rising), prompt, " ".join(map(str, rising)), " ".join(map(str, slip)))


SUMS = {
    "en": ("What is {}?", "How much is {}?", "{} = ?"),
    "zh": ("{}等于几？", "请算：{}", "{} = 几？"),
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
