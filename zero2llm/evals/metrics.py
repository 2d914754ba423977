"""Numbers that describe an evaluation, each with its unit, and proportions with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from zero2llm.evals.tasks.items import Item

Z95 = 1.959963984540054  # the normal quantile that leaves 2.5 % on each side


@dataclass(frozen=True)
class Rate:
    """``hits`` of ``total``, with the Wilson 95 % interval [low, high] of the true proportion.

        centre = (p + z^2 / 2n) / (1 + z^2 / n)     half = z sqrt(p (1 - p) / n + z^2 / 4n^2) / (1 + z^2 / n)

    Source: Wilson 1927. Unlike p +- z sqrt(p (1 - p) / n) it is not empty at 0 of n or n of n.
    """

    hits: int
    total: int

    @property
    def rate(self) -> float:
        return self.hits / self.total

    @property
    def interval(self) -> tuple[float, float]:
        n, p, z2 = self.total, self.rate, Z95**2
        centre = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
        return max(centre - half, 0.0), min(centre + half, 1.0)


def exact_match(outputs: Sequence[str], items: Sequence[Item]) -> dict[str, Rate]:
    """How many outputs equal the whole answer once stripped: per family, and under "overall".

    Raises ValueError where the two differ in number or are empty.
    """
    if len(outputs) != len(items) or not items:
        raise ValueError(f"{len(outputs)} outputs for {len(items)} items: one each is needed, and at least one")
    groups: dict[str, list[bool]] = {"overall": []}
    for output, item in zip(outputs, items, strict=True):
        right = output.strip() == item.answer.strip()
        groups["overall"].append(right)
        groups.setdefault(item.family, []).append(right)
    return {name: Rate(sum(marks), len(marks)) for name, marks in groups.items()}


def win_rate(chosen_logps: Sequence[float], rejected_logps: Sequence[float]) -> Rate:
    """How often the chosen reply has the higher total log-probability (nats); a tie is no win, nor is a NaN."""
    if len(chosen_logps) != len(rejected_logps) or not len(chosen_logps):
        raise ValueError(f"{len(chosen_logps)} chosen and {len(rejected_logps)} rejected: equal numbers are needed")
    wins = [float(c) > float(r) for c, r in zip(chosen_logps, rejected_logps, strict=True)]
    return Rate(sum(wins), len(wins))


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Total loss in nats over the UTF-8 bytes of the text: comparable between tokenizers."""
    if n_bytes <= 0:
        raise ValueError(f"bits per byte of {n_bytes} bytes is undefined")
    return nats / math.log(2) / n_bytes


def perplexity(nats: float, n_tokens: int) -> float:
    """exp(mean loss per token), infinite beyond the range of a float: comparable within one tokenizer only."""
    if n_tokens <= 0:
        raise ValueError(f"perplexity of {n_tokens} tokens is undefined")
    mean = nats / n_tokens
    return math.exp(mean) if mean < 700 else math.inf
