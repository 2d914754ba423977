"""Conversations for supervised training, and pairs of replies for preference training, from the same families."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from zero2llm.evals.tasks.generate import EASY, Message, conversation, generate
from zero2llm.evals.tasks.items import Item
from zero2llm.evals.tasks.manners import CURT, MANNERS, POLITE, REPLIES


@dataclass(frozen=True)
class Pair:
    """One prompt, the reply to prefer and the reply to avoid. ``family`` tells manner from exact pairs."""

    family: str
    lang: str
    prompt: list[Message]
    chosen: str
    rejected: str


def sft_conversations(
    n: int, seed: int, families: Sequence[str] = EASY, manner_share: float = 0.2, two_turn_share: float = 0.15
) -> list[list[Message]]:
    """``n`` training conversations; ``two_turn_share`` of them ask two questions.

    ``manner_share`` of the questions come from the manner families and are answered politely or curtly with equal
    frequency, each wording as often as any other: a model that learns this is undecided on held-out pairs.
    """
    _check_share("manner_share", manner_share), _check_share("two_turn_share", two_turn_share)
    n_two = round(n * two_turn_share)
    n_manner = round((n + n_two) * manner_share)
    items = _mixed_manners(generate(tuple(MANNERS), n_manner, seed, "train"), seed) if n_manner else []
    if n + n_two > n_manner:
        items += generate(families, n + n_two - n_manner, seed, "train")
    rng = Random(f"conversations/{seed}")
    rng.shuffle(items)
    talks = [conversation(*items[2 * i : 2 * i + 2]) for i in range(n_two)]
    talks += [conversation(item) for item in items[2 * n_two :]]
    rng.shuffle(talks)
    return talks


def preference_pairs(
    n: int, seed: int, split: str, exact_share: float = 0.2, families: Sequence[str] = EASY
) -> list[Pair]:
    """``n`` pairs of one split. A pair is won when the model gives ``chosen`` the higher total log-probability.

    ``exact_share`` of them come from ``families`` and prefer the right answer to a plausible wrong one, which keeps
    preference training from wearing the answers away; the others prefer a polite reply to a curt one.
    """
    _check_share("exact_share", exact_share)
    n_exact = round(n * exact_share)
    pairs = _manner_pairs(generate(tuple(MANNERS), n - n_exact, seed, split), seed) if n > n_exact else []
    if n_exact:
        exact = generate(families, n_exact, seed + 1, split)  # + 1: not the very questions of the SFT set
        pairs += [_pair(item, item.answer, item.wrong) for item in exact]
    Random(f"pairs/{seed}/{split}").shuffle(pairs)
    return pairs


def _pair(item: Item, chosen: str, rejected: str) -> Pair:
    return Pair(item.family, item.lang, conversation(item)[:1], chosen, rejected)


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} = {value}: a share lies between 0 and 1")


def _by_cell(items: list[Item]) -> dict[tuple[str, str], list[Item]]:
    cells = defaultdict(list)
    for item in items:
        cells[item.family, item.lang].append(item)
    return cells


def _mixed_manners(items: list[Item], seed: int) -> list[Item]:
    """The items with polite and curt answers dealt out like cards, not thrown like dice: no wording is luckier."""
    out = []
    for (family, lang), cell in _by_cell(items).items():
        deck = [*REPLIES[family, lang][POLITE], *REPLIES[family, lang][CURT]]
        Random(f"deck/{seed}/{family}/{lang}").shuffle(deck)
        out += [replace(item, answer=deck[i % len(deck)]) for i, item in enumerate(cell)]
    return out


def _manner_pairs(items: list[Item], seed: int) -> list[Pair]:
    """Every combination of a polite and a curt wording, equally often."""
    pairs = []
    for (family, lang), cell in _by_cell(items).items():
        deck = [(good, bad) for good in REPLIES[family, lang][POLITE] for bad in REPLIES[family, lang][CURT]]
        Random(f"deck/{seed}/{family}/{lang}").shuffle(deck)
        pairs += [_pair(item, *deck[i % len(deck)]) for i, item in enumerate(cell)]
    return pairs
