"""Tensors that stay on disk until they are asked for, and files written from them one at a time.

Converting a model then needs no more memory than its largest tensor. safetensors' own writer takes all tensors at
once; the format is 8 bytes of length, a JSON header {name: {dtype, shape, data_offsets}} and the bytes in that order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from zero2llm.core.files import full_disk, read_json

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
DTYPES = {name: dtype for dtype, name in NAMES.items()}


@dataclass(frozen=True)
class Lazy:
    """``load()`` reads the values: a tensor of this shape and dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def lazy(tensor: Tensor) -> Lazy:
    return Lazy(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def open_tensors(folder: Path, stem: str = "model") -> dict[str, Lazy]:
    """The tensors of ``stem``.safetensors, or of the files that its index lists.

    Raises ValueError naming the file that is missing, cut short or damaged, before anything is read.
    """
    index = folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        return open_safetensors(folder / f"{stem}.safetensors")
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(file, str) and Path(file).name == file for file in where.values()):
        raise ValueError(f"{index}: weight_map must name a file of this folder for each tensor")
    files = sorted(set(where.values()))
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise ValueError(f"{folder}: {len(missing)} of {len(files)} weight files are missing: {', '.join(missing[:4])}; download them again")
    found = {name: t for file in files for name, t in open_safetensors(folder / file).items()}
    if lost := [name for name in where if name not in found]:
        raise ValueError(f"{index}: lists tensors that its files lack: {', '.join(lost[:8])}")
    return found


def open_safetensors(file: Path) -> dict[str, Lazy]:
    """Raises ValueError for a file that is none, or cut short."""
    from safetensors import SafetensorError, safe_open

    try:
        opened = safe_open(file, "pt")
    except (OSError, SafetensorError) as error:
        what = "no such file" if not file.exists() else f"cannot be read as safetensors, it is damaged or cut short ({error})"
        raise ValueError(f"{file}: {what}") from error
    found = {}
    for name in opened.keys():  # noqa: SIM118  (no mapping)
        piece = opened.get_slice(name)
        if (dtype := DTYPES.get(piece.get_dtype())) is None:
            raise ValueError(f"{file}: tensor {name} is stored as {piece.get_dtype()}, which is not supported; export it in a 16- or 32-bit type")
        found[name] = Lazy(tuple(piece.get_shape()), dtype, lambda name=name: opened.get_tensor(name))
    return found


def write_tensors(
    named: Mapping[str, Lazy], parts: Iterable[Sequence[Tensor]], folder: Path, stem: str = "model", max_bytes: int = 4 << 30
) -> None:
    """Files as `save_tensors` writes them, from values that come in the order of ``named``, a few at a time.

    named : what is to be written; only shapes and dtypes are looked at. Raises ValueError if the disk is full.
    """
    shards: list[dict[str, Lazy]] = [{}]
    for name, tensor in named.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > max_bytes:
            shards.append({})
        shards[-1][name] = tensor
    names = [f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else [f"{stem}.safetensors"]
    folder.mkdir(parents=True, exist_ok=True)
    values = (tensor for part in parts for tensor in part)
    for shard, file in zip(shards, names, strict=True):
        try:
            _write_file(shard, values, folder / file)
        except OSError as error:
            raise full_disk(error, folder / file) from error
    if len(shards) > 1:
        where = {name: file for shard, file in zip(shards, names, strict=True) for name in shard}
        index = {"metadata": {"total_size": sum(t.nbytes for t in named.values())}, "weight_map": where}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def _write_file(shard: dict[str, Lazy], values: Iterator[Tensor], path: Path) -> None:
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in shard.items():
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, expected in shard.items():
            value = next(values)
            if value.shape != expected.shape or value.dtype != expected.dtype:
                raise ValueError(f"{name}: {value.dtype} {tuple(value.shape)} was written as {expected.dtype} {expected.shape}")
            file.write(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
