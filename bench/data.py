"""Near-duplicates, side by side: documents per second from text to signature, and from text to the list of duplicates.

    python bench/data.py                                         the embedded English and Chinese texts
    python bench/data.py --texts corpus.jsonl --candidates datasketch,rensa --json out.json

`sign`   text -> MinHash signature of 126 slots over 5-grams (words; characters where there are no spaces)
`dedup`  sign, then LSH in 21 bands of 6: the list of duplicates. Ours also check each candidate's estimate.

`handwritten` and `rensa` are the two engines of the minhash step, given 256 documents at a time; `handwritten+1` and
`rensa+1` one at a time. `datasketch` is its MinHash as its manual recommends for many documents (one set of
permutations, SHA-1), its shingles cut by the fastest Python found (one `re` pattern, `zip`, `join`);
`datasketch+crc32` exchanges SHA-1 for zlib's CRC-32, the cheapest 32-bit hash of the standard library. One thread,
everything in memory, no reading of files.
Needs datasketch and rensa for those; see docs/benchmarks.md.
"""

from __future__ import annotations

import os
import re
import sys
import zlib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

from results import report, table
from turns import Serving, compare, parser

CANDIDATES = "datasketch,datasketch+crc32,handwritten,handwritten+1,rensa,rensa+1"
PARTS = "sign,dedup"
NGRAM, BANDS, ROWS = 5, 21, 6
UNIT = re.compile("[\u3040-\u30ff\u3400-\u9fff]|[^\\W_\u3040-\u30ff\u3400-\u9fff]+")


def texts_of(paths: list[str], limit: int | None) -> list[str]:
    from itertools import islice

    from zero2llm.data.sources import documents

    return list(islice(documents(paths), limit))


def shingle_bytes(text: str) -> list[bytes]:
    words = UNIT.findall(text.lower())
    if len(words) < NGRAM:
        return [" ".join(words).encode()]
    return [" ".join(gram).encode() for gram in zip(*(words[j:] for j in range(NGRAM)), strict=False)]


def datasketch_work(crc32: bool, dedup: bool) -> Callable[[list[str]], int]:
    from datasketch import MinHash, MinHashLSH

    options = {"hashfunc": zlib.crc32} if crc32 else {}

    def work(texts: list[str]) -> int:
        made = MinHash.generator(map(shingle_bytes, texts), num_perm=BANDS * ROWS, **options)
        if not dedup:
            return sum(1 for _ in made)
        index, found = MinHashLSH(num_perm=BANDS * ROWS, params=(BANDS, ROWS)), 0
        for i, sketch in enumerate(made):
            found += bool(index.query(sketch))
            index.insert(i, sketch)
        return found

    return work


def our_work(engine: str, batch: int, dedup: bool) -> Callable[[list[str]], int]:
    import numpy as np

    from zero2llm.data.document import Document
    from zero2llm.data.steps.minhash import MinHashConfig

    step = MinHashConfig(engine=engine, ngram=NGRAM, bands=BANDS, rows=ROWS).build()

    def work(texts: list[str]) -> int:
        docs = [Document(text, "") for text in texts]
        signed = [rows for i in range(0, len(docs), batch) for rows in step.sign_many(docs[i : i + batch])]
        if not dedup:
            return len(signed)
        rows = np.concatenate(signed)
        return int((~step.decide(rows, np.arange(len(rows))).keep).sum())

    return work


def work_of(name: str) -> Callable[[list[str]], int]:
    part, _, candidate = name.partition(":")
    library, _, variant = candidate.partition("+")
    if library == "datasketch" and variant in ("", "crc32"):
        return datasketch_work(variant == "crc32", part == "dedup")
    if library in ("handwritten", "rensa") and variant in ("", "1"):
        return our_work(library, 1 if variant else 256, part == "dedup")
    raise ValueError(f"unknown candidate {candidate!r}; there are: {CANDIDATES}")


def work(name: str, paths: list[str], limit: int | None) -> None:
    os.environ["RAYON_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")  # rensa's threads
    line = Serving()
    texts, run, found = texts_of(paths, limit), work_of(name), 0
    found = run(texts)
    for _ in line.turns(units=1, warmup=0, found=found):
        run(texts)


def versions() -> dict[str, str]:
    found = {}
    for package in ("numpy", "datasketch", "rensa"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            pass
    return found


def main() -> None:
    p = parser(__doc__, rounds=5)
    p.add_argument("--texts", nargs="+", default=["embedded"], help="files that zero2llm reads, with a field `text`")
    p.add_argument("--limit", type=int, help="only the first documents")
    p.add_argument("--candidates", default=CANDIDATES)
    p.add_argument("--parts", default=PARTS, help="sign, dedup or both")
    p.set_defaults(threads=1)
    args = p.parse_args()
    if args.smoke:
        args.rounds, args.limit, args.candidates = 2, 200, "handwritten,handwritten+1"
    if args.worker:
        return work(args.worker, args.texts, args.limit)
    texts = texts_of(args.texts, args.limit)
    mb = sum(len(text.encode()) for text in texts) / 1e6
    names = [f"{part}:{name}" for part in args.parts.split(",") for name in args.candidates.split(",")]
    given = ["--texts", *args.texts] + (["--limit", str(args.limit)] if args.limit else [])
    results = compare(sys.argv[0], names, given, args.rounds, args.threads)
    tables = []
    for part in args.parts.split(","):
        some = {name: result for name, result in results.items() if name.startswith(f"{part}:")}
        tables.append(table(some, next(iter(some)), len(texts), "documents", "pass"))
        tables += [
            f"{r.name}: {mb / r.seconds:.1f} MB/s" + (f", {r.note['found']} duplicates" if part == "dedup" else "")
            for r in some.values()
            if r.turns
        ]
    about = {"documents": len(texts), "mb": round(mb, 1), "threads": args.threads, "rounds": args.rounds} | versions()
    report(args, about, results, "\n".join(tables))


if __name__ == "__main__":
    main()
