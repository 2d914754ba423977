"""A document on its way through the pipeline, and what a step may answer about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np


@dataclass
class Document:
    """``where`` names it in reports ("file, line 12"); ``meta`` is the rest of its record, kept as it is (JSON values).

    ``notes`` counts what steps changed in it ({"e-mail": 2}); the report adds them up. ``origin`` belongs to the pipeline: a
    piece carries its whole document's hash, so that pieces stay in one split.
    """

    text: str
    where: str
    meta: dict[str, Any] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)
    origin: str = ""


@dataclass(frozen=True)
class Removed:
    """Why a document goes. ``reason`` is a class that reports count by ("too few words"), ``detail`` this case ("12 < 50")."""

    reason: str
    detail: str = ""


Result = Document | Removed | list[Document]  # changed or as it was; out; cut into several


class Step(Protocol):
    """Looks at one document at a time; the same answer for the same document, in any process and order."""

    def __call__(self, doc: Document) -> Result: ...


@dataclass(frozen=True)
class Verdict:
    """keep : (N,) bool.  group : (N,) int64, the row number of the first of those that are alike (its own: alone)."""

    keep: np.ndarray
    group: np.ndarray


class CorpusStep(Protocol):
    """Looks at all documents: each is signed alone, all signatures are judged together, each document hears its verdict.

    Rows of signatures stand in document order. A document may have several (one for each line) or none.
    """

    def sign(self, doc: Document) -> np.ndarray: ...  # (k, W), W and dtype always the same
    def sign_many(self, docs: Sequence[Document]) -> list[np.ndarray]: ...  # the same for several at once: faster
    def decide(self, rows: np.ndarray, owner: np.ndarray) -> Verdict: ...  # (N, W), (N,) int64 number of the document
    def apply(self, doc: Document, keep: np.ndarray) -> Result: ...  # (k,) bool, in the order of its rows
