"""The model that is learned from: frozen, in evaluation mode, and of the student's own vocabulary.

Another vocabulary is refused: p and q are compared token by token, so the same number must be the same piece, and the same
text must be cut alike. What pads a table (models of one family often round theirs up) is no token and is cut off on both sides.
Where vocabularies differ a teacher can still write the answers that a student is fine-tuned on (sequence.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from zero2llm.core.batch import Batch
from zero2llm.tokenizers.tokenizer import Tokenizer
from zero2llm.train.adapted import weights_hash
from zero2llm.train.checkpoint import Checkpoint
from zero2llm.train.distill.divergence import Head, TopK

WAY_OUT = "let it write the answers instead (sequence-level distillation), or choose a teacher with the student's tokenizer"


class Teaches(Protocol):
    """A `Teacher`, or one that is `Stored`."""

    vocab_size: int

    def __call__(self, batch: Batch, keep: Tensor) -> Head | TopK | None: ...  # on the N positions that keep (B, T) marks


class Teacher:
    """vocab_size : tokens of the shared tokenizer, which both models' tables have at their beginning."""

    def __init__(self, model: nn.Module, vocab_size: int):
        if vocab_size > len(model.head_weight):
            raise ValueError(f"the tokenizer has {vocab_size} tokens, the teacher {len(model.head_weight)}; {WAY_OUT}")
        self.model, self.vocab_size = model.eval().requires_grad_(False), vocab_size

    @torch.compiler.disable
    @torch.no_grad()
    def __call__(self, batch: Batch, keep: Tensor) -> Head:
        hidden, _ = self.model(batch.tokens, batch.seq)
        return Head(hidden[keep], self.model.head_weight, self.model.logit_softcap)


@dataclass(frozen=True)
class Stored:
    """What a teacher said of rows that come through `CachedRows` (cache.py): read, not run. None of rows that do not."""

    vocab_size: int
    k: int
    temperature: float

    def __call__(self, batch: Batch, keep: Tensor) -> TopK | None:
        if "teacher_ids" not in batch.extra:
            return None
        logps, ids, tail = (batch.extra[f"teacher_{name}"][keep] for name in ("logps", "ids", "tail"))
        return TopK(logps.float(), ids.long(), tail)


def load_teacher(path: str | Path, tokenizer: Tokenizer, device: torch.device | str = "cpu") -> tuple[Teacher, str]:
    """A checkpoint, or the latest of a run, as a teacher for a student with ``tokenizer``; and the hash of its weights.

    Raises ValueError for another vocabulary.
    """
    found = Checkpoint.open(path, resuming=False)
    same_vocabulary(Tokenizer.load(found.tokenizer_dir), tokenizer, str(found.path))
    return Teacher(found.load_model().to(device), tokenizer.vocab_size), weights_hash(found.manifest)


def same_vocabulary(teacher: Tokenizer, student: Tokenizer, where: str) -> None:
    """Raises ValueError that says where the two first differ."""
    if teacher.fingerprint() == student.fingerprint():
        return
    mine, theirs = (t.library.get_vocab(with_added_tokens=True) for t in (student, teacher))
    pieces = [{number: piece for piece, number in vocab.items()} for vocab in (theirs, mine)]
    differ = next((i for i in range(max(teacher.vocab_size, student.vocab_size)) if pieces[0].get(i) != pieces[1].get(i)), None)
    if differ is None:
        reason = "the ids are the same, but text is cut into them in another way (merges, scores, normaliser or control tokens differ)"
    else:
        reason = f"id {differ} is {pieces[0].get(differ)!r} there and {pieces[1].get(differ)!r} in the student ({teacher.vocab_size} and {student.vocab_size} tokens)"
    raise ValueError(f"teacher {where} has another vocabulary: {reason}; {WAY_OUT}")
