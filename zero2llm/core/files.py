"""Files that are whole or absent: written beside their final name, flushed to disk, then renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

if TYPE_CHECKING:
    from torch import Tensor  # a data worker needs these functions and no torch


def beside(path: Path, what: str = "part") -> Path:
    """A name next to it that no other process has: process numbers repeat on other machines."""
    return path.with_name(f".{path.name}.{what}{uuid4().hex[:12]}")


@contextmanager
def new_folder(final: Path, overwrite: bool = False) -> Iterator[Path]:
    """Fill the folder that is yielded; it becomes ``final`` at the end, or vanishes on any error.

    Raises ValueError if ``final`` exists and is not empty (unless ``overwrite``), or the disk is full.
    """
    final = Path(final)
    if final.is_file() or (final.is_dir() and any(final.iterdir()) and not overwrite):
        raise ValueError(f"{final} already exists and is not empty; choose another place or pass --overwrite")
    part = beside(final)
    make_folder(final.parent)
    try:
        part.mkdir()
        yield part
        for path in sorted(part.rglob("*")):
            if path.is_file():
                _flush(path)
        if final.is_dir():
            old = beside(final, "old")
            os.replace(final, old)
            os.replace(part, final)
            shutil.rmtree(old)
        else:
            os.replace(part, final)
        _flush_folder(final.parent)
    except OSError as error:
        raise full_disk(error, final) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def new_file(final: Path) -> Iterator[Path]:
    """Fill the file whose name is yielded; it becomes ``final`` at the end, or vanishes on any error.

    Raises ValueError if the disk is full.
    """
    part = beside(final)
    make_folder(final.parent)
    try:
        yield part
        _flush(part)
        os.replace(part, final)
    except OSError as error:
        raise full_disk(error, final) from error
    finally:
        part.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """With those above it. Raises ValueError where a file stands or nothing may be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        file = next(p for p in (folder, *folder.parents) if p.is_file())
        raise ValueError(f"{folder} cannot be made: {file} is a file, not a folder; choose another place") from None
    except OSError as error:
        raise full_disk(error, folder) from error


def write_atomic(path: Path, text: str) -> None:
    """Replace a small text file in one step."""
    with new_file(path) as part:
        part.write_text(text, encoding="utf-8")


def full_disk(error: OSError, path: Path) -> Exception:
    """No space left, or no permission, as a sentence; any other error unchanged."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ValueError(f"no space left while writing {path}; nothing was overwritten: free some disk space and run again")
    folder = next((p for p in path.absolute().parents if p.is_dir()), path)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and not os.access(folder, os.W_OK):
        return ValueError(f"{path} cannot be written: {folder} may not be changed; choose another place")
    return error


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file below ``folder``, by its relative POSIX path."""
    return {p.relative_to(folder).as_posix(): sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def _flush(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    if os.name == "posix":  # a rename is durable once its folder is; Windows has no such call and needs none
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_json(path: Path) -> dict:
    """Raises ValueError naming the file if it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from error


def save_tensors(tensors: dict[str, Tensor], folder: Path, stem: str = "model", max_bytes: int = 4 << 30) -> None:
    """safetensors in files of at most ``max_bytes``, with the usual ``*.safetensors.index.json`` where there are several."""
    from safetensors.torch import save_file

    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
    folder.mkdir(parents=True, exist_ok=True)
    if len(shards) == 1:
        save_file(shards[0], folder / f"{stem}.safetensors", metadata={"format": "pt"})
        return
    where = {}
    for i, shard in enumerate(shards):
        file = f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, file)
    total = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def load_tensors(folder: Path, stem: str = "model") -> dict[str, Tensor]:
    """What `save_tensors` wrote. Raises ValueError if a file is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    index = folder / f"{stem}.safetensors.index.json"
    files = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else [f"{stem}.safetensors"]
    tensors = {}
    for file in files:
        try:
            tensors |= load_file(folder / file)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{folder / file}: cannot be read as safetensors ({error})") from error
    return tensors
