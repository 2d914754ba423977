"""Decompressors with one interface: decompress(data, max_length), needs_input, eof, unused_data, as lzma and bz2 have it."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable
from typing import Any


class _Deflate:
    """zlib with the interface of the other decompressors. ``wbits``: 31 gzip, -15 raw (zip)."""

    def __init__(self, wbits: int):
        self.inner, self.needs_input = zlib.decompressobj(wbits), True

    def decompress(self, data: bytes, max_length: int) -> bytes:
        out = self.inner.decompress(self.inner.unconsumed_tail + data, max_length)
        self.needs_input = len(out) < max_length  # a full block: zlib may hold more, even with all input taken
        return out

    eof = property(lambda self: self.inner.eof)
    unused_data = property(lambda self: self.inner.unused_data)


class _Zstandard:
    """Output is not limited by ``max_length``: at most 32 MB come from 1 KiB, in blocks of 128 KiB."""

    needs_input = True

    def __init__(self):
        try:
            import zstandard
        except ImportError:
            raise ValueError("a .zst file needs the extra: pip install 'zero2llm[data]'") from None
        self.inner = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()

    def decompress(self, data: bytes, max_length: int) -> bytes:
        out = []
        for i in range(0, len(data), 1 << 10):
            out.append(self.inner.decompress(data[i : i + (1 << 10)]))
            if self.inner.eof:
                self.behind = data[i + (1 << 10) :]
                break
        return b"".join(out)

    behind = b""
    eof = property(lambda self: self.inner.eof)
    unused_data = property(lambda self: self.inner.unused_data + self.behind)


class Stored:
    """``size`` bytes as they are: a zip's member without compression."""

    needs_input, unused_data = True, b""

    def __init__(self, size: int):
        self.left = size

    def decompress(self, data: bytes, max_length: int) -> bytes:
        self.left -= len(data)
        return data

    eof = property(lambda self: self.left <= 0)


ENGINES: dict[str, Callable[[], Any]] = {
    ".gz": lambda: _Deflate(31),
    ".xz": lzma.LZMADecompressor,
    ".bz2": bz2.BZ2Decompressor,
    ".zst": _Zstandard,
    "deflate": lambda: _Deflate(-15),
}
