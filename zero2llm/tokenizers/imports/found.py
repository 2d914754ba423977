"""What every importer returns."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Tokenizer as Library

from zero2llm.tokenizers.special import Roles


@dataclass(frozen=True)
class Found:
    """``template``: the chat template that came with it, None if none did."""

    library: Library
    roles: Roles
    template: str | None
