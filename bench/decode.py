"""Greedy decoding, side by side: a SmolLM2-135M-shaped Llama with random weights, fp32, prompts of 32 tokens.

    python bench/decode.py --batch 1
    python bench/decode.py --batch 16 --candidates hf_dynamic,ours
    python bench/decode.py --gguf model.f32.gguf --candidates hf_dynamic,ours,llamacpp      (needs xllamacpp)

    tokens/s = batch * (34 - 2) / (time for 34 new tokens - time for 2 new tokens)

so that start-up and the prompt cancel. `ours` is the Engine with everything that a request pays: events, detokenizer,
stop checks. HF is `generate` with its dynamic and its static cache, litgpt its own `generate` loops.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from results import report, table
from turns import Serving, compare, parser

PROMPT, FEW, MANY = 32, 2, 34
CANDIDATES = "hf_dynamic,hf_static,litgpt,ours"
Generate = Callable[[int], None]  # makes that many new tokens for every row


@dataclass(frozen=True)
class Shape:
    layers: int = 30
    d: int = 576
    heads: int = 9
    kv: int = 3
    ffn: int = 1536
    vocab: int = 49152
    max_len: int = 2048


SMOKE = Shape(layers=1, d=64, heads=4, kv=2, ffn=96, vocab=512, max_len=128)


def prompts(shape: Shape, batch: int):
    import torch

    return torch.randint(1, shape.vocab, (batch, PROMPT), generator=torch.Generator().manual_seed(1))


class Letters:
    """The least that the engine asks of a tokenizer: every token reads as one letter."""

    pad_id, stop_ids, special_ids = 0, frozenset({0}), frozenset({0})

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        return [ord(c) % self.vocab_size for c in text]

    def stream(self, begins: bool = True) -> Letters:
        return self

    def push(self, token: int) -> str:
        return chr(97 + token % 26)

    def flush(self) -> str:
        return ""


def ours(shape: Shape, batch: int) -> Generate:
    from zero2llm.engine.engine import Engine
    from zero2llm.engine.sampling import Sampling
    from zero2llm.model.lm import LM
    from zero2llm.model.presets import llama

    size = (shape.vocab, shape.d, shape.layers, shape.heads, shape.kv, shape.ffn, shape.max_len)
    engine = Engine(LM(llama(*size, base=1e5, tied=True)), Letters(shape.vocab))
    rows = prompts(shape, batch).tolist()

    def generate(n: int) -> None:
        done = engine.generate(rows, Sampling(max_tokens=n, temperature=0, ignore_eos=True))
        assert all(len(completion.tokens) == n for completion in done)

    return generate


def hf(shape: Shape, batch: int, cache: str | None) -> Generate:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.d, intermediate_size=shape.ffn, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv, max_position_embeddings=shape.max_len,
        tie_word_embeddings=True, attn_implementation="sdpa", bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )).eval()  # fmt: skip
    ids = prompts(shape, batch)
    extra = {"cache_implementation": cache} if cache else {}

    @torch.inference_mode()
    def generate(n: int) -> None:
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=n, min_new_tokens=n, **extra
        )
        assert out.shape[1] == PROMPT + n

    return generate


def litgpt(shape: Shape, batch: int) -> Generate:
    import torch
    from litgpt import GPT, Config
    from litgpt.generate import base

    model = GPT(Config(
        name="bench", block_size=shape.max_len, vocab_size=shape.vocab, padded_vocab_size=shape.vocab, n_layer=shape.layers,
        n_head=shape.heads, n_query_groups=shape.kv, n_embd=shape.d, rotary_percentage=1.0, parallel_residual=False,
        bias=False, norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", intermediate_size=shape.ffn,
    )).eval()  # fmt: skip
    model.lm_head.weight = model.transformer.wte.weight
    model.max_seq_length = PROMPT + MANY
    model.set_kv_cache(batch_size=batch)
    ids = prompts(shape, batch)

    @torch.inference_mode()
    def generate(n: int) -> None:
        if batch == 1:
            assert base.generate(model, ids[0], PROMPT + n, temperature=0.0, top_k=1, eos_id=None).numel() == PROMPT + n
            return
        greedy = {"temperature": 0.0, "top_k": 1}
        made = base.batched_generate_fn(
            model, ids, PROMPT + n, sample_args=greedy, include_prompt=False, include_eos=False
        )
        assert sum(1 for _ in made) >= n - 1

    return generate


def llamacpp(gguf: Path, batch: int, threads: int) -> Generate:
    """llama.cpp's server inside this process; more rows = that many parallel slots. Takes the weights of the file."""
    import json

    import xllamacpp

    p = xllamacpp.CommonParams()
    p.model.path = str(gguf)
    p.n_ctx, p.n_parallel, p.n_predict, p.n_gpu_layers = (PROMPT + MANY + 8) * batch, batch, -1, 0
    p.cpuparams.n_threads = p.cpuparams_batch.n_threads = threads
    p.warmup, p.verbosity, p.cache_prompt, p.cache_ram_mib = False, -1, False, 0
    server = xllamacpp.Server(p)
    rows = prompts(Shape(), batch).tolist()

    def one(row: list[int], n: int) -> None:
        ask = {
            "prompt": row,
            "n_predict": n,
            "temperature": 0.0,
            "ignore_eos": True,
            "cache_prompt": False,
            "stream": False,
        }
        reply = server.handle_completions(ask)
        reply = reply if isinstance(reply, dict) else json.loads(reply)
        assert (reply.get("usage") or {}).get("completion_tokens", reply.get("tokens_predicted")) == n, reply

    def generate(n: int) -> None:
        asking = [threading.Thread(target=one, args=(row, n)) for row in rows]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join()

    return generate


def build(name: str, shape: Shape, batch: int, gguf: Path | None, threads: int) -> Generate:
    if name == "llamacpp":
        return llamacpp(gguf, batch, threads)
    if name.startswith("hf_"):
        return hf(shape, batch, {"hf_dynamic": None, "hf_static": "static"}[name])
    return {"ours": ours, "litgpt": litgpt}[name](shape, batch)


def timed(generate: Generate, n: int) -> tuple[float, float]:
    began, cpu = time.perf_counter(), time.process_time()
    generate(n)
    return time.perf_counter() - began, time.process_time() - cpu


def work(name: str, shape: Shape, batch: int, gguf: Path | None, threads: int) -> None:
    serving = Serving()
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    generate = build(name, shape, batch, gguf, threads)
    generate(MANY)

    def measure() -> tuple[float, float]:
        few, many = timed(generate, FEW), timed(generate, MANY)
        return (many[0] - few[0]) / (MANY - FEW), (many[1] - few[1]) / (MANY - FEW)

    serving.measure(measure)


def main() -> None:
    p = parser(__doc__, rounds=7)
    p.add_argument("--batch", type=int, default=1)
    p.add_argument("--candidates", default=CANDIDATES)
    p.add_argument("--baseline", help="the candidate that ratios refer to; default: the first")
    p.add_argument("--gguf", type=Path, help="weights for the candidate llamacpp")
    args = p.parse_args()
    if args.worker:
        return work(args.worker, SMOKE if args.smoke else Shape(), args.batch, args.gguf, args.threads)
    names = args.candidates.split(",")
    if "llamacpp" in names and args.gguf is None:
        p.error("the candidate llamacpp needs --gguf")
    args.rounds = 2 if args.smoke else args.rounds
    options = ["--batch", str(args.batch), "--threads", str(args.threads), *(["--smoke"] if args.smoke else [])]
    options += ["--gguf", str(args.gguf)] if args.gguf else []
    results = compare(__file__, names, options, args.rounds, args.threads)
    about = {"shape": "smollm2-135m", "batch": args.batch, "prompt": PROMPT, "new tokens": f"{FEW} to {MANY}", "threads": args.threads, "rounds": args.rounds}  # fmt: skip
    report(args, about, results, table(results, args.baseline or names[0], args.batch, "tok", "step"))
    if all(r.failed for r in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
