"""Memory and time of a training step: full fine-tuning, and adapters on a base in NF4 (QLoRA), same model, same data.

    python bench/nf4.py                                   SmolLM2-135M's shape, batches of 4 x 256 tokens
    python bench/nf4.py --candidates full+mb1,nf4+mb1,nf4+mb1+recompute,nf4+mb1+bitsandbytes
    python bench/nf4.py --rows 8 --ctx 512 --json out.json

Every candidate runs the project's own loop, `train.fit.fit`, with AdamW in fp32. `full` trains all parameters; `lora`
freezes them and trains pairs of rank 16 on all projections; `nf4` does the same with the frozen projections in NF4.
Weights are random: memory does not depend on them. "peak MB" is the largest resident set of the process's whole life,
from building the model in fp32 (and quantising it) to the last step; `--json` also has the sizes after each phase.

Suffixes: +mb1, +mb2 (rows per micro-batch); +recompute; +lean (fit.keep_memory: false);
+bitsandbytes (its kernel dequantises).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass

import psutil
from results import report, table
from turns import Serving, compare, parser, peak_rss_mb, release_memory

CANDIDATES = "full+mb1,full+mb1+lean,lora+mb1,lora+mb1+lean,nf4+mb1,nf4+mb1+lean,nf4+mb1+lean+bitsandbytes"
RANK = 16


@dataclass(frozen=True)
class Work:
    rows: int
    ctx: int
    smoke: bool

    def model(self):
        from zero2llm.model.lm import LM
        from zero2llm.model.presets import llama, preset

        return LM(llama(512, 64, 2, 2, 1, 128, 64, tied=True) if self.smoke else preset("smollm2-135m"))

    def batch(self, vocab: int):
        import torch

        from zero2llm.core.batch import Batch
        from zero2llm.core.seq import Seq

        data = torch.randint(0, vocab, (self.rows, self.ctx + 1), generator=torch.Generator().manual_seed(1))
        return Batch(data[:, :-1].contiguous(), data[:, 1:].contiguous(), Seq.rows(self.rows, self.ctx))


def resident_mb() -> int:
    release_memory()
    return round(psutil.Process(os.getpid()).memory_info().rss / 2**20)


def adapted(model, kernel: str | None):
    """``model`` with LoRA on all projections, the frozen ones in NF4 (kernel None: as they are): as a recipe does it."""
    from zero2llm.adapters.lora import LoRAConfig
    from zero2llm.adapters.wrap import wrap
    from zero2llm.core.device import give_back_memory
    from zero2llm.layers.nf4 import quantize_model

    if kernel is not None:
        quantize_model(model, kernel=kernel)
    wrap(model, LoRAConfig(r=RANK))
    give_back_memory()
    return model


def work(name: str, job: Work, threads: int, units: int) -> None:
    """The worker: train until the foreground process has no more turns to give."""
    serving = Serving()
    import torch

    from zero2llm.layers.nf4 import Weights
    from zero2llm.optim.adamw import AdamWConfig
    from zero2llm.optim.build import build_optim
    from zero2llm.train.fit import FitConfig, fit
    from zero2llm.train.objectives.clm import CLM

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    base, *flags = name.split("+")
    note = {"start_mb": resident_mb()}
    model = job.model()
    note["built_mb"] = resident_mb()
    if base != "full":
        model = adapted(model, {"lora": None, "nf4": "bitsandbytes" if "bitsandbytes" in flags else "handwritten"}[base])
    note |= {"ready_mb": resident_mb(), "ready_peak_mb": round(peak_rss_mb()), "weights": str(Weights.of(model))}
    note["trained"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    batch, optim = job.batch(model.cfg.vocab_size), build_optim(model, AdamWConfig())
    micro = next((int(f[2:]) for f in flags if f.startswith("mb")), job.rows)
    cfg = FitConfig(steps=10**9, micro_rows=micro, recompute="recompute" in flags, keep_memory="lean" not in flags, dtype="fp32")
    steps: Iterable[int] = serving.turns(units, 2, **note)
    try:
        fit(model, CLM(), (batch for _ in steps), optim, cfg)
    except ValueError as error:  # how the loop says that the timer has no more steps
        assert "data ended" in str(error), error


def main() -> None:
    p = parser(__doc__, rounds=3)
    p.add_argument("--candidates", default=CANDIDATES)
    p.add_argument("--rows", type=int, default=4)
    p.add_argument("--ctx", type=int, default=256)
    p.add_argument("--steps", type=int, default=1, help="steps per turn")
    args = p.parse_args()
    if args.smoke:
        args.rows, args.ctx, args.rounds = 2, 16, 2
    if args.worker:
        return work(args.worker, Work(args.rows, args.ctx, args.smoke), args.threads, args.steps)
    names = args.candidates.split(",")
    options = ["--rows", str(args.rows), "--ctx", str(args.ctx), "--steps", str(args.steps), "--threads", str(args.threads)]
    results = compare(__file__, names, options + ["--smoke"] * args.smoke, args.rounds, args.threads)
    about = {"tokens per step": args.rows * args.ctx, "threads": args.threads, "rounds": args.rounds}
    report(args, about, results, table(results, names[0], args.rows * args.ctx, "tok", "step"))
    for r in results.values():
        print(f"{r.name}: {r.note.get('weights')}, {r.note.get('trained'):,} trained" if r.turns else f"{r.name}: failed")
    if all(r.failed for r in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
