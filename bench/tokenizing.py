"""Tokenizers: encoding on one core and on several against tokenizers and tiktoken, and training against their trainers.

    python bench/tokenizing.py                       encoding: English and Chinese, one core and two
    python bench/tokenizing.py --what train          training: ours by hand, tokenizers, rustbpe
    python bench/tokenizing.py --what corpus         a whole corpus with 1 and with 2 cores, ours

All candidates of a run share one vocabulary, trained on the texts themselves; `ours` is `Tokenizer.encode` and
`encode_batch` as everything else calls them, checks included. A candidate's ids are compared with ours before it is timed.
One turn encodes (or trains on) the whole sample once. Each candidate runs in a process of its own: turns.py.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from results import report, table
from turns import Serving, compare, parser

SIZE = {"encode": 4_000_000, "corpus": 16_000_000, "train": 2_000_000}  # bytes of text in a turn
SMALL = 60_000
TEXTS = {"en": ("embedded:en_austen", "embedded:en_moby_dick"), "zh": ("embedded:zh_songci", "embedded:zh_classical_prose")}
CANDIDATES = {
    "encode": ["tiktoken", "ours", "tokenizers", "ours@all", "tiktoken@all", "tokenizers@all"],
    "corpus": ["ours@1", "ours@all"],
    "train": ["tokenizers", "rustbpe", "handwritten"],
}


def sample(language: str, size: int) -> list[str]:
    """About ``size`` bytes of documents, read again from the beginning where the texts are shorter."""
    from zero2llm.data.sources import documents

    found, total = list(documents(list(TEXTS[language]))), 0
    out: list[str] = []
    while total < size:
        for text in found:
            out.append(text)
            total += len(text.encode())
            if total >= size:
                break
    return out


def vocabulary(vocab: int, language: str, size: int):
    """Trained once by whoever comes first, read by the others."""
    import tempfile

    from zero2llm.tokenizers.tokenizer import Tokenizer

    folder = Path(tempfile.gettempdir()) / f"zero2llm-bench-{os.getppid()}-{vocab}-{language}"
    if not (folder / "tokenizer.json").is_file():
        Tokenizer.train(sample(language, max(size, 3_000_000) if vocab > 1000 else size), vocab, engine="library").save(folder)
    return Tokenizer.load(folder)


def encoder(name: str, tokenizer, texts: list[str]):
    """What one turn does, and the ids of the first texts for the comparison."""
    import tiktoken

    from zero2llm.tokenizers.bytes import SPLITS
    from zero2llm.tokenizers.engines import Tiktoken, ranks_of

    kind, _, cores = name.partition("@")
    if kind == "ours":
        if not isinstance(tokenizer.engine, Tiktoken):
            raise ValueError(f"no fast engine: {tokenizer.engine}")
        tokenizer.encode_batch(texts * (1 + 50 * tokenizer.vocab_size // sum(map(len, texts))))  # so much text that the engine pays
        return (lambda: tokenizer.encode_batch(texts)) if cores == "all" else lambda: [tokenizer.encode(t) for t in texts]
    if kind == "tokenizers":
        library = tokenizer.library
        if cores == "all":
            return lambda: [e.ids for e in library.encode_batch_fast(texts, add_special_tokens=False)]
        return lambda: [library.encode(t, add_special_tokens=False).ids for t in texts]
    ranks = ranks_of(json.loads(tokenizer.library.to_str()))
    encoding = tiktoken.Encoding("bench", pat_str=SPLITS[tokenizer.split], mergeable_ranks=ranks, special_tokens={})
    if cores == "all":
        return lambda: encoding.encode_ordinary_batch(texts, num_threads=len(os.sched_getaffinity(0)))
    return lambda: [encoding.encode_ordinary(t) for t in texts]


def trainer(name: str, texts: list[str], vocab: int):
    from zero2llm.tokenizers.bpe import train_bpe
    from zero2llm.tokenizers.engines import train_rustbpe
    from zero2llm.tokenizers.fast import train_library

    merges = vocab - 260
    return {
        "tokenizers": lambda: train_library(texts, vocab, "qwen2"),
        "rustbpe": lambda: train_rustbpe(texts, merges, "qwen2"),
        "handwritten": lambda: train_bpe(texts, merges, "qwen2"),
    }[name]


def work(args) -> None:
    serving = Serving()
    if args.what == "train":
        texts = sample(args.language, args.bytes)
        turn, same = trainer(args.worker, texts, args.vocab), None
        n = len(turn())
    else:
        texts = sample(args.language, args.bytes)
        tokenizer = vocabulary(args.vocab, args.language, args.bytes)
        if args.worker.endswith("@1") and "sched_setaffinity" in dir(os):
            os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[0]})
        turn = encoder(args.worker.replace("@1", "@all"), tokenizer, texts)
        got, want = turn(), [tokenizer.core.encode(t, add_special_tokens=False).ids for t in texts[:200]]
        same, n = got[:200] == want, sum(map(len, got))
        if not same:
            raise ValueError(f"{args.worker} gives other ids than the tokenizers library")
    for _ in serving.turns(1, 0, same_ids=same, made=n, bytes=sum(len(t.encode()) for t in texts)):
        turn()


def main() -> None:
    p = parser(__doc__, rounds=7)
    p.add_argument("--what", choices=list(SIZE), default="encode")
    p.add_argument("--languages", default="en,zh")
    p.add_argument("--language", help="of a worker")
    p.add_argument("--vocab", type=int, default=16_384)
    p.add_argument("--bytes", type=int, help="of text in a turn")
    p.add_argument("--candidates", help="some of those of the kind of run, the first is the baseline")
    args = p.parse_args()
    if args.smoke:
        args.vocab, args.rounds, args.languages = 600, 2, args.languages.split(",")[0]
    args.bytes = args.bytes or (SMALL if args.smoke else SIZE[args.what])
    if args.worker:
        return work(args)
    names = args.candidates.split(",") if args.candidates else CANDIDATES[args.what]
    for language in args.languages.split(","):
        options = ["--what", args.what, "--language", language, "--vocab", str(args.vocab), "--bytes", str(args.bytes)]
        results = compare(__file__, names, options, args.rounds, args.threads)
        megabytes = next((r.note.get("bytes", 0) for r in results.values() if not r.failed), 0) / 1e6
        text = f"\n## {args.what}, {language}: {megabytes:.1f} MB, vocabulary {args.vocab:,}\n\n" + table(results, names[0], megabytes, "MB", "turn")
        saved = args.json
        if saved is not None:
            args.json = saved.with_name(f"{saved.stem}-{language}{saved.suffix}")
        report(args, {"what": args.what, "language": language, "vocab": args.vocab, "bytes": args.bytes}, results, text)
        args.json = saved


if __name__ == "__main__":
    sys.exit(main())
