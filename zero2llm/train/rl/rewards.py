"""What an answer is worth: rules that look at its text, and a weighted sum of several.

    R = sum_k weight_k * reward_k(text, record)

Rules need no model and cannot be flattered, but only say what they were told to look at. A rule that raises, or gives what is
no number, leaves its answer out of the step (metric `failed`): a score of 0 would teach the model something.
Source: verifiable rewards as in DeepSeek-R1 2501.12948 section 2.2.2 (accuracy and format).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from zero2llm.core.config import by_kind, config

NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Answer:
    """text : of the last turn, without its end token.  finish : stop or length.  tokens : that the policy wrote in all turns."""

    text: str
    finish: str
    tokens: int
    record: Mapping[str, Any]


Rule = Callable[[Answer], float]


@config
class ExactConfig:
    """1 if the text is the record's ``answer`` (any of ``gt``), up to blanks around it."""

    kind: Literal["exact"] = "exact"
    weight: float = 1.0

    def build(self) -> Rule:
        return lambda answer: float(answer.text.strip() in {right.strip() for right in right_answers(answer.record)})


@config
class NumericConfig:
    """1 if the last number in the text equals the record's answer, up to ``tolerance``."""

    kind: Literal["numeric"] = "numeric"
    weight: float = 1.0
    tolerance: float = 1e-6

    def build(self) -> Rule:
        def rule(answer: Answer) -> float:
            found = NUMBER.findall(answer.text)
            wanted = [float(NUMBER.findall(right)[-1].replace(",", "")) for right in right_answers(answer.record)]
            return float(bool(found) and any(abs(float(found[-1].replace(",", "")) - right) <= self.tolerance for right in wanted))

        return rule


@config
class RegexConfig:
    """1 if the whole text matches ``pattern`` (Python's re; . also matches line ends)."""

    kind: Literal["regex"] = "regex"
    pattern: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"reward regex: pattern {self.pattern!r} is no regular expression: {error}") from None

    def build(self) -> Rule:
        pattern = re.compile(self.pattern, re.DOTALL)
        return lambda answer: float(pattern.fullmatch(answer.text.strip()) is not None)


@config
class OverlongConfig:
    """0 up to ``limit - buffer`` tokens, then falling to -1 at ``limit`` and beyond (DAPO 2503.14476 eq. 13)."""

    kind: Literal["overlong"] = "overlong"
    limit: int
    buffer: int
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.buffer <= self.limit:
            raise ValueError(f"reward overlong: buffer = {self.buffer} must be from 1 to limit = {self.limit}")

    def build(self) -> Rule:
        return lambda answer: -min(max(answer.tokens - (self.limit - self.buffer), 0) / self.buffer, 1.0)


RuleConfig = Annotated[ExactConfig | NumericConfig | RegexConfig | OverlongConfig, by_kind]


def right_answers(record: Mapping[str, Any]) -> list[str]:
    """Raises ValueError if the prompt came without one."""
    found = [record["answer"]] if "answer" in record else list(record.get("gt", ()))
    if not found:
        raise ValueError("the prompt's record has neither answer nor gt")
    return [str(one) for one in found]


class Mixture:
    """``rules`` with their weights. Calling it gives one reward an answer, None where a rule failed."""

    def __init__(self, rules: Sequence[tuple[float, Rule]]):
        self.rules = rules
        self.first_failure: str | None = None

    @staticmethod
    def of(rules: Sequence[RuleConfig]) -> Mixture:
        return Mixture([(rule.weight, rule.build()) for rule in rules])

    def __call__(self, answers: Sequence[Answer]) -> list[float | None]:
        return [self._one(answer) for answer in answers]

    def _one(self, answer: Answer) -> float | None:
        try:
            value = sum(weight * float(rule(answer)) for weight, rule in self.rules)
        except Exception as error:  # a rule is anybody's code
            self.first_failure = self.first_failure or f"{type(error).__name__}: {error}"
            return None
        if not math.isfinite(value):
            self.first_failure = self.first_failure or f"a reward of {value}"
            return None
        return value
