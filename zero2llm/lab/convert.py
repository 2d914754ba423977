"""Hand a checkpoint to other programs."""

from __future__ import annotations

from pathlib import Path

from zero2llm.core.log import console
from zero2llm.interop.hf import export_hf
from zero2llm.lab.talk import load_engine


def export_checkpoint(checkpoint: Path, out: Path, to: str = "hf", overwrite: bool = False) -> Path:
    """Write ``checkpoint`` in the format ``to``. Raises ValueError for an unknown format, or a model without counterpart."""
    if to != "hf":
        raise ValueError(f"--to {to!r} is not available; this version writes: hf")
    engine = load_engine(checkpoint, "cpu")
    raise NotImplementedError
