"""What a preference is measured against: log pi_ref(y | x) of a batch's rows, as one callable.

    model         a frozen model, run beside the one that trains: a copy of the start, or the base under an adapter
    precomputed   the same numbers, worked out once before training and read from a file: no reference in memory
    none          log pi_ref = 0, a reference that finds all answers alike

A file of precomputed sums bears the hash of the reference's weights, of the rows' tokens and masks, and the number format;
one that is absent, cut short or made from anything else is made again.

Cost of `precomputed`: one forward pass over the data, four bytes a row. It pays when rows are seen more than once, or when
the second model does not fit. Shapes: (B,) fp32 or wider, without gradient.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from zero2llm.core.batch import Batch
from zero2llm.core.files import beside, full_disk
from zero2llm.parallel.plan import World
from zero2llm.train.objectives.pairs import sequence_logps

ReferenceKind = Literal["model", "precomputed", "none"]
Reference = Callable[[Batch], Tensor]


class Frozen:
    """A model that no longer learns."""

    def __init__(self, model: nn.Module):
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        return sequence_logps(self.model, batch)


def stored(batch: Batch) -> Tensor:
    """The sums that precomputed rows carry."""
    return batch.extra["ref"]


def nothing(batch: Batch) -> Tensor:
    return torch.zeros(len(batch), device=batch.tokens.device)


class StoredRows(Protocol):
    """Rows whose reference can be stored: `PairRows`, `JudgedRows`."""

    unit: int
    identity: dict
    reference: Tensor | None  # (units, unit), set by `precompute`

    def __len__(self) -> int: ...
    def numbered(self, units: list[int]) -> Batch: ...


def precompute(
    reference: Reference, rows: StoredRows, folder: Path, weights: str, *, micro_rows: int, device: torch.device, dtype: torch.dtype
) -> Path:
    """Give ``rows`` the reference's sums, from a file in ``folder`` or else from ``reference``; rank 0 works, the others wait.

    weights : names the reference's weights. Returns the file.
    """
    about = [weights, rows.identity, len(rows), rows.unit, str(dtype)]
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    path, world = folder / f"reference-{key[:16]}.safetensors", World.current()
    if world.rank == 0 and _read(path, key) is None:
        step = max(micro_rows // rows.unit, 1)
        parts = []
        for start in range(0, len(rows), step):
            batch = rows.numbered(list(range(start, min(start + step, len(rows))))).to(device)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                parts.append(reference(batch).cpu())
        _write(path, torch.cat(parts).view(-1, rows.unit), key)
    world.barrier()
    rows.reference = _read(path, key)
    assert rows.reference is not None, path
    return path


def _write(path: Path, sums: Tensor, key: str) -> None:
    from safetensors.torch import save_file

    part = beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"sums": sums.contiguous()}, part, metadata={"key": key})
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise full_disk(error, path) from error


def _read(path: Path, key: str) -> Tensor | None:
    """The sums, if the file is whole and made from what ``key`` names."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor("sums") if (file.metadata() or {}).get("key") == key else None
    except (OSError, SafetensorError):
        return None
