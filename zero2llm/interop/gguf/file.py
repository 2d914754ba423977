"""GGUF files: one file that holds a model's tensors, its shape and its tokenizer.

    "GGUF" | uint32 version | uint64 tensors | uint64 entries | entries: key, value | tensors' descriptions | padding | data
    description: name | uint32 n | n x uint64 dimensions, fastest first | uint32 kind | uint64 offset in the data

All little endian. The data begins at the next multiple of ``general.alignment`` (32 if absent), and so does each tensor.
A model in several files, ``name-00001-of-00003.gguf``, has its metadata in the first and tensors in all.

Source: ggml, docs/gguf.md (versions 2 and 3; these two are the same but for big-endian files, which we refuse).
Why: nothing is read but the header until a tensor is asked for, and nothing is held but one tensor while writing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from zero2llm.core.files import new_file
from zero2llm.core.lazy import Lazy
from zero2llm.interop.gguf.blocks import KINDS, PACK, UNPACK, dequantize, nbytes, quantize
from zero2llm.interop.gguf.values import Cursor, Typed, entry, string

BY_NUMBER = {kind.number: name for name, kind in KINDS.items()}
HALVES = {"F16": torch.float16, "BF16": torch.bfloat16}
MAX_NAME = 63  # bytes of a tensor's name that llama.cpp reads
STEP = 1 << 18  # weights packed at a time


@dataclass(frozen=True)
class Stored:
    """One tensor of a file.

    shape : as torch has it.  kind : such as "Q4_1".  raw : reads its bytes, uint8.
    lazy : its values, float32; F16 and BF16 as they are. Loading a kind that is not supported is a ValueError.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    raw: Callable[[], np.ndarray]
    lazy: Lazy


@dataclass(frozen=True)
class GGUF:
    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Stored]


def open_gguf(path: Path) -> GGUF:
    """The header of a file, or of all files of a model whose first one is given.

    Raises ValueError naming the file and what is wrong with it; whatever the bytes, nothing larger than the file is reserved.
    """
    path = Path(path)
    first = _open_part(path)
    count, number = first.metadata.get("split.count", 1), first.metadata.get("split.no", 0)
    if type(count) is not int or not 0 <= count < 100_000:
        raise ValueError(f"{path}: split.count is {count!r}, not a number of files; the file is damaged, fetch it again")
    if count <= 1:
        return first
    split = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", path.name)
    if not split or int(split[3]) != count:
        raise ValueError(f"{path}: is one of {count} files, which must be called NAME-00001-of-{count:05d}.gguf and so on")
    names = [path.with_name(f"{split[1]}-{i:05d}-of-{split[3]}.gguf") for i in range(1, count + 1)]
    if number != 0 or path != names[0]:
        raise ValueError(f"{path}: is not the first of {count} files; open {names[0].name}")
    if missing := [name.name for name in names if not name.is_file()]:
        raise ValueError(f"{path.parent}: {len(missing)} of {count} files are missing: {', '.join(missing[:8])}; fetch them too")
    tensors = dict(first.tensors)
    for i, name in enumerate(names[1:], 1):
        part = _open_part(name)
        if (part.metadata.get("split.no"), part.metadata.get("split.count")) != (i, count):
            raise ValueError(f"{name}: does not say that it is file {i + 1} of {count}; it belongs to another model")
        if twice := tensors.keys() & part.tensors.keys():
            raise ValueError(f"{name}: repeats tensors of the files before it: {', '.join(sorted(twice)[:8])}")
        tensors |= part.tensors
    if len(tensors) != (total := first.metadata.get("split.tensors.count", len(tensors))):
        raise ValueError(f"{path}: the model has {total} tensors, but its {count} files hold {len(tensors)}")
    return GGUF(path, first.metadata, tensors)


def _open_part(path: Path) -> GGUF:
    try:
        with open(path, "rb") as file:
            return _read_header(Cursor(path, file))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error


def _read_header(at: Cursor) -> GGUF:
    magic = at.take(min(4, at.size), "the first word")
    if magic != b"GGUF":
        raise ValueError(f"{at.path}: is no GGUF file, it begins with {magic!r}")
    version = at.number("uint32", "the version")
    if version not in (2, 3):
        why = "it is big endian" if version in (2 << 24, 3 << 24) else f"it has version {version}"
        raise ValueError(f"{at.path}: {why}; only little-endian GGUF of version 2 or 3 is read, convert it anew")
    n_tensors, n_entries = at.number("uint64", "the count of tensors"), at.number("uint64", "the count of entries")
    metadata: dict[str, Any] = {}
    for i in range(n_entries):
        key = at.string(f"key {i + 1} of {n_entries}")
        if not key or key in metadata:
            raise at.wrong(f"metadata key {key!r} occurs twice" if key else f"metadata key {i + 1} is empty")
        metadata[key] = at.value(key)
    described: dict[str, tuple[tuple[int, ...], str, int]] = {}
    for i in range(n_tensors):
        name = at.string(f"the name of tensor {i + 1} of {n_tensors}")
        if not name or name in described:
            raise at.wrong(f"tensor {name!r} occurs twice" if name else f"tensor {i + 1} has no name")
        described[name] = _description(at, f"tensor {name}")
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise at.wrong(f"general.alignment is {alignment!r}, not a power of two")
    start = at.at + -at.at % alignment
    _check_places(at, described, start, alignment)
    return GGUF(at.path, metadata, {
        name: _stored(at.path, name, shape, kind, start + offset) for name, (shape, kind, offset) in described.items()
    })  # fmt: skip


def _description(at: Cursor, what: str) -> tuple[tuple[int, ...], str, int]:
    if (n := at.number("uint32", what)) > 4:
        raise at.wrong(f"{what} has {n} dimensions, more than 4")
    shape = tuple(at.number("uint64", what) for _ in range(n))[::-1]
    if (number := at.number("uint32", what)) not in BY_NUMBER:
        raise ValueError(f"{at.path}: {what} is stored as kind {number}, which is unknown or damaged; store it as F16 or Q8_0")
    return shape, BY_NUMBER[number], at.number("uint64", what)


def _check_places(at: Cursor, described: dict[str, tuple[tuple[int, ...], str, int]], start: int, alignment: int) -> None:
    """Every tensor inside the file, at a multiple of the alignment, and none over another."""
    end = 0
    for name, (shape, kind, offset) in sorted(described.items(), key=lambda item: item[1][2]):
        try:
            size = nbytes(shape, kind)
        except ValueError as error:
            raise at.wrong(f"tensor {name}: {error}") from error
        if size == 0 or offset % alignment or offset < end:
            raise at.wrong(f"tensor {name} of shape {shape} is at {offset}: empty, not at a multiple of {alignment}, or over another")
        end = offset + size
        if start + end > at.size:
            raise at.wrong(f"tensor {name} ends at byte {start + end}, but the file ends at byte {at.size}")


def _stored(path: Path, name: str, shape: tuple[int, ...], kind: str, offset: int) -> Stored:
    def raw() -> np.ndarray:
        try:
            found = np.fromfile(path, np.uint8, nbytes(shape, kind), offset=offset)
        except OSError as error:
            raise ValueError(f"{path}: tensor {name} cannot be read ({error.strerror or error})") from error
        if len(found) != nbytes(shape, kind):
            raise ValueError(f"{path}: tensor {name} is cut short; the file changed while it was read")
        return found

    def load() -> Tensor:
        if kind in HALVES:
            return torch.from_numpy(raw()).view(HALVES[kind]).reshape(shape)
        if kind not in UNPACK:
            raise ValueError(f"{path}: tensor {name} is stored as {kind}, which cannot be read; these can: {', '.join(UNPACK)}")
        return torch.from_numpy(dequantize(raw(), kind, shape))

    return Stored(name, shape, kind, raw, Lazy(shape, HALVES.get(kind, torch.float32), load))


def write_gguf(
    path: Path, metadata: dict[str, Any], tensors: Iterable[tuple[str, tuple[int, ...], str, Callable[[], Tensor]]],
    overwrite: bool = False,
) -> None:  # fmt: skip
    """A file of version 3, whole or absent.

    metadata : bool, int, float, str or lists of one of them; `values` says which types they become.
    tensors : (name, shape as torch has it, kind, load); ``load`` is called once, when its turn has come.
    Raises ValueError for what does not fit (before anything is loaded, where shapes show it), a file that exists, a full disk.
    """
    path, tensors = Path(path), list(tensors)
    if path.exists() and not overwrite:
        raise ValueError(f"{path} already exists; choose another place or pass --overwrite")
    alignment = metadata.get("general.alignment", 32)
    alignment = alignment.value if isinstance(alignment, Typed) else alignment
    header = b"".join(_header(metadata, tensors, alignment))
    with new_file(path) as part, open(part, "wb") as file:
        file.write(header)
        for name, shape, kind, load in tensors:
            file.write(b"\0" * (-file.tell() % alignment))
            _write_tensor(file, name, shape, kind, load())
        file.write(b"\0" * (-file.tell() % alignment))


def _header(metadata: dict[str, Any], tensors: list[tuple], alignment: int) -> Iterator[bytes]:
    if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment = {alignment!r}: must be a power of two from 8 up")
    yield b"GGUF" + (3).to_bytes(4, "little") + len(tensors).to_bytes(8, "little") + len(metadata).to_bytes(8, "little")
    for key, value in metadata.items():
        yield from entry(key, value)
    names, offset = set(), 0
    for name, shape, kind, _ in tensors:
        if name in names or not 0 < len(name.encode()) <= MAX_NAME:
            raise ValueError(f"tensor {name!r}: " + ("named twice" if name in names else f"a name has 1 to {MAX_NAME} bytes"))
        names.add(name)
        if kind not in PACK:
            raise ValueError(f"tensor {name}: {kind} cannot be written; these can: {', '.join(PACK)}")
        if len(shape) > 4 or 0 in shape:
            raise ValueError(f"tensor {name}: GGUF cannot hold the shape {tuple(shape)}; it has at most 4 dimensions, none of them 0")
        try:
            size = nbytes(tuple(shape), kind)
        except ValueError as error:
            raise ValueError(f"tensor {name}: {error}; store it as F16 or F32") from error
        yield string(name) + len(shape).to_bytes(4, "little") + b"".join(n.to_bytes(8, "little") for n in reversed(shape))
        yield KINDS[kind].number.to_bytes(4, "little") + offset.to_bytes(8, "little")
        offset += size + -size % alignment


def _write_tensor(file: BinaryIO, name: str, shape: tuple[int, ...], kind: str, values: Tensor) -> None:
    if tuple(values.shape) != tuple(shape):
        raise ValueError(f"tensor {name}: has shape {tuple(values.shape)}, not {tuple(shape)} as was said")
    columns = shape[-1] if shape else 1
    rows = values.detach().cpu().reshape(-1, columns)
    step = max(1, STEP // columns)
    for i in range(0, prod(shape) // columns, step):
        try:
            file.write(quantize(rows[i : i + step].float().numpy(), kind))
        except ValueError as error:
            raise ValueError(f"tensor {name}: {error}") from error
