"""A calculator that a model may call: four operations, powers and parentheses, exactly, on nothing but numbers.

    sum     = product (("+" | "-") product)*
    product = sign (("*" | "/") sign)*
    sign    = ("+" | "-") sign | power
    power   = atom ["**" sign]                      right to left, and before a sign: -2**2 = -4, as in Python
    atom    = number | "(" sum ")"                  number: 12, 1.5, .5; no exponent, no separator

Source: the grammar is Python's ("Expressions", Language Reference 6) restricted to these operators.
Why: what a model writes is never run as code; a parser of four rules can do nothing but arithmetic. Fractions keep results exact,
so an answer does not depend on the machine. Limits on length, depth, exponent and size bound its time to well below a millisecond.
Results: whole numbers with all digits, others with 12 significant digits.
"""

from __future__ import annotations

import re
from decimal import Context, Decimal
from fractions import Fraction

LENGTH, DEPTH, EXPONENT, BITS = 200, 40, 100, 512  # characters, parentheses and signs inside each other, |exponent|, size of a result
DIGITS = 12
TOKEN = re.compile(r"\s*(\d+\.?\d*|\.\d+|\*\*|[-+*/()])", re.ASCII)


def calculate(expression: str) -> str:
    """The value as text. Raises ValueError that says what is wrong with the expression."""
    if len(expression) > LENGTH:
        raise ValueError(f"the expression has {len(expression)} characters, {LENGTH} are allowed")
    reader = _Reader(_tokens(expression))
    value = reader.sum(0)
    if reader.next() is not None:
        raise ValueError(f"{reader.next()!r} was not expected")
    return written(value)


def written(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    rounded = Context(prec=DIGITS).divide(Decimal(value.numerator), Decimal(value.denominator))
    text = format(rounded, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def _tokens(text: str) -> list[str]:
    found, at, text = [], 0, text.rstrip()
    while at < len(text):
        match = TOKEN.match(text, at)
        if match is None:
            raise ValueError(f"{text[at:].strip()[:1]!r} is neither a number nor one of + - * / ** ( )")
        found.append(match[1])
        at = match.end()
    return found


class _Reader:
    def __init__(self, tokens: list[str]):
        self.tokens, self.at = tokens, 0

    def next(self) -> str | None:
        return self.tokens[self.at] if self.at < len(self.tokens) else None

    def take(self) -> str:
        if self.next() is None:
            raise ValueError("the expression ends too early")
        self.at += 1
        return self.tokens[self.at - 1]

    def sum(self, depth: int) -> Fraction:
        value = self.product(depth)
        while self.next() in ("+", "-"):
            sign = 1 if self.take() == "+" else -1
            value = _bounded(value + sign * self.product(depth))
        return value

    def product(self, depth: int) -> Fraction:
        value = self.sign(depth)
        while self.next() in ("*", "/"):
            times, other = self.take() == "*", self.sign(depth)
            if not times and other == 0:
                raise ValueError("division by zero")
            value = _bounded(value * other if times else value / other)
        return value

    def sign(self, depth: int) -> Fraction:
        if depth > DEPTH:
            raise ValueError(f"parentheses and signs are more than {DEPTH} deep")
        if self.next() in ("+", "-"):
            return self.sign(depth + 1) if self.take() == "+" else -self.sign(depth + 1)
        return self.power(depth)

    def power(self, depth: int) -> Fraction:
        base = self.atom(depth)
        if self.next() != "**":
            return base
        self.take()
        return _power(base, self.sign(depth + 1))

    def atom(self, depth: int) -> Fraction:
        token = self.take()
        if token == "(":
            value = self.sum(depth + 1)
            if self.take() != ")":
                raise ValueError("a ) is missing")
            return value
        if not token[0].isdigit() and token[0] != ".":
            raise ValueError(f"{token!r} was not expected")
        return _bounded(Fraction(token))


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1 or abs(exponent) > EXPONENT:
        raise ValueError(f"the exponent {written(exponent):.20} must be whole and at most {EXPONENT}")
    if base == 0 and exponent < 0:
        raise ValueError("division by zero")
    if _size(base) * abs(exponent) > 2 * BITS:  # before it is computed; the exact size is looked at afterwards
        raise ValueError("the result is too large")
    return _bounded(base ** int(exponent))


def _size(value: Fraction) -> int:
    return max(abs(value.numerator).bit_length(), value.denominator.bit_length())


def _bounded(value: Fraction) -> Fraction:
    if _size(value) > BITS:
        raise ValueError("the result is too large")
    return value
