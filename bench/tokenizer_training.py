"""Training tokenizers: how much faster than counting everything again, and how good beside the libraries' trainers.

    python bench/tokenizer_training.py                      speed: BPE, the same merges, 1 MB of English and of Chinese
    python bench/tokenizer_training.py --what quality       bytes per token of every algorithm, ours and the libraries'

`speed`: one turn learns ``--merges`` merges from the whole text. `textbook` is rung 2 of zero2llm/tokenizers/ladder.py, which
counts all pairs anew for each merge, `handwritten` our trainer in pure Python; both must learn the same merges, or the run
fails. `tokenizers` and `rustbpe` are Rust. The textbook needs minutes a turn.
`quality`: each trainer gets nine documents of ten and as many entries; "seen" is the text it learned from, "new" the tenth
document. SentencePiece and the rows "space" get lines, cut at blanks only; all others our split rule qwen2 (WordPiece: BERT's).
Needs tokenizers; rustbpe and sentencepiece for those candidates: pip install rustbpe==0.1.0 sentencepiece==0.2.3.
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable

from results import machine, report, table
from turns import Serving, compare, parser

LANGUAGES = {"en": ("embedded:en_austen", "embedded:en_moby_dick"), "zh": ("embedded:zh_songci", "embedded:zh_classical_prose")}
CANDIDATES = "textbook,handwritten,tokenizers,rustbpe"
Encode = Callable[[str], list[int]]
Trained = tuple[Encode, int]  # and how many entries it has


def sample(language: str, size: int) -> list[str]:
    """About ``size`` bytes of documents, as much from each source."""
    from zero2llm.data.sources import documents

    out = []
    for source in LANGUAGES[language]:
        room = size // len(LANGUAGES[language])
        for text in documents([source]):
            out.append(text.encode()[:room].decode(errors="ignore"))
            room -= len(text.encode())
            if room <= 0:
                break
    return out


def speed_of(name: str, texts: list[str], merges: int) -> Callable[[], list[tuple[bytes, bytes]]]:
    from zero2llm.tokenizers.bpe import train_bpe, train_simple
    from zero2llm.tokenizers.engines import train_rustbpe
    from zero2llm.tokenizers.fast import train_library
    from zero2llm.tokenizers.special import SPECIALS

    return {
        "textbook": lambda: train_simple(texts, merges),
        "handwritten": lambda: train_bpe(texts, merges),
        "tokenizers": lambda: train_library(texts, merges + 256 + len(SPECIALS), "qwen2"),
        "rustbpe": lambda: train_rustbpe(texts, merges, "qwen2"),
    }[name]


def work(args) -> None:
    serving = Serving()
    texts = sample(args.language, args.bytes)
    turn = speed_of(args.worker, texts, args.merges)
    learned = speed_of("handwritten" if args.worker == "textbook" else args.worker, texts, args.merges)()
    for _ in serving.turns(1, 0, merges=len(learned), bytes=sum(len(t.encode()) for t in texts)):
        made = turn()
        if args.worker == "textbook" and made != learned:
            raise ValueError("the handwritten trainer learns other merges than the textbook")


def speed(args) -> None:
    for language in args.languages.split(","):
        options = ["--language", language, "--bytes", str(args.bytes), "--merges", str(args.merges)]
        results = compare(__file__, args.candidates.split(","), options, args.rounds, args.threads)
        megabytes = next((r.note["bytes"] for r in results.values() if r.note), 0) / 1e6
        title = f"\n## {language}: {megabytes:.2f} MB, {args.merges:,} merges\n\n"
        saved = args.json
        if saved is not None:
            args.json = saved.with_name(f"{saved.stem}-{language}{saved.suffix}")
        report(args, {"language": language, "merges": args.merges}, results, title + table(results, args.candidates.split(",")[0], megabytes, "MB", "turn"))
        args.json = saved


def ours(kind: str, texts: list[str], size: int, **options) -> Trained:
    from zero2llm.tokenizers.bpe import BPE, train_bpe
    from zero2llm.tokenizers.unigram import Unigram
    from zero2llm.tokenizers.unigram_train import train_unigram
    from zero2llm.tokenizers.wordpiece import WordPiece, train_wordpiece

    if kind == "bpe":
        merges = train_bpe(texts, size - 256)
        return BPE(merges, "qwen2").encode, len(merges) + 256
    if kind == "wordpiece":
        vocab = train_wordpiece(texts, size, **options)
        return WordPiece(vocab).encode, len(vocab)
    pieces = train_unigram(texts, size, **options)
    return Unigram(pieces, **options).encode, len(pieces)


def tokenizers(kind: str, texts: list[str], size: int) -> Trained:
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    from zero2llm.tokenizers.bpe import BPE
    from zero2llm.tokenizers.bytes import SPLITS
    from zero2llm.tokenizers.fast import train_library
    from zero2llm.tokenizers.special import SPECIALS

    if kind == "bpe":
        merges = train_library(texts, size + len(SPECIALS), "qwen2")
        return BPE(merges, "qwen2").encode, len(merges) + 256
    if kind == "wordpiece":
        library = Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
        library.normalizer, library.pre_tokenizer = normalizers.BertNormalizer(lowercase=False), pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=size, min_frequency=2, special_tokens=["[UNK]"], show_progress=False)
    else:
        library = Tokenizer(models.Unigram())
        library.pre_tokenizer = pre_tokenizers.Split(Regex(SPLITS["qwen2"]), "isolated")
        trainer = trainers.UnigramTrainer(vocab_size=size - 256, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    library.train_from_iterator(texts, trainer)
    return lambda text: library.encode(text).ids, library.get_vocab_size() + 256 * (kind == "unigram")


def sentencepiece(texts: list[str], size: int) -> Trained:
    import sentencepiece as library

    out = io.BytesIO()
    try:
        library.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=out, vocab_size=size, model_type="unigram", character_coverage=0.9995, byte_fallback=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False, bos_id=-1, eos_id=-1, num_threads=1, minloglevel=2,
            max_sentence_length=1 << 20, split_by_unicode_script=False, split_by_number=False,
        )  # fmt: skip
    except RuntimeError as error:  # too many entries for the text
        raise ValueError(str(error).split("]")[-1].strip()) from None
    trained = library.SentencePieceProcessor(model_proto=out.getvalue())
    return trained.encode, trained.vocab_size()


SPACE = {"split": "space", "space": "▁", "prefix": True}
TRAINERS = {  # name -> (whether it gets lines, how it is trained)
    "BPE, ours": (False, lambda texts, size: ours("bpe", texts, size)),
    "BPE, tokenizers": (False, lambda texts, size: tokenizers("bpe", texts, size)),
    "WordPiece count, ours": (False, lambda texts, size: ours("wordpiece", texts, size)),
    "WordPiece likelihood, ours": (False, lambda texts, size: ours("wordpiece", texts, size, score="likelihood")),
    "WordPiece ratio, ours": (False, lambda texts, size: ours("wordpiece", texts, size, score="ratio")),
    "WordPiece, tokenizers": (False, lambda texts, size: tokenizers("wordpiece", texts, size)),
    "Unigram, ours": (False, lambda texts, size: ours("unigram", texts, size)),
    "Unigram, tokenizers": (False, lambda texts, size: tokenizers("unigram", texts, size)),
    "Unigram space, ours": (True, lambda texts, size: ours("unigram", texts, size, **SPACE)),
    "Unigram space, SentencePiece": (True, sentencepiece),
}


def lines_of(texts: list[str]) -> list[str]:
    return [line for text in texts for line in text.split("\n") if line]


def rate(encode: Encode, texts: list[str]) -> float:
    """Bytes of text per token."""
    return sum(len(text.encode()) for text in texts) / sum(len(encode(text)) for text in texts)


def quality(args) -> None:
    found: dict[str, dict] = {name: {} for name in TRAINERS}
    for language in args.languages.split(","):
        texts = sample(language, args.bytes)
        seen, new = [t for i, t in enumerate(texts) if i % 10], texts[::10]
        for name, (lines, train) in TRAINERS.items():
            began = time.process_time()
            try:
                encode, entries = train(lines_of(seen) if lines else seen, args.vocab)
                seconds = time.process_time() - began
                rates = [rate(encode, lines_of(part) if lines else part) for part in (seen, new)]
            except (ImportError, ValueError) as error:
                found[name][language] = {"failed": str(error)[:80]}
                continue
            found[name][language] = {"seen": rates[0], "new": rates[1], "seconds": seconds, "entries": entries}
    languages = args.languages.split(",")
    print(f"{args.bytes / 1e6:g} MB of each language, vocabulary {args.vocab:,}; " + ", ".join(f"{k} {v}" for k, v in machine().items()))
    print("| trainer | " + " | ".join(f"{x} seen | {x} new | CPU-s" for x in languages) + " |")
    print("|---|" + "---:|" * (3 * len(languages)))
    for name, by in found.items():
        cells = []
        for r in by.values():
            fewer = f" ({r['entries']:,} entries)" if r.get("entries", args.vocab) < args.vocab else ""
            cells.append(f"failed: {r['failed']} | |" if "failed" in r else f"{r['seen']:.3f}{fewer} | {r['new']:.3f} | {r['seconds']:.1f}")
        print(f"| {name} | " + " | ".join(cells) + " |")
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), "options": {"bytes": args.bytes, "vocab": args.vocab}, "results": found}, indent=1) + "\n")


def main() -> None:
    p = parser(__doc__, rounds=3)
    p.add_argument("--what", choices=["speed", "quality"], default="speed")
    p.add_argument("--languages", default=",".join(LANGUAGES))
    p.add_argument("--language", help="of a worker")
    p.add_argument("--bytes", type=int, default=1_000_000, help="of text")
    p.add_argument("--merges", type=int, default=500)
    p.add_argument("--vocab", type=int, default=8000)
    p.add_argument("--candidates", default=CANDIDATES, help="of speed; the first is the baseline")
    args = p.parse_args()
    if args.smoke:
        args.bytes, args.merges, args.vocab, args.rounds = 20_000, 20, 2000, 2
    if args.worker:
        return work(args)
    return speed(args) if args.what == "speed" else quality(args)


if __name__ == "__main__":
    sys.exit(main())
