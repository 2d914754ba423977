"""Programs that a model wrote, each in a process of its own that may compute, print, and nothing else.

    our process  ->  python sandbox_child.py, own session, empty environment, folder of its own  ->  what it prints, or None

The child gives up its rights before it reads the program (sandbox_child.py says which, and by what means); this side keeps the
clock, caps what is printed, and kills the whole process group.

What it protects from: programs of a language model that go astray or take a chance: endless loops, memory and process bombs, writing
or deleting files, the network, signals to other processes, reading files outside Python's library (on Linux).
What it does not: faults of the kernel or the interpreter that somebody looks for on purpose, and other programs' use of the
machine (load, heat, timing). Where the kernel offers neither seccomp nor landlock (macOS, old or stripped kernels) files and network
are open to the program, and a warning says so once. For code of hostile origin use a virtual machine.
Cost: one start of Python a test, about 35 ms of a core, as many side by side as there are cores.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from zero2llm.core.log import log_once

CHILD = Path(__file__).with_name("sandbox_child.py")
OUTPUT = 1 << 16  # bytes that are read of one program
PATIENCE = 3  # wall seconds for each CPU second that is allowed, and one more: sleeping is no CPU time
SIDE_BY_SIDE = 8


@dataclass(frozen=True)
class Program:
    """code : answer.py.  check : check.py, for mode check.  given : standard input."""

    mode: Literal["program", "check"]
    code: str
    given: str
    check: str = ""


@dataclass(frozen=True)
class Limits:
    """seconds of CPU time, MiB of address space."""

    seconds: int
    memory: int


def run_all(programs: Sequence[Program], limits: Limits) -> list[str | None]:
    """What each printed; None where it failed, was stopped, or printed too much."""
    with ThreadPoolExecutor(min(os.cpu_count() or 1, SIDE_BY_SIDE)) as pool:
        return list(pool.map(lambda program: run(program, limits), programs))


def run(program: Program, limits: Limits) -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        for name, text in (("answer.py", program.code), ("check.py", program.check), ("given", program.given)):
            (Path(folder) / name).write_text(text, encoding="utf-8", errors="replace")
        with open(Path(folder) / "given", "rb") as given:
            return _watched(program.mode, folder, given, limits)


def _watched(mode: str, folder: str, given, limits: Limits) -> str | None:
    command = [sys.executable, "-s", "-S", "-B", "-X", "utf8", str(CHILD), mode, str(limits.seconds), str(limits.memory), str(os.getpid())]
    child = subprocess.Popen(
        command, cwd=folder, env={"PYTHONHASHSEED": "0"}, stdin=given, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    )  # fmt: skip
    end, read = time.monotonic() + PATIENCE * limits.seconds + 1, b""
    try:
        while select.select([child.stdout], [], [], max(end - time.monotonic(), 0))[0]:
            part = os.read(child.stdout.fileno(), OUTPUT)
            read += part
            if not part:
                with suppress(subprocess.TimeoutExpired):
                    child.wait(max(end - time.monotonic(), 0))
                break
            if len(read) > OUTPUT:
                break
    finally:
        if child.returncode is None:  # until it is waited for, its number is not given to another
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
        child.stdout.close()
        child.wait()
    return read.decode("utf-8", errors="replace") if child.returncode == 0 and len(read) <= OUTPUT else None


@cache
def protections() -> tuple[str, ...]:
    """Those that hold here; says once which are missing."""
    held = (_probe() or "").split()
    missing = [name for name in ("limits", "landlock", "seccomp") if name not in held]
    if missing:
        log_once(f"reward code: this system does not offer {', '.join(missing)}: the programs of answers are less confined (train/rl/sandbox.py)")
    return tuple(held)


def _probe() -> str | None:
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "rb") as nothing:
        return _watched("probe", folder, nothing, Limits(5, 512))
