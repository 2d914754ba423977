"""One adapter training step, side by side with peft: forward + backward + clipping + AdamW in fp32, same shape, same work.

    python bench/adapters.py                       12M parameters, LoRA and DoRA of rank 16 on every projection
    python bench/adapters.py --kinds lora --rank 64 --json out.json

`ours` is the project's own loop, `train.fit.fit`, as in train_step.py; `peft` is peft on transformers' Llama (sdpa) with
the loop that its users write and torch's fused AdamW. The ratio is ours over peft: at most 1.0 is what we ask.
Needs transformers, peft and accelerate; see docs/benchmarks.md.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass

from results import report, table
from turns import Serving, compare, parser


@dataclass(frozen=True)
class Shape:
    layers: int
    heads: int
    d: int
    ffn: int
    ctx: int = 256
    vocab: int = 4096
    rows: int = 8
    micro: int = 4


SHAPES = {"mini": Shape(6, 6, 384, 1024), "small": Shape(8, 8, 512, 1408), "tiny": Shape(2, 2, 64, 128, 64, 512, 4, 4)}


def tokens_of(shape: Shape):
    import torch

    return torch.randint(0, shape.vocab, (shape.rows, shape.ctx + 1), generator=torch.Generator().manual_seed(1))


def train_ours(kind: str, rank: int, shape: Shape, steps: Iterable[int]) -> None:
    from zero2llm.adapters.dora import DoRAConfig
    from zero2llm.adapters.lora import LoRAConfig
    from zero2llm.adapters.wrap import wrap
    from zero2llm.core.batch import Batch
    from zero2llm.core.seq import Seq
    from zero2llm.model.lm import LM
    from zero2llm.model.presets import llama
    from zero2llm.optim.adamw import AdamWConfig
    from zero2llm.optim.build import build_optim
    from zero2llm.train.fit import FitConfig, fit
    from zero2llm.train.objectives.clm import CLM

    model = LM(llama(shape.vocab, shape.d, shape.layers, shape.heads, shape.heads, shape.ffn, shape.ctx, tied=True))
    wrap(model, {"lora": LoRAConfig, "dora": DoRAConfig}[kind](r=rank, alpha=2.0 * rank))
    data = tokens_of(shape)
    batch = Batch(data[:, :-1].contiguous(), data[:, 1:].contiguous(), Seq.rows(shape.rows, shape.ctx))
    try:
        fit(model, CLM(), (batch for _ in steps), build_optim(model, AdamWConfig(weight_decay=0.0)),
            FitConfig(steps=10**9, micro_rows=shape.micro, dtype="fp32"))  # fmt: skip
    except ValueError as error:  # how the loop says that the timer has no more steps
        assert "data ended" in str(error), error


def train_peft(kind: str, rank: int, shape: Shape, steps: Iterable[int]) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    cfg = LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.d, intermediate_size=shape.ffn, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.heads, max_position_embeddings=shape.ctx,
        tie_word_embeddings=True, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    adapter = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", use_dora=kind == "dora", task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM(cfg), adapter)
    params = [p for p in model.parameters() if p.requires_grad]
    optim = torch.optim.AdamW(params, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    data = tokens_of(shape)
    x, y = data[:, :-1].contiguous(), data[:, 1:].contiguous()
    model.train()
    for _ in steps:
        for xs, ys in zip(x.split(shape.micro), y.split(shape.micro), strict=True):
            (model(input_ids=xs, labels=ys, shift_labels=ys).loss * (len(xs) / shape.rows)).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optim.step()
        optim.zero_grad(set_to_none=True)


def work(candidate: str, args) -> None:
    import torch

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    serving = Serving()
    who, kind = candidate.split("_")
    train = {"ours": train_ours, "peft": train_peft}[who]
    train(kind, args.rank, SHAPES[args.shape], serving.turns(1 if args.smoke else args.steps, 1 if args.smoke else 3))


def main() -> None:
    p = parser(__doc__, rounds=7)
    p.add_argument("--shape", choices=SHAPES, default="mini")
    p.add_argument("--kinds", default="lora,dora")
    p.add_argument("--rank", type=int, default=16)
    p.add_argument("--steps", type=int, default=3, help="training steps per turn")
    args = p.parse_args()
    if args.smoke:
        args.shape, args.rounds = "tiny", 2
    if args.worker:
        return work(args.worker, args)
    options = ["--shape", args.shape, "--rank", str(args.rank), "--steps", str(args.steps), "--threads", str(args.threads)]
    shape, kinds = SHAPES[args.shape], args.kinds.split(",")
    names = [f"{who}_{kind}" for kind in kinds for who in ("peft", "ours")]
    results = compare(__file__, names, options + ["--smoke"] * args.smoke, args.rounds, args.threads)
    text = []
    for kind in kinds:
        two = {name: r for name, r in results.items() if name.endswith("_" + kind)}
        text.append(table(two, f"peft_{kind}", shape.rows * shape.ctx, "tok", "step"))
        ours, theirs = two[f"ours_{kind}"], two[f"peft_{kind}"]
        if ours.turns and theirs.turns:
            ratio, least, most = theirs.faster(ours)
            text.append(f"{kind}: step time {ratio:.2f} x peft's ({least:.2f}-{most:.2f}), peak memory {ours.rss_mb / theirs.rss_mb:.2f} x\n")
    report(args, {"shape": args.shape, "rank": args.rank, "threads": args.threads}, results, "\n".join(text))
    if any(r.failed for r in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
