"""One training step, side by side: forward + backward + clipping + AdamW in fp32, same shape, same work.

    python bench/train_step.py                      12M parameters
    python bench/train_step.py --shape nano         1.6M parameters
    python bench/train_step.py --candidates ours+mb4+compile,litgpt+compile --json out.json

`ours` is the project's own loop, `train.fit.fit`, with its objective and its optimizer: everything that a user of
`zero2llm train` pays. The others are the loop that their users write: micro-batches, `clip_grad_norm_`, and torch's
fused AdamW (the default of transformers' Trainer). Every candidate clips to 1.0.

Suffixes: +compile (torch.compile); +mb4, +mb8 (micro-batches of that many rows, summed to the full batch).
Needs transformers and litgpt for those two; see docs/benchmarks.md.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from results import report, table
from turns import Serving, compare, parser

Batches = Iterable[int]  # the timer: each item asks for one training step


@dataclass(frozen=True)
class Shape:
    layers: int
    heads: int
    d: int
    ffn: int  # hidden width of the SwiGLU
    ctx: int = 256
    vocab: int = 4096
    rows: int = 16


SHAPES = {
    "mini": Shape(6, 6, 384, 1024),
    "nano": Shape(4, 4, 128, 512),
}  # 12.2M and 1.6M parameters, embedding counted once
CANDIDATES = "hf_llama,hf_llama+mb4,hf_llama+compile,litgpt,litgpt+compile,nanogpt,nanogpt+compile,ours+mb16,ours+mb8,ours+mb4,ours+mb16+compile,ours+mb4+compile"  # fmt: skip


def tokens_of(shape: Shape):
    """(rows, ctx + 1) random token ids: the loss does not matter here, only the work."""
    import torch

    return torch.randint(0, shape.vocab, (shape.rows, shape.ctx + 1), generator=torch.Generator().manual_seed(1))


def train_ours(shape: Shape, rows: int, compiled: bool, steps: Batches) -> None:
    from zero2llm.core.batch import Batch
    from zero2llm.core.seq import Seq
    from zero2llm.model.lm import LM
    from zero2llm.model.presets import llama
    from zero2llm.optim.adamw import AdamWConfig
    from zero2llm.optim.build import build_optim
    from zero2llm.train.fit import FitConfig, fit
    from zero2llm.train.objectives.clm import CLM

    model = LM(llama(shape.vocab, shape.d, shape.layers, shape.heads, shape.heads, shape.ffn, shape.ctx, tied=True))
    data = tokens_of(shape)
    batch = Batch(data[:, :-1].contiguous(), data[:, 1:].contiguous(), Seq.rows(shape.rows, shape.ctx))
    cfg = FitConfig(steps=10**9, micro_rows=rows, compile=compiled, dtype="fp32")
    try:
        fit(model, CLM(), (batch for _ in steps), build_optim(model, AdamWConfig()), cfg)
    except ValueError as error:  # how the loop says that the timer has no more steps
        assert "data ended" in str(error), error


def train_peer(model, loss_of: Callable, shape: Shape, rows: int, compiled: bool, steps: Batches) -> None:
    """The usual loop around somebody else's model. ``loss_of(model, x, y)`` is the mean over the tokens."""
    import torch

    params = list(model.parameters())
    optim = torch.optim.AdamW(params, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    data = tokens_of(shape)
    x, y = data[:, :-1].contiguous(), data[:, 1:].contiguous()
    run = torch.compile(model, dynamic=False) if compiled else model
    model.train()
    for _ in steps:
        for xs, ys in zip(x.split(rows), y.split(rows), strict=True):
            (loss_of(run, xs, ys) * (len(xs) / shape.rows)).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optim.step()
        optim.zero_grad(set_to_none=True)


def hf_llama(shape: Shape):
    from transformers import LlamaConfig, LlamaForCausalLM

    cfg = LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.d, intermediate_size=shape.ffn, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.heads, max_position_embeddings=shape.ctx,
        tie_word_embeddings=True, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(cfg), lambda model, x, y: model(input_ids=x, labels=y, shift_labels=y).loss


def litgpt(shape: Shape):
    from litgpt import GPT, Config
    from litgpt.utils import chunked_cross_entropy

    model = GPT(Config(
        name="bench", block_size=shape.ctx, vocab_size=shape.vocab, padded_vocab_size=shape.vocab, n_layer=shape.layers,
        n_head=shape.heads, n_query_groups=shape.heads, n_embd=shape.d, rotary_percentage=1.0, parallel_residual=False,
        bias=False, norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", intermediate_size=shape.ffn,
    ))  # fmt: skip
    model.max_seq_length = shape.ctx
    model.lm_head.weight = model.transformer.wte.weight
    return model, lambda model, x, y: chunked_cross_entropy(model(x), y)


def nanogpt(shape: Shape):
    """GPT-2 in plain PyTorch as nanoGPT writes it: one QKV product, GELU, learned positions. Not a Llama, the same size."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            d = shape.d
            self.norm1, self.norm2 = nn.LayerNorm(d, bias=False), nn.LayerNorm(d, bias=False)
            self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
            hidden = shape.ffn * 3 // 2  # two matrices instead of three: equal parameters
            self.up, self.down = nn.Linear(d, hidden, bias=False), nn.Linear(hidden, d, bias=False)

        def forward(self, x):
            q, k, v = (
                t.unflatten(-1, (shape.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).split(shape.d, -1)
            )
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(o.transpose(1, 2).flatten(2))
            return x + self.down(F.gelu(self.up(self.norm2(x))))

    class GPT(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.place = nn.Embedding(shape.vocab, shape.d), nn.Embedding(shape.ctx, shape.d)
            self.blocks, self.norm = (
                nn.ModuleList(Block() for _ in range(shape.layers)),
                nn.LayerNorm(shape.d, bias=False),
            )
            for p in self.parameters():
                if p.ndim > 1:
                    nn.init.normal_(p, std=0.02)

        def forward(self, x, y):
            h = self.embed(x) + self.place.weight[: x.shape[1]]
            for block in self.blocks:
                h = block(h)
            return F.cross_entropy((self.norm(h) @ self.embed.weight.t()).flatten(0, 1), y.flatten())

    torch.manual_seed(0)
    return GPT(), lambda model, x, y: model(x, y)


PEERS = {"hf_llama": hf_llama, "litgpt": litgpt, "nanogpt": nanogpt}


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
    if base == "ours":
        train_ours(shape, rows, compiled, steps)
    else:
        model, loss_of = PEERS[base](shape)
        train_peer(model, loss_of, shape, rows, compiled, steps)


def main() -> None:
    p = parser(__doc__, rounds=7)
    p.add_argument("--shape", choices=SHAPES, default="mini")
    p.add_argument("--candidates", default=CANDIDATES)
    p.add_argument("--baseline", help="the candidate that ratios refer to; default: the first")
    p.add_argument("--steps", type=int, help="steps per turn; default 1 (mini) or 4 (nano)")
    args = p.parse_args()
    shape = SHAPES[args.shape]
    units = args.steps or {"mini": 1, "nano": 4}[args.shape]
    if args.smoke:
        shape, units, args.rounds = replace(shape, layers=1, ctx=32, rows=4), 1, 2
    if args.worker:
        return work(args.worker, shape, args.threads, units, warmup=1 if args.smoke else 3)
    names = args.candidates.split(",")
    options = [
        "--shape",
        args.shape,
        "--threads",
        str(args.threads),
        "--steps",
        str(units),
        *(["--smoke"] if args.smoke else []),
    ]
    results = compare(__file__, names, options, args.rounds, args.threads)
    tokens = shape.rows * shape.ctx
    about = {"shape": args.shape, "tokens per step": tokens, "threads": args.threads, "rounds": args.rounds}
    report(args, about, results, table(results, args.baseline or names[0], tokens, "tok", "step"))
    if all(r.failed for r in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
