"""What an answer is worth: rules that look at its text, and a weighted sum of several.

    R = sum_k weight_k * reward_k(text, record)

Rules of a few lines stand here; `code` (code_reward.py) runs the answer, `model` (model_reward.py) asks a reward model. Rules that need
no model cannot be flattered, but only say what they were told to look at. A rule that raises, or gives what is no number, leaves its
answer, and no other, out of the step (metric `failed`): a score of 0 would teach the model something.
Source: verifiable rewards as in DeepSeek-R1 2501.12948 section 2.2.2 (accuracy and format).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Annotated, Literal

import torch

from zero2llm.core.config import by_kind, config
from zero2llm.tokenizers.tokenizer import Tokenizer
from zero2llm.train.rl.answer import Answer, Rule, Together, right_answers
from zero2llm.train.rl.code_reward import CodeConfig
from zero2llm.train.rl.model_reward import ModelRewardConfig

NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")


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


@config
class ToolConfig:
    """The share of an answer's tool calls that could be run without an error; 0 without a call. ``used``: and 0 unless the last
    call's result stands in the last turn. Calls in a turn that no reply followed do not count."""

    kind: Literal["tool"] = "tool"
    weight: float = 1.0
    used: bool = False

    def build(self) -> Rule:
        def rule(answer: Answer) -> float:
            if not answer.calls or (self.used and answer.calls[-1].result not in answer.text):
                return 0.0
            return sum(not call.failed for call in answer.calls) / len(answer.calls)

        return rule


RuleConfig = Annotated[ExactConfig | NumericConfig | RegexConfig | OverlongConfig | ToolConfig | CodeConfig | ModelRewardConfig, by_kind]


class Mixture:
    """``rules`` with their weights. Calling it gives one reward an answer, None where a rule failed."""

    def __init__(self, rules: Sequence[tuple[float, Rule | Together]]):
        self.rules = rules
        self.first_failure: str | None = None

    @staticmethod
    def of(rules: Sequence[RuleConfig], tokenizer: Tokenizer, device: torch.device | str = "cpu") -> Mixture:
        """tokenizer : the policy's; a reward model must share it. Raises ValueError for a reward model that cannot serve."""
        build = lambda rule: rule.build(tokenizer, device) if isinstance(rule, ModelRewardConfig) else rule.build()
        return Mixture([(rule.weight, build(rule)) for rule in rules])

    def __call__(self, answers: Sequence[Answer]) -> list[float | None]:
        columns = [(weight, scores(rule, answers)) for weight, rule in self.rules]
        return [self._sum([(weight, column[i]) for weight, column in columns]) for i in range(len(answers))]

    def _sum(self, parts: Sequence[tuple[float, float | str]]) -> float | None:
        failed = next((value for _, value in parts if isinstance(value, str)), None)
        value = 0.0 if failed else sum(weight * part for weight, part in parts)
        if not failed and math.isfinite(value):
            return value
        self.first_failure = self.first_failure or failed or f"a reward of {value}"
        return None


def scores(rule: Rule | Together, answers: Sequence[Answer]) -> Sequence[float | str]:
    """One value each; a text says why there is none."""
    return rule.score(answers) if isinstance(rule, Together) else [_one(rule, answer) for answer in answers]


def _one(rule: Rule, answer: Answer) -> float | str:
    try:
        return float(rule(answer))
    except Exception as error:  # a rule is anybody's code
        return f"{type(error).__name__}: {error}"
