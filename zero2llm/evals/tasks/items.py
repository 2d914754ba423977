"""What a generated question is, and how its content is dealt to the training or the test split."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

LANGS = ("en", "zh")
SPLITS = ("train", "test")
TEST_PERCENT = 15

Key = int | str | tuple["Key", ...]  # content without wording or language


@dataclass(frozen=True)
class Item:
    """One question. ``answer`` is the only right reply, ``wrong`` a plausible mistake, ``key`` the content as text. ``expression`` :
    what to ask a calculator, in families that are meant for one.

    Two items with equal (family, key) are the same question in other words, or in the other language.
    """

    family: str
    lang: str
    prompt: str
    answer: str
    wrong: str = ""
    key: str = ""
    expression: str = ""


@dataclass(frozen=True)
class Draft:
    """What a family's ``write`` returns: the content key and the texts made of it."""

    key: Key
    prompt: str
    answer: str
    wrong: str
    expression: str = ""


@dataclass(frozen=True)
class Family:
    """A kind of question: ``write(rng, lang)`` draws content and wording and works the answer out."""

    name: str
    write: Callable[[Random, str], Draft]

    def item(self, rng: Random, lang: str) -> Item:
        draft = self.write(rng, lang)
        key = json.dumps(draft.key, ensure_ascii=False, separators=(",", ":"))
        return Item(self.name, lang, draft.prompt, draft.answer, draft.wrong, key, draft.expression)


def split_of(family: str, key: str) -> str:
    """The split that owns this content: about TEST_PERCENT of all keys are "test", the rest "train".

    sha256, because Python's own hash changes between processes. It reads the content alone, so neither a seed,
    nor a wording, nor a language can carry a test question into training.
    """
    digest = hashlib.sha256(f"{family}\n{key}".encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") % 100 < TEST_PERCENT else "train"
