"""One step of DPO and of GRPO, side by side with TRL's trainers: the same weights, prompts, answers' lengths and AdamW, in fp32.

    python bench/alignment.py                                     12M parameters, random weights
    python bench/alignment.py --kinds grpo --rounds 7 --json out.json
    python bench/alignment.py --checkpoint runs/smollm2 --kinds dpo --rows 8
    python bench/alignment.py --candidates trl_grpo,trl_grpo+mb16,ours_grpo+mb8

Kinds: dpo (the reference runs beside the policy), dpo_stored (its sums were worked out before: eight bytes a pair),
grpo (8 answers to a prompt, one update a rollout, no KL), grpo_kl (with a reference, weight 0.04). Suffix +mbN: micro-batches
of N rows. Without it TRL takes the whole batch at once and ours what its recipes take; TRL's other settings are those that are fastest
here (no recomputation, no logging, no saving, fused AdamW, its own generation with a cache).

Both read one folder that our exporter wrote. DPO: the same pairs in the same order, padded as each side does it. GRPO: every
answer is as long as every other. TRL gets `min_new_tokens`; ours gets a tokenizer without `stop_ids`, to which the end token is a
token like any other, so nothing of the engine is switched off. The reward is the share of one letter in the text.
A turn is one optimizer step, rollout included. `rollout` and `update` are medians over the steps of a worker, warm-up left out:
for ours the metric `rollout_s`, for TRL the time in `_generate_and_score_completions` (sampling, rewards and the reference's pass).
Ours asks for at most 1.0 x TRL's step in DPO and 0.7 x in GRPO. Needs trl, transformers, datasets; see docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from results import report, table
from turns import Serving, compare, parser

KINDS, WARM = ("dpo", "dpo_stored", "grpo", "grpo_kl"), 3


@dataclass(frozen=True)
class Shape:
    layers: int = 6
    heads: int = 6
    d: int = 384
    ffn: int = 1024
    vocab: int = 4096
    max_len: int = 256
    rows: int = 64  # of GRPO; DPO takes a quarter of them
    prompt: tuple[int, int] = (24, 48)  # words, least and most
    answer: tuple[int, int] = (16, 64)  # words of an answer in a pair
    new: int = 64  # tokens of an answer in GRPO
    micro: int = 8  # ours, where a candidate says nothing


SHAPES = {"mini": Shape(), "tiny": Shape(2, 2, 64, 128, 600, 128, 16, (4, 8), (4, 8), 8)}
SAMPLES, UNITS = 8, 256  # answers to a prompt; prompts and pairs, then they begin again


def words() -> list[str]:
    """3,000 words of two or three syllables, always the same."""
    rng = random.Random(0)
    syllable = lambda: rng.choice("bdfgklmnprstvz") + rng.choice("aeiou")
    return ["".join(syllable() for _ in range(rng.choice((2, 3)))) for _ in range(3000)]


def texts(shape: Shape) -> list[dict[str, str]]:
    rng, known = random.Random(1), words()
    some = lambda least, most: "".join(" " + rng.choice(known) for _ in range(rng.randint(least, most)))
    return [{"prompt": some(*shape.prompt), "chosen": some(*shape.answer), "rejected": some(*shape.answer)} for _ in range(UNITS)]


def pay(text: str) -> float:
    return text.count("a") / max(len(text), 1)


def export(shape: Shape, checkpoint: Path | None, out: Path) -> None:
    """The folder that both read."""
    import torch

    from zero2llm.interop.hf import export_hf
    from zero2llm.model.lm import LM
    from zero2llm.model.presets import llama
    from zero2llm.tokenizers.tokenizer import Tokenizer
    from zero2llm.train.checkpoint import Checkpoint

    if checkpoint is not None:
        found = Checkpoint.open(checkpoint, resuming=False)
        model, tokenizer = found.load_model(), found.tokenizer_dir
    else:
        torch.manual_seed(0)
        model, tokenizer = LM(llama(shape.vocab, shape.d, shape.layers, shape.heads, shape.heads, shape.ffn, shape.max_len, tied=True)), out / "tokenizer"
        Tokenizer.train([" ".join(words())] * 4, shape.vocab).save(tokenizer)
    export_hf(model.state_dict(), model.cfg, tokenizer, out / "model")


def our_model(folder: Path):
    from zero2llm.interop.hf import load_hf
    from zero2llm.model.lm import LM
    from zero2llm.tokenizers.tokenizer import Tokenizer

    cfg, tensors = load_hf(folder / "model")
    model = LM(cfg)
    model.load_state_dict(tensors)
    return model, Tokenizer.load(folder / "model")


@dataclass
class Clock:
    """Steps on demand, and what of each went into sampling."""

    steps: Iterable[int]
    rollout: list[float]


def paced(batches: Iterator, steps: Iterable[int]) -> Iterator:
    for _ in steps:
        yield next(batches)


def our_pairs(shape: Shape, tokenizer, reference) -> Iterator:
    """Batches of pairs for ever, in order."""
    from zero2llm.data.rows import padded

    sides = []
    for pair in texts(shape):
        before = tokenizer.encode(pair["prompt"])
        for side in ("chosen", "rejected"):
            answer = [*tokenizer.encode(pair[side]), tokenizer.eos_id]
            sides.append(([*before, *answer], [0] * len(before) + [1] * len(answer)))
    rows = shape.rows // 4 * 2
    batches = [padded(sides[i : i + rows], tokenizer.pad_id, None, {}, 2) for i in range(0, len(sides), rows)]
    if reference is not None:
        batches = [replace(batch, extra={"ref": reference(batch)}) for batch in batches]
    while True:
        yield from batches


def our_rollouts(shape: Shape, model, tokenizer, objective, micro: int):
    from zero2llm.model.lm import LM
    from zero2llm.parallel.plan import World
    from zero2llm.train.rl.methods import assemble
    from zero2llm.train.rl.rewards import Mixture
    from zero2llm.train.rl.rollout import RolloutConfig
    from zero2llm.train.rl.source import Rollouts

    class Prompts:
        identity = {"prompts": "bench"}
        rows = [tokenizer.encode(pair["prompt"]) for pair in texts(shape)]

        def prompt(self, g: int) -> tuple[list[int], dict]:
            return self.rows[g % UNITS], {}

    tokenizer.stop_ids = frozenset()
    rollout = RolloutConfig(prompts=shape.rows // SAMPLES, samples=SAMPLES, max_tokens=shape.new, max_batch=shape.rows)
    made, loss = assemble(objective, rollout.temperature, tokenizer.vocab_size)
    reference = LM.clone(model).eval().requires_grad_(False) if made.reference else None
    reward = Mixture([(1.0, lambda answer: pay(answer.text))])
    return Rollouts(model, tokenizer, Prompts(), reward, made, rollout, seed=0, world=World(), reference=reference, micro_rows=micro), loss


def train_ours(kind: str, micro: int | None, shape: Shape, folder: Path, clock: Clock) -> None:
    from zero2llm.model.lm import LM
    from zero2llm.optim.adamw import AdamWConfig
    from zero2llm.optim.build import build_optim
    from zero2llm.train.fit import FitConfig, fit
    from zero2llm.train.objectives.dpo import DPOConfig
    from zero2llm.train.objectives.reference import Frozen, stored
    from zero2llm.train.rl.grpo import GRPOConfig
    from zero2llm.train.rl.kl import KLConfig

    model, tokenizer = our_model(folder)
    micro = micro or shape.micro
    if kind.startswith("dpo"):
        frozen = Frozen(LM.clone(model))
        batches = our_pairs(shape, tokenizer, frozen if kind == "dpo_stored" else None)
        objective = DPOConfig().build(stored if kind == "dpo_stored" else frozen)
    else:
        cfg = GRPOConfig(kl=KLConfig(weight=0.04) if kind == "grpo_kl" else None)
        source, objective = our_rollouts(shape, model, tokenizer, cfg, micro)
        batches = iter(source)
    hook = lambda state: clock.rollout.append(state.metrics.get("rollout_s", 0.0))
    try:
        fit(model, objective, paced(batches, clock.steps), build_optim(model, AdamWConfig(weight_decay=0.0)),
            FitConfig(steps=10**9, micro_rows=micro, dtype="fp32"), hooks=(hook,))  # fmt: skip
    except ValueError as error:  # how the loop says that the timer has no more steps
        assert "data ended" in str(error), error


class Done(Exception):
    """The timer has no more steps."""


def pacer(steps: Iterable[int]):
    from transformers import TrainerCallback

    class Paced(TrainerCallback):
        waiting = iter(steps)

        def on_step_begin(self, args, state, control, **more):
            if next(self.waiting, None) is None:
                raise Done

    return Paced()


def their_options(shape: Shape, folder: Path, rows: int, micro: int | None) -> dict:
    """``rows`` of a step as TRL counts them: pairs in DPO, answers in GRPO."""
    micro = micro or rows
    return {
        "output_dir": str(folder / "trl"), "per_device_train_batch_size": micro, "gradient_accumulation_steps": rows // micro,
        "max_steps": 10**6, "learning_rate": 3e-4, "optim": "adamw_torch_fused", "lr_scheduler_type": "constant", "max_grad_norm": 1.0,
        "gradient_checkpointing": False, "bf16": False, "fp16": False, "use_cpu": True, "logging_strategy": "no", "save_strategy": "no",
        "eval_strategy": "no", "report_to": [], "disable_tqdm": True, "dataloader_pin_memory": False, "seed": 0,
    }  # fmt: skip


def train_trl(kind: str, micro: int | None, shape: Shape, folder: Path, clock: Clock) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

    class Sampled(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            began = time.perf_counter()
            made = super()._generate_and_score_completions(inputs)
            clock.rollout.append(time.perf_counter() - began)
            return made

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float32", attn_implementation="sdpa")
    tokenizer, data = AutoTokenizer.from_pretrained(folder / "model"), texts(shape)
    common = {"processing_class": tokenizer, "callbacks": [pacer(clock.steps)]}
    if kind.startswith("dpo"):
        pairs = shape.rows // 4
        options = their_options(shape, folder, pairs, micro and micro // 2)
        cfg = DPOConfig(**options, beta=0.1, max_length=None, train_sampling_strategy="sequential", precompute_ref_log_probs=kind == "dpo_stored",
                        precompute_ref_batch_size=pairs)  # fmt: skip
        trainer = DPOTrainer(model, args=cfg, train_dataset=Dataset.from_list(data), **common)
    else:
        cfg = GRPOConfig(
            **their_options(shape, folder, shape.rows, micro), num_generations=SAMPLES, num_iterations=1, temperature=1.0, shuffle_dataset=False,
            max_completion_length=shape.new, generation_kwargs={"min_new_tokens": shape.new}, loss_type="grpo", epsilon=0.2,
            beta=0.04 if kind == "grpo_kl" else 0.0,
        )  # fmt: skip
        reward = lambda completions, **more: [pay(text) for text in completions]
        prompts = Dataset.from_list([{"prompt": row["prompt"]} for row in data])
        trainer = Sampled(model, reward_funcs=reward, args=cfg, train_dataset=prompts, **common)
    try:
        trainer.train()
    except Done:
        pass


def parts(candidate: str) -> tuple[str, str, int | None]:
    """"ours_grpo_kl+mb8" -> ours, grpo_kl, 8"""
    name, _, micro = candidate.partition("+mb")
    who, _, kind = name.partition("_")
    assert who in ("ours", "trl") and kind in KINDS, candidate
    return who, kind, int(micro) if micro else None


def work(candidate: str, args) -> None:
    serving = Serving()
    import torch

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    warm, (who, kind, micro) = 1 if args.smoke else WARM, parts(candidate)
    clock = Clock(serving.turns(1, warm), [])
    {"ours": train_ours, "trl": train_trl}[who](kind, micro, shape_of(args), args.folder, clock)
    (args.folder / f"{candidate}.json").write_text(json.dumps(clock.rollout[warm:]))


def shape_of(args) -> Shape:
    shape = SHAPES["tiny" if args.smoke else args.shape]
    return replace(shape, rows=args.rows or shape.rows, new=args.new or shape.new)


def main() -> None:
    p = parser(__doc__, rounds=5)
    p.add_argument("--shape", choices=SHAPES, default="mini")
    p.add_argument("--checkpoint", type=Path, help="weights and tokenizer of one of our checkpoints, in place of random ones")
    p.add_argument("--kinds", default="dpo,dpo_stored,grpo,grpo_kl")
    p.add_argument("--candidates", help="in place of --kinds; the ratios of a kind are to the fastest of TRL's")
    p.add_argument("--rows", type=int, help="answers of a step in GRPO, of which DPO takes a quarter as pairs; default 64")
    p.add_argument("--new", type=int, help="tokens of an answer in GRPO; default 64")
    p.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = p.parse_args()
    args.rounds = 2 if args.smoke else args.rounds
    if args.worker:
        return work(args.worker, args)
    names = (args.candidates or ",".join(f"trl_{kind},ours_{kind}" for kind in args.kinds.split(","))).split(",")
    options = ["--shape", args.shape, "--threads", str(args.threads), *["--smoke"] * args.smoke]
    options += [word for key in ("rows", "new") if getattr(args, key) for word in (f"--{key}", str(getattr(args, key)))]
    with tempfile.TemporaryDirectory() as folder:
        export(shape_of(args), args.checkpoint, Path(folder))
        results = {}
        for kind in KINDS:  # one kind after the other: four models wait at most, not sixteen
            asked = [name for name in names if parts(name)[1] == kind]
            results |= compare(__file__, asked, [*options, "--folder", folder], args.rounds, args.threads) if asked else {}
        sampled = {path.stem: json.loads(path.read_text()) for path in Path(folder).glob("*_*.json")}
    report(args, vars(shape_of(args)) | {"threads": args.threads}, results, "\n".join(said(results, sampled, shape_of(args))))
    if any(r.failed for r in results.values()):
        sys.exit(1)


def said(results: dict, sampled: dict[str, list[float]], shape: Shape) -> Iterator[str]:
    for kind in KINDS:
        some = {name: r for name, r in results.items() if parts(name)[1] == kind}
        if not some:
            continue
        theirs = [r for name, r in some.items() if name.startswith("trl") and r.turns]
        base = min(theirs or some.values(), key=lambda r: r.seconds if r.turns else float("inf"))
        yield "\n" + table(some, base.name, shape.rows // 4 if kind.startswith("dpo") else shape.rows, "pair" if kind.startswith("dpo") else "answer", "step")
        for name, r in some.items():
            share = f"rollout {statistics.median(sampled[name]):.3f} s, update {r.seconds - statistics.median(sampled[name]):.3f} s" if any(sampled.get(name, ())) else ""
            if r.turns and base.turns and theirs:
                ratio, least, most = base.faster(r)
                yield f"{name}: step {ratio:.2f} x that of {base.name} ({least:.2f}-{most:.2f}), peak memory {r.rss_mb / base.rss_mb:.2f} x. {share}"


if __name__ == "__main__":
    main()
