"""Chat templates from folders that transformers wrote: read as text, checked, rendered only in the sandbox.

Looked for in this order, as transformers does: chat_template.jinja (and additional_chat_templates/*.jinja),
chat_template.json, the key chat_template of tokenizer_config.json, which may be a text or a list of named ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from zero2llm.tokenizers.sandbox import compiled

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class Foreign:
    """templates : by name, "default" where there is one.  names : bos_token and others, which templates may write."""

    templates: Mapping[str, str]
    names: Mapping[str, str]

    def choose(self, name: str | None = None, tools: bool = False) -> str:
        """The named one; else, as in transformers, "tool_use" where tools are given and it exists, else "default"."""
        wanted = name or ("tool_use" if tools and "tool_use" in self.templates else "default")
        if wanted not in self.templates:
            raise ValueError(f"there is no chat template {wanted!r}; there are: {', '.join(self.templates) or 'none'}")
        return self.templates[wanted]


def read_foreign(folder: str | Path) -> Foreign:
    """The chat templates of a tokenizer folder. Raises ValueError naming a file that cannot be used."""
    folder = Path(folder)
    config = _json(folder / "tokenizer_config.json")
    templates = _files(folder) or _listed(folder / "chat_template.json", _json(folder / "chat_template.json"))
    templates = templates or _listed(folder / "tokenizer_config.json", config)
    for name, text in templates.items():
        try:
            compiled(text)
        except TemplateError as error:
            raise ValueError(f"{folder}: the chat template {name!r} is no Jinja template ({error})") from error
    older = _json(folder / "special_tokens_map.json")
    names = {key: config.get(key) or older[key] for key in NAMED if config.get(key) or older.get(key)}
    names = {key: value["content"] if isinstance(value, dict) else value for key, value in names.items()}
    return Foreign(templates, names)


def _files(folder: Path) -> dict[str, str]:
    single, more = folder / "chat_template.jinja", sorted((folder / "additional_chat_templates").glob("*.jinja"))
    named = {"default": single} if single.is_file() else {}
    return {name: p.read_text(encoding="utf-8") for name, p in (named | {p.stem: p for p in more}).items()}


def _listed(file: Path, holder: dict[str, Any]) -> dict[str, str]:
    found = holder.get("chat_template") or {}
    if isinstance(found, str):
        return {"default": found}
    if isinstance(found, list) and all(isinstance(t, dict) and {"name", "template"} <= set(t) for t in found):
        found = {t["name"]: t["template"] for t in found}
    if not isinstance(found, dict) or not all(isinstance(t, str) for t in found.values()):
        raise ValueError(f"{file}: chat_template is neither a text nor a list of named texts")
    return found


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file}: an object was expected")
    return found
