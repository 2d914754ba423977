"""What a benchmark measured, and how it is said: turns and their medians, ratios within a round, the machine, a table, a file."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

PACKAGES = ("torch", "transformers", "litgpt", "xllamacpp")


@dataclass
class Turn:
    seconds: float  # per unit of work (a step, a token)
    cpu: float  # CPU seconds per unit
    others: float  # share of the machine's CPU that other processes used meanwhile


@dataclass
class Result:
    name: str
    turns: list[Turn] = field(default_factory=list)
    rss_mb: float = 0.0  # peak of the whole life of the process
    note: dict = field(default_factory=dict)  # whatever the worker said when it was ready
    failed: str = ""

    @property
    def seconds(self) -> float:
        return statistics.median(t.seconds for t in self.turns)

    @property
    def cpu(self) -> float:
        return statistics.median(t.cpu for t in self.turns)

    @property
    def others(self) -> float:
        return statistics.median(t.others for t in self.turns)

    def faster(self, base: Result, what: str = "seconds") -> tuple[float, float, float]:
        """How many times less than ``base`` this needs: (median, least, most) over the rounds."""
        both = min(len(base.turns), len(self.turns))  # one that failed on the way has fewer
        ratios = [getattr(b, what) / getattr(t, what) for b, t in zip(base.turns[:both], self.turns[:both], strict=True)]
        return statistics.median(ratios), min(ratios), max(ratios)


def table(results: dict[str, Result], baseline: str, units: float, unit: str, milli: str) -> str:
    """A Markdown table: ``units`` of work (named ``unit``) in the time that a turn reports (called ``milli``)."""
    base = results[baseline]
    lines = [
        f"| candidate | {unit}/s | ms/{milli} | x {baseline} (range) | CPU-s x | peak MB | RSS x | others |",
        "|---|" + "---:|" * 7,
    ]
    for r in results.values():
        if r.failed or not r.turns or not base.turns:
            lines.append(f"| {r.name} | failed: {r.failed or 'no baseline'} |" + " |" * 6)
            continue
        ratio, least, most = r.faster(base)
        lines.append(
            f"| {r.name} | {units / r.seconds:,.1f} | {r.seconds * 1e3:,.1f} | {ratio:.2f} ({least:.2f}-{most:.2f}) "
            f"| {r.faster(base, 'cpu')[0]:.2f} | {r.rss_mb:,.0f} | {r.rss_mb / base.rss_mb:.2f} | {r.others:.0%} |"
        )
    return "\n".join(lines)


def machine() -> dict:
    """What the numbers were measured on: hardware and versions, no names of hosts or people."""
    cpu, flags = platform.processor() or platform.machine(), ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        cpu, flags = fields.get("model name", cpu), fields.get("flags", "")
    simd = next((level for level in ("avx512f", "avx2", "avx") if level in flags.split()), "none")
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            pass
    ram = round(psutil.virtual_memory().total / 2**30)
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu,
        "cores": psutil.cpu_count(),
        "simd": simd,
        "ram_gib": ram,
        **versions,
    }


def report(args: argparse.Namespace, options: dict, results: dict[str, Result], text: str) -> None:
    """Print the table and the machine; with ``--json`` write every turn."""
    about = machine()
    print(", ".join(f"{key} {value}" for key, value in (options | about).items()))
    print(text)
    if args.json:
        rows = {
            r.name: {"turns": [vars(t) for t in r.turns], "rss_mb": r.rss_mb, "note": r.note, "failed": r.failed}
            | ({"seconds": r.seconds, "cpu": r.cpu} if r.turns else {})
            for r in results.values()
        }
        args.json.write_text(json.dumps({"machine": about, "options": options, "results": rows}, indent=1) + "\n")
