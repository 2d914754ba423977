"""What the teacher says of every labelled token, written to disk once: after that the teacher needs no memory.

    FOLDER/teacher-KEY/rows-00000000.safetensors     rows 0 .. 511 of the token files, by row number
        counts (rows,) int32     labelled tokens of each row
        logps (tokens, k) fp16, ids (tokens, k) int32     its k likeliest tokens, rows end to end
        tail (tokens,) fp32      log of the probability of all others
    KEY = hash of the teacher's weights, the rows' tokens and masks, k, temperature and number format

A file is whole or absent and bears the key, so a run that was killed goes on with the first file that is missing, and what was
made from anything else is made again.

What is lost: the order within the tail (divergence.py says how much that is; the metric `tail` of `summary` how likely the tail
is), and fp16's rounding, at most 2^-11 of a log-probability, after which the values are made to add up to 1 again.
Cost: 6 k + 4 bytes a labelled token: 100 for k = 16, against 2 V in fp16; one pass of the teacher over the data.
Only for rows that are the same in every epoch: conversations, and documents packed best-fit. Documents end to end are cut
otherwise in each epoch, and what a teacher says depends on where its text begins.
"""

from __future__ import annotations

import hashlib
import json
import os
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from zero2llm.core.batch import IGNORE, Batch
from zero2llm.core.files import beside, full_disk
from zero2llm.data.rows import ConversationRows, FittedRows
from zero2llm.parallel.plan import World
from zero2llm.train.distill.divergence import in_chunks, likeliest, log_probs
from zero2llm.train.distill.teacher import Stored, Teacher

ROWS = 512  # in a file: what a kill costs at most
FINITE = 60000.0  # fp16 ends at 65504
Fixed = ConversationRows | FittedRows


def numbered(rows: Fixed, numbers: list[int]) -> Batch:
    """These rows by their number in the files, whatever the order of an epoch."""
    place = np.argsort(rows.order(0))
    return rows.batch([(0, int(place[n])) for n in numbers])


def cache_key(rows: Fixed, weights: str, k: int, temperature: float, dtype: torch.dtype) -> str:
    about = [weights, rows.identity, len(rows), k, temperature, str(dtype)]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def write_cache(
    teacher: Teacher, weights: str, rows: Fixed, folder: Path, *, k: int, temperature: float = 1.0, micro_rows: int = 8,
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, tell=lambda done, total: None,
) -> CachedRows:  # fmt: skip
    """Make the files that are missing and return the rows with them; rank 0 works, the others wait.

    weights : the hash of the teacher's (`load_teacher`).  tell(done, total) hears of rows. Raises ValueError for rows that
    differ from epoch to epoch, k out of range, or a full disk.
    """
    if not isinstance(rows, Fixed):
        raise ValueError(f"a teacher's cache needs rows that stay the same; {type(rows).__name__} are cut anew in each epoch: take packing best_fit")
    if not 1 <= k < teacher.vocab_size:
        raise ValueError(f"top_k = {k} must be from 1 to {teacher.vocab_size - 1}: the vocabulary has {teacher.vocab_size} tokens")
    key, world = cache_key(rows, weights, k, temperature, dtype), World.current()
    folder = Path(folder) / f"teacher-{key[:16]}"
    if world.rank == 0:
        for first in range(0, len(rows), ROWS):
            last = min(first + ROWS, len(rows))
            if _open(_file(folder, first), key) is None:
                steps = [list(range(a, min(a + micro_rows, last))) for a in range(first, last, micro_rows)]
                with torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
                    parts = [said(teacher, numbered(rows, some).to(device), k, temperature) for some in steps]
                _write(_file(folder, first), {name: torch.cat([p[name] for p in parts]) for name in parts[0]}, key)
            tell(last, len(rows))
    world.barrier()
    return CachedRows(rows, folder, key, Stored(teacher.vocab_size, k, temperature))


@torch.no_grad()
def said(teacher: Teacher, batch: Batch, k: int, temperature: float) -> dict[str, Tensor]:
    """A batch's part of a file."""
    keep = batch.labels != IGNORE
    head = teacher(batch, keep)

    def measure(z: Tensor, _, labels: Tensor) -> tuple[Tensor, ...]:
        found = likeliest(log_probs(z, teacher.vocab_size, temperature), k)
        return found.logps.clamp(min=-FINITE).half(), found.ids.int(), found.tail.float()

    names, values = ("logps", "ids", "tail"), in_chunks(measure, head, head, batch.labels[keep])
    return {"counts": keep.sum(1).int().cpu()} | {name: v.cpu() for name, v in zip(names, values, strict=True)}


class CachedRows:
    """Rows with what the teacher says of them: extra teacher_logps, teacher_ids (B, T, k) and teacher_tail (B, T).

    teacher : what an objective takes in place of the running one.
    """

    def __init__(self, rows: Fixed, folder: Path, key: str, teacher: Stored):
        self.rows, self.folder, self.key, self.teacher = rows, folder, key, teacher
        self.unit, self.identity = rows.unit, rows.identity | {"teacher": key[:16]}
        self.file = lru_cache(maxsize=64)(self._file)

    def __len__(self) -> int:
        return len(self.rows)

    def _file(self, first: int):
        """The opened file and where each of its rows begins. Raises ValueError if it is missing, damaged or another's."""
        path = _file(self.folder, first)
        if (found := _open(path, self.key)) is None:
            raise ValueError(f"{path}: missing, damaged or made from something else; write the teacher's cache again")
        return found, np.cumsum([0, *found.get_tensor("counts").tolist()])

    def batch(self, wanted: list[tuple[int, int]]) -> Batch:
        batch = self.rows.batch(wanted)
        keep, extra = batch.labels != IGNORE, {}
        for r, (epoch, row) in enumerate(wanted):
            number = int(self.rows.order(epoch)[row])
            for name, value in self.row(number).items():
                if name not in extra:
                    extra[name] = value.new_zeros((*keep.shape, *value.shape[1:]))
                if len(value) != int(keep[r].sum()):
                    raise ValueError(f"{self.folder}: row {number} has {len(value)} tokens there and {int(keep[r].sum())} here; write it again")
                extra[name][r, keep[r]] = value
        return Batch(batch.tokens, batch.labels, batch.seq, batch.extra | extra, batch.group)

    def row(self, number: int) -> dict[str, Tensor]:
        file, starts = self.file(number // ROWS * ROWS)
        a, b = map(int, starts[number % ROWS : number % ROWS + 2])
        return {f"teacher_{name}": file.get_slice(name)[a:b] for name in ("logps", "ids", "tail")}

    def summary(self) -> dict[str, float]:
        """tokens stored, bytes on disk, and `tail`: the mean probability of what is not stored."""
        files = [self.file(first)[0] for first in range(0, len(self), ROWS)]
        tails = torch.cat([file.get_tensor("tail") for file in files])
        size = sum(_file(self.folder, first).stat().st_size for first in range(0, len(self), ROWS))
        return {"tokens": len(tails), "bytes": size, "tail": float(tails.exp().mean())}


def _file(folder: Path, first: int) -> Path:
    return folder / f"rows-{first:08d}.safetensors"


def _open(path: Path, key: str):
    """The file, if it is whole and made from what ``key`` names."""
    try:
        found = safe_open(path, "pt")
        return found if (found.metadata() or {}).get("key") == key else None
    except (OSError, SafetensorError):
        return None


def _write(path: Path, tensors: dict[str, Tensor], key: str) -> None:
    part = beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in tensors.items()}, part, metadata={"key": key})
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise full_disk(error, path) from error
