"""Bytes as they come: a part of a file, decompressed, re-encoded to UTF-8; damage ends a stream and is remembered.

    Part -> Inflated -> Recoded, each below an io.BufferedReader

A damaged stream gives every byte before the damage, then ends, and `fault` says why: a reader first hands over what is
good. The library's own file objects raise in the middle of a block and take the block with them.
"""

from __future__ import annotations

import codecs
import io
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

SLICE = 1 << 14  # compressed bytes fed at a time
BLOCK = 1 << 16  # bytes taken at a time
BUFFER = 1 << 18


@dataclass
class Opened:
    """A buffered stream. ``fault`` says why it ended too early; empty as long as nothing is damaged."""

    file: BinaryIO
    raw: Part | Inflated | Recoded | None = None
    encoding: str = "UTF-8"  # what its bytes are said to be, for messages

    @property
    def fault(self) -> str:
        return self.raw.fault if self.raw is not None else ""

    def close(self) -> None:
        self.file.close()


def buffered(raw: Part | Inflated | Recoded, encoding: str = "UTF-8") -> Opened:
    return Opened(io.BufferedReader(raw, BUFFER), raw, encoding)


class Part(io.RawIOBase):
    """``size`` bytes from where ``file`` stands, None: all of them. Leaves the file open unless it is its ``own``."""

    def __init__(self, file: BinaryIO, size: int | None, own: bool = True):
        self.file, self.left, self.own, self.fault = file, size, own, ""

    def readable(self) -> bool:
        return True

    def readinto(self, into) -> int:
        n = len(into) if self.left is None else min(len(into), self.left)
        data = self.file.read(n)
        if self.left is not None:
            self.left -= len(data)
            if n and not data:
                self.fault = "it is cut short"
        into[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if self.own:
            self.file.close()
        super().close()


class Inflated(io.RawIOBase):
    """What a compressed stream holds: all its concatenated parts (``several``), or one with a known checksum.

    ``source`` opens the compressed bytes. It is called a second time after damage: a decompressor throws away a whole
    block of good output with the bad byte, so that block is repeated byte by byte. None the second time: it is lost.
    """

    def __init__(self, source: Callable[[], Opened | None], make: Callable[[], Any], several=True, crc: int | None = None):
        self.source, self.make, self.several, self.crc = source, make, several, crc
        self.damage, self.ended, self.sum = "", False, 0
        self.ready = memoryview(b"")
        self._start()

    def _start(self) -> None:
        self.below, self.engine, self.fed, self.steps = self.source(), None, b"", 0

    @property
    def fault(self) -> str:
        return self.damage and (self.below and self.below.fault or self.damage)

    def readable(self) -> bool:
        return True

    def readinto(self, into) -> int:
        while not self.ready and not self.ended:
            self._next()
        n = min(len(into), len(self.ready))
        into[:n], self.ready = self.ready[:n], self.ready[n:]
        return n

    def close(self) -> None:
        if self.below is not None:
            self.below.close()
        super().close()

    def _next(self) -> None:
        out = b""
        try:
            out = self._step(SLICE, BLOCK)
            self.steps += 1
        except (ValueError, MemoryError):  # the extra is missing; no damage
            raise
        except EOFError:
            self.damage = "it is cut short"
        except Exception as error:  # each library has its own kinds, without a common base
            out, self.damage = self._again(), str(error) or type(error).__name__
        if self.crc is not None:
            self.sum = zlib.crc32(out, self.sum)
            if self.ended and not self.damage and self.sum != self.crc:
                self.damage = "its checksum is wrong"
        self.ended = self.ended or bool(self.damage)
        self.ready = memoryview(out)

    def _step(self, n: int, most: int) -> bytes:
        """One call of the decompressor. Sets ``ended``; raises on damage, EOFError if the file ends too early."""
        data, self.fed = self.fed, b""
        if not data and (self.engine is None or self.engine.needs_input):
            data = self.below.file.read(n)
            if not data:
                if self.engine is not None or not self.several:
                    raise EOFError
                self.ended = True
                return b""
        if self.engine is None:
            data = data.lstrip(b"\0") if self.steps else data  # padding between concatenated parts
            if not data:
                return b""
            self.engine = self.make()
        out = self.engine.decompress(data, most)
        if self.engine.eof:
            self.fed, self.engine = self.engine.unused_data, None
            self.ended = not self.several
        return out

    def _again(self) -> bytes:
        """The good bytes of the step that failed."""
        good, out = self.steps, []
        self.below.close()
        self._start()
        if self.below is None:
            return b""
        while self.steps < good:
            self._step(SLICE, BLOCK)
            self.steps += 1
        try:
            while not self.ended:
                self.fed, rest = self.fed[:1], self.fed[1:]
                out.append(self._step(1, 1))
                self.fed += rest
        except Exception:
            pass  # the damage that is known already
        return b"".join(out)


class Recoded(io.RawIOBase):
    """Text of another encoding as UTF-8. What is no text becomes bytes that are not UTF-8 either: only its line is bad."""

    def __init__(self, below: Opened, encoding: str):
        codecs.register_error("zero2llm.mark", lambda error: ("\udcff", error.end))
        self.below, self.decoder = below, codecs.getincrementaldecoder(encoding)("zero2llm.mark")
        self.ready, self.ended = b"", False

    @property
    def fault(self) -> str:
        return self.below.fault

    def readable(self) -> bool:
        return True

    def readinto(self, into) -> int:
        while not self.ready and not self.ended:
            data = self.below.file.read(BLOCK)
            self.ended = not data
            self.ready = self.decoder.decode(data, final=self.ended).encode("utf-8", "surrogatepass")
        n = min(len(into), len(self.ready))
        into[:n], self.ready = self.ready[:n], self.ready[n:]
        return n

    def close(self) -> None:
        self.below.close()
        super().close()
