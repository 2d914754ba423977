"""How much memory and time it takes to read a large file: made in a temporary folder, read in a process of its own.

    python bench/read_large.py --gigabytes 5

Wanted: at most 500 MB of resident memory, whatever the size. Documents have 200 to 20,000 characters, half of them Chinese. `jsonl in units`
is the same file cut into 32 MiB ranges, read one after another, as the workers of a pipeline read them; the cutting is part of its time.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

KINDS = ("jsonl", "json", "jsonl.gz", "jsonl.zst", "csv", "txt", "parquet", "jsonl in units")
LIMIT_MB = 500


def records(seed: int = 1, n: int = 2000) -> list[dict]:
    rng = random.Random(seed)
    words = ["the", "whale", "and", "a", "model", "learns", "from", "text", "春", "眠", "不", "觉", "晓", "处处", "闻", "啼鸟"]
    made = []
    for i in range(n):
        length, chosen = int(200 * 100 ** rng.random()), words[8:] if i % 2 else words[:8]
        made.append({"id": i, "text": ("" if i % 2 else " ").join(rng.choices(chosen, k=length // (1 if i % 2 else 5))), "score": rng.random()})
    return made


def make(path: Path, kind: str, n_bytes: float) -> tuple[int, int]:
    """Write at least ``n_bytes`` of data before packing; returns (bytes before packing, records)."""
    rows = records()
    if kind == "parquet":
        return make_parquet(path, rows, n_bytes)
    block, between = as_bytes(rows, kind), b",\n" if kind == "json" else b""
    n = max(int(n_bytes / len(block)), 1)
    with opened(path, kind) as file:
        file.write({"json": b"[\n", "csv": b"id,text,score\n"}.get(kind, b""))
        for i in range(n):
            file.write((between if i else b"") + block)
        file.write(b"\n]\n" if kind == "json" else b"")
    return n * len(block), n * len(rows)


def opened(path: Path, kind: str):
    if kind.endswith(".gz"):
        return gzip.open(path, "wb", compresslevel=1)
    if kind.endswith(".zst"):
        import zstandard

        return zstandard.open(path, "wb", cctx=zstandard.ZstdCompressor(level=1))
    return open(path, "wb")


def as_bytes(rows: list[dict], kind: str) -> bytes:
    if kind == "csv":
        return "".join('{},"{}",{}\n'.format(*row.values()) for row in rows).encode()
    if kind == "txt":
        return "".join(row["text"] + "\n\n" for row in rows).encode()
    made = [json.dumps(row, ensure_ascii=False) for row in rows]
    return ",\n".join(made).encode() if kind == "json" else "".join(line + "\n" for line in made).encode()


def make_parquet(path: Path, rows: list[dict], n_bytes: float) -> tuple[int, int]:
    import pyarrow
    import pyarrow.parquet

    table, size = pyarrow.Table.from_pylist(rows), sum(len(row["text"].encode()) for row in rows)
    n = max(int(n_bytes / size), 1)
    with pyarrow.parquet.ParquetWriter(path, table.schema, use_dictionary=False) as writer:
        big = pyarrow.concat_tables([table] * 16)  # row groups of about 150 MB
        for _ in range(0, n, 16):
            writer.write_table(big)
    return -(-n // 16) * 16 * size, -(-n // 16) * 16 * len(rows)


def read(path: str, in_units: bool) -> None:
    """In the process that is measured: prints records, seconds, and the peak of resident memory in MB."""
    from turns import peak_rss_mb

    from zero2llm.data.sources import BadRecords, read_records, read_unit, units

    began, before, bad = time.perf_counter(), peak_rss_mb(), BadRecords()
    if in_units:
        n = sum(1 for unit in units([path]) for _ in read_unit(unit, bad))
    else:
        n = sum(1 for _ in read_records([path], bad))
    print(json.dumps([n, time.perf_counter() - began, peak_rss_mb(), before]))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--gigabytes", type=float, default=0.2, help="of data in the file, before packing")
    p.add_argument("--kinds", nargs="*", default=KINDS, choices=KINDS)
    p.add_argument("--folder", type=Path, help="where the file is made (default: the system's temporary folder)")
    p.add_argument("--json", type=Path, help="also write everything to this file")
    p.add_argument("--smoke", action="store_true", help="a few megabytes: only to see that it runs")
    p.add_argument("--read", help=argparse.SUPPRESS)
    p.add_argument("--in-units", action="store_true", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.read:
        read(args.read, args.in_units)
        return
    gigabytes, found = 0.004 if args.smoke else args.gigabytes, {}
    print("| kind | GB | records | s | MB/s | peak RSS, MB | of it before reading |\n|---|---:|---:|---:|---:|---:|---:|")
    for kind in args.kinds:
        suffix, folder = kind.partition(" ")[0], Path(tempfile.mkdtemp(dir=args.folder))
        try:
            size, n = make(folder / f"large.{suffix}", suffix, gigabytes * 1e9)
            command = [sys.executable, __file__, "--read", str(folder / f"large.{suffix}")] + ["--in-units"] * (kind != suffix)
            done = subprocess.run(command, capture_output=True, text=True)
        finally:
            shutil.rmtree(folder)
        if done.returncode:
            sys.exit(f"{kind}: {done.stderr[-2000:]}")
        read_n, seconds, peak, before = json.loads(done.stdout)
        if suffix != "txt" and read_n != n:
            sys.exit(f"{kind}: {read_n} records were read, {n} were written")
        found[kind] = {"bytes": size, "records": read_n, "seconds": seconds, "peak_rss_mb": peak, "within_limit": peak <= LIMIT_MB}
        print(f"| {kind} | {size / 1e9:.2f} | {read_n} | {seconds:.1f} | {size / 1e6 / seconds:.0f} | {peak:.0f} | {before:.0f} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    if over := [kind for kind, f in found.items() if not f["within_limit"]]:
        sys.exit(f"more than {LIMIT_MB} MB: {', '.join(over)}")


if __name__ == "__main__":
    main()
