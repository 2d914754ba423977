"""Every mixer of the arena at growing lengths: what doubling the text costs, from where it beats softmax attention, how
much the training form gains over the step form, and whether the decoding state has the size that model/cost.py says.

    python bench/mixers.py                        all mixers, one layer of d = 256, batch 1, forward and backward
    python bench/mixers.py --mixers gqa,kda --lengths 4096,8192

Milliseconds are medians over interleaved rounds (each round visits every mixer at every length). `x2` = time at the longest
length / time at the one before it (4,096 / 2,048): 2 is linear, 4 quadratic. `beats mha from` = the shortest measured length at which the mixer is
faster than full multi-head attention of the same width in that run. `steps / whole` = time of 1,024 one-token steps
through the decoding state / time of one call with 1,024 tokens, both without gradient.
"""

from __future__ import annotations

import gc
import json
import statistics
import time

from results import machine
from turns import parser

LENGTHS = (512, 1024, 2048, 4096)
STEPS = 1024


def layer(name: str, d: int, heads: int):
    """The mixer, and the bytes of state that its price predicts for STEPS tokens."""
    import torch

    from zero2llm.core.config import parse
    from zero2llm.lab.variants import MIXERS
    from zero2llm.model.spec import LayerSpec

    torch.manual_seed(0)
    cfg = parse(LayerSpec, {"mixer": MIXERS[name](d, heads)}).mixer
    cost = cfg.cost(d)
    kept = STEPS if cost.window is None else min(STEPS, cost.window)
    blocks = cost.block_state * (STEPS // cost.block) if cost.block else 0
    return cfg.build(d), 4 * (cost.fixed_state + cost.state * kept + blocks)


def train_ms(module, d: int, length: int) -> float:
    import torch

    from zero2llm.core.seq import Seq

    x = torch.randn(1, length, d, requires_grad=True)
    for _ in range(2):  # the first finds the caches full of another candidate's data
        began = time.perf_counter()
        y, aux = module(x, Seq.rows(1, length))
        (y.square().sum() + sum(v for k, v in aux.items() if k.endswith("_loss"))).backward()
    return (time.perf_counter() - began) * 1e3


def step_ratio(module, d: int, steps: int) -> float:
    import torch

    from zero2llm.core.seq import Seq

    x, state = torch.randn(1, steps, d), module.init_state(1, steps)
    with torch.no_grad():
        module(x, Seq.rows(1, steps))
        began = time.perf_counter()
        module(x, Seq.rows(1, steps))
        whole = time.perf_counter() - began
        began = time.perf_counter()
        for t in range(steps):
            module(x[:, t : t + 1], Seq.rows(1, 1, t), state)
        return (time.perf_counter() - began) / whole


def main() -> None:
    p = parser(__doc__, rounds=5)
    p.add_argument("--mixers", default="all")
    p.add_argument("--lengths", default=",".join(map(str, LENGTHS)), help="rising")
    p.add_argument("--d", type=int, default=256)
    p.add_argument("--heads", type=int, default=4)
    args = p.parse_args()
    import torch

    from zero2llm.core.device import keep_memory
    from zero2llm.lab.variants import MIXERS

    keep_memory()  # as the training loop does
    torch.set_num_threads(args.threads)
    names = list(MIXERS) if args.mixers == "all" else ["mha", *(n for n in args.mixers.split(",") if n != "mha")]
    lengths, steps = (tuple(map(int, args.lengths.split(","))), STEPS) if not args.smoke else ((32, 64), 16)
    found = {name: {length: [] for length in lengths} for name in names}
    extra: dict[str, dict] = {}
    for name in names:
        module, predicted = layer(name, args.d, args.heads)
        real = module.init_state(1, STEPS).nbytes()
        extra[name] = {"steps / whole": step_ratio(module, args.d, steps), "state": real, "predicted": predicted}
    for i in range(args.rounds + 1 if not args.smoke else 1):
        for name in names:
            module, _ = layer(name, args.d, args.heads)
            for length in lengths:
                ms = train_ms(module, args.d, length)
                if i or args.smoke:  # the first round warms up
                    found[name][length].append(ms)
            gc.collect()
    middle = {name: {length: statistics.median(ms) for length, ms in by.items()} for name, by in found.items()}
    print(
        "| mixer | "
        + " | ".join(f"{length} ms" for length in lengths)
        + " | x2 | beats mha from | steps / whole | state KiB at 1,024 |"
    )
    print("|---|" + "---:|" * (len(lengths) + 4))
    for name, by in middle.items():
        beats = [length for length in lengths if by[length] < middle[names[0]][length]]
        more = extra[name]
        state = f"{more['state'] / 1024:,.1f}" + (
            "" if more["state"] == more["predicted"] else f" (predicted {more['predicted'] / 1024:,.1f})"
        )
        x2 = statistics.median(b / a for a, b in zip(found[name][lengths[-2]], found[name][lengths[-1]], strict=True))
        print(
            f"| {name} | "
            + " | ".join(f"{by[n]:,.0f}" for n in lengths)
            + f" | {x2:.2f} | {beats[0] if beats else 'never'} | {more['steps / whole']:.1f} | {state} |"
        )
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), "ms": found, "more": extra}, indent=1) + "\n")


if __name__ == "__main__":
    main()
