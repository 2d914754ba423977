"""Token files: memory-mapped, hashed, and either whole or absent.

tokens-00000.bin ...   all items end to end (uint16 up to 65,536 entries, else uint32), a new file every so many tokens
mask-00000.bin ...     uint8 beside each token: 1 = trained (absent where every token is)
offsets.bin            int64, item i is tokens[offsets[i] : offsets[i + 1]], counted over all files
extra.jsonl            one JSON object an item: a label, an image's name (absent where there is none)
manifest.json          counts, sha256 of each file, the tokenizer's fingerprint, what it was made from

Everything is mapped, nothing is loaded: a corpus may be larger than memory, its index too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np

from zero2llm.core.files import hashes, new_folder, read_json, sha256
from zero2llm.data.token_writer import Item, TokenWriter
from zero2llm.tokenizers.tokenizer import Tokenizer

FORMAT = 2
FIELDS = {"kind", "key", "tokenizer", "dtype", "items", "tokens", "files", "sha256", "sizes"}


class Mapped:
    """Several memory-mapped files as one long array; a slice that crosses a border is put together."""

    def __init__(self, files: Sequence[Path], dtype: str):
        self.parts = [np.memmap(file, dtype=dtype, mode="r") for file in files]
        self.starts = np.cumsum([0, *map(len, self.parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, at: slice) -> np.ndarray:
        first, last, _ = at.indices(len(self))
        pieces, number = [], int(np.searchsorted(self.starts, first, side="right")) - 1
        while first < last:
            start, end = int(self.starts[number]), min(int(self.starts[number + 1]), last)
            pieces.append(self.parts[number][first - start : end - start])
            first, number = end, number + 1
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else self.parts[0][:0]

    def close(self) -> None:
        for part in self.parts:
            part._mmap.close()


@dataclass(frozen=True)
class TokenShards:
    """Items of tokens on disk. ``tokens`` and ``mask`` are slices of mapped files, ``offsets`` (n + 1,) is mapped."""

    path: Path
    manifest: dict
    tokens: Mapped
    mask: Mapped | None
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def close(self) -> None:
        """Let go of the files, which Windows will not replace or delete while they are mapped. Arrays become unusable."""
        for mapped in (self.tokens, self.mask):
            if mapped is not None:
                mapped.close()
        self.offsets._mmap.close()

    @cached_property
    def lines(self) -> np.ndarray:
        """Where each line of extra.jsonl begins, and its end."""
        with open(self.path / "extra.jsonl", "rb") as file:
            return np.cumsum([0, *map(len, file)])

    def extra(self, item: int) -> dict:
        """What stands beside an item's tokens; empty if nothing does."""
        if "extra.jsonl" not in self.manifest["sizes"]:
            return {}
        with open(self.path / "extra.jsonl", "rb") as file:
            file.seek(int(self.lines[item]))
            return json.loads(file.readline())

    @staticmethod
    def open(path: str | Path, fingerprint: str | None = None, *, verify: bool = False) -> TokenShards:
        """Map a folder. Raises ValueError for damage, another format, or another tokenizer than ``fingerprint``."""
        path = Path(path)
        manifest = read_json(path / "manifest.json")
        if manifest.get("format") != FORMAT:
            raise ValueError(
                f"{path}: token file format {manifest.get('format')!r}, this version reads {FORMAT}; delete the folder to "
                "make it again"
            )
        if lacking := FIELDS - set(manifest):
            raise ValueError(
                f"{path / 'manifest.json'}: lacks {', '.join(sorted(lacking))}; delete the folder to make it again"
            )
        if fingerprint is not None and manifest["tokenizer"] != fingerprint:
            raise ValueError(f"{path}: was made with another tokenizer; delete the folder to make it again")
        for name, size in manifest["sizes"].items():
            if not (path / name).is_file() or (path / name).stat().st_size != size:
                raise ValueError(f"{path / name}: missing or cut short; delete the folder to make it again")
            if verify and sha256(path / name) != manifest["sha256"][name]:
                raise ValueError(
                    f"{path / name}: its sha256 differs from the manifest's; delete the folder to make it again"
                )
        names = [f"{n:05}.bin" for n in range(manifest["files"])]
        masked = f"mask-{names[0]}" in manifest["sizes"]
        return TokenShards(
            path, manifest, Mapped([path / f"tokens-{n}" for n in names], manifest["dtype"]),
            Mapped([path / f"mask-{n}" for n in names], "uint8") if masked else None,
            np.memmap(path / "offsets.bin", dtype=np.int64, mode="r"),
        )  # fmt: skip


def build_shards(
    items: Iterable[Item], out: Path, *, tokenizer: Tokenizer, key: str, kind: str, limit: int = 1 << 30
) -> TokenShards:
    """Write items to ``out`` unless a folder made from the same ``key`` stands there already; ``limit`` tokens a file.

    ``key`` says what the items are made from (files, options); it need not be readable. Raises ValueError if there
    are none, one is malformed, the disk is full, or ``out`` holds anything but token files.
    """
    return write_shards(lambda writer: writer.add_all(items), out, tokenizer=tokenizer, key=key, kind=kind, limit=limit)


def write_shards(fill, out: Path, *, tokenizer: Tokenizer, key: str, kind: str, limit: int) -> TokenShards:
    """The same, where ``fill`` gets the `TokenWriter` and gives it everything there is."""
    out = Path(out)
    if (out / "manifest.json").is_file() and (out / "offsets.bin").is_file():
        old = read_json(out / "manifest.json")
        if (old.get("format"), old.get("key"), old.get("tokenizer")) == (FORMAT, key, tokenizer.fingerprint()):
            return TokenShards.open(out)
    elif out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out}: holds other files than token files; choose another folder")
    about = {"format": FORMAT, "kind": kind, "key": key, "tokenizer": tokenizer.fingerprint()}
    with new_folder(out, overwrite=True) as part:
        with TokenWriter(part, tokenizer, limit) as writer:
            fill(writer)
        counts = writer.counts()
        files = {"sha256": hashes(part), "sizes": {p.name: p.stat().st_size for p in part.iterdir()}}
        (part / "manifest.json").write_text(json.dumps(about | counts | files, indent=1), encoding="utf-8")
    return TokenShards.open(out)


def document_items(texts: Iterable[str], tokenizer: Tokenizer, batch: int = 512) -> Iterator[Item]:
    """Each document as [start] + ids. The start is context; the end is the label of the last token, so it is not stored."""
    texts = iter(texts)
    while chunk := list(islice(texts, batch)):
        for ids in tokenizer.encode_batch(chunk):
            yield [tokenizer.bos_id, *ids], None


def stream_items(file: Path, tokenizer: Tokenizer) -> Iterator[Item]:
    """Documents of a bare stream of uint16 ids (nanoGPT's train.bin): each end token begins the next one.

    The file does not say which vocabulary it was made with. Raises ValueError for an id that the tokenizer lacks.
    """
    if file.stat().st_size % 2 or not file.stat().st_size:
        raise ValueError(f"{file}: {file.stat().st_size} bytes are no stream of two-byte token ids")
    ids, start, step = np.memmap(file, dtype=np.uint16, mode="r"), 0, 1 << 24
    for at in range(0, len(ids), step):
        if (largest := int(ids[at : at + step].max())) >= tokenizer.vocab_size:
            raise ValueError(f"{file}: holds id {largest}, the tokenizer has {tokenizer.vocab_size} entries: it was made with another")
    for at in range(0, len(ids), step):
        for end in (np.flatnonzero(ids[at : at + step] == tokenizer.eos_id) + at).tolist():
            if end > start:
                yield [tokenizer.bos_id, *ids[start:end].tolist()], None
            start = end + 1
    if start < len(ids):
        yield [tokenizer.bos_id, *ids[start:].tolist()], None


def share(text: str) -> float:
    """A number in [0, 1) that depends on the text alone: the same document always falls into the same split."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def split_documents(texts: Iterable[str], valid_fraction: float) -> tuple[list[str], list[str]]:
    """Training and validation documents, by content: a duplicate can never stand in both."""
    train, valid = [], []
    for text in texts:
        (valid if share(text) < valid_fraction else train).append(text)
    return train, valid
