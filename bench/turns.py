"""Fair turns for competitors on one machine: each in a process of its own, measured round-robin, medians reported.

Absolute times drift by 10 % from hour to hour and by far more on a shared machine. What stays comparable are ratios
between candidates that took turns within the same minutes, so this is all that the scripts here claim: a ratio is taken
within each round, and the median over the rounds is reported. Each turn also records the CPU seconds used (waiting
for a core costs none, so this ratio survives a busy machine) and the share of the CPU that other processes took.

A script calls `compare` in the foreground process and `serve` in the processes that it starts, which are the same
script with ``--worker NAME``. They talk in lines of JSON over stdin and stdout.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from results import Result, Turn


def parser(description: str, rounds: int) -> argparse.ArgumentParser:
    """The options that every script has."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=rounds, help="turns per candidate")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--json", type=Path, help="also write everything, each turn included, to this file")
    p.add_argument("--smoke", action="store_true", help="seconds instead of minutes: only to see that it runs")
    p.add_argument("--worker", help=argparse.SUPPRESS)
    return p


# --------------------------------------------------------------------------------------------- in the worker


def peak_rss_mb() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return 0.0


def release_memory() -> None:
    """Give freed heap back, so that candidates that wait their turn do not push each other out of memory."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except OSError:
        pass


class Serving:
    """The worker's side of the line. What a library prints to stdout goes to stderr, so that it cannot disturb."""

    def __init__(self):
        self.out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self.began = time.perf_counter()

    def say(self, **what) -> None:
        release_memory()
        print(json.dumps(what), file=self.out)

    def turns(self, units: int, warmup: int, **note) -> Iterator[int]:
        """Yield ``warmup`` times, report ready, then yield ``units`` times per turn that the foreground asks for.

        The time from one yield to the next request is what counts: the consumer does one unit of work in between.
        """
        for i in range(warmup):
            yield i
        self.say(ready=round(time.perf_counter() - self.began, 1), **note)
        for _ in sys.stdin:
            began, cpu = time.perf_counter(), time.process_time()
            for i in range(units):
                yield i
            seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
            self.say(seconds=seconds / units, cpu=cpu / units, rss_mb=peak_rss_mb())

    def measure(self, measure: Callable[[], tuple[float, float]], **note) -> None:
        """For work that times itself: ``measure`` returns (seconds, CPU seconds) per unit."""
        self.say(ready=round(time.perf_counter() - self.began, 1), **note)
        for _ in sys.stdin:
            seconds, cpu = measure()
            self.say(seconds=seconds, cpu=cpu, rss_mb=peak_rss_mb())


# ------------------------------------------------------------------------------------ in the foreground process


class Worker:
    """One candidate's process."""

    def __init__(self, script: str, name: str, options: list[str], threads: int):
        self.result = Result(name)
        self.log = tempfile.NamedTemporaryFile("w+", suffix=".log")
        # as our command line sets it: a thread that waits sleeps soon, instead of burning the core that another process needs
        env = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "passive",
            "GOMP_SPINCOUNT": "2000",
        }
        command = [sys.executable, script, "--worker", name, *options]
        self.process = subprocess.Popen(command, stdin=-1, stdout=-1, stderr=self.log, text=True, env=env)
        self.result.note = self.read() or {}

    def read(self) -> dict | None:
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.log.seek(0)
            lines = [line for line in self.log.read().splitlines() if "Error" in line] or [
                f"died with exit code {self.process.returncode}"
            ]
            self.result.failed = lines[-1][:300]
            return None
        return json.loads(line)

    def ask(self, what: str) -> dict | None:
        """One line to the worker, one line back; None (and ``result.failed``) if it died."""
        try:
            self.process.stdin.write(what + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # `read` finds out why
        return self.read()

    def turn(self) -> None:
        process = psutil.Process(self.process.pid)
        machine, own, began = _busy(), _own(process), time.perf_counter()
        reply = self.ask("go")
        if reply is None:
            return
        capacity = psutil.cpu_count() * (time.perf_counter() - began)
        others = max(_busy() - machine - (_own(process) - own), 0.0) / capacity
        self.result.turns.append(Turn(reply["seconds"], reply["cpu"], others))
        self.result.rss_mb = reply["rss_mb"]

    def close(self) -> None:
        if self.process.poll() is None:
            try:
                self.process.stdin.close()
                self.process.wait(timeout=30)
            except (subprocess.TimeoutExpired, BrokenPipeError):
                self.process.kill()


def _busy() -> float:
    t = psutil.cpu_times()
    return sum(t[:8]) - t.idle - getattr(t, "iowait", 0.0)


def _own(process: psutil.Process) -> float:
    t = process.cpu_times()
    return t.user + t.system + t.children_user + t.children_system


def compare(script: str, names: list[str], options: list[str], rounds: int, threads: int) -> dict[str, Result]:
    """Start a process per candidate, give each ``rounds`` turns in round-robin order, and close them."""
    workers: list[Worker] = []
    try:
        for name in names:
            workers.append(Worker(script, name, options, threads))
            made = workers[-1].result
            print(
                f"# {name}: " + (f"FAILED: {made.failed}" if made.failed else f"ready after {made.note['ready']} s"),
                file=sys.stderr,
            )
        for _ in range(rounds):
            for worker in workers:
                if not worker.result.failed:
                    worker.turn()
    finally:
        for worker in workers:
            worker.close()
    return {w.result.name: w.result for w in workers}
