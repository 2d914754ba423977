"""Lines (or paragraphs) that many documents share: menus, licences, notices. The first document keeps them.

    signature of a line = blake2b(line without case and extra white space), 16 bytes
    a line goes  iff  it stands in at least ``seen`` documents, and this is not the first (``remove: repeats``)

Source: paragraph deduplication of CCNet, Wenzek et al. 1911.00359, section 3.1; C4 (1910.10683, section 2.2) does it
with spans of three sentences. Ours: documents are counted, not occurrences, so a refrain that one document repeats
stays; that is the business of the repetition heuristics.
Why: boilerplate is too small a part of a page for MinHash to see. Lines under ``min_bytes`` ("Chapter 2", "***") are
never signed: they repeat by their nature, and headings would vanish (at 30 bytes the titles of Chinese song lyrics
do). Bytes, because 15 Chinese characters say as much as 45 letters. What stood around a line that goes stays as it
is, empty lines too. 16 bytes per line on disk, and about 70 in memory while they are sorted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import regex

from zero2llm.core.config import config
from zero2llm.data.document import Document, Removed, Verdict
from zero2llm.data.steps.exact import digest, folded
from zero2llm.data.union import first_of_equal

ENDS = {"line": regex.compile(r"\r\n|[\n\r\u2028]"), "paragraph": regex.compile(r"(?:\r\n|\n)(?:[^\S\n]*\n)+|\u2029")}


@config
class LinesConfig:
    kind: Literal["lines"] = "lines"
    looks_at: ClassVar[str] = "corpus"
    unit: Literal["line", "paragraph"] = "line"  # a paragraph ends at an empty line
    min_bytes: int = 45  # of UTF-8; shorter lines are not looked at
    seen: int = 2  # documents that must have it
    remove: Literal["repeats", "all"] = "repeats"  # all: from the first document as well
    min_left: int = 60  # bytes; a document that lost lines and has less left goes

    def __post_init__(self):
        if self.min_bytes < 1:
            raise ValueError(f"min_bytes = {self.min_bytes}: at least 1")
        if self.seen < 2:
            raise ValueError(f"seen = {self.seen}: at least 2, a line seen once is no repeat")
        if self.min_left < 0:
            raise ValueError(f"min_left = {self.min_left}: not below 0")

    def build(self) -> Lines:
        return Lines(self)


def pieces(text: str, unit: str) -> list[str]:
    """The text cut behind each end of a line or paragraph; joined they are the text again."""
    cuts = [0, *(match.end() for match in ENDS[unit].finditer(text)), len(text)]
    return [text[start:end] for start, end in zip(cuts, cuts[1:], strict=False) if start < end]


class Lines:
    """A document has a row for each line that is long enough."""

    def __init__(self, cfg: LinesConfig):
        self.cfg = cfg

    def looked_at(self, piece: str) -> bool:
        return len(piece.strip().encode("utf-8", "surrogatepass")) >= self.cfg.min_bytes

    def sign(self, doc: Document) -> np.ndarray:
        rows = [digest(folded(piece)) for piece in pieces(doc.text, self.cfg.unit) if self.looked_at(piece)]
        return np.stack(rows) if rows else np.empty((0, 2), dtype="<u8")

    def sign_many(self, docs: Sequence[Document]) -> list[np.ndarray]:
        return [self.sign(doc) for doc in docs]

    def decide(self, rows: np.ndarray, owner: np.ndarray) -> Verdict:
        group = first_of_equal(rows[:, 0], rows[:, 1])
        order = np.lexsort((owner, group))
        fresh = np.ones(len(rows), dtype=bool)  # the first time that this document has this line
        fresh[1:] = (np.diff(group[order]) != 0) | (np.diff(owner[order]) != 0)
        documents = np.bincount(group[order[fresh]], minlength=len(rows))
        goes = documents[group] >= self.cfg.seen
        if self.cfg.remove == "repeats":
            goes &= owner != owner[group]
        return Verdict(~goes, group)

    def apply(self, doc: Document, keep: np.ndarray) -> Document | Removed:
        if keep.all():
            return doc
        verdicts = iter(keep.tolist())
        left = [piece for piece in pieces(doc.text, self.cfg.unit) if not self.looked_at(piece) or next(verdicts)]
        gone = int((~keep).sum())
        text = "".join(left).strip()
        if len(text.encode("utf-8", "surrogatepass")) < self.cfg.min_left:
            return Removed("only lines seen before", f"{gone} of {len(keep)}")
        doc.text = text
        doc.notes[f"{self.cfg.unit} seen before"] += gone
        return doc
