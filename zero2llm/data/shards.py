"""Token files: memory-mapped, hashed, and either whole or absent.

tokens.bin   all items end to end (uint16 up to 65,536 entries, else uint32)
mask.bin     uint8 beside each token: 1 = trained (absent where every token is)
offsets.bin  int64, item i is tokens[offsets[i] : offsets[i + 1]]
manifest.json  counts, sha256 of each file, the tokenizer's fingerprint, what it was made from
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from zero2llm.core.files import hashes, new_folder, read_json, sha256
from zero2llm.tokenizers.tokenizer import Tokenizer

FORMAT = 1
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

    @staticmethod
    def open(path: str | Path, fingerprint: str | None = None, *, verify: bool = False) -> TokenShards:
        """Map a folder. Raises ValueError for damage, another format, or another tokenizer than ``fingerprint``."""
        path = Path(path)
        manifest = read_json(path / "manifest.json")
        if manifest.get("format") != FORMAT:
            raise ValueError(f"{path}: token file format {manifest.get('format')!r}, this version reads {FORMAT}")
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
    are none, or the disk is full.
    """
    if (out / "manifest.json").is_file():
        old = TokenShards.open(out)
        if (old.manifest["key"], old.manifest["tokenizer"]) == (key, tokenizer.fingerprint()):
            return old
    dtype = np.uint16 if tokenizer.vocab_size <= 65_536 else np.uint32
    offsets, masked = [0], False
    with new_folder(out, overwrite=True) as part:
        with open(part / "tokens.bin", "wb") as tokens, open(part / "mask.bin", "wb") as masks:
            for ids, mask in items:
                tokens.write(np.asarray(ids, dtype=dtype).tobytes())
                if mask is not None:
                    masked = True
                    masks.write(np.asarray(mask, dtype=np.uint8).tobytes())
                offsets.append(offsets[-1] + len(ids))
        if len(offsets) == 1:
            raise ValueError("the data holds no usable record")
        if not masked:
            (part / "mask.bin").unlink()
        np.asarray(offsets, dtype=np.int64).tofile(part / "offsets.bin")
        manifest = {
            "format": FORMAT,
            "kind": kind,
            "key": key,
            "tokenizer": tokenizer.fingerprint(),
            "dtype": np.dtype(dtype).name,
        }
        manifest |= {"items": len(offsets) - 1, "tokens": offsets[-1], "sha256": hashes(part)}
        manifest["sizes"] = {p.name: p.stat().st_size for p in part.iterdir()}
        (part / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    return TokenShards.open(out)


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
