"""tiktoken's files: a line of base64 bytes and rank per token. Ranks are ids and the order of merges at once.

Source: openai/tiktoken load.py and openai_public.py (patterns and control tokens), QwenLM/Qwen tokenization_qwen.py,
meta-llama/llama-models tokenizer.py: facts that stand in no such file, so a name must say which it is.
From ranks to merges: a token's bytes, joined as long as that makes tokens of lower rank, end as the two parts that make it.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from zero2llm.tokenizers.bytes import SPLITS, alphabet, to_chars
from zero2llm.tokenizers.engines import merges_of_ranks
from zero2llm.tokenizers.imports.found import Found
from zero2llm.tokenizers.special import guess_roles

_END = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_LOW, _UP = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UP}*{_LOW}+{_END}|[^\r\n\p{{L}}\p{{N}}]?{_UP}+{_LOW}*{_END}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Encoding:
    """``specials``: control tokens and their ids, counted from the last rank + 1 if ``relative``."""

    rule: str
    specials: dict[str, int]
    relative: bool = False
    nfc: bool = False


def _llama3() -> dict[str, int]:
    named = {"<|begin_of_text|>": 0, "<|end_of_text|>": 1, "<|finetune_right_pad_id|>": 4, "<|start_header_id|>": 6,
             "<|end_header_id|>": 7, "<|eom_id|>": 8, "<|eot_id|>": 9, "<|python_tag|>": 10}  # fmt: skip
    free = [i for i in range(256) if i not in named.values()]
    return named | {f"<|reserved_special_token_{n}|>": i for n, i in enumerate(free)}


def _qwen() -> dict[str, int]:
    names = [f"<|extra_{i}|>" for i in range(205)]
    return {name: i for i, name in enumerate(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *names])}


_FIM = {"<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260, "<|endofprompt|>": 100276}
ENCODINGS = {
    "gpt2": Encoding(SPLITS["gpt2"], {"<|endoftext|>": 50256}),
    "r50k_base": Encoding(SPLITS["gpt2"], {"<|endoftext|>": 50256}),
    "p50k_base": Encoding(SPLITS["gpt2"], {"<|endoftext|>": 50256}),
    "cl100k_base": Encoding(SPLITS["llama3"], {"<|endoftext|>": 100257} | _FIM),
    "o200k_base": Encoding(O200K, {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}),
    "qwen": Encoding(SPLITS["qwen2"], _qwen(), relative=True, nfc=True),
    "llama3": Encoding(SPLITS["llama3"], _llama3(), relative=True),
}


def parse(data: bytes) -> dict[bytes, int]:
    """Bytes and rank of every token. Raises ValueError naming the line of a fault."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"line {number}: base64 and a number were expected, this is {line[:40]!r} ({error})") from None
    if len(set(ranks.values())) != len(ranks):
        raise ValueError("two tokens have the same rank")
    if missing := [b.hex() for b in alphabet() if b not in ranks]:
        raise ValueError(f"single bytes have no rank: {', '.join(missing[:8])}")
    return ranks


def encoding_of(file: Path, split: str | None) -> Encoding:
    """What ``split`` or the file's name says. ``split`` may be an encoding's name, a split rule of ours, or a rule itself."""
    name = split or file.name.removesuffix(".gz").removesuffix(".tiktoken").lower()
    if name in ENCODINGS:
        return ENCODINGS[name]
    if split in SPLITS:
        return Encoding(SPLITS[split], {"<|endoftext|>": 0}, relative=True)
    if split and "\\" in split:
        return Encoding(split, {"<|endoftext|>": 0}, relative=True)
    what = f"{split!r} is unknown" if split else "its name does not say how it cuts text"
    raise ValueError(f"{file}: {what}; give --split: one of {', '.join(dict.fromkeys([*ENCODINGS, *SPLITS]))}, or a rule")


def read_ranks(file: Path, split: str | None, eos: str | None) -> Found:
    """Raises ValueError naming file and line of a fault, or if nothing says how text is cut."""
    encoding = encoding_of(file, split)
    try:
        ranks = parse(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}, {error}") from None
    shift = max(ranks.values()) + 1 if encoding.relative else 0
    specials = {name: i + shift for name, i in encoding.specials.items()}
    taken = set(ranks.values()) & set(specials.values())
    if taken:
        raise ValueError(f"{file}: ids {sorted(taken)[:4]} are tokens of the file and control tokens at once; give another --split")
    merges, whole = merges_of_ranks(ranks)
    vocab = {to_chars(token): rank for token, rank in ranks.items()} | specials
    pairs = [(to_chars(a), to_chars(b)) for a, b in merges]
    library = Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=bool(whole)))
    cut = pre_tokenizers.Split(Regex(encoding.rule), "isolated")
    library.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    library.decoder = decoders.ByteLevel()
    if encoding.nfc:
        library.normalizer = normalizers.NFC()
    names = sorted(specials, key=specials.__getitem__)
    library.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in names])
    return Found(library, guess_roles(names, {"eos": eos} if eos else {}), None)
