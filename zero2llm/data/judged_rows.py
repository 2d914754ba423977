"""Rows of judged answers for KTO: each beside a mismatched one, the same prompt with an answer to another question.

Which answer a prompt is given is fixed by the data: the next one, round a shuffled circle of all items, whose prompt is
another. (The paper rotates within a batch.) So any rank can make its rows alone, they are the same in every epoch, and a
reference's log-probability of them can be stored. A mismatched row that would pass ``seq_len`` is cut at its end.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from zero2llm.core.batch import Batch
from zero2llm.data.rows import beside, check_trained, identity, item_of, padded, shuffled
from zero2llm.data.shards import TokenShards


class JudgedRows:
    """Unit i is two rows: item i, and its prompt with the answer of item `other[i]`.

    extra: label (B,) bool of the item, and `ref` if ``reference`` (items, 2) is set.
    """

    unit = 2

    def __init__(self, shards: TokenShards, seq_len: int, pad_id: int, seed: int | None):
        check_trained(shards)
        self.labels = beside(shards, "label")
        if self.labels is None:
            raise ValueError(f"{shards.path}: says of no answer whether it is good; these are not judged answers")
        self.shards, self.seq_len, self.pad_id, self.seed, self.reference = shards, seq_len, pad_id, seed, None
        self.begins = [_begin(item_of(shards, i)[1]) for i in range(len(shards))]
        self.other = self._others()
        self.identity = identity(shards, seq_len) | {"mismatched": "circle"}
        self.order = lru_cache(maxsize=2)(lambda epoch: shuffled(len(self), self.seed, epoch))

    def __len__(self) -> int:
        return len(self.shards)

    def _prompt(self, i: int) -> bytes:
        return item_of(self.shards, i)[0][: self.begins[i]].tobytes()

    def _others(self) -> np.ndarray:
        """For each item the next one on the circle with another prompt."""
        circle = shuffled(len(self), 0, 0)
        prompts = [self._prompt(int(i)) for i in circle]
        change = next((at for at in range(len(circle)) if prompts[at - 1] != prompts[at]), None)
        if change is None:
            raise ValueError(f"{self.shards.path}: all {len(self)} answers are to the same prompt; kto compares answers to different ones")
        other, nearest = np.empty(len(self), dtype=np.int64), circle[change]
        for at in range(change - 1, change - 1 - len(circle), -1):  # backwards, from where a prompt ends
            if prompts[at] != prompts[(at + 1) % len(circle)]:
                nearest = circle[(at + 1) % len(circle)]
            other[circle[at]] = nearest
        return other

    def batch(self, wanted: list[tuple[int, int]]) -> Batch:
        return self.numbered([int(self.order(epoch)[i]) for epoch, i in wanted])

    def numbered(self, items: list[int]) -> Batch:
        """These items, by their place in the files."""
        extra = {"label": torch.tensor([bool(self.labels[i]) for i in items]).repeat_interleave(2)}
        if self.reference is not None:
            extra["ref"] = self.reference[items].flatten()
        rows = [row for i in items for row in (item_of(self.shards, i), self._mismatched(i))]
        return padded(rows, self.pad_id, self.seq_len, extra, group=2)

    def _mismatched(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        j = int(self.other[i])
        (prompt, before), (answer, trained) = item_of(self.shards, i), item_of(self.shards, j)
        tokens = np.concatenate((prompt[: self.begins[i]], answer[self.begins[j] :]))
        mask = np.concatenate((np.zeros_like(before[: self.begins[i]]), trained[self.begins[j] :]))
        return tokens[: self.seq_len], mask[: self.seq_len]


def _begin(mask: np.ndarray) -> int:
    """Where the answer begins: the first trained token that something stands before."""
    return 1 + int(np.argmax(mask[1:] != 0))
