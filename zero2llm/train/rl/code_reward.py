"""The reward of an answer that is a program: the share of its tests that it passes.

    R = passed / tests             or, with value: all, 1 only if it passes every one

The program is the last fenced block of the answer, or the whole text. Its tests stand in the prompt's record as ``answer`` (or ``gt``),
one or a list of:
    {"input": text, "output": text}     a program: reads standard input; its output must be this, up to blanks at ends of lines
    "assert f(2) == 4"                  functions: the answer runs first, as a module, then this
Each test has a process of its own (sandbox.py), so one endless loop loses one test. A comparison with a literal is made on this
side: the child is asked for the value of the left, and neither it nor the program ever sees what is right; containers are compared as
the plain list, tuple, set or dict. Other statements (a loop, ``assert abs(f(2) - 1.4) < 0.1``) count as passed if they run to
their end, which the child reports with a nonce that is read after the answer has run.
What remains: a program that reads the nonce from its own standard input can fake that report, for statements alone; one that reads the
test's call can answer for that call only. Prefer literals or input and output, and keep some tests out of training.
A record without tests, or with one that is none, is no 0: the answer counts as failed. Results do not depend on the load up to the wall
clock's limit; hashing is fixed, other randomness is the program's own.
Source: MBPP 2108.07732 (asserts), APPS 2105.09938 (input and output; share and all).
"""

from __future__ import annotations

import ast
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from zero2llm.core.config import config
from zero2llm.train.rl.answer import Answer, Together
from zero2llm.train.rl.sandbox import Limits, Program, protections, run_all

FENCED = re.compile(r"```[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
VALUE = "value_of_the_test = (\n{}\n)"  # what sandbox_child.py looks for
UNREADABLE = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)  # of ast, for text that is no Python


@dataclass(frozen=True)
class Test:
    """``given`` and ``output`` of a program; or ``check``, run behind the answer, and the ``value`` it must have, as text
    (None = it need only run through)."""

    given: str | None = None
    output: str = ""
    check: str = ""
    value: str | None = None


@config
class CodeConfig:
    """The share of the record's tests that the answer's program passes; ``all``: 1 or 0. Limits of each test: CPU seconds, MiB."""

    kind: Literal["code"] = "code"
    weight: float = 1.0
    value: Literal["share", "all"] = "share"
    seconds: int = 2
    memory: int = 256

    def __post_init__(self) -> None:
        if os.name != "posix":
            raise ValueError(f"reward code needs Linux or macOS: on {os.name!r} a program of the model's could not be confined; use another rule there")
        if self.seconds < 1 or self.memory < 64:
            raise ValueError(f"reward code: seconds = {self.seconds} must be at least 1, memory = {self.memory} at least 64 (MiB; Python itself takes 30)")

    def build(self) -> Together:
        protections()
        return Together(self.scores)

    def scores(self, answers: Sequence[Answer]) -> list[float | str]:
        tests = [asked(answer.record) for answer in answers]
        nonce = secrets.token_hex(16)
        jobs = [(i, test) for i, some in enumerate(tests) if not isinstance(some, str) for test in some]
        programs = [program(code_of(answers[i].text), test, nonce) for i, test in jobs]
        passed = [[] for _ in answers]
        for (i, test), printed in zip(jobs, run_all(programs, Limits(self.seconds, self.memory)), strict=True):
            passed[i].append(passes(test, printed, nonce))
        score = all if self.value == "all" else lambda found: sum(found) / len(found)
        return [some if isinstance(some, str) else float(score(found)) for some, found in zip(tests, passed, strict=True)]


def code_of(text: str) -> str:
    blocks = FENCED.findall(text)
    return blocks[-1] if blocks else text


def asked(record: Mapping[str, Any]) -> list[Test] | str:
    """The record's tests, or why there are none."""
    found = record.get("answer", record.get("gt"))
    found = found if isinstance(found, list | tuple) else [] if found is None else [found]
    try:
        return [as_test(one) for one in found] or "the prompt's record has no tests in answer or gt"
    except ValueError as error:
        return str(error)


def as_test(value: Any) -> Test:
    """Raises ValueError if it is no test."""
    if isinstance(value, dict) and set(value) == {"input", "output"} and all(isinstance(text, str) for text in value.values()):
        return Test(given=value["input"], output=value["output"])
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"a test is {{input, output}} as texts, or a line of Python such as 'assert f(2) == 4', not {value!r:.60}")
    try:
        body = ast.parse(value).body
    except UNREADABLE as error:
        raise ValueError(f"the test {value!r:.60} is no Python: {error}") from None
    match body:
        case [ast.Assert(test=ast.Compare(left=left, ops=[ast.Eq()], comparators=[right]))]:
            literal = literal_of(ast.unparse(right))
            if literal is not None:
                return Test(check=VALUE.format(ast.unparse(left)), value=literal[0])
    return Test(check=value)


def literal_of(text: str) -> tuple[str, Any] | None:
    """The text and the value of a literal; None if it is none."""
    try:
        return text, ast.literal_eval(text)
    except UNREADABLE:
        return None


def program(code: str, test: Test, nonce: str) -> Program:
    if test.given is not None:
        return Program("program", code, test.given)
    return Program("check", code, nonce, test.check)


def passes(test: Test, printed: str | None, nonce: str) -> bool:
    if printed is None:
        return False
    if test.given is not None:
        return _lines(printed) == _lines(test.output)
    if not printed.startswith(nonce):
        return False
    if test.value is None:
        return True
    found = literal_of(printed.removeprefix(nonce))
    return found is not None and bool(found[1] == literal_of(test.value)[1])


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
