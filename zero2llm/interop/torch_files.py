"""Weights in files that torch.save wrote (.pth, .pt, .bin): tensors that stay on disk until they are asked for.

    a zip archive = data.pkl (which tensor lies where) + the bytes of each storage

Such a file holds a pickle, and a pickle can name any function to be called while it is read. So torch.load reads it with
weights_only=True, an unpickler of its own that knows tensors and plain containers and calls nothing else; the bytes
are mapped, not read (mmap). Files of before torch 1.6 (tar, or pickles one after another) cannot be mapped, and are
where that unpickler was once broken (CVE-2025-32434): they are refused before it sees them.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from zero2llm.core.files import read_json
from zero2llm.core.lazy import NAMES, Lazy

ZIP = b"PK\x03\x04"
WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel's and torch.compile's
NESTED = ("model", "state_dict", "model_state_dict")  # where training scripts keep the weights among other things
CLASS = re.compile(r"GLOBAL ([\w.]+)|class ([\w.]+)")
RESAVE = "torch.save(torch.load(FILE, map_location='cpu', weights_only=True), NEW_FILE)"


@dataclass(frozen=True)
class TorchFile:
    """tensors : the state dict.  rest : what lay beside it in a nested file.  notes : what was changed, in words."""

    tensors: dict[str, Lazy]
    rest: dict = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def open_torch(path: Path) -> tuple[dict[str, Lazy], dict]:
    """The tensors of a state dict, and what lay beside it ({"model": ..., "model_args": ...}); `read_torch` without notes."""
    found = read_torch(path)
    return found.tensors, found.rest


def read_torch(path: Path) -> TorchFile:
    """Names lose the prefixes of wrappers, if all have them. Two names of one (tied) tensor stay two names.

    Raises ValueError naming the file: not there, not a zip, cut short, with code in it, no state dict. Nothing in it runs.
    """
    path = Path(path)
    data = _load(path)
    if not isinstance(data, dict):
        raise ValueError(f"{path}: holds a {type(data).__name__}, not a state dict (names and tensors); nothing in it was run")
    state, rest = _state_dict(data, path)
    named, prefixes = _unwrapped(state)
    notes = (f"names without the prefix {' '.join(prefixes)} that a wrapper had put before them",) if prefixes else ()
    return TorchFile({name: _lazy(tensor, name, path) for name, tensor in named.items()}, rest, notes)


def open_bin(folder: Path, stem: str = "pytorch_model") -> dict[str, Lazy]:
    """The tensors of ``stem``.bin, or of the files that ``stem``.bin.index.json lists. Raises ValueError as `read_torch` does."""
    folder = Path(folder)
    index = folder / f"{stem}.bin.index.json"
    if not index.is_file():
        return open_torch(folder / f"{stem}.bin")[0]
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(file, str) and Path(file).name == file for file in where.values()):
        raise ValueError(f"{index}: weight_map must name a file of this folder for each tensor")
    files = sorted(set(where.values()))
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise ValueError(f"{folder}: {len(missing)} of {len(files)} weight files are missing: {', '.join(missing[:4])}; download them again")
    found = {name: t for file in files for name, t in open_torch(folder / file)[0].items()}
    if lost := [name for name in where if name not in found]:
        raise ValueError(f"{index}: lists tensors that its files lack: {', '.join(lost[:8])}")
    return found


def is_torch(path: Path) -> bool:
    """Whether torch.save wrote it, by its content: a zip whose first entry is the pickle or, of late, data about the file."""
    try:
        with open(path, "rb") as file:
            head = file.read(256)
    except OSError:
        return False
    size = int.from_bytes(head[26:28], "little")
    inside = head[30 : 30 + size].partition(b"/")[2]
    return head.startswith(ZIP) and inside in (b"data.pkl", b".format_version", b"byteorder", b"version")


def _load(path: Path) -> object:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    with open(path, "rb") as file:
        head = file.read(4)
    if not head:
        raise ValueError(f"{path}: is empty; download or copy it again")
    if head != ZIP:
        raise ValueError(
            f"{path}: is no zip archive, as torch.save writes since torch 1.6, but a plain pickle, a file of an older torch or "
            f"something else; nothing in it was run. If an older torch wrote it and you trust it: {RESAVE}"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of types on their way out, which are refused below
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # of every kind: a damaged pickle fails wherever its bytes lead
        raise ValueError(f"{path}: {_reason(str(error))}; nothing in it was run") from None


def _reason(said: str) -> str:
    """What torch says, in one sentence and without its advice to load it all the same."""
    if "central directory" in said or "not a ZIP" in said:
        return "is cut short or damaged: it has no end; download or copy it again"
    if "TorchScript" in said:
        return "is a TorchScript program, code and not weights; save the model's state_dict() instead"
    if (found := CLASS.search(said)) is not None:
        name = found[1] or found[2]
        return f"asks for {name}, which is code and not weights; take another file, or have its author save model.state_dict() alone"
    return f"cannot be read as weights ({said.strip().splitlines()[0][:160] if said.strip() else 'no reason given'}); it is damaged, or no such file"


def _state_dict(data: dict, path: Path) -> tuple[dict[str, Tensor], dict]:
    """The dict whose values are all tensors: ``data`` itself, or one of its values with a usual name."""
    for key in (None, *NESTED):
        state = data if key is None else data.get(key)
        if isinstance(state, dict) and state and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
            return state, {} if key is None else {k: v for k, v in data.items() if k != key}
    keys = ", ".join(f"{key} ({type(value).__name__})" for key, value in list(data.items())[:8]) or "nothing"
    raise ValueError(
        f"{path}: holds no state dict (names and tensors), neither itself nor under {', '.join(NESTED)}; it holds: {keys}; "
        "nothing in it was run"
    )


def _unwrapped(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    removed = []
    while prefix := next((p for p in WRAPPERS if all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
        removed.append(prefix)
    return state, removed


def _lazy(tensor: Tensor, name: str, path: Path) -> Lazy:
    """A copy at each reading: what its reader does to it reaches neither the mapped file nor a tensor tied to it."""
    tensor = tensor.detach()
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized or tensor.dtype not in NAMES:
        what = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
        raise ValueError(f"{path}: tensor {name} is stored as {what}, which is not supported; save it dense, in a 16- or 32-bit type")
    return Lazy(tuple(tensor.shape), tensor.dtype, tensor.clone)
