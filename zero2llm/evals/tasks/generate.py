"""Draw questions: balanced, free of duplicates, a function of the seed, and never from the other split."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from zero2llm.evals.tasks.calculate import CALCULATED
from zero2llm.evals.tasks.families import EXACT
from zero2llm.evals.tasks.items import LANGS, SPLITS, Item, split_of
from zero2llm.evals.tasks.manners import MANNERS

FAMILIES = EXACT | MANNERS | CALCULATED
EASY = ("recall", "pick", "translate", "sort", "last")  # what a tiny model learns in two minutes
PATIENCE = 2000  # draws in a row that bring nothing new before a family counts as used up

Message = dict[str, str]


def generate(families: Sequence[str], n: int, seed: int, split: str, langs: Sequence[str] = LANGS) -> list[Item]:
    """``n`` questions in shuffled order, as many of each family and language as of any other (give or take one).

    Each (family, language) draws from a generator of its own, so adding a family leaves the others' items as they
    were. No prompt occurs twice. Raises ValueError for an unknown name, or where a family runs out of questions.
    """
    _check(families, split, langs)
    cells = [(family, lang) for family in families for lang in langs]
    quota = [n // len(cells) + (i < n % len(cells)) for i in range(len(cells))]
    items = [item for cell, size in zip(cells, quota, strict=True) for item in _cell(*cell, size, seed, split)]
    Random(f"order/{seed}/{split}").shuffle(items)
    return items


def _check(families: Sequence[str], split: str, langs: Sequence[str]) -> None:
    for what, given, known in (("family", families, FAMILIES), ("split", [split], SPLITS), ("language", langs, LANGS)):
        for name in given:
            if name not in known:
                raise ValueError(f"{what} {name!r} is unknown; there are: {', '.join(known)}")
        if not given or len(set(given)) < len(given):
            raise ValueError(f"{what}: {list(given)} is empty or names one twice")


def _cell(family: str, lang: str, n: int, seed: int, split: str) -> list[Item]:
    rng = Random(f"{seed}/{split}/{family}/{lang}")
    found: dict[str, Item] = {}
    idle = 0
    while len(found) < n:
        item = FAMILIES[family].item(rng, lang)
        if item.prompt in found or split_of(family, item.key) != split:
            idle += 1
            if idle > PATIENCE:
                raise ValueError(f"family {family!r} has about {len(found)} {split} questions in {lang!r}, not {n}")
            continue
        found[item.prompt], idle = item, 0
    return list(found.values())


def conversation(*items: Item) -> list[Message]:
    """Messages of one conversation: each item is one turn of the user and one of the assistant."""
    roles = ("user", "assistant")
    return [{"role": r, "content": c} for item in items for r, c in zip(roles, (item.prompt, item.answer), strict=True)]
