"""tokenizer.json, with what tokenizer_config.json, special_tokens_map.json and the chat template beside it say.

    roles       bos_token, eos_token, pad_token: a name, or an object with `content`; `stop_tokens` if we wrote the folder
    template    as foreign.py finds it; of several, the default
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tokenizers import Tokenizer as Library

from zero2llm.core.files import read_json
from zero2llm.tokenizers.foreign import read_foreign
from zero2llm.tokenizers.imports.found import Found
from zero2llm.tokenizers.special import OWN, SPECIALS, Roles, guess_roles


def read_hf(file: Path, eos: str | None = None) -> Found:
    """Raises ValueError naming the file that cannot be read."""
    try:
        library = Library.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{file}: cannot be read as a tokenizer ({error})") from error
    config = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (beside := file.with_name(name)).is_file():
            config |= read_json(beside)
    try:
        templates = read_foreign(file.parent)
        return Found(library, _roles(library, config, eos), templates.choose() if templates.templates else None)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _roles(library: Library, config: dict, eos: str | None) -> Roles:
    vocab = library.get_vocab()
    said = {"eos": eos} if eos else {}
    for role in ("eos", "pad", "bos"):
        name = config.get(f"{role}_token")
        name = name.get("content") if isinstance(name, dict) else name
        if name is not None and role not in said:
            said[role] = name
    if set(SPECIALS) <= set(vocab) and said.get("eos", OWN.eos) == OWN.eos and said.get("pad", OWN.pad) == OWN.pad:
        return replace(OWN, stops=tuple(config.get("stop_tokens") or OWN.stops))
    added = [token.content for token in library.get_added_tokens_decoder().values()]
    roles = guess_roles(list(dict.fromkeys([*added, *sorted(vocab, key=vocab.__getitem__)])), said)
    stops = config.get("stop_tokens")
    return Roles(roles.eos, roles.pad, roles.bos, tuple(stops)) if stops else roles
