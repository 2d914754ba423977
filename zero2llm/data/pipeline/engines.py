"""Who does the tasks: processes of this machine, datatrove's executors, or several machines that share a file system.

A task is a file to be written, so every engine gives the same bytes, and another one may take over half-way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path

from zero2llm.data.pipeline.task import Task, run_task
from zero2llm.data.pipeline.workers import cores, pool

__all__ = ["Progress", "Share", "cores", "run_datatrove", "run_local"]

Progress = Callable[[int], None]  # is told the documents of each part that is done


def run_local(tasks: Sequence[Task], workers: int, progress: Progress) -> None:
    if workers == 1 or len(tasks) == 1:
        for task in tasks:
            progress(run_task(task))
        return
    with pool(min(workers, len(tasks))) as running:
        try:
            for future in as_completed([running.submit(run_task, task) for task in tasks]):
                progress(future.result())
        except BaseException:
            running.shutdown(wait=False, cancel_futures=True)
            raise


@dataclass(frozen=True)
class Share:
    """A datatrove pipeline block: rank r of n does every n-th task. It takes no documents and gives none."""

    tasks: tuple[Task, ...]

    def __call__(self, data, rank: int = 0, world_size: int = 1):
        for task in self.tasks[rank::world_size]:
            run_task(task)
        return data


def run_datatrove(tasks: Sequence[Task], workers: int, progress: Progress, logs: Path) -> None:
    """The same tasks on datatrove's local executor. Its Slurm and Ray executors take the same block."""
    try:
        from datatrove.executor import LocalPipelineExecutor
    except ImportError:
        raise ValueError("engine: datatrove needs the extra: pip install 'zero2llm[datatrove]'") from None
    executor = LocalPipelineExecutor(
        pipeline=[Share(tuple(tasks))], tasks=len(tasks), workers=workers, logging_dir=str(logs), skip_completed=False,
        start_method="spawn",
    )  # fmt: skip
    executor.run()
    for task in tasks:
        if not task.done.is_file():
            raise ValueError(f"datatrove did not finish {task.stem}; its logs are in {logs}")
        progress(run_task(task))
