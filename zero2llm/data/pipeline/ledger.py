"""What each step did, counted so that counts of parts add up to the same whole in any grouping.

Examples are those with the smallest hash of (where, reason): a sample of the removals that does not depend on which worker
met them first.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field

from zero2llm.data.document import Document, Removed

EXAMPLES = 10  # kept of each reason
EXCERPT = 600  # characters of each


@dataclass
class Size:
    documents: int = 0
    bytes: int = 0
    tokens: int | None = None  # None without a tokenizer

    def add(self, n_bytes: int, n_tokens: int | None) -> None:
        self.documents += 1
        self.bytes += n_bytes
        if n_tokens is not None:
            self.tokens = (self.tokens or 0) + n_tokens

    def merge(self, other: dict) -> None:
        self.documents += other["documents"]
        self.bytes += other["bytes"]
        if other["tokens"] is not None:
            self.tokens = (self.tokens or 0) + other["tokens"]

    def to_dict(self) -> dict:
        return {"documents": self.documents, "bytes": self.bytes, "tokens": self.tokens}


@dataclass
class Loss:
    """The documents that went for one reason."""

    size: Size = field(default_factory=Size)
    examples: list[dict] = field(default_factory=list)  # {"key", "where", "detail", "text"}

    def keep_first(self) -> None:
        self.examples = sorted(self.examples, key=lambda e: (e["key"], e["where"]))[:EXAMPLES]


@dataclass
class StepCount:
    """One step's row of the funnel."""

    entered: Size = field(default_factory=Size)
    left: Size = field(default_factory=Size)
    notes: Counter[str] = field(default_factory=Counter)
    removed: dict[str, Loss] = field(default_factory=dict)
    seconds: float = 0.0  # of all processes together

    def lose(self, doc: Document, why: Removed, n_bytes: int, n_tokens: int | None) -> None:
        loss = self.removed.setdefault(why.reason, Loss())
        loss.size.add(n_bytes, n_tokens)
        key = hashlib.blake2b(f"{why.reason}\0{doc.where}".encode(), digest_size=8).hexdigest()
        if len(loss.examples) < EXAMPLES or key < loss.examples[-1]["key"]:
            loss.examples.append({"key": key, "where": doc.where, "detail": why.detail, "text": doc.text[:EXCERPT]})
            loss.keep_first()

    def to_dict(self) -> dict:
        removed = {
            reason: loss.size.to_dict() | {"examples": loss.examples} for reason, loss in sorted(self.removed.items())
        }
        return {
            "in": self.entered.to_dict(),
            "out": self.left.to_dict(),
            "notes": dict(sorted(self.notes.items())),
            "removed": removed,
            "seconds": self.seconds,
        }

    def merge(self, other: dict) -> None:
        self.entered.merge(other["in"])
        self.left.merge(other["out"])
        self.notes.update(other["notes"])
        self.seconds += other["seconds"]
        for reason, found in other["removed"].items():
            loss = self.removed.setdefault(reason, Loss())
            loss.size.merge(found)
            loss.examples += found["examples"]
            loss.keep_first()
