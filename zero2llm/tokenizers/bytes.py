"""Bytes as text, and how text is cut before any merge."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import regex

# How text is cut into pieces that merges never cross; llama.cpp knows the three as gpt-2, llama3 and qwen2.
SPLITS = {
    "gpt2": r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",
    "llama3": r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
    "qwen2": r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
}


@cache
def splitter(name: str) -> regex.Pattern:
    """The compiled split rule ``name``. Raises ValueError for an unknown one."""
    if name not in SPLITS:
        raise ValueError(f"split rule {name!r} is unknown; there are: {', '.join(SPLITS)}")
    import regex  # slow to load, and only a handwritten tokenizer in training needs it

    return regex.compile(SPLITS[name])


@cache
def byte_to_char() -> dict[int, str]:
    """GPT-2's printable stand-in for every byte: tokenizer files hold text, and a lone byte of a Chinese character is
    none. Printable Latin-1 characters stand for themselves, the other 68 bytes for U+0100 and following."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in own]
    return {b: chr(b) for b in own} | {b: chr(0x100 + i) for i, b in enumerate(others)}


@cache
def char_to_byte() -> dict[str, int]:
    return {char: byte for byte, char in byte_to_char().items()}


@cache
def alphabet() -> tuple[bytes, ...]:
    """The 256 single bytes in vocabulary order: that of their stand-ins, as the tokenizers library sorts them."""
    return tuple(bytes([b]) for _, b in sorted((char, byte) for byte, char in byte_to_char().items()))


def to_chars(piece: bytes) -> str:
    """Bytes in their printable form, as tokenizer.json stores them."""
    return "".join(map(byte_to_char().__getitem__, piece))


def from_chars(text: str) -> bytes:
    return bytes(map(char_to_byte().__getitem__, text))


def readable(piece: bytes) -> str:
    """A token as a person reads it: whole characters as they are, parts of one as \\x.., blanks visible."""
    shown = piece.decode("utf-8", errors="backslashreplace")
    return shown.replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r").replace(" ", "·")
