"""The tokenizer inside a GGUF file, read into a tokenizer folder and written from one.

    tokens, token_type     every entry by id, and what it is: 1 normal, 2 unknown, 3 control, 4 added, 5 unused, 6 byte
    *_token_id             which of them begins, ends, pads; eot ends a turn
    add_bos_token          whether a text begins with the start token (for whole texts: chat templates write it themselves)
    chat_template          Jinja

Source: ggml, docs/gguf.md; llama-vocab.cpp of llama.cpp for what is true where a key is absent. The kinds of vocabulary stand
in vocab_bpe.py (split rules: vocab_pre.py) and vocab_spm.py, templates in vocab_template.py.
Why: a model is a function of token ids. What a key cannot say, or llama.cpp would do otherwise, is an error or a note.

A model may have more rows than the vocabulary has entries: they are written as unused tokens behind it, and dropped on reading.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Library
from tokenizers import processors

from zero2llm.core.files import read_json
from zero2llm.interop.gguf.file import GGUF
from zero2llm.interop.gguf.vocab_bpe import PRE, read_bpe, write_bpe
from zero2llm.interop.gguf.vocab_pre import RULES
from zero2llm.interop.gguf.vocab_spm import read_spm, write_spm
from zero2llm.interop.gguf.vocab_template import plain
from zero2llm.tokenizers.foreign import read_foreign
from zero2llm.tokenizers.imports.sentencepiece import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER
from zero2llm.tokenizers.nature import BLANK, BYTES
from zero2llm.tokenizers.special import TURN_ENDS, Roles
from zero2llm.tokenizers.tokenizer import Tokenizer

KEY, TEMPLATE = "tokenizer.ggml.", "tokenizer.chat_template"
READERS = {"gpt2": read_bpe, "llama": read_spm, "t5": read_spm}
DEFAULT_IDS = {"gpt2": {}, "llama": {"bos": 1, "eos": 2, "unknown": 0}, "t5": {"eos": 1, "unknown": 2}}  # where no key says
KNOWN_ENDS = ("<|endoftext|>", "<|end_of_text|>")  # llama.cpp stops there by name, as at those of TURN_ENDS
ROLES = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}
NAMED = (*ROLES, "eot", "eom")


def save_tokenizer(gguf: GGUF, folder: Path) -> tuple[str, ...]:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja, and notes on what the file does not say.

    Raises ValueError naming the file, for a kind of vocabulary or a split rule that is not known, or damage.
    """
    try:
        return _save(gguf.metadata, Path(folder))
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{gguf.path}: its tokenizer cannot be read: an entry has another type than it should ({error})") from error
    except ValueError as error:
        raise ValueError(f"{gguf.path}: its tokenizer cannot be read: {error}") from error


def _save(meta: dict[str, Any], folder: Path) -> tuple[str, ...]:
    kind = meta.get(KEY + "model")
    if kind not in READERS:
        what = f"it is of the kind {kind!r} ({KEY}model)" if kind else f"there is none ({KEY}model)"
        raise ValueError(f"{what}; known are {', '.join(READERS)}")
    tokens, types = _entries(meta)
    library, notes = READERS[kind](meta, tokens, types)
    roles = {}
    for role in NAMED:
        i = meta.get(f"{KEY}{role}_token_id", DEFAULT_IDS[kind].get(role))
        if i is not None and not (type(i) is int and 0 <= i < len(tokens)):
            raise ValueError(f"{KEY}{role}_token_id is {i!r}, but there are {len(tokens)} tokens")
        if i is not None:
            roles[role] = library.id_to_token(i)
    usual = {"bos": kind == "llama" or (kind == "gpt2" and RULES[meta[PRE]].bos), "eos": kind == "t5"}
    adds = {role: bool(meta.get(f"{KEY}add_{role}_token", usual[role])) and role in roles for role in ("bos", "eos")}
    if any(adds.values()):
        library.post_processor = _around(library, roles, adds)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **{name: roles[role] for role, name in ROLES.items() if role in roles}}
    config |= {"extra_special_tokens": {}, "add_bos_token": adds["bos"], "add_eos_token": adds["eos"], "clean_up_tokenization_spaces": False}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(library.to_str(pretty=True), encoding="utf-8")
    _write_templates(meta, folder)
    _write_config(folder, config)
    stops = Tokenizer.load(folder).roles.stops
    if more := [roles[role] for role in ("eot", "eom") if role in roles and roles[role] not in stops]:
        _write_config(folder, config | {"stop_tokens": list(dict.fromkeys([*stops, *more]))})
    return tuple(notes)


def _entries(meta: dict[str, Any]) -> tuple[list[str], list[int]]:
    """Tokens and types, without the unused ones at the end. Raises ValueError if they are no vocabulary."""
    tokens = meta.get(KEY + "tokens")
    types = meta.get(KEY + "token_type", [NORMAL] * len(tokens or []))
    if not tokens or len(types) != len(tokens) or not all(type(t) is str for t in tokens):
        raise ValueError(f"{KEY}tokens and {KEY}token_type are no lists of the same length ({len(tokens or [])} and {len(types)})")
    if len(set(tokens)) != len(tokens):
        seen: set[str] = set()
        twice = next(t for t in tokens if t in seen or seen.add(t))
        raise ValueError(f"token {twice!r} occurs twice")
    named = {meta.get(f"{KEY}{role}_token_id") for role in NAMED}
    n = 1 + max((i for i, kind in enumerate(types) if kind != UNUSED or i in named), default=-1)
    return tokens[:n], types[:n]


def _around(library: Library, roles: dict[str, str], adds: dict[str, bool]) -> processors.TemplateProcessing:
    """What puts start and end around a text in other programs; ours leaves that to whoever trains."""
    first, last = ([role] if adds[role] else [] for role in ("bos", "eos"))
    text = lambda name: [*first, f"${name}", *last]
    named = [{"id": role, "ids": [library.token_to_id(roles[role])], "tokens": [roles[role]]} for role in first + last]
    return processors.TemplateProcessing(single=text("A"), pair=[*text("A"), *text("B")], special_tokens=named)


def _write_templates(meta: dict[str, Any], folder: Path) -> None:
    """The default, and named ones (such as tool_use) as transformers stores them."""
    for key, text in meta.items():
        if key == TEMPLATE or key.startswith(TEMPLATE + "."):
            name = key.removeprefix(TEMPLATE)[1:]
            if not isinstance(text, str) or (name and not name.replace("_", "").replace("-", "").isalnum()):
                raise ValueError(f"{key} is no chat template")
            file = folder / "additional_chat_templates" / f"{name}.jinja" if name else folder / "chat_template.jinja"
            file.parent.mkdir(exist_ok=True)
            file.write_text(text, encoding="utf-8")


def _write_config(folder: Path, config: dict[str, Any]) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False, indent=1), encoding="utf-8")


def vocab_metadata(tokenizer_dir: Path, vocab_size: int) -> dict[str, Any]:
    """The entries ``tokenizer.*`` of a GGUF file for a model of ``vocab_size`` rows.

    Raises ValueError naming the folder and the part for which GGUF has no counterpart, or if the model has too few rows.
    """
    return written_vocab(tokenizer_dir, vocab_size)[0]


def vocab_notes(tokenizer_dir: Path, vocab_size: int) -> tuple[str, ...]:
    """What llama.cpp will do otherwise, in words for whoever exports; usually nothing."""
    return tuple(written_vocab(tokenizer_dir, vocab_size)[1])


def written_vocab(tokenizer_dir: Path, vocab_size: int) -> tuple[dict[str, Any], list[str]]:
    """`vocab_metadata` and `vocab_notes` at once."""
    folder = Path(tokenizer_dir)
    tokenizer = Tokenizer.load(folder)
    try:
        return _written(tokenizer, folder, vocab_size)
    except ValueError as error:
        raise ValueError(f"{folder}: this tokenizer cannot be written to GGUF: {error}") from error


def _written(tokenizer: Tokenizer, folder: Path, vocab_size: int) -> tuple[dict[str, Any], list[str]]:
    data, size = json.loads(tokenizer.library.to_str()), tokenizer.vocab_size
    if size > vocab_size:
        raise ValueError(f"it has {size} tokens, the model {vocab_size}: it is another model's")
    names = [tokenizer.library.id_to_token(i) for i in range(size)] + [None] * (vocab_size - size)
    types = _types(tokenizer, data, names)
    names = [_free(f"[PAD{i}]", names) if name is None else name for i, name in enumerate(names)]
    if tokenizer.nature.form == "bytes":
        meta, notes = write_bpe(tokenizer, data)
    elif data["model"]["type"] in ("BPE", "Unigram"):
        meta, notes = write_spm(data, names, types)
    else:
        raise ValueError(f"its model is {data['model']['type']}; GGUF has a place for byte-level BPE, and SentencePiece's BPE and Unigram")
    blank = lambda name, kind: name.replace(BLANK, " ") if kind == USER and tokenizer.nature.form == "blanks" else name
    meta[KEY + "tokens"] = [blank(name, kind) for name, kind in zip(names, types, strict=True)]
    meta[KEY + "token_type"] = types
    meta |= _roles(tokenizer, data, folder)
    for name, template in (read_foreign(folder).templates or {"default": tokenizer.template}).items():
        if template:
            meta[TEMPLATE if name == "default" else f"{TEMPLATE}.{name}"] = plain(template)
    return meta, [*notes, *_unsaid(tokenizer.roles)]


def _free(name: str, names: list[str | None]) -> str:
    """The name of a row that no token uses: any that is not taken."""
    return _free(name + "_", names) if name in names else name


def _types(tokenizer: Tokenizer, data: dict[str, Any], names: list[str | None]) -> list[int]:
    """Raises ValueError for an added token that llama.cpp would find in other places.

    Gemma's files list runs of blanks as added tokens, but text holds none any more: they come from merges, like other pieces.
    """
    model, blanks = data["model"], tokenizer.nature.form == "blanks"
    for token in data["added_tokens"]:
        if not token["special"] and (token["lstrip"] or token["rstrip"] or token["single_word"]):
            raise ValueError(f"its added token {token['content']!r} takes blanks beside it or stands alone only, for which GGUF has no place")
    unknown = model.get("unk_token") if model["type"] == "BPE" else names[model.get("unk_id") or 0]
    unknown, bytes_ = None if tokenizer.nature.form == "bytes" else unknown, set(BYTES) if blanks else set()
    found = {i for i, token in tokenizer.added.items() if token.normalized or not (blanks and BLANK in token.content)}
    of = lambda i, name: (
        UNUSED if name is None else UNKNOWN if name == unknown else CONTROL if i in tokenizer.special_ids
        else USER if i in found else BYTE if name in bytes_ else NORMAL
    )  # fmt: skip
    return [of(i, name) for i, name in enumerate(names)]


def _roles(tokenizer: Tokenizer, data: dict[str, Any], folder: Path) -> dict[str, Any]:
    roles, id_of = tokenizer.roles, tokenizer.library.token_to_id
    config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "padding": tokenizer.pad_id}
    said = config.get("unk_token")
    unknown = id_of((said.get("content") if isinstance(said, dict) else said) or data["model"].get("unk_token") or "")
    ids |= {"unknown": data["model"].get("unk_id") if unknown is None else unknown}
    ids |= {"eot": id_of(_turn_end(roles) or ""), "eom": id_of("<|eom_id|>") if "<|eom_id|>" in roles.stops else None}
    meta: dict[str, Any] = {f"{KEY}{role}_token_id": i for role, i in ids.items() if i is not None}
    first, last = _ends(data.get("post_processor"))
    meta[KEY + "add_bos_token"] = bool(config.get("add_bos_token")) or first == roles.bos
    meta[KEY + "add_eos_token"] = bool(config.get("add_eos_token")) or last == roles.eos
    return meta


def _ends(post: dict[str, Any] | None) -> tuple[str | None, str | None]:
    """The control tokens that a post_processor puts before and behind a text."""
    for part in (post or {}).get("processors", [post] if post else []):
        if part["type"] == "TemplateProcessing":
            ends = [piece.get("SpecialToken", {}).get("id") for piece in part["single"]]
            return tuple(part["special_tokens"][end]["tokens"][0] if end else None for end in (ends[0], ends[-1]))
    return None, None


def _turn_end(roles: Roles) -> str | None:
    """The end of a turn, or whatever else ends generation beside eos and the names that every program knows."""
    return next((name for name in (*TURN_ENDS, *roles.stops) if name in roles.stops and name not in (roles.eos, *KNOWN_ENDS)), None)


def _unsaid(roles: Roles) -> list[str]:
    """Ends of generation for which there is no key."""
    said = {roles.eos, _turn_end(roles), *KNOWN_ENDS, *TURN_ENDS}
    lost = [name for name in roles.stops if name not in said]
    return [f"generation does not stop at {', '.join(lost)} there: GGUF has keys for eos and one end of a turn"] if lost else []
