"""How long the command line lets one wait before it does anything: medians of interleaved runs, each a fresh process.

    python bench/startup.py

`import torch` is the floor of every verb that needs torch; `--help` must not pay it. Wanted: `--help` within 0.5 s, a
verb that needs torch within 1.2 times `import torch`.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from results import machine
from turns import parser

RUN = "import sys; from zero2llm.cli import main; sys.argv[0] = 'zero2llm'; main()"
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "zero2llm --help": ["-c", RUN, "--help"],
    "import torch": ["-c", "import torch"],
    "zero2llm presets llama-nano": ["-c", RUN, "presets", "llama-nano"],
    "zero2llm generate, missing checkpoint": ["-c", RUN, "generate", "no-such-folder", "--prompt", "x"],
    "import the training stage": ["-c", "import zero2llm.lab.stage"],
}


def run(command: list[str]) -> tuple[float, bool]:
    """Seconds from start to exit, and whether the exit was one that we expect (2 = an error message for the user)."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *command], capture_output=True)
    return time.perf_counter() - began, done.returncode in (0, 2)


def main() -> None:
    args = parser(__doc__, rounds=9).parse_args()
    names = list(COMMANDS)[:3] if args.smoke else list(COMMANDS)
    rounds = 1 if args.smoke else args.rounds
    times: dict[str, list[float]] = {name: [] for name in names}
    broken = set()
    for i in range(rounds + 1):
        for name in names:
            seconds, fine = run(COMMANDS[name])
            broken |= set() if fine else {name}
            if i or args.smoke:  # the first round reads files into the cache
                times[name].append(seconds)
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    print("| command | s, median | s, best | x import torch |\n|---|---:|---:|---:|")
    floor = statistics.median(times["import torch"])
    for name, values in times.items():
        middle = statistics.median(values)
        print(
            f"| {name} | {'failed' if name in broken else f'{middle:.2f}'} | {min(values):.2f} | {middle / floor:.2f} |"
        )
    if args.json:
        import json

        args.json.write_text(
            json.dumps({"machine": machine(), "seconds": times, "failed": sorted(broken)}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
