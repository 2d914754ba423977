"""`zero2llm data answers`: a teacher answers the questions of files, for students to be fine-tuned on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from zero2llm.core.log import console
from zero2llm.engine.sampling import Sampling
from zero2llm.lab.data_files import format_of
from zero2llm.lab.talk import find_checkpoint, load_engine
from zero2llm.train.adapted import weights_hash
from zero2llm.train.distill.sequence import write_answers


def write_down(teacher: Path, files: Sequence[str], out: Path, sampling: Sampling, batch: int, device: str) -> None:
    """``out`` and a line on what was left out. Raises ValueError before anything is written."""
    if format_of(out) != (".jsonl", ""):
        raise ValueError(f"--out {out}: answers are written line by line; take a name that ends in .jsonl")
    if batch < 1:
        raise ValueError(f"--batch {batch} must be at least 1")
    engine = load_engine(teacher, device, max_batch=batch)
    found = write_answers(engine, weights_hash(find_checkpoint(teacher).manifest), files, out, sampling, batch=batch)
    left_out = ", ".join(f"{n} {why}" for why, n in found.items() if why != "written")
    console().print(f"{out}: {found['written']} answers" + (f"; left out: {left_out}" if left_out else ""), markup=False, soft_wrap=True)
