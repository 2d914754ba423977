"""The calculator by hand: values, an independent evaluation of random expressions, what is refused, and six bugs that are caught."""

from __future__ import annotations

import time
from fractions import Fraction
from random import Random

import pytest

from tests.golden.planted import bug_tests
from zero2llm.train.rl import calculator
from zero2llm.train.rl.calculator import _Reader, calculate, written

VALUES = {
    "2 + 3 * 4": "14", "(2 + 3) * 4": "20", "10 - 3 - 2": "5", "24 / 4 / 2": "3", "2 ** 3 ** 2": "512", "-2 ** 2": "-4", "(-2) ** 2": "4",
    "2 ** -1": "0.5", "--3": "3", "+4": "4", "2 * -3": "-6", "0.1 + 0.2": "0.3", ".5 * 4": "2", "1.": "1", "10 / 4": "2.5", "1 / 3": "0.333333333333",
    "2 / 3": "0.666666666667", "7/1000": "0.007", "100 * 100": "10000", "2 ** 100": "1267650600228229401496703205376", "0 ** 0": "1", " 1\t+ 1 ": "2",
    "1 / 3 * 3": "1", "-7 / 2": "-3.5", "1 / 10 ** 15": "0.000000000000001", "10 ** 20 + 1 / 2": "100000000000000000000",
}  # fmt: skip
REFUSED = {
    "": "too early", "1 +": "too early", "(1": "too early", "(1 2": "\\) is missing", "1 2": "'2' was not expected", ")": "not expected", "1 / 0": "division by zero",
    "0 ** -1": "division by zero", "1e5": "'e' is neither", "x": "'x' is neither", "__import__('os')": "neither", "1,000": "',' is neither", "2 ** 0.5": "0.5 must be whole",
    "1 ** 101": "at most 100", "1 ** -101": "at most 100", "9" * 160: "too large", "99 ** 99": "too large", "0" * 201: "201 characters", "(" * 60 + "1": "40 deep",
    "-" * 60 + "1": "40 deep", "٣": "neither", "2 ^ 3": "neither", "1_0": "neither", "*2": "not expected", "5 % 2": "neither",
}  # fmt: skip


def check_values():
    for expression, value in VALUES.items():
        assert _said(expression) == value, expression


def _said(expression):
    try:
        return calculate(expression)
    except ValueError as error:
        return str(error)


def check_refused():
    for expression, words in REFUSED.items():
        with pytest.raises(ValueError, match=words):
            raise AssertionError(f"{expression!r} gave {calculate(expression)}")


def tree(rng: Random, depth: int) -> tuple[str, Fraction]:
    """An expression and its value, built together: nothing is parsed."""
    if depth == 0 or rng.random() < 0.2:
        n = rng.randint(1, 20)
        return (str(n), Fraction(n)) if rng.random() < 0.7 else (f"{n}.{n % 10}", n + Fraction(n % 10, 10))
    (a, x), (b, y) = tree(rng, depth - 1), tree(rng, depth - 1)
    sign = rng.choice("+-*/")
    if sign == "/" and y == 0:
        sign = "+"
    return f"({a}) {sign} ({b})", {"+": x + y, "-": x - y, "*": x * y, "/": x / (y or 1)}[sign]


def check_trees():
    rng, seen = Random(0), 0
    while seen < 150:
        text, value = tree(rng, 3)
        if len(text) <= calculator.LENGTH:
            assert _said(text) == written(value), text
            seen += 1


def check_chains():
    """Without parentheses: Python's own reading of whole numbers."""
    rng = Random(1)
    for _ in range(150):
        text = "".join(f"{rng.randint(1, 9)} {rng.choice(['+', '-', '*', '-'])} " for _ in range(5)) + str(rng.randint(1, 9))
        products = [p.split(" * ") for p in text.replace(" - ", " + -").split(" + ")]
        value = sum(_product(p) for p in products)
        assert _said(text) == str(value), text


def _product(factors):
    value = 1
    for factor in factors:
        value *= int(factor)
    return value


def check_time():
    began = time.process_time()
    for expression in ("9**9**9**9", "99**99*99**99", "(" * 199, "1" + "+1" * 99, "1/3" + "*1/7" * 40, "9" * 190, "**" * 99):
        for _ in range(20):
            _said(expression)
    assert time.process_time() - began < 1


def test_exact_and_bounded():
    assert calculate("2**100*2**100*2**56") == str(2**256)
    with pytest.raises(ValueError, match="too large"):
        calculate("(2**100)**6")


def method(name):
    def plant(change):
        def bug(monkeypatch):
            monkeypatch.setattr(_Reader, name, change)

        bug.__name__ = change.__name__
        return bug

    return plant


def left_to_right_powers(self, depth):
    value = self.atom(depth)
    while self.next() == "**":
        self.take()
        value = calculator._power(value, self.sign_of_atom(depth) if self.next() in ("+", "-") else self.atom(depth))
    return value


def minus_before_power(self, depth):
    if self.next() == "-":
        self.take()
        value = -self.atom(depth)
        if self.next() == "**":
            self.take()
            value = calculator._power(value, self.sign(depth + 1))
        return value
    return self.power(depth) if self.next() != "+" else (self.take(), self.sign(depth + 1))[1]


def right_to_left_differences(self, depth):
    value = self.product(depth)
    if self.next() in ("+", "-"):
        sign = 1 if self.take() == "+" else -1
        value = value + sign * self.sum(depth)
    return value


def no_precedence(self, depth):
    value = self.sign(depth)
    while self.next() in ("+", "-", "*", "/"):
        sign, other = self.take(), self.sign(depth)
        value = {"+": value + other, "-": value - other, "*": value * other, "/": value / (other or 1)}[sign]
    return value


def whole_division(self, depth):
    value = self.sign(depth)
    while self.next() in ("*", "/"):
        times, other = self.take() == "*", self.sign(depth)
        if not times and other == 0:
            raise ValueError("division by zero")
        value = value * other if times else Fraction(value // other)
    return value


_Reader.sign_of_atom = lambda self, depth: -self.atom(depth) if self.take() == "-" else self.atom(depth)


def what_is_left_is_ignored(monkeypatch):
    monkeypatch.setattr(calculator, "calculate", None)
    monkeypatch.setitem(globals(), "calculate", lambda text: written(_Reader(calculator._tokens(text)).sum(0)))


def floats(monkeypatch):
    monkeypatch.setattr(calculator, "written", lambda value: repr(float(value)).removesuffix(".0"))


def size_is_not_looked_at(monkeypatch):
    monkeypatch.setattr(calculator, "BITS", 10**9)


BUGS = {
    method("power")(left_to_right_powers): {"check_values"},
    method("sign")(minus_before_power): {"check_values"},
    method("sum")(right_to_left_differences): {"check_values", "check_chains"},
    method("sum")(no_precedence): {"check_values", "check_chains"},
    method("product")(whole_division): {"check_values", "check_trees"},
    what_is_left_is_ignored: {"check_refused"},
    floats: {"check_values"},
    size_is_not_looked_at: {"check_refused"},
}
CHECKS = [check_values, check_refused, check_trees, check_chains, check_time]
test_the_calculator, test_bugs_are_caught = bug_tests(BUGS, CHECKS, also=(ValueError, ArithmeticError))
