"""What a tokenizer file is made of: how its pieces spell bytes, what it adds to a text, and what of a text it loses.

    bytes    GPT-2, Llama-3, Qwen and ours: every byte has a printable stand-in; pieces are bytes
    blanks   SentencePiece with byte fallback: U+2581 is a blank, <0xE4> a byte; pieces are bytes
    text     WordPiece and whatever knows an unknown token: pieces are names, the library's decoder joins them

Why: ours, imported and exported tokenizers are one kind of object, and what differs between them stands here.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Container
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

from tokenizers import Tokenizer as Library

from zero2llm.tokenizers.bytes import SPLITS, byte_to_char, from_chars
from zero2llm.tokenizers.charsmap import Charsmap

BLANK = "\u2581"
BYTES = [f"<0x{b:02X}>" for b in range(256)]
KEEPING = {"ByteLevel", "Split", "Digits", "Punctuation", "UnicodeScripts", "Metaspace"}  # splitters that drop nothing


@dataclass(frozen=True)
class Nature:
    """``model``: BPE, Unigram, WordPiece ... ``split``: the name of its split rule, None if none of ours.
    ``loss``: why a text may not come back; empty if every text does. ``prefix``: what is put before a text, unless that
    begins with one of ``unless``; ``each``: also before text behind a control token. ``drops_blank``: a blank stands before
    every text, put there by `prepared` or by the library, so decoding takes one off.
    """

    model: str
    form: Literal["bytes", "blanks", "text"]
    split: str | None
    loss: str
    blank: str = ""  # the sign that stands for a blank, if not the blank itself
    prefix: str = ""
    unless: tuple[str, ...] = ()
    each: bool = True
    drops_blank: bool = False
    table: Charsmap | None = field(default=None, compare=False)

    def prepared(self, text: str, start: bool = True) -> str:
        """The text as the working core takes it. ``start``: it begins a document, not in the middle of one."""
        if self.table is not None:
            text = self.table.apply(text)
        return self.prefix + text if self.prefix and start and text and not text.startswith(self.unless) else text


def steps(part: dict | None, key: str) -> list[dict]:
    """A normalizer, splitter or decoder as a flat list."""
    if part is None:
        return []
    return [step for inner in part[key] for step in steps(inner, key)] if part["type"] == "Sequence" else [part]


def examine(data: dict[str, Any]) -> tuple[Nature, dict | None]:
    """The nature of a tokenizer.json, and the working core where that differs from the file: SentencePiece's table and
    the blank in front are done here (the library does them otherwise), and typed control strings must stay text."""
    model, normal = data["model"], steps(data.get("normalizer"), "normalizers")
    cuts, vocab = steps(data.get("pre_tokenizer"), "pretokenizers"), data["model"]["vocab"]
    names = {piece for piece, _ in vocab} if isinstance(vocab, list) else set(vocab)
    back = steps(data.get("decoder"), "decoders")
    form = "text"
    if any(step["type"] == "ByteLevel" for step in back):
        form = "bytes"
    elif model.get("byte_fallback") and names.issuperset(BYTES):
        form = "blanks"
    blank = BLANK if any(step["type"] == "Metaspace" or step.get("content") == " " for step in back) else ""
    nature = Nature(model["type"], form, _split(cuts), _loss(form, model, names, normal, cuts) or _sign(form, blank), blank)
    normal, cuts, nature = _peel(normal, cuts, nature)
    nature = replace(nature, drops_blank=bool(nature.prefix) or any(step["type"] == "Prepend" for step in normal))
    cuts = cuts + _cut_inside(model, data["added_tokens"], cuts)
    core = data | {
        "normalizer": {"type": "Sequence", "normalizers": normal} if normal else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": cuts} if cuts else None,
    }
    same = nature.table is None and not nature.prefix and cuts == steps(data.get("pre_tokenizer"), "pretokenizers")
    return nature, None if same else core


def _split(cuts: list[dict]) -> str | None:
    """The name of the rule if it is exactly one of ours."""
    match cuts:
        case [{"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}]:
            return "gpt2"
        case [{"type": "Split", "pattern": {"Regex": rule}, "behavior": "Isolated", "invert": False},
              {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False}]:  # fmt: skip
            return next((name for name, known in SPLITS.items() if known == rule), None)
    return None


def _loss(form: str, model: dict, names: set[str], normal: list[dict], cuts: list[dict]) -> str:
    if form == "text":
        return f"{model['type']} without bytes: what it cannot spell is unknown, and decoding guesses the blanks"
    plain = [step for step in normal if not (form == "blanks" and _blanks_only(step))]
    if plain:
        return f"its normalizer rewrites text ({', '.join(step['type'] for step in plain)})"
    for step in cuts:
        if step["type"] not in KEEPING or step.get("behavior") == "Removed":
            return f"its splitter {step['type']} drops parts of the text"
        if step["type"] == "ByteLevel" and step["add_prefix_space"]:
            return "it puts a blank in front of every text"
    if form == "bytes":
        missing = [f"0x{b:02x}" for b, char in byte_to_char().items() if char not in names]
        return f"bytes without a token: {', '.join(missing[:8])}" if missing else ""
    return ""


def _sign(form: str, blank: str) -> str:
    return "U+2581 comes back as a blank" if form == "blanks" and blank else ""


def _blanks_only(step: dict) -> bool:
    return step["type"] == "Prepend" or (step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == BLANK)


def _peel(normal: list[dict], cuts: list[dict], nature: Nature) -> tuple[list[dict], list[dict], Nature]:
    """Take the steps that `Nature.prepared` does out of the library's hands."""
    if normal and normal[0]["type"] == "Precompiled":
        nature = replace(nature, table=_table(normal[0]["precompiled_charsmap"]))
        normal = normal[1:]
    if normal and normal[0]["type"] == "Prepend":
        return normal[1:], cuts, replace(nature, prefix=normal[0]["prepend"])
    if not normal and cuts and cuts[0]["type"] == "Metaspace" and cuts[0].get("prepend_scheme", "always") != "never":
        nature = replace(nature, prefix=" ", unless=(" ", BLANK), each=cuts[0].get("prepend_scheme") != "first")
        cuts = [cuts[0] | {"prepend_scheme": "never"}, *cuts[1:]]
    return normal, cuts, nature


@lru_cache(maxsize=2)
def _table(data: str) -> Charsmap:
    """Reading one takes a second."""
    return Charsmap(base64.b64decode(data))


def look_alikes(names: list[str]) -> str:
    """A rule that finds the last character of text that spells one of ``names``."""
    groups: dict[str, list[str]] = {}
    for name in sorted(set(names)):
        if len(name) > 1:
            groups.setdefault(name[-1], []).append(re.escape(name[:-1]))
    return "|".join(f"(?<={'|'.join(begin)}){re.escape(last)}" for last, begin in groups.items())


def _cut_inside(model: dict, added: list[dict], cuts: list[dict]) -> list[dict]:
    """Unigram takes a typed <s> or <0x0A> for its control or byte piece, so it is cut in two before the search, unless
    its score is so low that single characters always win."""
    if model["type"] != "Unigram":
        return []
    scores, names = dict(model["vocab"]), [*(token["content"] for token in added if token["special"]), *BYTES]
    worst = min((score for piece, score in scores.items() if piece not in names), default=0.0) - 10  # of any one character
    rule = look_alikes([name for name in names if scores.get(name, float("-inf")) >= worst * len(name)])
    cut = {"type": "Split", "pattern": {"Regex": rule}, "behavior": "MergedWithNext", "invert": False}
    return [cut] if rule and cut not in cuts else []


def spelled(library: Library, size: int, nature: Nature, added: Container[int]) -> list[bytes]:
    """The bytes of every token; of added tokens, and in the form ``text``, the name; of an id that is not in use, nothing.

    In the form ``blanks`` an added token that is no control token may be a run of blanks (Gemma has such), and is spelled like
    other pieces.
    """
    as_byte = {name: bytes([b]) for b, name in enumerate(BYTES)}
    blanks = {i for i, token in library.get_added_tokens_decoder().items() if nature.form == "blanks" and not token.special}
    out = []
    for i in range(size):
        name = library.id_to_token(i)
        if name is None:
            out.append(b"")
        elif (i in added and i not in blanks) or nature.form == "text":
            out.append(name.encode())
        elif nature.form == "blanks":
            out.append(as_byte.get(name) or name.replace(nature.blank or " ", " ").encode())
        else:
            out.append(_from_chars(name))
    return out


def _from_chars(name: str) -> bytes:
    try:
        return from_chars(name)
    except KeyError:  # an entry that no text reaches, written without stand-ins
        return name.encode()


def core_of(data: dict) -> Library:
    """The library's object for the data of a tokenizer.json."""
    return Library.from_str(json.dumps(data))
