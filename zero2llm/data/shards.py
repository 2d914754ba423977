"""Token files: memory-mapped, hashed, and either whole or absent.

tokens.bin   all items end to end (uint16 up to 65,536 entries, else uint32)
mask.bin     uint8 beside each token: 1 = trained (absent where every token is)
offsets.bin  int64, item i is tokens[offsets[i] : offsets[i + 1]]
manifest.json  counts, sha256 of each file, the tokenizer's fingerprint, what it was made from
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from zero2llm.core.files import hashes, new_folder, read_json, sha256
from zero2llm.tokenizers.tokenizer import Tokenizer

FORMAT = 1
FIELDS = {"kind", "key", "tokenizer", "dtype", "items", "tokens", "sha256", "sizes"}
Item = tuple[Sequence[int], Sequence[int] | None]  # ids, and the loss mask or None


@dataclass(frozen=True)
class TokenShards:
    """Items of tokens on disk. ``tokens`` and ``mask`` are memory maps; ``offsets`` (n + 1,) is in memory."""

    path: Path
    manifest: dict
    tokens: np.ndarray
    mask: np.ndarray | None
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def close(self) -> None:
        """Let go of the files, which Windows will not replace or delete while they are mapped. Arrays become unusable."""
        for mapped in (self.tokens, self.mask):
            if mapped is not None:
                mapped._mmap.close()

    @staticmethod
    def open(path: str | Path, fingerprint: str | None = None, *, verify: bool = False) -> TokenShards:
        """Map a folder. Raises ValueError for damage, another format, or another tokenizer than ``fingerprint``."""
        path = Path(path)
        manifest = read_json(path / "manifest.json")
        if manifest.get("format") != FORMAT:
            raise ValueError(f"{path}: token file format {manifest.get('format')!r}, this version reads {FORMAT}")
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
        tokens = np.memmap(path / "tokens.bin", dtype=manifest["dtype"], mode="r")
        mask = np.memmap(path / "mask.bin", dtype=np.uint8, mode="r") if "mask.bin" in manifest["sizes"] else None
        return TokenShards(path, manifest, tokens, mask, np.fromfile(path / "offsets.bin", dtype=np.int64))


def build_shards(items: Iterable[Item], out: Path, *, tokenizer: Tokenizer, key: str, kind: str) -> TokenShards:
    """Write items to ``out`` unless a folder made from the same ``key`` stands there already.

    ``key`` says what the items are made from (files, options); it need not be readable. Raises ValueError if there
    are none, one is malformed, the disk is full, or ``out`` holds anything but token files.
    """
    out = Path(out)
    if (out / "manifest.json").is_file() and (out / "tokens.bin").is_file():
        old = read_json(out / "manifest.json")
        if (old.get("key"), old.get("tokenizer")) == (key, tokenizer.fingerprint()):
            return TokenShards.open(out)
    elif out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out}: holds other files than token files; choose another folder")
    about = {"format": FORMAT, "kind": kind, "key": key, "tokenizer": tokenizer.fingerprint()}
    with new_folder(out, overwrite=True) as part:
        counts = _write_items(items, part, tokenizer)
        manifest = (
            about | counts | {"sha256": hashes(part), "sizes": {p.name: p.stat().st_size for p in part.iterdir()}}
        )
        (part / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    return TokenShards.open(out)


def _write_items(items: Iterable[Item], folder: Path, tokenizer: Tokenizer) -> dict:
    """The three binary files; what the manifest says of them."""
    dtype = np.uint16 if tokenizer.vocab_size <= 65_536 else np.uint32
    byte_lengths, n_bytes = np.asarray(tokenizer.byte_lengths(), dtype=np.int64), 0
    offsets, n_masked = array("q", [0]), 0
    with open(folder / "tokens.bin", "wb") as tokens, open(folder / "mask.bin", "wb") as masks:
        for number, (ids, mask) in enumerate(items):
            row = np.asarray(ids, dtype=np.int64)
            if not len(row) or row.min() < 0 or row.max() >= tokenizer.vocab_size:
                fault = (
                    f"id {row.max()} or {row.min()} is outside a vocabulary of {tokenizer.vocab_size}"
                    if len(row)
                    else "it has no token"
                )
                raise ValueError(f"item {number} cannot be stored: {fault}")
            tokens.write(row.astype(dtype).tobytes())
            n_bytes += int(byte_lengths[row].sum())
            if mask is not None:
                if len(mask) != len(row):
                    raise ValueError(f"item {number} cannot be stored: {len(row)} tokens, a mask of {len(mask)}")
                n_masked += 1
                masks.write(np.asarray(mask, dtype=np.uint8).tobytes())
            offsets.append(offsets[-1] + len(row))
    n = len(offsets) - 1
    if not n:
        raise ValueError("the data holds no usable record")
    if n_masked not in (0, n):  # the files would no longer stand side by side
        raise ValueError(f"{n_masked} of {n} items have a loss mask; give it to all or to none")
    if not n_masked:
        (folder / "mask.bin").unlink()
    np.asarray(offsets, dtype=np.int64).tofile(folder / "offsets.bin")
    return {"dtype": np.dtype(dtype).name, "items": n, "tokens": offsets[-1], "text_bytes": n_bytes}


def document_items(texts: Iterable[str], tokenizer: Tokenizer, batch: int = 512) -> Iterable[Item]:
    """Each document as [start] + ids. The start is context; the end is the label of the last token, so it is not stored."""
    texts = iter(texts)
    while chunk := list(islice(texts, batch)):
        for ids in tokenizer.encode_batch(chunk):
            yield [tokenizer.eos_id, *ids], None


def share(text: str) -> float:
    """A number in [0, 1) that depends on the text alone: the same document always falls into the same split."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def split_documents(texts: Iterable[str], valid_fraction: float) -> tuple[list[str], list[str]]:
    """Training and validation documents, by content: a duplicate can never stand in both."""
    train, valid = [], []
    for text in texts:
        (valid if share(text) < valid_fraction else train).append(text)
    return train, valid
