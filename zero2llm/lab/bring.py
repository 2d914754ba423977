"""Somebody else's model as a checkpoint of ours: which reader reads it, and what came along."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from zero2llm.adapters.wrap import unwrap
from zero2llm.core.log import console
from zero2llm.interop.foreign import Foreign, import_model
from zero2llm.interop.gguf.read import read_gguf
from zero2llm.interop.minimind import read_minimind
from zero2llm.interop.nanogpt import is_nanogpt, read_nanogpt
from zero2llm.interop.peft.read import load_peft
from zero2llm.interop.read_hf import download, is_hub_name, read_hf
from zero2llm.interop.torch_files import is_torch, read_torch
from zero2llm.lab.talk import find_checkpoint
from zero2llm.model.cost import parameters
from zero2llm.train.checkpoint import save_model

Shape = Mapping[str, int | float | str]


def find_foreign(source: str, tokenizer: Path | None = None, shape: Shape | None = None, endpoint: str | None = None) -> Foreign:
    """Open ``source``: a folder, a .gguf, .pth or .pt file, or a name on a hub. Raises ValueError if it is none of these.

    tokenizer, shape : for weights that come without: the folder of theirs, and what the tensors do not show.
    """
    path = Path(source)
    if (path / "adapter_config.json").is_file():
        raise ValueError(f"{source} is an adapter; say which checkpoint it belongs to: --base")
    if path.is_dir():
        refuse_spare(tokenizer, shape, source)
        refuse_other_folders(path)
        return read_hf(path)
    if path.is_file():
        return _file(path, tokenizer, shape)
    if not is_hub_name(source):
        raise ValueError(f"{source}: no such file or folder; on a hub a name is OWNER/NAME or modelscope://OWNER/NAME")
    refuse_spare(tokenizer, shape, source)
    return read_hf(download(source, endpoint))


def _file(path: Path, tokenizer: Path | None, shape: Shape | None) -> Foreign:
    if path.suffix == ".gguf":
        refuse_spare(tokenizer, shape, str(path))
        return read_gguf(path)
    if path.suffix not in (".pth", ".pt", ".bin", ".ckpt") and not is_torch(path):
        raise ValueError(f"{path}: unknown kind of file; readable are folders of Hugging Face, .gguf, minimind's .pth and nanoGPT's ckpt.pt")
    shape = dict(shape or {})
    return read_nanogpt(path, tokenizer, shape) if is_nanogpt(read_torch(path)) else read_minimind(path, tokenizer, shape)


def refuse_other_folders(folder: Path) -> None:
    if (folder / "manifest.json").is_file() or (folder / "checkpoints").is_dir():
        raise ValueError(f"{folder} is a checkpoint of zero2llm already; every verb opens it as it is")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json, so it is no folder that transformers wrote; name one, or a file of weights")


def refuse_spare(tokenizer: Path | None, shape: Shape | None, source: str) -> None:
    given = [name for name, value in (("--tokenizer", tokenizer), ("--shape", shape)) if value]
    if given:
        raise ValueError(f"{source} says itself what {' and '.join(given)} would say; leave it out")


def import_checkpoint(source: str, out: Path, tokenizer: Path | None = None, shape: Shape | None = None,
                      endpoint: str | None = None, overwrite: bool = False) -> Path:  # fmt: skip
    """Write ``source`` as a checkpoint. Raises ValueError before anything is written."""
    found = find_foreign(source, tokenizer, shape, endpoint)
    cfg = import_model(found, out, overwrite)
    say = console().print
    say(f"wrote {out}: {found.config['model_type']}, {parameters(cfg)['total']:,} parameters, {len(cfg.specs())} layers of {cfg.d_model}", markup=False, soft_wrap=True)
    for note in found.notes:
        say(f"  {note}", style="yellow", markup=False, soft_wrap=True)
    say(f"talk to it: zero2llm chat {out}", markup=False, soft_wrap=True)
    return out


def import_adapter(folder: Path, base: Path, out: Path, overwrite: bool = False) -> Path:
    """An adapter in peft's format, merged into its base. Raises ValueError if it is for another model."""
    source = find_checkpoint(base)
    model = source.load_model()
    paths = load_peft(model, folder)

    def save_tokenizer(to: Path) -> None:
        shutil.copytree(source.tokenizer_dir, to)

    save_model(unwrap(model), save_tokenizer, out, source, overwrite)
    console().print(f"wrote {out}: the adapter changes {len(paths)} projections of {source.path}", markup=False, soft_wrap=True)
    return out


def read_shape(pairs: Sequence[str]) -> dict[str, int | float | str]:
    """KEY=VALUE as numbers where they are. Raises ValueError for what is no pair."""
    shape: dict[str, int | float | str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals and value):
            raise ValueError(f"--shape {pair!r}: write KEY=VALUE, such as n_heads=8")
        try:
            shape[key] = int(value)
        except ValueError:
            try:
                shape[key] = float(value)
            except ValueError:
                shape[key] = value
    return shape
