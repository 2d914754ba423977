"""Products of a few rows with a weight matrix, as decoding makes them: torch's F.linear, and the forms in ops/linear.py.

    python bench/linear_rows.py

Microseconds per product: the best of the interleaved repetitions, because a busy neighbour makes a product on two
threads a hundred times slower (one thread waits for the other to get its core back). Every repetition walks over enough copies of the
matrix to fill more than the last-level cache, as a model's layers do: one matrix in a loop would come from the cache.
`ours` is `ops.linear.linear` as it stands; the other columns are the forms that it chooses from, so that the table
shows where the thresholds belong.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

from results import machine
from turns import parser

SHAPES = ((576, 576), (192, 576), (1536, 576), (576, 1536), (1024, 384), (2048, 2048), (49152, 576))  # (N, K)
ROWS = (1, 2, 3, 4, 8, 16, 24, 32, 48, 64, 128)
CACHE = 48 * 2**20  # bytes of weights to walk over, more than a last-level cache holds


def split(parts: int):
    """A batched product of that many slices of the weight; for one or more rows."""

    def form(x, w):
        n, k = w.shape
        if n % parts:
            return x @ w.t()
        y = x[None] @ w.view(parts, n // parts, k).transpose(1, 2)  # (parts, rows, n / parts)
        return y.transpose(0, 1).reshape(len(x), n)

    return form


def forms() -> dict[str, Callable]:
    import torch
    import torch.nn.functional as F

    from zero2llm.ops.linear import linear

    def padded(x, w):  # one row as two columns
        return (w @ torch.cat((x, torch.zeros_like(x))).t())[:, : len(x)].t()

    return {
        "F.linear": F.linear,
        "ours": linear,
        "split 2": split(2),
        "split 4": split(4),
        "turned": lambda x, w: (w @ x.t()).t(),
        "padded": padded,
        "mv": lambda x, w: torch.stack([w @ row for row in x]) if len(x) > 1 else (w @ x[0])[None],
    }


def measure(n: int, k: int, rows: int, rounds: int, seconds: float, cache: int = CACHE) -> dict[str, list[float]]:
    """Microseconds per product of each form in each round, its result checked against F.linear."""
    import torch

    copies = max(2, cache // (n * k * 4))
    weights = [torch.randn(n, k) for _ in range(copies)]
    x, kinds = torch.randn(rows, k), forms()
    times: dict[str, list[float]] = {name: [] for name in kinds}
    expected = kinds["F.linear"](x, weights[0])
    loops = {}
    for name, form in kinds.items():
        torch.testing.assert_close(form(x, weights[0]), expected, rtol=1e-3, atol=1e-3)
        began = time.perf_counter()
        for w in weights:
            form(x, w)
        loops[name] = max(1, int(seconds / (time.perf_counter() - began)))
    for _ in range(rounds):
        for name, form in kinds.items():
            began = time.perf_counter()
            for _ in range(loops[name]):
                for w in weights:
                    form(x, w)
            times[name].append((time.perf_counter() - began) / (loops[name] * copies) * 1e6)
    return times


def main() -> None:
    p = parser(__doc__, rounds=25)
    p.add_argument("--rows", type=lambda s: tuple(int(v) for v in s.split(",")), default=ROWS)
    args = p.parse_args()
    import torch

    torch.set_num_threads(args.threads)
    shapes, rows_list, rounds, seconds, cache = SHAPES, args.rows, args.rounds, 0.005, CACHE
    if args.smoke:
        shapes, rows_list, rounds, seconds, cache = ((64, 32),), (1, 2), 2, 1e-4, 0
    print(", ".join(f"{key} {value}" for key, value in (machine() | {"threads": args.threads}).items()))
    names, found = list(forms()), []
    print(
        "| N x K | rows | "
        + " | ".join(names)
        + " | best | ours x F.linear |\n|---|---:|"
        + "---:|" * len(names)
        + "---|---:|"
    )
    with torch.inference_mode():
        for n, k in shapes:
            for rows in rows_list:
                rounds_us = measure(n, k, rows, rounds, seconds, cache)
                times = {name: min(values) for name, values in rounds_us.items()}
                best = min(times, key=times.get)
                cells = " | ".join(f"{times[name]:,.0f}" for name in names)
                print(
                    f"| {n} x {k} | {rows} | {cells} | {best} | {times['F.linear'] / times['ours']:.2f} |", flush=True
                )
                found.append({"n": n, "k": k, "rows": rows, "us": rounds_us})
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), "table": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
