"""How soon our recipe is as good as a tuned GPT-2 of transformers is after its whole budget. Two cores, small models.

    python bench/time_to_loss.py --out runs/ttl                                 three seeds, 120 s of training
    python bench/time_to_loss.py --out runs/ttl --sweep baseline --lr 1e-3,2e-3,4e-3,8e-3
    python bench/time_to_loss.py --out runs/ttl --sweep ours --lr 4e-3,8e-3

Baseline: `GPT2LMHeadModel`, AdamW, cosine, dropout 0, trained for `--budget` seconds; its last validation loss is the
target. Ours: Qwen3-style blocks of the same parameter count (within 5 %), Muon, trained by `train.fit.fit`, planned for
`--share` of that budget. Same tokenizer, same rows in the same order, same batch, same held-out documents; both are
scored in bits per byte of those documents. The ratio is the training time until ours first scores the target, divided by the
baseline's whole training time; evaluation and data preparation count for neither.

The two processes of a seed alternate every few seconds, so a slow minute of the machine hits both.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from results import machine
from turns import Serving, Worker, parser

EOS = "<|endoftext|>"


# ------------------------------------------------------------------------------------------------------ the data


def read_texts(data: list[str]) -> list[str]:
    """Documents of .jsonl (field text) and .txt files; ``embedded`` = the text inside the package."""
    texts: list[str] = []
    for path in data:
        if path.startswith("embedded"):
            from zero2llm.data.sources import BadRecords, documents

            texts += documents((path,), field="text", bad=BadRecords(skip=False))
        elif path.endswith(".jsonl"):
            texts += [
                json.loads(line)["text"] for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()
            ]
        else:
            texts.append(Path(path).read_text(encoding="utf-8"))
    return list(dict.fromkeys(texts))


def prepare(args: argparse.Namespace) -> Path:
    """Tokenizer, training tokens and held-out tokens as one file in the output folder; made once per choice of data."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    key = hashlib.sha256(json.dumps([args.data, args.vocab, args.valid_bytes]).encode()).hexdigest()[:12]
    path = args.out / f"tokens-{key}.pt"
    if path.exists():
        return path
    texts = sorted(
        read_texts(args.data), key=lambda t: hashlib.sha256(t.encode()).digest()
    )  # an order that mixes the files
    sizes = itertools.accumulate(len(t.encode()) for t in texts)
    n_valid = sum(size <= args.valid_bytes for size in sizes) + 1
    valid, train = texts[:n_valid], texts[n_valid:]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        train, trainers.BpeTrainer(vocab_size=args.vocab, special_tokens=[EOS], initial_alphabet=alphabet)
    )
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(args.out / f"tokenizer-{key}.json"))
    join = lambda docs: torch.tensor(
        [i for e in tokenizer.encode_batch(docs) for i in (0, *e.ids)]
    )  # EOS, document, EOS ...
    torch.save({"train": join(train), "valid": join(valid), "valid_bytes": sum(len(t.encode()) for t in valid)}, path)
    return path


def rows_of(tokens, ctx: int):
    """(N, ctx + 1) rows: inputs and, one further, targets."""
    n = (len(tokens) - 1) // ctx
    return tokens[: n * ctx + 1].unfold(0, ctx + 1, ctx)


class Data:
    def __init__(self, path: Path, ctx: int, rows: int, seed: int):
        import torch

        saved = torch.load(path)
        self.train, self.valid, self.batch = rows_of(saved["train"], ctx), rows_of(saved["valid"], ctx), rows
        self.order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))
        self.valid_bytes = (
            saved["valid_bytes"] * self.valid[:, 1:].numel() / (len(saved["valid"]) - 1)
        )  # a last partial row is not scored

    def batches(self) -> Iterator:
        """Rows in the seed's order, again and again."""
        for start in itertools.count(0, self.batch):
            yield self.train[self.order[[i % len(self.order) for i in range(start, start + self.batch)]]]

    def bits_per_byte(self, nats_of: Callable) -> float:
        """``nats_of(x, y)`` is the summed loss of some rows."""
        import torch

        with torch.no_grad():
            nats = sum(
                float(nats_of(part[:, :-1].contiguous(), part[:, 1:].contiguous())) for part in self.valid.split(8)
            )
        return nats / math.log(2) / self.valid_bytes


# ------------------------------------------------------------------------------------- the two, as training loops


def baseline(args: argparse.Namespace):
    """(model, train(batches, steps, lr), nats_of)."""
    import torch
    import torch.nn.functional as F
    from transformers import GPT2Config, GPT2LMHeadModel

    from zero2llm.optim.schedule import CosineConfig

    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=args.vocab, n_positions=args.ctx, n_embd=args.d, n_layer=args.layers, n_head=args.heads, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, attn_implementation="sdpa",
    ))  # fmt: skip

    def nats_of(x, y):
        return F.cross_entropy(model(input_ids=x).logits.flatten(0, 1), y.flatten(), reduction="sum")

    def train(batches: Iterable, steps: int, lr: float) -> None:
        optim = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        schedule = CosineConfig()
        for step, rows in zip(range(steps), batches, strict=False):
            for group in optim.param_groups:
                group["lr"] = lr * schedule.factor(step, steps)
            for part in rows.split(args.micro_rows):
                (nats_of(part[:, :-1], part[:, 1:]) / rows[:, 1:].numel()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optim.step()
            optim.zero_grad(set_to_none=True)

    return model, train, nats_of


def ours(args: argparse.Namespace):
    from zero2llm.core.batch import Batch
    from zero2llm.core.seq import Seq
    from zero2llm.model.lm import LM
    from zero2llm.model.presets import qwen3
    from zero2llm.ops.xent import cross_entropy_sum
    from zero2llm.optim.build import build_optim
    from zero2llm.optim.muon import MuonConfig
    from zero2llm.optim.schedule import WSDConfig
    from zero2llm.train.fit import FitConfig, fit
    from zero2llm.train.objectives.clm import CLM

    gpt2 = args.layers * (12 * args.d**2 + 13 * args.d) + args.ctx * args.d  # besides the embedding, which is the same
    hidden = round((gpt2 / args.layers - 4 * args.d**2) / (3 * args.d) / 8) * 8
    shape = (args.vocab, args.d, args.layers, args.heads, args.heads, hidden, args.ctx)
    model = LM(qwen3(*shape, head_dim=args.d // args.heads, tied=True))

    def nats_of(x, y):
        hidden, _ = model(x, Seq.rows(*x.shape))
        return cross_entropy_sum(hidden, model.head_weight, y)

    def train(batches: Iterable, steps: int, lr: float) -> None:
        optim = build_optim(model, MuonConfig(lr=lr, adamw_lr=args.adamw_lr))
        full = (Batch(r[:, :-1].contiguous(), r[:, 1:].contiguous(), Seq.rows(len(r), args.ctx)) for r in batches)
        schedule = WSDConfig(decay=args.decay, warmup=0.02)
        fit(
            model,
            CLM(),
            full,
            optim,
            FitConfig(steps=steps, schedule=schedule, micro_rows=args.micro_rows, dtype="fp32"),
        )

    return model, train, nats_of


# ------------------------------------------------------------------------------------------------------ the worker


class Clock:
    """Hands out batches; training time runs from one hand-over to the next, and stands still between slices."""

    def __init__(self, serving: Serving, data: Data, score: Callable[[], float], steps: int, every: int):
        self.serving, self.data, self.score, self.steps, self.every = serving, data, score, steps, every
        self.seconds = self.cpu = 0.0
        self.marks: list[dict] = []

    def mark(self, step: int) -> None:
        self.marks.append({"step": step, "seconds": self.seconds, "cpu": self.cpu, "bpb": self.score()})

    def batches(self) -> Iterator:
        left = self.slice()
        for step, rows in zip(range(self.steps), self.data.batches(), strict=False):
            if left <= 0:
                self.serving.say(done=False)
                left = self.slice()
            began, cpu = time.perf_counter(), time.process_time()
            yield rows
            took = time.perf_counter() - began
            left, self.seconds, self.cpu = left - took, self.seconds + took, self.cpu + time.process_time() - cpu
            if (step + 1) % self.every == 0 and step + 1 < self.steps:
                self.mark(step + 1)

    def slice(self) -> float:
        return float(sys.stdin.readline() or sys.exit(0))


def work(args: argparse.Namespace) -> None:
    serving = Serving()
    import torch

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model, train, nats_of = {"baseline": baseline, "ours": ours}[args.worker](args)
    data = Data(args.tokens, args.ctx, args.rows, args.seed)
    twin = {name: value.clone() for name, value in model.state_dict().items()}
    if not args.steps:  # see how fast this is, then forget what was learned
        times = []
        train((times.append(time.perf_counter()) or rows for rows in itertools.islice(data.batches(), 6)), 6, 1e-4)
        args.steps = max(10, round(args.seconds / statistics.median(b - a for a, b in itertools.pairwise(times))))
        model.load_state_dict(twin)
    clock = Clock(serving, data, lambda: data.bits_per_byte(nats_of), args.steps, max(1, args.steps // args.marks))
    serving.say(ready=0, steps=args.steps, params=sum(p.numel() for p in model.parameters()))
    train(clock.batches(), args.steps, args.rate)
    clock.mark(args.steps)
    serving.say(done=True, marks=clock.marks)


# ------------------------------------------------------------------------------------------------ the foreground


def race(
    args: argparse.Namespace, tokens: Path, seed: int, runs: dict[str, tuple[float, float, int]]
) -> dict[str, dict]:
    """Train all ``runs`` (name -> lr, seconds, steps) of one seed, in alternating slices. Returns what each reported last."""
    workers, last = {}, {}
    for name, (lr, seconds, steps) in runs.items():
        options = {"tokens": tokens, "seed": seed, "rate": lr, "seconds": seconds, "steps": steps}
        options |= {key: getattr(args, key) for key in ("d", "layers", "heads", "ctx", "vocab", "rows", "decay", "threads", "micro_rows", "marks", "adamw_lr")}  # fmt: skip
        flat = [
            text
            for key, value in options.items()
            if value is not None
            for text in (f"--{key.replace('_', '-')}", str(value))
        ]
        workers[name] = Worker(__file__, name.split("@")[0], ["--out", str(args.out), *flat], args.threads)
        if workers[name].result.failed:
            sys.exit(f"{name} failed: {workers[name].result.failed}")
    while len(last) < len(workers):
        for name, worker in workers.items():
            if name in last:
                continue
            reply = worker.ask(str(args.slice))
            if reply is None:
                sys.exit(f"{name} failed: {worker.result.failed}")
            if reply["done"]:
                last[name] = reply | worker.result.note
    for worker in workers.values():
        worker.close()
    return last


def reached(marks: list[dict], target: float) -> dict | None:
    return next((mark for mark in marks if mark["bpb"] <= target), None)


def compare_seeds(args: argparse.Namespace, tokens: Path) -> list[dict]:
    print(
        "| seed | baseline bpb | steps | s | ours: best bpb | steps to target | s to target | ratio | CPU-s ratio |\n|---|"
        + "---:|" * 8
    )
    found = []
    for seed in range(1, args.seeds + 1):
        plan = {
            "baseline": (args.baseline_lr, args.budget, args.baseline_steps),
            "ours": (args.ours_lr, args.budget * args.share, args.ours_steps),
        }
        both = race(args, tokens, seed, plan)
        final, marks = both["baseline"]["marks"][-1], both["ours"]["marks"]
        hit = reached(marks, final["bpb"])
        cells = [f"{hit['step']}", f"{hit['seconds']:.1f}", f"{hit['seconds'] / final['seconds']:.2f}", f"{hit['cpu'] / final['cpu']:.2f}"] if hit else ["not reached", "", "", ""]  # fmt: skip
        best = min(mark["bpb"] for mark in marks)
        print(
            f"| {seed} | {final['bpb']:.4f} | {final['step']} | {final['seconds']:.1f} | {best:.4f} | "
            + " | ".join(cells)
            + " |",
            flush=True,
        )
        found.append(
            {
                "seed": seed,
                "params": {k: v["params"] for k, v in both.items()},
                "hit": hit,
                **{k: v["marks"] for k, v in both.items()},
            }
        )
    print(f"parameters: {found[0]['params']}")
    return found


def sweep(args: argparse.Namespace, tokens: Path) -> list[dict]:
    """Final score of one of the two for each learning rate, seed 0: how to find --baseline-lr and --ours-lr."""
    print("| " + args.sweep + " lr | steps | bits per byte |\n|---:|---:|---:|")
    seconds = args.budget * (1 if args.sweep == "baseline" else args.share)
    steps = args.baseline_steps if args.sweep == "baseline" else args.ours_steps
    done = race(args, tokens, 0, {f"{args.sweep}@{lr}": (float(lr), seconds, steps) for lr in args.lr.split(",")})
    for name, reply in done.items():
        print(f"| {name.split('@')[1]} | {reply['steps']} | {reply['marks'][-1]['bpb']:.4f} |")
    return [{"name": name, **reply} for name, reply in done.items()]


def options() -> argparse.Namespace:
    p = parser(__doc__, rounds=1)
    p.add_argument("--out", type=Path, required=True, help="folder for the tokenizer and the encoded text")
    p.add_argument("--data", nargs="+", default=["embedded"], help=".jsonl and .txt files, or embedded")
    p.add_argument("--budget", type=float, default=120, help="seconds of training of the baseline")
    p.add_argument("--share", type=float, default=0.5, help="part of the budget that ours plans to use")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--sweep", choices=("baseline", "ours"))
    p.add_argument("--lr", default="1e-3,2e-3,4e-3,8e-3", help="rates of the sweep")
    p.add_argument("--baseline-lr", type=float, default=4e-3)
    p.add_argument("--ours-lr", type=float, default=8e-3)
    p.add_argument("--adamw-lr", type=float, help="ours: embedding, norms; default: as the matrices")
    p.add_argument("--decay", type=float, default=0.4, help="ours: last part of the run in which the rate falls to 0")
    p.add_argument("--baseline-steps", type=int, default=0, help="fixed instead of measured from the budget")
    p.add_argument("--ours-steps", type=int, default=0)
    p.add_argument("--valid-bytes", type=int, default=200_000)
    p.add_argument("--marks", type=int, default=40, help="evaluations per run")
    p.add_argument("--slice", type=float, default=5.0, help="seconds of a turn")
    for name, default in {
        "d": 128,
        "layers": 4,
        "heads": 4,
        "ctx": 256,
        "vocab": 4096,
        "rows": 16,
        "micro-rows": 8,
    }.items():
        p.add_argument(f"--{name}", type=int, default=default)
    for name, kind in {"tokens": Path, "seed": int, "rate": float, "seconds": float, "steps": int}.items():
        p.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)  # for the worker
    return p.parse_args()


def main() -> None:
    args = options()
    if args.worker:
        return work(args)
    if args.smoke:
        args.budget, args.share, args.seeds, args.marks, args.slice, args.valid_bytes = 2.0, 1.0, 1, 4, 0.5, 4_000
        args.d, args.layers, args.heads, args.ctx, args.rows, args.vocab = 32, 1, 2, 32, 4, 320
    tokens = prepare(args)
    found = sweep(args, tokens) if args.sweep else compare_seeds(args, tokens)
    about = machine()
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    if args.json:
        settings = {key: str(value) for key, value in vars(args).items() if key != "out"}
        args.json.write_text(json.dumps({"machine": about, "settings": settings, "runs": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
