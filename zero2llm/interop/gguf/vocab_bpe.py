"""Byte-level BPE in GGUF (`tokenizer.ggml.model` = "gpt2"): GPT-2, Llama 3, Qwen, SmolLM2 and ours.

    tokens   pieces in GPT-2's printable stand-ins for bytes; control and added tokens as they are written
    merges   "left right", the first merge first
    pre      the name of the split rule (vocab_pre.py)

Source: ggml, docs/gguf.md; llama-vocab.cpp of llama.cpp (llm_tokenizer_bpe_session), whose ids these are.
What no key says: that text is composed first (Qwen's NFC). llama.cpp does not do it; we write it under a key of our own.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Library

from zero2llm.interop.gguf.values import Typed
from zero2llm.interop.gguf.vocab_pre import RULES, names_of, rule_of, splitter_of
from zero2llm.tokenizers.imports.sentencepiece import CONTROL, UNKNOWN, USER
from zero2llm.tokenizers.nature import steps
from zero2llm.tokenizers.tokenizer import Tokenizer

PRE, MERGES, COMPOSES = "tokenizer.ggml.pre", "tokenizer.ggml.merges", "tokenizer.zero2llm.normalizer"
QWEN_NOTE = "the file does not say whether text is composed (NFC) before it is cut, as Qwen's own tokenizer does; it is read as llama.cpp reads it, without"
NFC_NOTE = "the tokenizer composes characters first (NFC), llama.cpp does not: letters written with separate accents get other tokens there"


def read_bpe(meta: dict[str, Any], tokens: list[str], types: list[int]) -> tuple[Library, list[str]]:
    """The library's form and notes. Raises ValueError for an unknown split rule or merges of another vocabulary."""
    rule = rule_of(meta.get(PRE))
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = []
    for i, line in enumerate(meta.get(MERGES, [])):
        pair = tuple(line.split(" "))
        if len(pair) != 2 or not vocab.keys() >= {*pair, "".join(pair)}:
            raise ValueError(f"merge {i} is {line!r}: two tokens of the vocabulary that make a third were expected")
        merges.append(pair)
    composes = meta.get(COMPOSES)
    if composes not in (None, "none", "NFC"):
        raise ValueError(f"{COMPOSES} is {composes!r}; known are none and NFC")
    library = Library(models.BPE(vocab=vocab, merges=merges, ignore_merges=rule.whole))
    library.pre_tokenizer, library.decoder = splitter_of(rule), decoders.ByteLevel()
    if composes == "NFC":
        library.normalizer = normalizers.NFC()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind in (CONTROL, UNKNOWN)]
    found = [token for token, kind in zip(tokens, types, strict=True) if kind == USER]
    library.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in control])
    library.add_tokens([AddedToken(name, special=False, normalized=False) for name in found])
    qwen = meta[PRE].startswith(("qwen", "deepseek-r1-qwen")) and composes is None
    return library, [note for note in (qwen and QWEN_NOTE, rule.near) if note]


def write_bpe(tokenizer: Tokenizer, data: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Split rule and merges as metadata, and notes. Raises ValueError naming what llama.cpp could not do."""
    model, normal = data["model"], [step["type"] for step in steps(data.get("normalizer"), "normalizers")]
    if model.get("dropout") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise ValueError("it drops merges at random or marks borders of words, for which GGUF has no place")
    if normal not in ([], ["NFC"]):
        raise ValueError(f"its normalizer ({', '.join(normal)}) rewrites text, for which GGUF has no place")
    name = _name(tokenizer, data)
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    meta = {"tokenizer.ggml.model": "gpt2", PRE: name, MERGES: Typed("string", [" ".join(pair) for pair in pairs]), COMPOSES: "NFC" if normal else "none"}
    return meta, [note for note in (normal and NFC_NOTE, RULES[name].near) if note]


def _name(tokenizer: Tokenizer, data: dict[str, Any]) -> str:
    """The name that says the same: the rule, and whether a piece that is a token is merged nevertheless. Where every
    token is what its own bytes merge to, the second makes no difference; ours then take the rule's usual name."""
    names, whole = names_of(data.get("pre_tokenizer")), bool(data["model"].get("ignore_merges"))
    fitting = [name for name in names if RULES[name].whole == whole]
    if (tokenizer.own or not fitting) and _reached(data):
        fitting = names
    if not fitting:
        raise ValueError(f"it takes whole pieces {'without' if whole else 'only by'} merging, and the rule {names[0]} does not in GGUF")
    return fitting[0]


def _reached(data: dict[str, Any]) -> bool:
    """Whether every token is what the merges make of its own bytes."""
    model, added = data["model"], {token["content"] for token in data["added_tokens"]}
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    join = models.BPE(vocab=model["vocab"], merges=pairs).tokenize
    return all([part.id for part in join(name)] == [i] for name, i in model["vocab"].items() if name not in added)
