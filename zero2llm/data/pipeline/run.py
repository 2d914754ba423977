"""A data recipe from its sources to clean text and token files, with an account of what went where.

    plan      sources -> work units of about part_mb, independent of the number of workers
    segment   every unit or part through the steps up to the next corpus step, in parallel
    judge     the corpus step over all signatures; then the next segment
    finish    parts in order into the files of each split, the report, the token shards

The work lies beside the output, in OUT.work, until the output is whole: a run that was killed goes on where it was, a
finished folder appears at once.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path

from zero2llm.core.files import new_folder, read_json, write_atomic
from zero2llm.data.pipeline.engines import cores, run_datatrove, run_local
from zero2llm.data.pipeline.finish import check_compress, write_output
from zero2llm.data.pipeline.judge import judge, judged
from zero2llm.data.pipeline.recipe import DataRecipe, as_json, files_of, prepared, result_key, segments
from zero2llm.data.pipeline.task import Task
from zero2llm.data.sources import units

Listen = Callable[[str, int, int, int], None]  # segment's title, parts done, parts in all, documents

LOCK = "lock"


def plan(recipe: DataRecipe, work: Path, overwrite: bool = False) -> list[Task]:
    """The tasks of the first segment. Raises ValueError if ``work`` was begun with another recipe or other files."""
    files = [(str(file), *stamp(file)) for file in files_of(recipe)]
    key, marker = result_key(recipe, files), work / "plan.json"
    if marker.is_file() and read_json(marker)["key"] != key:
        if not overwrite:
            raise ValueError(f"{work}: holds work of another recipe or other files; remove it, or pass --overwrite")
        clear(work)
    if not marker.is_file():
        write_atomic(marker, json.dumps({"key": key}))
    text, tasks = as_json(prepared(recipe, work)), []
    for number, source in enumerate(recipe.sources):
        for unit in units(source, recipe.part_mb << 20):
            tasks.append(Task(text, str(work), 0, len(tasks), unit, number))
    return tasks


def stamp(file: Path | str) -> tuple[int, int]:
    path = Path(file)
    return (path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else (0, 0)  # a hub's data set has no file


def clear(work: Path) -> None:
    """All but the lock, which is held."""
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def work_folder(recipe: DataRecipe) -> Path:
    """Where the work lies. Raises ValueError if the output could swallow what it is made from, or be read as a source."""
    out = Path(recipe.out)
    if out.name in ("", ".."):
        raise ValueError(f"out = {recipe.out} is no name for a new folder")
    work = out.with_name(out.name + ".work")
    globs = [p for source in recipe.sources for p in source.paths if "**" in p]
    read = [Path(f) for f in files_of(recipe)]
    folders = [Path(p) for source in recipe.sources for p in source.paths if Path(p).is_dir()]
    for mine in (out.resolve(), work.resolve()):
        for path in (path for path in read if path.resolve().is_relative_to(mine)):
            raise ValueError(f"{path} lies in {mine}, which this run writes: choose another out = {recipe.out}")
        for folder in (folder for folder in folders if mine.is_relative_to(folder.resolve())):
            raise ValueError(f"out = {recipe.out} lies in {folder}, which this run reads: choose a folder outside of it")
        for pattern in (p for p in globs if fnmatch(str(mine / "00" / "part-000000.jsonl"), str(Path(p).absolute()))):
            raise ValueError(f"out = {recipe.out} lies in {pattern}, which this run reads: choose a folder outside of it")
    if work.is_dir() and not (work / "plan.json").is_file() and {p.name for p in work.iterdir()} - {LOCK}:
        raise ValueError(f"{work}: holds other files than work of a run; move them, or choose another out = {recipe.out}")
    return work


@contextmanager
def locked(work: Path, shared: bool = False) -> Iterator[None]:
    """One run at a time in a folder; jobs that share a segment may be several. A killed run's lock is gone with it."""
    work.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl  # not on Windows
    except ImportError:
        yield
        return
    with open(work / LOCK, "w") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{work}: another run is at work here; wait until it has ended") from None
        except OSError:
            pass  # a file system without locks
        yield


def run(
    recipe: DataRecipe, overwrite: bool = False, listen: Listen | None = None, page: Callable[[dict], str] | None = None
) -> dict:
    """Everything; ``page`` makes report.html from the funnel. Returns the funnel.

    Raises ValueError for bad input, before anything in ``out`` is touched.
    """
    out, work, began = Path(recipe.out), work_folder(recipe), time.time()
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise ValueError(f"{out} already exists and is not empty; choose another place or pass --overwrite")
    check_compress(recipe)
    with locked(work):
        by_segment, groups, seconds = all_segments(recipe, plan(recipe, work, overwrite), listen)
        with new_folder(out, overwrite) as part:
            funnel = write_output(recipe, part, by_segment, groups, seconds, began)
            if page:
                (part / "report.html").write_text(page(funnel), encoding="utf-8")
        if not recipe.keep_work:
            clear(work)
            with suppress(OSError):  # a run that waits for the lock has put something there
                (work / LOCK).unlink(missing_ok=True)
                work.rmdir()
    return funnel


def all_segments(recipe: DataRecipe, first: list[Task], listen: Listen | None) -> tuple[list[list[Task]], dict, list[float]]:
    """The tasks of each segment, all done; what was found alike by each corpus step; the seconds of each segment."""
    by_segment, groups, seconds = [], {}, []
    for number, segment in enumerate(segments(recipe)):
        now, tasks = time.time(), tasks_of(first, number)
        do(tasks, recipe, listen, f"segment {number + 1} of {len(segments(recipe))}")
        if segment.before is not None:
            groups[segment.before] = judge(tasks, recipe.steps[segment.before].build())
        by_segment.append(tasks)
        seconds.append(time.time() - now)
    return by_segment, groups, seconds


def run_share(recipe: DataRecipe, rank: int, world: int) -> tuple[int, int]:
    """One of ``world`` jobs on a shared file system: what it has to do next. Returns (segment, tasks of it).

    That is its share of the first unfinished segment; or, where all of one is done but not judged, rank 0 judges it. So an
    array of jobs is started twice for every corpus step and once more; the end belongs to the ordinary `run`, which also
    does whatever is left.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} must be from 0 to {world - 1}")
    work = work_folder(recipe)
    with locked(work, shared=True):
        first = plan(recipe, work)
        for number, segment in enumerate(segments(recipe)):
            tasks = tasks_of(first, number)
            if not all(task.done.is_file() for task in tasks):
                run_local(tasks[rank::world], 1, lambda _: None)
                return number, len(tasks[rank::world])
            if segment.before is not None and not judged(tasks).is_file():
                if rank == 0:
                    judge(tasks, recipe.steps[segment.before].build())
                return number, 0
    return number, 0


def tasks_of(first: list[Task], segment: int) -> list[Task]:
    return first if segment == 0 else [Task(t.recipe, t.work, segment, t.number) for t in first]


def do(tasks: list[Task], recipe: DataRecipe, listen: Listen | None, title: str) -> None:
    done = documents = 0

    def progress(n: int) -> None:
        nonlocal done, documents
        done, documents = done + 1, documents + n
        if listen:
            listen(title, done, len(tasks), documents)

    if listen:
        listen(title, 0, len(tasks), 0)
    workers = recipe.workers or cores()
    if recipe.engine == "datatrove":
        run_datatrove(tasks, workers, progress, Path(tasks[0].work) / "datatrove" / f"{tasks[0].segment:02}")
    else:
        run_local(tasks, workers, progress)
