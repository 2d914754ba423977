"""Between two segments: the signatures of all parts are laid end to end and judged, and every part hears its verdict."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from zero2llm.core.files import read_json, write_atomic
from zero2llm.data.document import CorpusStep, Verdict
from zero2llm.data.pipeline.part import save_array
from zero2llm.data.pipeline.task import Task, from_line

LARGEST = 10  # groups that the report shows
NAMED, SHOWN, EXCERPT = 5, 3, 300  # places and texts of each, and characters of a text


def judged(tasks: Sequence[Task]) -> Path:
    """The file that stands there when the segment of ``tasks`` is judged."""
    return tasks[0].stem.parent / "judged.json"


def judge(tasks: Sequence[Task], step: CorpusStep) -> dict | None:
    """Write which rows of each part stay; returns what the report says of groups that are alike.

    Memory: what ``step.decide`` takes; the rows themselves are a memory map.
    """
    marker = judged(tasks)
    if marker.is_file():
        return read_json(marker)["groups"]
    lengths = [np.load(task.stem.with_suffix(".rows.npy")) for task in tasks]
    counts = [int(n.sum()) for n in lengths]
    owner = np.repeat(np.arange(sum(map(len, lengths))), np.concatenate(lengths))
    rows = gather([task.stem.with_suffix(".sign.npy") for task in tasks], counts, marker.with_name("rows.npy"))
    verdict = step.decide(rows, owner) if len(rows) else Verdict(np.ones(0, bool), np.arange(0))
    at = 0
    for task, n in zip(tasks, counts, strict=True):
        save_array(task.stem.with_suffix(".keep.npy"), verdict.keep[at : at + n])
        at += n
    groups = describe(verdict.group, owner, lengths, tasks)
    write_atomic(marker, json.dumps({"groups": groups}, ensure_ascii=False))
    return groups


def gather(files: Sequence[Path], counts: Sequence[int], out: Path) -> np.ndarray:
    """(N, W) rows of all parts as one memory map."""
    shapes = [np.load(file, mmap_mode="r") for file, n in zip(files, counts, strict=True) if n]
    if not shapes:
        return np.empty((0, 0))
    rows = np.lib.format.open_memmap(out, mode="w+", dtype=shapes[0].dtype, shape=(sum(counts), shapes[0].shape[1]))
    at = 0
    for part in shapes:
        rows[at : at + len(part)] = part
        at += len(part)
    return rows


def describe(group: np.ndarray, owner: np.ndarray, lengths: Sequence[np.ndarray], tasks: Sequence[Task]) -> dict:
    """Sizes of the groups, and the largest with some of their documents."""
    names, sizes = np.unique(group, return_counts=True)
    together = sizes > 1
    order = np.argsort(-sizes[together], kind="stable")[:LARGEST]
    top = names[together][order]
    members = {int(g): owner[np.flatnonzero(group == g)[:NAMED]].tolist() for g in top}
    texts = read_documents({i for found in members.values() for i in found}, lengths, tasks)
    largest = [
        {
            "size": int(size),
            "where": [texts[i][0] for i in members[int(g)]],
            "texts": [texts[i][1][:EXCERPT] for i in members[int(g)][:SHOWN]],
        }
        for g, size in zip(top, sizes[together][order], strict=True)
    ]
    counted = Counter(sizes[together].tolist())
    return {"sizes": {str(size): counted[size] for size in sorted(counted)}, "largest": largest}


def read_documents(wanted: set[int], lengths: Sequence[np.ndarray], tasks: Sequence[Task]) -> dict[int, tuple[str, str]]:
    """(where, text) of documents by their number over all parts."""
    found, first = {}, 0
    for task, n in zip(tasks, map(len, lengths), strict=True):
        here = {i for i in wanted if first <= i < first + n}
        if here:
            with open(task.stem.with_suffix(".jsonl"), encoding="utf-8") as file:
                for i, line in enumerate(file, first):
                    if i in here:
                        doc = from_line(line)
                        found[i] = doc.where, doc.text
        first += n
    return found
