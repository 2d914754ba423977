"""The key `data` of a recipe: which files, how they are read, and what of them is held out."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal

from zero2llm.core.config import config


@config
class PartConfig:
    """One source of a mixture; weights are relative to each other."""

    name: str
    train: tuple[str, ...]
    weight: float = 1.0


@config
class TurnConfig:
    """A curriculum's turn: from this share of all steps on, sources come with these weights (one not named: 0)."""

    at: float
    weights: dict[str, float]


@config
class DataConfig:
    """Files, folders, globs, ``embedded`` / ``embedded:NAME``, or a folder of token files. The objective decides which
    records are expected. ``mixture`` in place of ``train``: several sources with weights."""

    train: tuple[str, ...] = ()
    mixture: tuple[PartConfig, ...] = ()
    curriculum: tuple[TurnConfig, ...] = ()
    reads: Literal["documents", "conversations"] | None = None  # objectives distill and hidden; the others know
    packing: Literal["concat", "best_fit", "stored"] = "concat"  # of documents; rows.py says what each costs
    workers: int | None = None  # processes that encode text; None = one a core
    valid: tuple[str, ...] | None = None  # None = a share of the training documents, chosen by their content
    valid_fraction: float = 0.01
    valid_rows: int | None = None  # at most this many rows are evaluated; None = all
    field: str = "text"
    skip_bad_records: bool = False
    sft_schema: Literal["conversation", "single-turn", "agent"] | None = None  # None = told by each record's own keys
    template_names: dict[str, Any] = dataclasses.field(default_factory=dict)  # what the chat template may read: {keep_thinking: true}
    train_thinking: bool = True  # whether what stands between <think> and </think> is part of the loss
    train_on: Literal["assistant", "last", "all"] = "assistant"  # SFT: every answer, the last alone, or every token
    too_long: Literal["turns", "start", "refuse"] = "turns"  # SFT: what goes of a conversation longer than seq_len (data/fitting.py)
    max_documents: int | None = None

    def __post_init__(self) -> None:
        if bool(self.train) == bool(self.mixture) or any(not part.train for part in self.mixture):
            raise ValueError("data.train is empty: give it, or data.mixture with a list train for each source (not both)")
        names = [part.name for part in self.mixture]
        if len(set(names)) < len(names) or not all(re.fullmatch(r"[\w-]+", name) for name in names):
            raise ValueError(f"data.mixture: names {names} must differ, and be of letters, digits, - and _")
        at = [0.0, *(turn.at for turn in self.curriculum), 1.0]
        if any(a >= b for a, b in zip(at, at[1:], strict=False)) or (self.curriculum and not self.mixture):
            raise ValueError(f"data.curriculum: turns at {at[1:-1]} must rise between 0 and 1, and need data.mixture")
        for turn in self.curriculum:
            if unknown := set(turn.weights) - set(names):
                raise ValueError(f"data.curriculum: {', '.join(sorted(unknown))} is none of the sources {', '.join(names)}")
        if self.train_on == "last" and self.too_long == "turns":
            raise ValueError("data.train_on: last trains the very answer that data.too_long: turns drops; take too_long: start or refuse")
        if self.train_on == "all" and not self.train_thinking:
            raise ValueError("data.train_on: all trains every token, thoughts too; remove train_thinking: false, or take train_on: assistant")
        if self.valid == ():
            raise ValueError("data.valid is empty; leave the key out to hold out a share of data.train")
        for key in ("workers", "valid_rows", "max_documents"):
            if (value := getattr(self, key)) is not None and value < 1:
                raise ValueError(f"data.{key} = {value} must be positive")
        if not 0 < self.valid_fraction < 1:
            raise ValueError(f"data.valid_fraction = {self.valid_fraction} must lie between 0 and 1")
