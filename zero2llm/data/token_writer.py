"""Writing token files: one item after the other, or whole blocks of them that other processes have encoded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zero2llm.tokenizers.tokenizer import Tokenizer

# ids, the loss mask or None, and what else belongs to the item (a label, an image) if anything does
Item = tuple[Sequence[int], Sequence[int] | None] | tuple[Sequence[int], Sequence[int] | None, dict]


def id_type(vocab_size: int) -> np.dtype:
    return np.dtype(np.uint16 if vocab_size <= 65_536 else np.uint32)


class TokenWriter:
    """The files of shards.py in ``folder``. A file holds whole items, ``limit`` tokens of them, or one that is longer."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, limit: int):
        self.folder, self.limit, self.vocab_size = folder, limit, tokenizer.vocab_size
        self.dtype = id_type(tokenizer.vocab_size)
        self.byte_lengths = byte_lengths(tokenizer)
        self.items = self.tokens = self.text_bytes = self.masked = self.extras = self.files = self.here = 0
        self.open: dict[str, Any] = {}

    def __enter__(self) -> TokenWriter:
        self.open["offsets"] = open(self.folder / "offsets.bin", "wb")
        self.open["offsets"].write(np.int64(0).tobytes())
        self.open["extra"] = open(self.folder / "extra.jsonl", "w", encoding="utf-8", newline="\n")
        self.next_file()
        return self

    def __exit__(self, *failure) -> None:
        for file in self.open.values():
            file.close()

    def next_file(self) -> None:
        for name in ("tokens", "mask"):
            if name in self.open:
                self.open[name].close()
            self.open[name] = open(self.folder / f"{name}-{self.files:05}.bin", "wb")
        self.files, self.here = self.files + 1, 0

    def add_all(self, items: Iterable[Item]) -> None:
        for ids, mask, *extra in items:
            self.add(ids, mask, extra[0] if extra else None)

    def add(self, ids: Sequence[int], mask: Sequence[int] | None, extra: dict | None = None) -> None:
        row = np.asarray(ids, dtype=np.int64)
        if mask is not None and len(mask) != len(row):
            raise ValueError(f"item {self.items} cannot be stored: {len(row)} tokens, a mask of {len(mask)}")
        self.add_block(row, np.asarray([len(row)]), None if mask is None else np.asarray(mask, dtype=np.uint8))
        if extra is not None:
            self.open["extra"].write(json.dumps(extra, ensure_ascii=False) + "\n")
            self.extras += 1

    def add_block(self, ids: np.ndarray, lengths: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Several items at once: ``ids`` (sum of lengths) end to end."""
        if not len(lengths):
            return
        if not lengths.min() or ids.min() < 0 or ids.max() >= self.vocab_size:
            fault = (
                f"id {ids.max()} or {ids.min()} is outside a vocabulary of {self.vocab_size}"
                if lengths.min()
                else "it has no token"
            )
            which = self.items if len(lengths) == 1 else f"{self.items} to {self.items + len(lengths) - 1}"
            raise ValueError(f"item {which} cannot be stored: {fault}")
        ends = np.cumsum(lengths, dtype=np.int64)
        self.open["offsets"].write((self.tokens + ends).tobytes())
        self.items, self.tokens = self.items + len(lengths), self.tokens + len(ids)
        if len(self.byte_lengths):
            self.text_bytes += int(self.byte_lengths[ids].sum())
        start = 0
        while start < len(ids):  # as many whole items as the file still takes
            fit = int(np.searchsorted(ends, start + self.limit - self.here, side="right"))
            stop = int(ends[fit - 1]) if fit else 0
            if stop <= start and self.here:
                self.next_file()
                continue
            stop = stop if stop > start else int(ends[np.searchsorted(ends, start, side="right")])
            self.open["tokens"].write(ids[start:stop].astype(self.dtype).tobytes())
            if mask is not None:
                self.open["mask"].write(mask[start:stop].tobytes())
            start, self.here = stop, self.here + stop - start
        self.masked += len(lengths) if mask is not None else 0

    def counts(self) -> dict:
        """What the manifest says; called when all is written. Removes the files that hold nothing."""
        n = self.items
        if not n:
            raise ValueError("the data holds no usable record")
        for name, found, files in (("loss mask", self.masked, "mask-*.bin"), ("extra", self.extras, "extra.jsonl")):
            if found not in (0, n):  # the files would no longer stand side by side
                raise ValueError(f"{found} of {n} items have {name if name == 'extra' else 'a ' + name}; give it to all or to none")
            if not found:
                for path in self.folder.glob(files):
                    path.unlink()
        counts = {"dtype": self.dtype.name, "items": n, "tokens": self.tokens, "text_bytes": self.text_bytes or None}
        return counts | {"files": self.files}


def byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """How many bytes each token stands for; empty where that is not defined (WordPiece)."""
    try:
        return np.asarray(tokenizer.byte_lengths(), dtype=np.int64)
    except ValueError:
        return np.empty(0, dtype=np.int64)
