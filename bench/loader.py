"""Text into token files, and token files into batches: how fast, and is training ever kept waiting?

    python bench/loader.py                      the embedded texts, four times over
    python bench/loader.py --copies 40

`encode, N processes` = documents to finished token files (read, tokenize, write, hash). `rows` = batches of 16 rows of 256 tokens as training
asks for them, in one process. Compare with what a training step consumes (train_step.py).
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path

from results import machine
from turns import parser


def timed(work, rounds: int) -> float:
    """Median seconds."""
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def main() -> None:
    p = parser(__doc__, rounds=3)
    p.add_argument("--copies", type=int, default=4, help="of the embedded texts, each a file of its own")
    args = p.parse_args()
    from zero2llm.data.encode import encode_documents
    from zero2llm.data.loader import Loader
    from zero2llm.data.mixture import MixtureRows, Phase
    from zero2llm.data.rows import DocumentRows, FittedRows, StoredRows
    from zero2llm.data.sources import BadRecords, Source, documents
    from zero2llm.tokenizers.tokenizer import Tokenizer

    names = ["zh_poetry_small"] if args.smoke else ["en_austen", "en_moby_dick", "zh_classical_prose", "zh_poetry_small", "zh_songci"]
    texts = list(documents([f"embedded:{name}" for name in names]))
    tokenizer = Tokenizer.train(texts[:: 1 if args.smoke else 8], 400 if args.smoke else 4096, engine="library")
    copies, rounds = (1, 1) if args.smoke else (args.copies, args.rounds)
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
        for i in range(copies):
            (folder / f"{i:03}.jsonl").write_text("".join(lines), encoding="utf-8")
        size = sum(f.stat().st_size for f in folder.glob("*.jsonl")) / 1e6
        source, made = Source(paths=(str(folder / "*.jsonl"),)), []
        for workers in (1, 2):

            def encode(workers=workers):
                out = folder / f"tokens{len(made)}"
                made.append(encode_documents([source], out, tokenizer, key=str(len(made)), workers=workers, bad=BadRecords()))

            seconds = timed(encode, rounds)
            found[f"encode, {workers} process{'es' * (workers > 1)}"] = {"tok/s": len(made[-1].tokens) / seconds, "MB/s": size / seconds}
        shards, n = made[-1], 5 if args.smoke else 200
        rows = {
            kind.__name__: kind(shards, 256, tokenizer.pad_id, tokenizer.eos_id, 1) for kind in (DocumentRows, StoredRows, FittedRows)
        }
        rows["MixtureRows of two"] = MixtureRows([rows["DocumentRows"], rows["StoredRows"]], [Phase(0, (0.7, 0.3))], 1)
        for name, kind in rows.items():
            loader = iter(Loader(kind, 16, seed=1))
            next(loader)  # the order of the first epoch
            seconds = timed(lambda loader=loader: [next(loader) for _ in range(n)], rounds)
            found[f"rows, {name}"] = {"tok/s": n * 16 * 256 / seconds}
        for shards in made:
            shards.close()
    print("| what | tok/s | MB/s of text |\n|---|---:|---:|")
    for name, row in found.items():
        print(f"| {name} | {row['tok/s']:,.0f} | {row.get('MB/s', 0):,.1f} |")
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), "found": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
