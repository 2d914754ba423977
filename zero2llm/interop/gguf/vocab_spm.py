"""SentencePiece vocabularies in GGUF: BPE (`tokenizer.ggml.model` = "llama": Llama 2, Gemma) and Unigram ("t5").

    scores              which pieces to join first (BPE), log probabilities (Unigram)
    token_type          1 normal, 2 unknown, 3 control, 4 a user's own symbol, 5 unused, 6 byte
    add_space_prefix    a blank stands before every text; remove_extra_whitespaces, precompiled_charsmap: as in SentencePiece

Source: ggml, docs/gguf.md; llama-vocab.cpp of llama.cpp (llm_tokenizer_spm_session, llm_tokenizer_ugm_session).
llama.cpp joins whatever two neighbours make a token, the best-scored first; tokenizer.json lists such pairs. It has no scores,
so export counts down from the first piece made: only their order is ever used. A vocabulary whose pairs follow another
rule is refused, and so is what these two forms cannot do: rewriting text before BPE, bytes in Unigram.
"""

from __future__ import annotations

import base64
import json
from itertools import product
from typing import Any

from tokenizers import Tokenizer as Library

from zero2llm.interop.gguf.values import Typed
from zero2llm.tokenizers.imports import sentencepiece
from zero2llm.tokenizers.imports.sentencepiece import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER, Model, Piece
from zero2llm.tokenizers.nature import BLANK, BYTES, look_alikes, steps

SCORES, PREFIX, SQUEEZE, TABLE = (
    f"tokenizer.ggml.{key}" for key in ("scores", "add_space_prefix", "remove_extra_whitespaces", "precompiled_charsmap")
)
UNKNOWN_ID = "tokenizer.ggml.unknown_token_id"
BEHIND = "it has symbols of its own: llama.cpp puts a blank also behind such a symbol, SentencePiece does not"
FIRST = "llama.cpp puts a blank before every text and behind every control token; this tokenizer not before a blank, or only at the start"


def read_spm(meta: dict[str, Any], tokens: list[str], types: list[int]) -> tuple[Library, list[str]]:
    """The library's form and notes. Raises ValueError if scores or bytes are missing, or it cannot do the same."""
    bpe, scores = meta["tokenizer.ggml.model"] == "llama", meta.get(SCORES, [])
    if len(scores) < len(tokens):
        raise ValueError(f"{SCORES} has {len(scores)} entries for {len(tokens)} tokens")
    if bpe and (missing := sorted(set(BYTES) - set(tokens))):
        raise ValueError(f"bytes without a token: {', '.join(missing[:8])}")
    names = [token.replace(" ", BLANK) if kind == USER else token for token, kind in zip(tokens, types, strict=True)]
    if odd := reachable(names, [i for i, kind in enumerate(types) if kind == UNUSED]) if bpe else []:
        raise ValueError(f"token {odd[0]!r} is marked unused, but two tokens make it; the tokenizers library cannot switch it off")
    prefix, squeeze, table = meta.get(PREFIX, True), meta.get(SQUEEZE, False), bytes(meta.get(TABLE, []))
    if bpe and (squeeze or table):
        raise ValueError("it rewrites text before BPE (remove_extra_whitespaces or precompiled_charsmap), which is not supported")
    unknown = meta.get(UNKNOWN_ID, 0 if bpe else 2)
    if not 0 <= unknown < len(tokens):
        raise ValueError(f"{UNKNOWN_ID} is {unknown}, but there are {len(tokens)} tokens")
    pieces = [Piece(*entry) for entry in zip(names, scores, types, strict=False)]
    made = sentencepiece.library(Model(pieces, "bpe" if bpe else "unigram", bpe, [unknown, -1, -1, -1], table, prefix, squeeze))
    return made, [BEHIND] if bpe and prefix and USER in types else []


def write_spm(data: dict[str, Any], names: list[str], types: list[int]) -> tuple[dict[str, Any], list[str]]:
    """Scores and what is done before them as metadata, and notes. Raises ValueError naming what llama.cpp could not do."""
    model = data["model"]
    bpe, prefix, squeeze, table, notes = model["type"] == "BPE", *_before(data, names, types)
    if bpe and (squeeze or table):
        raise ValueError("it rewrites text before BPE (a table of replacements, or squeezed blanks), for which GGUF has no place")
    if bpe and (not model.get("byte_fallback") or set(BYTES) - set(names)):
        raise ValueError("it is a BPE on characters without tokens for bytes; GGUF has BPE on bytes, or with them")
    if not bpe and model.get("byte_fallback"):
        raise ValueError("it is Unigram that spells unknown characters in bytes; GGUF's Unigram (t5) makes them one unknown token")
    known = dict(model["vocab"]) if not bpe else _scores(model, names, types)
    meta = {"tokenizer.ggml.model": "llama" if bpe else "t5", "tokenizer.ggml.pre": "default", PREFIX: prefix, SQUEEZE: squeeze}
    meta[SCORES] = [float(known.get(name, 0.0)) for name in names]
    meta |= {TABLE: Typed("uint8", list(table))} if table else {}
    if bpe and prefix and USER in types:
        notes.append(BEHIND)
    if odd := reachable(names, [i for i, kind in enumerate(types) if kind in (UNKNOWN, CONTROL, UNUSED, BYTE)]) if bpe else []:
        notes.append(f"llama.cpp takes text that spells {', '.join(odd[:4])} for that token, since two tokens make it")
    return meta, notes


def _before(data: dict[str, Any], names: list[str], types: list[int]) -> tuple[bool, bool, bytes, list[str]]:
    """Prefix, squeezed blanks, table of replacements, notes. Raises ValueError for any other normalizer or splitter."""
    normal, parts = steps(data.get("normalizer"), "normalizers"), steps(data.get("pre_tokenizer"), "pretokenizers")
    table = base64.b64decode(normal[0]["precompiled_charsmap"]) if normal and normal[0]["type"] == "Precompiled" else b""
    normal = [step | {"prepend": " "} if step["type"] == "Prepend" else step for step in normal[bool(table) :]]
    rule = look_alikes([name for name, kind in zip(names, types, strict=True) if kind in (UNKNOWN, CONTROL, BYTE)])
    match parts:
        case [] | [{"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}]:  # Gemma's, after blanks are gone
            pass
        case [{"type": "Split", "pattern": {"Regex": found}, "behavior": "MergedWithNext"}] if found == rule:
            pass
        case [{"type": "Metaspace", "replacement": "\u2581", "split": False, "prepend_scheme": when}] if not normal:
            return when != "never", False, table, [FIRST] if when != "never" else []
        case _:
            raise ValueError(f"GGUF has no place for its pre_tokenizer ({', '.join(step['type'] for step in parts)}) in a SentencePiece vocabulary")
    for prefix, squeeze in product((True, False), repeat=2):
        plain = Model([Piece("<unk>", 0.0, UNKNOWN)], dummy_prefix=prefix, squeezes_blanks=squeeze)
        if normal == steps(json.loads(sentencepiece.library(plain).to_str())["normalizer"], "normalizers"):
            return prefix, squeeze, table, []
    raise ValueError(f"its normalizer ({', '.join(step['type'] for step in normal) or 'none'}) is not SentencePiece's, for which alone GGUF has a place")


def _scores(model: dict[str, Any], names: list[str], types: list[int]) -> dict[str, float]:
    """Of each piece: minus the number of pieces that are made earlier."""
    groups: dict[str, set[tuple[str, ...]]] = {}
    last = None
    for pair in model["merges"]:
        pair = tuple(pair.split(" ") if isinstance(pair, str) else pair)
        if (piece := "".join(pair)) != last and piece in groups:
            raise ValueError(f"its merges make {piece!r} at two places, so no score can say when")
        last = piece
        groups.setdefault(piece, set()).add(pair)
    every, normal = set(names), {name for name, kind in zip(names, types, strict=True) if kind == NORMAL}
    if odd := sorted(name for name in normal if len(name) > 1 and not every.issuperset(name)):
        raise ValueError(f"a character of {odd[0]!r} has no token of its own, so llama.cpp would make it and the tokenizers library not")
    for name in normal:
        found, both = groups.get(name, set()), cuts(name)
        if not {c for c in both if normal.issuperset(c)} <= found <= {c for c in both if every.issuperset(c)}:
            raise ValueError(f"its merges do not make {name!r} in every way two tokens can, as SentencePiece does")
    order = {piece: -float(i) for i, piece in enumerate(groups)}
    return order | {name: -float(len(order) + i) for i, name in enumerate(names) if name not in order}


def reachable(names: list[str], which: list[int]) -> list[str]:
    """Those of the tokens ``which`` that two tokens of the vocabulary make when joined."""
    known = set(names)
    return [names[i] for i in which if any(known.issuperset(cut) for cut in cuts(names[i]))]


def cuts(piece: str) -> list[tuple[str, str]]:
    return [(piece[:i], piece[i:]) for i in range(1, len(piece))]
