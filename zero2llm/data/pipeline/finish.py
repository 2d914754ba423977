"""Parts become the files that people use: text of each split, the account as JSON, what everything was made from."""

from __future__ import annotations

import gzip
import io
import json
import platform
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from zero2llm.core.config import to_dict
from zero2llm.core.files import hashes, read_json
from zero2llm.data.document import Document
from zero2llm.data.encode import encode_documents
from zero2llm.data.pipeline.engines import cores
from zero2llm.data.pipeline.ledger import Size, StepCount
from zero2llm.data.pipeline.recipe import DataRecipe
from zero2llm.data.pipeline.task import LISTED, Task, from_line, split_of
from zero2llm.data.sources import BadRecords, Source
from zero2llm.data.stats import Stats
from zero2llm.tokenizers.tokenizer import Tokenizer

LONGEST = 1 << 14  # MiB of a line: what a source let through, the shards take
SHOWN = 1000  # most frequent words and tokens that the report keeps


class SplitFiles:
    """The text files of one split, a new one every ``limit`` bytes: train-00000.jsonl, train-00001.jsonl ..."""

    def __init__(self, folder: Path, name: str, compress: str, limit: int):
        self.folder, self.name, self.compress, self.limit = folder, name, compress, limit
        self.paths, self.written, self.file, self.size = [], 0, None, Size()

    def write(self, doc: Document) -> None:
        line = (json.dumps({"text": doc.text, "where": doc.where} | doc.meta, ensure_ascii=False) + "\n").encode()
        if self.file is None or self.written + len(line) > self.limit:
            self.close()
            self.file, self.written = self.open(), 0
        self.file.write(line)
        self.written += len(line)
        self.size.add(len(doc.text.encode()), None)

    def open(self) -> Any:
        suffix = {"none": "", "gz": ".gz", "zst": ".zst"}[self.compress]
        path = self.folder / f"{self.name}-{len(self.paths):05}.jsonl{suffix}"
        self.paths.append(path)
        if self.compress == "gz":
            return gzip.GzipFile(path, "wb", mtime=0)  # a time stamp would make equal data differ
        if self.compress == "zst":
            return zstd_writer(path)
        return open(path, "wb")

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def zstd_writer(path: Path) -> io.BufferedIOBase:
    import zstandard

    return zstandard.open(path, "wb")


def check_compress(recipe: DataRecipe) -> None:
    """Before hours of work: raises ValueError if the library for the last step is missing."""
    try:
        if recipe.compress == "zst":
            import zstandard  # noqa: F401
    except ImportError:
        raise ValueError("compress: zst needs the extra: pip install 'zero2llm[data]'") from None


def documents_of(tasks: Sequence[Task]) -> Iterator[Document]:
    for task in tasks:
        with open(task.stem.with_suffix(".jsonl"), encoding="utf-8") as file:
            yield from map(from_line, file)


def write_output(
    recipe: DataRecipe, folder: Path, by_segment: list[list[Task]], groups: dict, seconds: list[float], began: float
) -> dict:
    """Fill ``folder``; returns the funnel, which is also its funnel.json."""
    names = [*recipe.splits, "train"]
    files = {name: SplitFiles(folder, name, recipe.compress, recipe.file_mb << 20) for name in names}
    for doc in documents_of(by_segment[-1]):
        files[split_of(doc, recipe.seed, recipe.splits)].write(doc)
    for split in files.values():
        split.close()
    written = sum(split.size.documents for split in files.values())
    funnel = account(recipe, by_segment, groups, seconds)
    if written != funnel["after"]["documents"]:
        raise ValueError(changed_part(by_segment[-1]))
    if not written:
        raise ValueError("no document is left: the steps remove everything; see the parts in the work folder")
    if recipe.shards is not None:
        write_shards(recipe, folder, files)
    funnel["seconds"] = round(time.time() - began, 1)
    funnel["splits"] = {name: files[name].size.to_dict() for name in ("train", *recipe.splits)}
    (folder / "funnel.json").write_text(json.dumps(funnel, ensure_ascii=False, indent=1), encoding="utf-8")
    manifest = {"recipe": to_dict(recipe), "versions": funnel["versions"], "sha256": hashes(folder)}
    (folder / "manifest.json").write_text(json.dumps(manifest, ensure_ascii=False, indent=1), encoding="utf-8")
    return funnel


def changed_part(tasks: Sequence[Task]) -> str:
    """Which part holds other documents than its account says."""
    for task in tasks:
        said, there = read_json(task.done)["documents"], sum(1 for _ in documents_of([task]))
        if said != there:
            path = task.stem.with_suffix(".jsonl")
            return f"{path}: holds {there} documents, its account says {said}; remove {task.done} and run again"
    return "parts were changed while they were read; run again"


def account(recipe: DataRecipe, by_segment: list[list[Task]], groups: dict, seconds: list[float]) -> dict:
    """The ledgers of all parts as one."""
    counts = {i: StepCount() for i in range(len(recipe.steps))}
    before, after = Stats(), Stats()
    sources = [{"name": s.title, "documents": 0, "bytes": 0, "bad": 0, "noted": Counter()} for s in recipe.sources]
    bad: list[str] = []
    for task in (task for tasks in by_segment for task in tasks):
        done = read_json(task.done)
        for i, count in done["steps"].items():
            counts[int(i)].merge(count)
        if done["before"] is not None:
            part, source = Stats.from_dict(done["before"]), sources[task.source]
            before.merge(part)
            source["documents"] += done["before"]["documents"]
            source["bytes"] += done["before"]["bytes"]
            source["bad"] += done["bad"]
            source["noted"].update(done["noted"])
            bad += done["bad_records"][: LISTED - len(bad)]
        if done["after"] is not None:
            after.merge(Stats.from_dict(done["after"]))
    steps = [
        {"name": step.kind, "kind": step.kind} | counts[i].to_dict() | {"groups": groups.get(i)}
        for i, step in enumerate(recipe.steps)
    ]
    libraries = {name: version(name) for name in ("numpy", "tokenizers", "regex")}
    return {
        "title": Path(recipe.out).name,
        "recipe": to_dict(recipe),
        "made": date.today().isoformat(),
        "versions": {"zero2llm": version("zero2llm"), "python": platform.python_version()} | libraries,
        "seconds": 0.0,  # at the end
        "segment_seconds": [round(s, 1) for s in seconds],
        "sources": sources,
        "bad_records": bad,
        "bad_total": sum(s["bad"] for s in sources),
        "steps": steps,
        "before": before.to_dict(most=SHOWN),
        "after": after.to_dict(most=SHOWN),
    }


def write_shards(recipe: DataRecipe, folder: Path, files: dict[str, SplitFiles]) -> None:
    """Token files of every split that holds anything: ``tokens/NAME``."""
    tokenizer, workers = Tokenizer.load(recipe.tokenizer), recipe.workers or cores()
    for name, split in files.items():
        if split.size.documents:
            source, out = Source(paths=tuple(map(str, split.paths)), max_line_mib=LONGEST), folder / "tokens" / name
            shards = encode_documents(
                [source], out, tokenizer, key=recipe.out, workers=workers, bad=BadRecords(), limit=recipe.shards.tokens_per_file
            )
            split.size.tokens = int(shards.offsets[-1])
            shards.close()
