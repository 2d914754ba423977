"""One batch of token rows with its labels: what every objective receives."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from zero2llm.core.seq import Seq

IGNORE = -100  # label of a position that carries no loss


@dataclass(frozen=True)
class Batch:
    """Rows of tokens. ``labels[b, t]`` is the token that position t must predict (already shifted), or IGNORE.

    tokens, labels : (B, T) int64.  seq : positions and documents.
    extra : further tensors with one entry per row, (B, ...): a reward, a reference log-probability ...
    group : rows that belong together and may not be split (2 = a chosen row followed by its rejected row).
    """

    tokens: Tensor
    labels: Tensor
    seq: Seq
    extra: dict[str, Tensor] = field(default_factory=dict)
    group: int = 1

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, index) -> Batch:
        """The rows that ``index`` (a slice or an index tensor) selects."""
        extra = {key: value[index] for key, value in self.extra.items()}
        return Batch(self.tokens[index], self.labels[index], self.seq[index], extra, self.group)

    def split(self, rows: int) -> list[Batch]:
        """Micro-batches of at most ``rows`` rows (rounded to whole groups, at least one)."""
        rows = max(rows // self.group, 1) * self.group
        return [self.rows(slice(i, i + rows)) for i in range(0, len(self), rows)]

    def to(self, device) -> Batch:
        extra = {key: value.to(device) for key, value in self.extra.items()}
        return Batch(self.tokens.to(device), self.labels.to(device), self.seq.to(device), extra, self.group)

    def n_targets(self) -> int:
        """Positions that carry loss."""
        return int((self.labels != IGNORE).sum())

    @staticmethod
    def shifted(tokens: Tensor, trainable: Tensor, seq: Seq, **more) -> Batch:
        """Build labels by shifting: position t predicts token t + 1 where that token is ``trainable`` (B, T)
        and belongs to the same document; the last column, document ends and padding carry no loss."""
        labels = torch.full_like(tokens, IGNORE)
        keep = trainable[:, 1:].bool()
        if seq.seg is not None:
            keep = keep & (seq.seg[:, 1:] == seq.seg[:, :-1]) & (seq.seg[:, 1:] != 0)
        labels[:, :-1] = torch.where(keep, tokens[:, 1:], IGNORE)
        return Batch(tokens, labels, seq, **more)
