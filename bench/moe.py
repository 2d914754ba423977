"""One training step of a mixture of experts, beside a dense model of equal active size and HF Mixtral of equal shape.

    python bench/moe.py                             d 384, 8 experts, top-2, 512 tokens a row
    python bench/moe.py --shape small --json out.json

`ours` trains the experts with the project's own loop; `dense` is the same model, loop and optimizer with one GLU of
k * hidden in each layer: the same FLOPs per token, E / k times fewer weights to read, to average and to update.
`hf_mixtral` is transformers' Mixtral with its default experts, `hf_mixtral_eager` with its loop over experts, both with the
load-balancing loss that ours adds too. All clip to 1.0 and take AdamW in fp32. Suffix +mbN: micro-batches of N rows.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

from results import report, table
from train_step import Batches, tokens_of, train_peer
from turns import Serving, compare, parser


@dataclass(frozen=True)
class Shape:
    layers: int
    heads: int
    d: int
    hidden: int  # of one expert
    experts: int = 8
    k: int = 2
    ctx: int = 512
    vocab: int = 4096
    rows: int = 8


SHAPES = {"small": Shape(4, 4, 256, 352), "mid": Shape(4, 6, 384, 512), "large": Shape(4, 8, 512, 704)}
CANDIDATES = "dense+mb4,ours+mb4,hf_mixtral+mb4,hf_mixtral_eager+mb4"


def ours(shape: Shape, dense: bool):
    from zero2llm.layers.ffns.glu import GLUConfig
    from zero2llm.layers.ffns.moe import MoEConfig
    from zero2llm.layers.mixers.gqa import GQAConfig
    from zero2llm.layers.positions.rope import RoPEConfig
    from zero2llm.model.lm import LM
    from zero2llm.model.spec import LayerPattern, LayerSpec, ModelConfig

    experts = MoEConfig(n_experts=shape.experts, top_k=shape.k, hidden=shape.hidden)
    ffn = GLUConfig(hidden=shape.k * shape.hidden) if dense else experts
    spec = LayerSpec(mixer=GQAConfig(n_heads=shape.heads, position=RoPEConfig()), ffn=ffn)
    return LM(ModelConfig(
        vocab_size=shape.vocab, d_model=shape.d, max_len=shape.ctx, blocks={"b": spec},
        layers=LayerPattern(pattern=["b"], repeat=shape.layers),
    ))  # fmt: skip


def train_ours(model, shape: Shape, rows: int, compiled: bool, steps: Batches) -> None:
    from zero2llm.core.batch import Batch
    from zero2llm.core.seq import Seq
    from zero2llm.optim.adamw import AdamWConfig
    from zero2llm.optim.build import build_optim
    from zero2llm.train.fit import FitConfig, fit
    from zero2llm.train.objectives.clm import CLM

    data = tokens_of(shape)
    batch = Batch(data[:, :-1].contiguous(), data[:, 1:].contiguous(), Seq.rows(shape.rows, shape.ctx))
    cfg = FitConfig(steps=10**9, micro_rows=rows, compile=compiled, dtype="fp32")
    try:
        fit(model, CLM(), (batch for _ in steps), build_optim(model, AdamWConfig()), cfg)
    except ValueError as error:  # how the loop says that the timer has no more steps
        assert "data ended" in str(error), error


def hf_mixtral(shape: Shape, experts: str | None):
    from transformers import MixtralConfig, MixtralForCausalLM

    cfg = MixtralConfig(
        vocab_size=shape.vocab, hidden_size=shape.d, intermediate_size=shape.hidden, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.heads, max_position_embeddings=shape.ctx,
        num_local_experts=shape.experts, num_experts_per_tok=shape.k, output_router_logits=True, router_aux_loss_coef=0.01,
        sliding_window=None, tie_word_embeddings=True, use_cache=False, attn_implementation="sdpa",
        **({} if experts is None else {"experts_implementation": experts}),
    )  # fmt: skip
    return MixtralForCausalLM(cfg), lambda model, x, y: model(input_ids=x, labels=y, shift_labels=y).loss


def work(name: str, shape: Shape, threads: int, units: int, warmup: int) -> None:
    """The worker: train until the foreground process has no more turns to give."""
    serving = Serving()
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    base, *flags = name.split("+")
    rows = next((int(f[2:]) for f in flags if f.startswith("mb")), shape.rows)
    compiled = "compile" in flags
    steps = serving.turns(units, warmup)
    if base in ("ours", "dense"):
        train_ours(ours(shape, base == "dense"), shape, rows, compiled, steps)
    else:
        model, loss_of = hf_mixtral(shape, {"hf_mixtral": None, "hf_mixtral_eager": "eager"}[base])
        train_peer(model, loss_of, shape, rows, compiled, steps)


def main() -> None:
    p = parser(__doc__, rounds=7)
    p.add_argument("--shape", choices=SHAPES, default="mid")
    p.add_argument("--candidates", default=CANDIDATES)
    p.add_argument("--baseline", help="the candidate that ratios refer to; default: the first")
    args = p.parse_args()
    shape = SHAPES[args.shape]
    if args.smoke:
        shape, args.rounds = replace(shape, layers=1, ctx=32, rows=4), 2
    if args.worker:
        return work(args.worker, shape, args.threads, 1, warmup=1 if args.smoke else 2)
    names = args.candidates.split(",")
    options = ["--shape", args.shape, "--threads", str(args.threads), *(["--smoke"] if args.smoke else [])]
    results = compare(__file__, names, options, args.rounds, args.threads)
    tokens = shape.rows * shape.ctx
    about = {"shape": args.shape, "tokens per step": tokens, "threads": args.threads, "rounds": args.rounds}
    report(args, about, results, table(results, args.baseline or names[0], tokens, "tok", "step"))
    if all(r.failed for r in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
