"""Two made-up tasks that tell mixers apart: recall of many pairs, and copying. A model learns them in a minute.

    recall    k1 v1 k2 v2 ... kn vn | k3 v3 k1 v1 ...        after a key seen before, which value belongs to it?
    copy      a b c d ... # a b c d ...                      repeat what stood before the mark

Source: multi-query associative recall, Zoology 2312.04927 section 3; copying, 2402.01032 section 2. Both need the state to
hold n items exactly: softmax attention keeps every key, a recurrence has K x V numbers for them. Scored on the answers
only; chance is 1 / (number of symbols).
"""

from __future__ import annotations

import torch
from torch import Tensor

from zero2llm.core.batch import IGNORE, Batch
from zero2llm.core.seq import Seq

VOCAB = 64
MARK = 0
KEYS, VALUES = (1, 32), (32, 64)  # token numbers: from, up to


def recall(rows: int, n_pairs: int, generator: torch.Generator) -> Batch:
    """Rows of 4 n - 1 tokens: n pairs, then all n keys again in another order with their values; targets after those."""
    if not 1 <= n_pairs <= KEYS[1] - KEYS[0]:
        raise ValueError(f"n_pairs = {n_pairs}: there are {KEYS[1] - KEYS[0]} different keys")
    keys = _shuffled(rows, KEYS[1] - KEYS[0], generator)[:, :n_pairs] + KEYS[0]
    values = torch.randint(*VALUES, (rows, n_pairs), generator=generator)
    again = _shuffled(rows, n_pairs, generator)
    pairs = lambda k, v: torch.stack((k, v), -1).flatten(1)
    text = torch.cat((pairs(keys, values), pairs(keys.gather(1, again), values.gather(1, again))), 1)
    answer = torch.zeros_like(text, dtype=torch.bool)
    answer[:, 2 * n_pairs + 1 :: 2] = True
    return _batch(text, answer)


def copying(rows: int, length: int, generator: torch.Generator) -> Batch:
    """Rows of 2 length tokens: symbols, the mark, the symbols again; targets on the repetition."""
    symbols = torch.randint(1, VOCAB, (rows, length), generator=generator)
    text = torch.cat((symbols, torch.full((rows, 1), MARK), symbols), 1)
    answer = torch.arange(2 * length + 1).expand(rows, -1) > length
    return _batch(text, answer)


@torch.no_grad()
def accuracy(model: torch.nn.Module, batch: Batch) -> float:
    """Share of targets whose likeliest token is right."""
    hidden, _ = model(batch.tokens, batch.seq)
    wanted = batch.labels != IGNORE
    return float((model.logits(hidden[wanted]).argmax(-1) == batch.labels[wanted]).float().mean())


def _shuffled(rows: int, n: int, generator: torch.Generator) -> Tensor:
    return torch.rand(rows, n, generator=generator).argsort(1)


def _batch(text: Tensor, answer: Tensor) -> Batch:
    """The answers (B, T) as next-token targets."""
    labels = torch.where(answer, text, IGNORE)[:, 1:]
    return Batch(text[:, :-1].contiguous(), labels.contiguous(), Seq.rows(len(text), text.shape[1] - 1))
