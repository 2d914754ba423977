"""One worker's piece of work: documents in, steps over them, a part file out; and what happened, as a small JSON file.

The JSON file is written last and atomically: a part that has one is finished, any other is done again. So a run may be
killed at any moment and loses no more than the parts that were being worked on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

import numpy as np

from zero2llm.core.config import parse
from zero2llm.core.files import read_json, write_atomic
from zero2llm.data.document import Document, Removed, Result
from zero2llm.data.pipeline.ledger import StepCount
from zero2llm.data.pipeline.part import Signatures, whole_file
from zero2llm.data.pipeline.recipe import DataRecipe, Segment, segments
from zero2llm.data.shards import share
from zero2llm.data.sources import BadRecords, Unit, read_unit, text_fault
from zero2llm.data.stats import Stats
from zero2llm.data.steps.words import language_of
from zero2llm.tokenizers.tokenizer import Tokenizer

LISTED = 200  # bad records that a part names
OURS = ("text", "where", "source")  # fields that a written record has from us
NOTHING = Removed("nothing left")
MADE = "documents made by cutting"  # of a step that makes several of one: in + made = out + removed


@dataclass(frozen=True)
class Task:
    """Part ``number`` of segment ``segment``; ``unit`` and ``source`` only where documents are read from sources."""

    recipe: str  # JSON: workers build their own steps from it
    work: str
    segment: int
    number: int
    unit: Unit | None = None
    source: int = 0

    @property
    def stem(self) -> Path:
        return Path(self.work) / f"{self.segment:02}" / f"part-{self.number:06}"

    @property
    def done(self) -> Path:
        return self.stem.with_suffix(".json")


@dataclass
class Tools:
    """What a worker builds once and uses for all its tasks of a segment."""

    recipe: DataRecipe
    segment: Segment
    steps: list[Callable[[Document], Result]]
    tokenizer: Tokenizer | None

    def tokens(self, text: str) -> int | None:
        return None if self.tokenizer is None else len(self.tokenizer.encode(text))


@lru_cache(maxsize=2)
def tools(recipe: str, segment: int) -> Tools:
    cfg = parse(DataRecipe, json.loads(recipe))
    here = segments(cfg)[segment]
    tokenizer = None if cfg.tokenizer is None else Tokenizer.load(cfg.tokenizer)
    return Tools(cfg, here, [cfg.steps[i].build() for i in here.steps], tokenizer)


def run_task(task: Task) -> int:
    """Do the task unless it is done. Returns the documents that it wrote."""
    if task.done.is_file():
        return read_json(task.done)["documents"]
    kit = tools(task.recipe, task.segment)
    report = Work(kit)
    bad = BadRecords(skip=kit.recipe.skip_bad_records)
    documents = from_source(task, kit, bad) if task.unit is not None else from_part(task, kit, report)
    report.write(documents, task, first=task.unit is not None)
    report.finish(task, bad)
    return report.documents


def from_source(task: Task, kit: Tools, bad: BadRecords) -> Iterator[Document]:
    source = kit.recipe.sources[task.source]
    for record in read_unit(task.unit, bad):
        value = {source.field: record.value} if isinstance(record.value, str) else record.value
        if not isinstance(value, dict) or source.field not in value:
            has = ", ".join(map(str, value)) if isinstance(value, dict) else type(value).__name__
            bad.add(record.file, record.line, f"no field {source.field!r}; it has: {has or 'nothing'}")
        elif fault := text_fault(value[source.field]):
            bad.add(record.file, record.line, f"field {source.field!r} {fault}")
        else:
            meta = {"source": source.title} | others(value, source.field, bad)
            yield Document(value[source.field], f"{record.file}, line {record.line}", meta)


def others(value: dict, field: str, bad: BadRecords) -> dict:
    """A record's other fields; one whose name is ours stays under another."""
    rest = {k: v for k, v in value.items() if k != field and k not in OURS}
    for name in OURS:
        if name != field and name in value:
            free = f"original_{name}"
            while free in value:
                free = f"original_{free}"
            rest[free] = value[name]
            bad.noted[f"fields {name!r} kept as {free!r}"] += 1
    return rest


def from_part(task: Task, kit: Tools, work: Work) -> Iterator[Document]:
    """Documents of the segment before, those that the corpus step in between lets through."""
    before = Task(task.recipe, task.work, task.segment - 1, task.number)
    step, count = kit.recipe.steps[kit.segment.after].build(), work.counts[kit.segment.after]
    keep = np.load(before.stem.with_suffix(".keep.npy"))
    lengths = np.load(before.stem.with_suffix(".rows.npy"))
    at = 0
    with open(before.stem.with_suffix(".jsonl"), encoding="utf-8") as file:
        for line, n in zip(file, lengths.tolist(), strict=True):
            doc = from_line(line)
            verdict, at = keep[at : at + n], at + n
            yield from work.through(doc, count, lambda d, v=verdict: step.apply(d, v))


def from_line(line: str) -> Document:
    value = json.loads(line)
    return Document(value["text"], value["where"], value["meta"], origin=value.get("origin", ""))


def to_line(doc: Document) -> bytes:
    value = {"text": doc.text, "where": doc.where, "meta": doc.meta} | ({"origin": doc.origin} if doc.origin else {})
    return (json.dumps(value, ensure_ascii=False) + "\n").encode()


class Work:
    """Documents through the steps of a segment, and the account of it."""

    def __init__(self, kit: Tools):
        self.kit, self.documents = kit, 0
        mine = [*kit.segment.steps] if kit.segment.after is None else [kit.segment.after, *kit.segment.steps]
        self.counts = {i: StepCount() for i in mine}
        self.before, self.after = Stats(), Stats()
        self.sizes: dict[str, tuple[int, int | None]] = {}

    def size(self, text: str) -> tuple[int, int | None]:
        """Bytes and tokens; a text that several steps leave as it is gets counted once."""
        if text not in self.sizes:
            self.sizes.clear()
            self.sizes[text] = len(text.encode()), self.kit.tokens(text)
        return self.sizes[text]

    def through(self, doc: Document, count: StepCount, step: Callable[[Document], Result]) -> Iterator[Document]:
        """What the step makes of the document: nothing, one, or several."""
        size, whole = self.size(doc.text), Document(doc.text, doc.where, origin=doc.origin)  # steps may change what they get
        count.entered.add(*size)
        began = time.perf_counter()
        result = step(doc)
        count.seconds += time.perf_counter() - began
        cut = isinstance(result, list)
        pieces = result if cut else [] if isinstance(result, Removed) else [result]
        if not any(piece.text.strip() for piece in pieces):
            count.lose(whole, result if isinstance(result, Removed) else NOTHING, *size)
            return
        if len(pieces) > 1:
            count.notes[MADE] += len(pieces) - 1
        for piece in pieces:
            if not piece.text.strip():
                count.lose(piece, NOTHING, *self.size(piece.text))
                continue
            piece.origin = whole.origin or (blake2b(whole.text.encode(), digest_size=16).hexdigest() if cut else "")
            count.left.add(*self.size(piece.text))
            count.notes.update(piece.notes)
            piece.notes.clear()
            yield piece

    def chain(self, doc: Document, at: int) -> Iterator[Document]:
        if at == len(self.kit.steps):
            yield doc
            return
        index = self.kit.segment.steps[at]
        for piece in self.through(doc, self.counts[index], self.kit.steps[at]):
            yield from self.chain(piece, at + 1)

    def write(self, documents: Iterator[Document], task: Task, first: bool) -> None:
        """Part file, and the signatures that the corpus step behind this segment asks for."""
        task.stem.parent.mkdir(parents=True, exist_ok=True)
        nxt = self.kit.segment.before
        signer = None if nxt is None else self.kit.recipe.steps[nxt].build()
        with Signatures(task.stem.parent, signer) as signed:
            with whole_file(task.stem.with_suffix(".jsonl")) as file:
                for doc in documents:
                    if first:
                        self.count(self.before, doc)
                    for done in self.chain(doc, 0):
                        if signer is None:
                            self.count(self.after, done)
                        else:
                            signed.add(done)
                        file.write(to_line(done))
                        self.documents += 1
            if signer is not None:
                signed.save(task.stem)

    def count(self, stats: Stats, doc: Document) -> None:
        tokenizer = self.kit.tokenizer
        stats.add(doc.text, language_of(doc), None if tokenizer is None else tokenizer.encode(doc.text))

    def finish(self, task: Task, bad: BadRecords) -> None:
        last = self.kit.segment.before is None
        value = {
            "documents": self.documents,
            "steps": {str(i): count.to_dict() for i, count in self.counts.items()},
            "bad": bad.total,
            "bad_records": bad.found[:LISTED],
            "noted": dict(sorted(bad.noted.items())),
            "before": self.before.to_dict() if task.unit is not None else None,
            "after": self.after.to_dict() if last else None,
        }
        write_atomic(task.done, json.dumps(value, ensure_ascii=False))


def split_of(doc: Document, seed: int, shares: dict[str, float]) -> str:
    """Which split a document belongs to, by its content: equal documents never part, nor do pieces of one."""
    at = share(f"{seed}\0{doc.origin or doc.text}")
    for name, size in shares.items():
        if at < size:
            return name
        at -= size
    return "train"
