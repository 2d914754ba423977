"""SentencePiece `.model` files, Unigram and BPE, rebuilt on the tokenizers library with the same ids.

    text -> normalise (a table of replacements) -> blanks become U+2581, one in front -> pieces

Source: sentencepiece_model.proto, unigram_model.cc and bpe_model.cc of google/sentencepiece; 1804.10959 (Unigram).
Why: Llama-2, Mistral, T5 and many Chinese models come as such a file.

    Unigram   scores as they stand; a user's own symbol has 0.1 for each byte but the first (as in version 0.2.3), so it wins
    BPE       joins whatever two neighbours make the best-scored piece: every way to cut a piece in two is a merge

Control and byte pieces (`<s>`, `<0x0A>`) are no text in SentencePiece. The library would find them in a typed text, so
a cut is made inside what only looks like one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from zero2llm.tokenizers.imports.found import Found
from zero2llm.tokenizers.imports.protobuf import fields, number, signed
from zero2llm.tokenizers.nature import BLANK, look_alikes
from zero2llm.tokenizers.special import guess_roles

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
MODEL, VOCABULARY, FALLBACK, SUFFIX, FIRST_ID = 3, 4, 35, 24, 40  # fields of TrainerSpec; ids of unk, bos, eos, pad at 40 ..


@dataclass(frozen=True)
class Piece:
    text: str
    score: float
    kind: int


@dataclass
class Model:
    """What a file says, with SentencePiece's defaults for what it leaves out."""

    pieces: list[Piece] = field(default_factory=list)
    kind: str = "unigram"
    byte_fallback: bool = False
    ids: list[int] = field(default_factory=lambda: [0, 1, 2, -1])  # unk, bos, eos, pad; -1 = none
    table: bytes = b""  # of normalisation
    dummy_prefix: bool = True
    squeezes_blanks: bool = True


def parse(data: bytes) -> Model:
    """Raises ValueError for damage, or for what the library cannot do."""
    model = Model()
    try:
        for tag, value in fields(data):
            if tag == 1:
                model.pieces.append(_piece(value))
            elif tag == 2:
                _trainer(model, value)
            elif tag == 3:
                _normalizer(model, value)
    except (TypeError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"a field has another type than SentencePiece's ({error})") from None
    if not model.pieces:
        raise ValueError("it holds no pieces: this is no SentencePiece model")
    if model.kind not in ("unigram", "bpe"):
        raise ValueError(f"its type is {model.kind!r}; unigram and bpe can be read")
    own = [p.text for p in model.pieces if p.kind == USER]
    if own and model.dummy_prefix and model.squeezes_blanks and model.kind == "bpe":
        raise ValueError(f"a BPE with symbols of its own ({own[0]!r} ...) that also squeezes blanks is not supported")
    if any(p.kind == UNUSED for p in model.pieces):
        raise ValueError("it has pieces marked unused, which the tokenizers library cannot switch off")
    return model


def _piece(data: bytes) -> Piece:
    text, score, kind = "", 0.0, NORMAL
    for tag, value in fields(data):
        if tag == 1:
            text = value.decode("utf-8")
        elif tag == 2:
            score = number(value)
        elif tag == 3:
            kind = value
    return Piece(text, score, kind)


def _trainer(model: Model, data: bytes) -> None:
    for tag, value in fields(data):
        if tag == MODEL:
            model.kind = TYPES.get(value, str(value))
        elif tag == FALLBACK:
            model.byte_fallback = bool(value)
        elif tag == SUFFIX and value:
            raise ValueError("it writes blanks at the end of words (treat_whitespace_as_suffix), which is not supported")
        elif FIRST_ID <= tag < FIRST_ID + 4:
            model.ids[tag - FIRST_ID] = signed(value)


def _normalizer(model: Model, data: bytes) -> None:
    for tag, value in fields(data):
        if tag == 2:
            model.table = value
        elif tag == 3:
            model.dummy_prefix = bool(value)
        elif tag == 4:
            model.squeezes_blanks = bool(value)
        elif tag == 5 and not value:
            raise ValueError("it keeps blanks as they are (escape_whitespaces = false), which is not supported")


def merges(pieces: list[Piece]) -> list[tuple[str, str]]:
    """Every way to cut a piece into two others, the best-scored piece first."""
    known = {p.text for p in pieces if p.kind == NORMAL}
    ranked = sorted((p for p in pieces if p.kind == NORMAL and len(p.text) > 1), key=lambda p: -p.score)
    cuts = ((p.text[:i], p.text[i:]) for p in ranked for i in range(1, len(p.text)))
    return [(a, b) for a, b in cuts if a in known and b in known]


def library(model: Model) -> Tokenizer:
    """The tokenizers library's form of it."""
    names = [p.text for p in model.pieces]
    if model.kind == "bpe":
        vocab = {name: i for i, name in enumerate(names)}
        core = models.BPE(vocab=vocab, merges=merges(model.pieces), unk_token=names[model.ids[0]], fuse_unk=True,
                          byte_fallback=model.byte_fallback)  # fmt: skip
    else:
        weigh = lambda p: 0.1 * (len(p.text.encode()) - 1) if p.kind == USER else p.score
        core = models.Unigram([(p.text, weigh(p)) for p in model.pieces], model.ids[0], model.byte_fallback)
    tokenizer = Tokenizer(core)
    tokenizer.normalizer = normalizers.Sequence(_rules(model))
    typed = [p.text for p in model.pieces if p.kind in (UNKNOWN, CONTROL, BYTE)]
    if model.kind == "unigram" and (rule := look_alikes(typed)):
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(rule), "merged_with_next")
    steps = [decoders.Replace(BLANK, " "), *([decoders.ByteFallback()] if model.byte_fallback else []), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if model.dummy_prefix else []))
    special = [p.text for p in model.pieces if p.kind in (UNKNOWN, CONTROL)]
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in special])
    if model.kind == "bpe":
        own = [p.text for p in model.pieces if p.kind == USER and " " not in p.text]  # a blank is never seen: it was replaced
        tokenizer.add_tokens([AddedToken(s, special=False, normalized=BLANK in s) for s in own])
    return tokenizer


def _rules(model: Model) -> list:
    """The steps of normalisation; `\\z` and not `$`, which also matches before a last line break."""
    steps = [normalizers.Precompiled(model.table)] if model.table else []
    if model.squeezes_blanks:
        for rule, by in ((r"\A +", ""), (rf"[ {BLANK}]+\z", ""), (" +", " ")):
            steps.append(normalizers.Replace(Regex(rule), by))
    steps += [normalizers.Prepend(" ")] if model.dummy_prefix else []
    return [*steps, normalizers.Replace(" ", BLANK)]


def read_sentencepiece(path: Path, eos: str | None = None) -> Found:
    """Raises ValueError naming the file."""
    try:
        model = parse(path.read_bytes())
        names = [model.pieces[i].text if 0 <= i < len(model.pieces) else None for i in model.ids]
        said = {role: name for role, name in zip(("bos", "eos", "pad"), names[1:], strict=True) if name is not None}
        return Found(library(model), guess_roles([p.text for p in model.pieces], said | ({"eos": eos} if eos else {})), None)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: not a SentencePiece model that can be read: {error}") from None
