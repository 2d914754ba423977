"""A corpus into token files on all cores: every process encodes units of text, one writes what they bring, in order.

The result does not depend on the number of processes: units are cut by size, and are written in their order. A unit that is
larger, because nobody can start reading in the middle of it (a packed file, a hub's shard), is read here and its texts are
handed out, so that no process ever holds more than some megabytes of it.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from zero2llm.data.pipeline.workers import pool
from zero2llm.data.readers.kinds import kind_of
from zero2llm.data.shards import TokenShards, share, write_shards
from zero2llm.data.sources import BadRecords, Source, Unit, read_unit, texts_of, units
from zero2llm.data.token_writer import TokenWriter, id_type
from zero2llm.tokenizers.tokenizer import Tokenizer

BATCH = 256  # documents that are encoded in one call
UNIT = 8 << 20  # bytes of text that a process gets at a time
Keep = tuple[float, float]  # from, to: a share of the documents, by content
Encoded = tuple[np.ndarray, np.ndarray, BadRecords]  # ids end to end, the documents' lengths, what was bad
Job = tuple[Unit | list[str], BadRecords]  # texts that are still to be read, or texts and what was bad among them

_tokenizer: Tokenizer | None = None  # of a worker process


def _begin(tokenizer: Tokenizer) -> None:
    global _tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread: the other cores have processes of their own
    _tokenizer = tokenizer


def is_large(unit: Unit) -> bool:
    """Whether its text could be much more than UNIT."""
    if kind_of(unit.file)[0] == ".parquet" and unit.end is not None:
        return False  # row groups of that size
    if unit.end is not None and Path(unit.file).is_file():
        return unit.end - unit.start > 2 * UNIT
    return not Path(unit.file).is_file() or Path(unit.file).stat().st_size > UNIT


def jobs(sources: Sequence[Source], skip: bool) -> Iterator[Job]:
    """Units, or of large ones their texts, UNIT bytes at a time."""
    for unit in (unit for source in sources for unit in units(source, UNIT)):
        bad = BadRecords(skip=skip)
        if not is_large(unit):
            yield unit, bad
            continue
        texts, size = [], 0
        for text in texts_of(read_unit(unit, bad), unit.source.field, bad):
            texts.append(text)
            size += len(text.encode())
            if size >= UNIT:
                yield texts, BadRecords(skip=skip)
                texts, size = [], 0
        yield texts, bad  # known at the unit's end


def encode_job(job: Job, keep: Keep, tokenizer: Tokenizer | None = None) -> Encoded:
    """Documents as [start] + ids each; those whose content's hash lies in ``keep``."""
    tokenizer, (given, bad) = tokenizer or _tokenizer, job
    texts = texts_of(read_unit(given, bad), given.source.field, bad) if isinstance(given, Unit) else iter(given)
    pieces, lengths, dtype = [], [], id_type(tokenizer.vocab_size)
    if keep != (0.0, 1.0):
        texts = (text for text in texts if keep[0] <= share(text) < keep[1])
    while chunk := list(islice(texts, BATCH)):
        for ids in tokenizer.encode_batch(chunk):
            pieces.append(np.asarray([tokenizer.bos_id, *ids], dtype=dtype))
            lengths.append(len(pieces[-1]))
    ids = np.concatenate(pieces) if pieces else np.empty(0, dtype)
    return ids, np.asarray(lengths, dtype=np.int64), bad


def encoded(sources: Sequence[Source], tokenizer: Tokenizer, workers: int, skip: bool, keep: Keep) -> Iterator[Encoded]:
    """Every job's ids, in order; a few more than ``workers`` are under way at any time."""
    rest = jobs(sources, skip)
    first = list(islice(rest, 2))
    if workers == 1 or len(first) == 1:
        while first:
            yield encode_job(first.pop(0), keep, tokenizer)
        yield from (encode_job(job, keep, tokenizer) for job in rest)
        return
    with pool(workers, _begin, tokenizer) as running:
        under_way = deque(running.submit(encode_job, job, keep) for job in [*first, *islice(rest, workers)])
        while under_way:
            done = under_way.popleft().result()
            under_way.extend(running.submit(encode_job, job, keep) for job in islice(rest, 1))
            yield done


def encode_documents(
    sources: Sequence[Source], out: Path, tokenizer: Tokenizer, *, key: str, workers: int, bad: BadRecords,
    keep: Keep = (0.0, 1.0), limit: int = 1 << 30, progress: Callable[[int], None] | None = None,
) -> TokenShards:  # fmt: skip
    """Token files of the documents of ``sources`` whose content's hash lies in ``keep`` (all of them). Bad records end the run, or with ``bad.skip`` are listed there."""

    def fill(writer: TokenWriter) -> None:
        for ids, lengths, here in encoded(sources, tokenizer, workers, bad.skip, keep):
            bad.merge(here)
            writer.add_block(ids, lengths)
            if progress:
                progress(len(lengths))

    return write_shards(fill, out, tokenizer=tokenizer, key=key, kind="clm", limit=limit)
