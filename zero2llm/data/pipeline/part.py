"""Files of a part: whole or absent, and on disk before the account that vouches for them.

Each is written beside its final name, flushed and renamed. So neither a power cut nor a second process that does the same part
(a worker left over from a killed run writes the same bytes) can leave half a file under a name that counts.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

import numpy as np

from zero2llm.core.files import new_file
from zero2llm.data.document import CorpusStep, Document

TOGETHER = 256  # documents that are signed in one call
CHARACTERS = 4 << 20  # of text, after which fewer are


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to that gets its name at the end, or vanishes on any error."""
    with new_file(path) as part, open(part, "wb") as file:
        yield file


def save_array(path: Path, values: np.ndarray) -> None:
    with whole_file(path) as file:
        np.save(file, values)


class Signatures:
    """Rows of a part's documents, kept on disk while they are made: a part may be a packed file of many gigabytes."""

    def __init__(self, folder: Path, signer: CorpusStep | None):
        self.spool, self.lengths, self.like = TemporaryFile(dir=folder), array("q"), np.empty((0, 0))
        self.signer, self.waiting, self.characters = signer, [], 0

    def __enter__(self) -> Signatures:
        return self

    def __exit__(self, *failure) -> None:
        self.spool.close()

    def add(self, doc: Document) -> None:
        self.waiting.append(doc)
        self.characters += len(doc.text)
        if len(self.waiting) == TOGETHER or self.characters > CHARACTERS:
            self.sign()

    def sign(self) -> None:
        """(k, W) of each document that waits."""
        for rows in self.signer.sign_many(self.waiting) if self.waiting else ():
            self.lengths.append(len(rows))
            if len(rows):
                self.like = rows[:0]
                self.spool.write(np.ascontiguousarray(rows).tobytes())
        self.waiting, self.characters = [], 0

    def save(self, stem: Path) -> None:
        """``.rows.npy``: how many rows each document has; ``.sign.npy``: all rows."""
        self.sign()
        self.spool.flush()
        n, rows = sum(self.lengths), self.like
        if n:
            rows = np.memmap(self.spool, rows.dtype, mode="r", shape=(n, rows.shape[1]))
        save_array(stem.with_suffix(".rows.npy"), np.frombuffer(self.lengths, np.int64))
        save_array(stem.with_suffix(".sign.npy"), rows)
