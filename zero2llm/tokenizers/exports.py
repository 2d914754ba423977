"""Tokenizers as files of other programs: a folder that transformers opens, and tiktoken's ranks.

Ids are the same there, with two exceptions that lie in the tokenizers library. Text that spells a control token becomes that
token. A SentencePiece table is applied to whole graphemes: what follows a replaced character in one (an accent) is lost.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path

from tokenizers import Tokenizer as Library

from zero2llm.core.files import write_atomic
from zero2llm.tokenizers.bytes import SPLITS
from zero2llm.tokenizers.engines import ranks_of, refusal
from zero2llm.tokenizers.nature import examine
from zero2llm.tokenizers.special import OWN, Roles


def write_folder(folder: Path, library: Library, template: str, roles: Roles) -> None:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja. ``stop_tokens`` is a key of ours, which others pass over."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(library.to_str(pretty=True), encoding="utf-8")
    if template:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": roles.bos,
        "eos_token": roles.eos,
        "pad_token": roles.pad,
        "extra_special_tokens": {},
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
    } | ({} if roles == OWN else {"stop_tokens": list(roles.stops)})
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def write_ranks(file: Path, library: Library) -> dict:
    """tiktoken's file: a line of base64 bytes and id per token. Returns what stands in no such file: the keyword arguments
    ``pat_str`` and ``special_tokens`` of tiktoken.Encoding.

    Raises ValueError if tiktoken would give other ids, or knows no such tokenizer. Not in the file either, and left to whoever
    reads it: composing characters first (NFC), and finding added tokens in text (``allowed_special``).
    """
    data = json.loads(library.to_str())
    nature, _ = examine(data)
    if reason := refusal(data, nature.split):
        raise ValueError(f"no tiktoken file can say what this tokenizer does: {reason}")
    lines = sorted((rank, base64.b64encode(token).decode()) for token, rank in ranks_of(data).items())
    write_atomic(Path(file), "".join(f"{token} {rank}\n" for rank, token in lines))
    special = {token["content"]: token["id"] for token in data["added_tokens"]}
    return {"pat_str": SPLITS[nature.split], "special_tokens": special}
