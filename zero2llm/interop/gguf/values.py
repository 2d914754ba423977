"""The header of a GGUF file: numbers, strings and typed metadata values, read and written.

    string   uint64 length, UTF-8 bytes
    value    uint32 type, then by type: a number | one byte 0 or 1 | a string | uint32 type, uint64 count, the elements

The type of what is written follows from the Python value; `Typed` says otherwise where a reader expects another one:

    bool -> bool    int from 0 to 2**32 - 1 -> uint32    float -> float32 (rounded)    str -> string
    list of bool, int, float or str -> array of bool, int32, float32 or string

Source: ggml, docs/gguf.md, version 3; llama.cpp asks for exactly these types (uint32 for counts, int32 for token types).
Why the limits: a damaged length must end in a sentence, not in an attempt to reserve it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

NUMBERS = {  # type -> struct and numpy code
    "uint8": "B", "int8": "b", "uint16": "H", "int16": "h", "uint32": "I", "int32": "i", "float32": "f", "bool": "?",
    "uint64": "Q", "int64": "q", "float64": "d",
}  # fmt: skip
TYPES = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "bool", "string", "array", "uint64", "int64", "float64"]
OF_PYTHON = {bool: "bool", int: "int32", float: "float32", str: "string"}
MAX_STRING = 1 << 26  # bytes; the longest in use are chat templates of some ten thousand
MAX_ELEMENTS = 1 << 22  # of an array; the largest vocabularies have a quarter of a million tokens


@dataclass(frozen=True)
class Typed:
    """A metadata value whose type the file must have, as in ``Typed("uint64", 5)``; a list makes an array of that type."""

    type: str
    value: Any

    def __post_init__(self) -> None:
        if self.type not in NUMBERS and self.type != "string":
            raise ValueError(f"GGUF has no metadata type {self.type!r}; it has {', '.join((*NUMBERS, 'string'))}")


class Cursor:
    """Reads a file from front to back; everything that is not there is a ValueError naming the file."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.size = file.seek(0, 2)
        file.seek(0)
        self.at = 0

    def wrong(self, what: str) -> ValueError:
        return ValueError(f"{self.path}: {what}; the file is damaged, fetch it again")

    def take(self, count: int, what: str) -> bytes:
        found = self.file.read(count) if count <= self.size - self.at else b""
        if len(found) != count:
            raise self.wrong(f"{what} at byte {self.at} needs {count} bytes, but the file ends at byte {self.size}")
        self.at += count
        return found

    def number(self, type: str, what: str) -> Any:
        code = NUMBERS[type]
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]

    def string(self, what: str) -> str:
        if (length := self.number("uint64", what)) > MAX_STRING:
            raise self.wrong(f"{what} claims a string of {length} bytes, more than {MAX_STRING}")
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError as error:
            raise self.wrong(f"{what} is no UTF-8 ({error.reason})") from error

    def type(self, what: str) -> str:
        if (number := self.number("uint32", what)) >= len(TYPES):
            raise self.wrong(f"{what} has type {number}, which GGUF does not know")
        return TYPES[number]

    def value(self, key: str) -> Any:
        """Of one metadata entry; arrays are lists."""
        what = f"metadata {key!r}"
        type = self.type(what)
        return self._array(what) if type == "array" else self._elements(type, 1, what)[0]

    def _array(self, what: str) -> list:
        type, count = self.type(what), self.number("uint64", what)
        if type == "array":
            raise self.wrong(f"{what} is an array of arrays, which is not supported")
        least = 8 if type == "string" else struct.calcsize(NUMBERS[type])
        if count > MAX_ELEMENTS or count * least > self.size - self.at:
            raise self.wrong(f"{what} claims {count} elements of type {type}, more than the file or this reader holds")
        return self._elements(type, count, what)

    def _elements(self, type: str, count: int, what: str) -> list:
        if type == "string":
            return [self.string(what) for _ in range(count)]
        dtype = np.dtype(NUMBERS[type]).newbyteorder("<")
        raw = self.take(count * dtype.itemsize, what)
        if type == "bool" and raw.strip(b"\0\1"):
            raise self.wrong(f"{what} has a boolean that is neither 0 nor 1")
        return np.frombuffer(raw, dtype).tolist()


def entry(key: str, value: Any) -> Iterator[bytes]:
    """The bytes of one metadata entry. Raises ValueError naming the key whose value has no type, or another than it says."""
    typed = value if isinstance(value, Typed) else Typed(_type_of(key, value), value)
    yield string(key)
    if isinstance(typed.value, list | tuple):
        yield struct.pack("<IIQ", TYPES.index("array"), TYPES.index(typed.type), len(typed.value))
        for element in typed.value:
            yield _scalar(key, typed.type, element)
    else:
        yield struct.pack("<I", TYPES.index(typed.type)) + _scalar(key, typed.type, typed.value)


def string(text: str) -> bytes:
    raw = text.encode()
    return len(raw).to_bytes(8, "little") + raw


def _type_of(key: str, value: Any) -> str:
    if isinstance(value, list | tuple):
        kinds = {type(element) for element in value}
        if len(kinds) == 1 and (found := OF_PYTHON.get(kinds.pop())):
            return found
        hold = "only bools, only ints, only floats or only strings"
        raise ValueError(f"metadata {key!r}: a list must hold {hold}; Typed names its type")
    if type(value) is int:
        return "uint32"
    if found := OF_PYTHON.get(type(value)):
        return found
    raise ValueError(f"metadata {key!r}: {value!r} is a {type(value).__name__}, which GGUF cannot hold")


def _scalar(key: str, type: str, value: Any) -> bytes:
    wanted = {"bool": bool, "string": str, "float32": (int, float), "float64": (int, float)}.get(type, int)
    if not isinstance(value, wanted) or (isinstance(value, bool) and type != "bool"):
        raise ValueError(f"metadata {key!r}: {value!r} is no {type}")
    try:
        return string(value) if type == "string" else struct.pack("<" + NUMBERS[type], value)
    except (struct.error, OverflowError, UnicodeEncodeError) as error:
        raise ValueError(f"metadata {key!r}: {value!r} does not fit {type} ({error}); Typed names another type") from error
