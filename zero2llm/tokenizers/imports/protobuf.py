"""The fields of a protobuf message, without its schema: enough to read a SentencePiece model.

    message = (key value)*    key = number << 3 | wire type    wire type: 0 varint, 1 eight bytes, 2 length + bytes, 5 four bytes

Source: protobuf.dev/programming-guides/encoding. Why: a model file has three small messages that matter, and reading
them needs neither the sentencepiece package nor a generated class.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

VARINT, EIGHT, BYTES, FOUR = 0, 1, 2, 5


def varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, lowest first, and where it ends."""
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError(f"not a protobuf message: a number breaks off at byte {at}")
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 0x80:
            return value, at


def fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value): an int, or the raw bytes of text, nested messages and floats."""
    at = 0
    while at < len(data):
        key, at = varint(data, at)
        kind = key & 7
        if kind == VARINT:
            value, at = varint(data, at)
            yield key >> 3, value
            continue
        if kind == BYTES:
            size, at = varint(data, at)
        elif kind in (EIGHT, FOUR):
            size = 8 if kind == EIGHT else 4
        else:
            raise ValueError(f"not a protobuf message: wire type {kind} at byte {at}")
        if at + size > len(data):
            raise ValueError(f"not a protobuf message: a field of {size} bytes at byte {at} breaks off")
        yield key >> 3, data[at : at + size]
        at += size


def number(value: bytes) -> float:
    """A float field."""
    return struct.unpack("<f", value)[0]


def signed(value: int) -> int:
    """A negative int32 is stored as its 64-bit two's complement."""
    return value - (1 << 64) if value >> 63 else value
