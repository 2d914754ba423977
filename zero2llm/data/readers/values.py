"""Strict JSON: a text is exactly one value that can be written again, or a ValueError says why it is not.

Python's own parser takes NaN, keeps the last of two equal keys, turns 1e999 into infinity and half a surrogate pair into
a string that no file can hold. Each would lose or change data without a word, or fail far from here.
Rule: what `parse` returns, `json.dumps(value, ensure_ascii=False, allow_nan=False).encode()` writes.
"""

from __future__ import annotations

import base64
import datetime
import json
import math
from collections import Counter
from decimal import Decimal
from typing import Any
from uuid import UUID

DEEPEST = 100  # levels of nesting; Python's writers recurse, and their limit depends on who calls them


def _object(pairs: list[tuple[str, Any]]) -> dict:
    value = dict(pairs)
    if len(value) != len(pairs):
        twice = next(key for key, n in Counter(k for k, _ in pairs).items() if n > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return value


def _constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _number(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"the number {text[:40]} is too large for a float")
    return value


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=_number)


def parse(text: str) -> Any:
    """Raises ValueError: the reason, without a place."""
    try:
        value = DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(why(error)) from None
    if fault := unwritable(value, text):
        raise ValueError(fault)
    return value


def parse_several(text: str) -> list[Any]:
    """Objects that follow each other without a line break: two lines that a crash joined. Raises ValueError if not all are whole."""
    values, at = [], 0
    while at < len(text):
        try:
            value, stop = DECODER.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise ValueError(why(error)) from None
        fault = unwritable(value, text[at:stop])
        if fault or not isinstance(value, dict):
            raise ValueError(fault or f"not JSON (something stands behind the value, at column {at + 1})")
        values.append(value)
        while stop < len(text) and text[stop] in " \t\r\n":
            stop += 1
        at = stop
    return values


def why(error: Exception) -> str:
    """A parser's complaint as one sentence."""
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error.msg} at column {error.colno})"
    if isinstance(error, RecursionError):
        return f"not JSON that can be read (nested more than {DEEPEST} deep)"
    if "integer string conversion" in str(error):
        return "not JSON that can be read (a number of more than 4,300 digits)"
    return f"not JSON ({error})"


def unwritable(value: Any, text: str) -> str:
    """Why a parsed value could not be written again; empty if it could. ``text`` is what it was parsed from."""
    if text.count("[") + text.count("{") > DEEPEST and too_deep(value):
        return f"not JSON that can be read (nested more than {DEEPEST} deep)"
    if "\\u" in text and ("\\ud" in text or "\\uD" in text):
        return half_character(json.dumps(value, ensure_ascii=False))
    return ""


def half_character(text: str) -> str:
    """JSON may spell half of a surrogate pair, which no encoding can store."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"holds half a character (\\u{ord(text[error.start]):04x})"
    return ""


def too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEEPEST):
        below = []
        for part in level:
            if isinstance(part, dict):
                below += part.values()
            elif isinstance(part, list):
                below += part
        level = [part for part in below if isinstance(part, dict | list)]
        if not level:
            return False
    return True


def plain(value: Any, noted: Counter[str]) -> Any:
    """A row of a table with JSON's kinds of values only; each change of kind is counted in ``noted``."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        noted["not-a-number or infinite values read as null"] += 1
        return None
    if isinstance(value, dict):
        return {str(k): plain(v, noted) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v, noted) for v in value]
    if isinstance(value, bytes):
        noted["binary values read as base64"] += 1
        return base64.b64encode(value).decode()
    if isinstance(value, datetime.date | datetime.time):
        noted["dates and times read as ISO 8601"] += 1
        return value.isoformat()
    if isinstance(value, Decimal | UUID | datetime.timedelta):
        noted["decimals, durations and UUIDs read as text"] += 1
        return str(value)
    raise ValueError(f"a value of kind {type(value).__name__} has no JSON form; leave that column out")
