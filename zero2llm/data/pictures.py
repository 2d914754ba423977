"""Pictures with words: a conversation, and the files that its <image> marks stand for.

Source: LLaVA's instruction files (arXiv:2304.08485) and minimind-v's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from zero2llm.data.shapes import as_object, until_answer
from zero2llm.data.sources import text_fault
from zero2llm.data.turns import Conversation, spoken

IMAGE_MARK = "<image>"


@dataclass(frozen=True)
class Pictured:
    """A conversation in which the n-th ``<image>`` stands for the n-th file."""

    messages: Conversation
    images: tuple[str, ...]
    where: str = field(default="", compare=False)


def as_pictured(value: object) -> Pictured:
    """``image`` (a name, or several) beside a conversation with as many ``<image>``."""
    record = as_object(value)
    named = [record[key] for key in ("image", "images") if record.get(key)]
    images = named[0] if named and isinstance(named[0], list) else named
    if len(named) != 1 or not all(isinstance(name, str) and not text_fault(name) for name in images):
        raise ValueError(f"image must be one file name or a list of them, not {named if len(named) != 1 else images!r}")
    messages = until_answer(spoken(record), record)
    marks = sum(m["content"].count(IMAGE_MARK) for m in messages)
    if marks != len(images):
        raise ValueError(f"{marks} {IMAGE_MARK} in the text, but {len(images)} image{'s' * (len(images) != 1)}")
    if any(IMAGE_MARK in m["content"] for m in messages if m["role"] == "assistant"):
        raise ValueError(f"{IMAGE_MARK} in an answer: pictures are seen, not drawn")
    return Pictured(messages, tuple(images))


def image_path(folder: str | Path, name: str) -> Path:
    """The file of that name in ``folder``. Raises ValueError if it does not exist or lies elsewhere."""
    root = Path(folder).resolve()
    path = (root / name).resolve()
    if not path.is_relative_to(root):
        raise ValueError(f"image {name!r} lies outside the folder {folder}")
    if not path.is_file():
        raise ValueError(f"image {name!r} is not in the folder {folder}")
    return path
