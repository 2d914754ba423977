"""Answers sampled from the model that is being trained, with the log-probabilities that they were sampled with.

    prompt  ->  samples answers each, token by token, y_t ~ softmax(z_t / temperature)

Token ids are kept as they were sampled, never made again from text. What each answer draws depends on the seed, the number of
its rollout, its prompt and its place alone, so neither the ranks nor what shares its batch change it. No top-p, top-k or
penalty: the log-probabilities of what they do are not the policy's.
This is the only file of train/ that knows the engine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zero2llm.core.batch import Batch
from zero2llm.core.config import config
from zero2llm.core.seq import Seq
from zero2llm.engine.engine import Engine
from zero2llm.engine.sampling import Sampling
from zero2llm.tokenizers.tokenizer import Tokenizer

MULTIPLE = 16  # row length is rounded up to this, so that few different shapes occur


@config
class RolloutConfig:
    """prompts : per rollout, over all ranks.  samples : answers to each.  A rollout is trained on for ``epochs`` passes, each
    cut into ``minibatches`` optimizer steps.  max_batch : rows decoded together."""

    prompts: int = 16
    samples: int = 8
    max_tokens: int = 64
    temperature: float = 1.0
    minibatches: int = 1
    epochs: int = 1
    max_batch: int = 64
    stop: tuple[str, ...] = ()
    truncated: str = "score"  # answers cut at max_tokens: "score" them as they are, or "leave_out"

    def __post_init__(self) -> None:
        for name in ("prompts", "samples", "max_tokens", "minibatches", "epochs", "max_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"rollout.{name} = {getattr(self, name)} must be at least 1")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"rollout.temperature = {self.temperature} must be positive: greedy answers to one prompt are all the same")
        if self.truncated not in ("score", "leave_out"):
            raise ValueError(f"rollout.truncated = {self.truncated!r}; there are: score, leave_out")
        if self.prompts * self.samples % self.minibatches:
            raise ValueError(f"rollout: {self.prompts} x {self.samples} answers do not divide into {self.minibatches} minibatches")


@dataclass(frozen=True)
class Episode:
    """One answer. ids : prompt and everything after it.  trained : 1 on tokens that the policy sampled.  logps : of those,
    0 elsewhere.  record : what stands beside the prompt."""

    ids: list[int]
    trained: list[int]
    logps: list[float]
    text: str
    finish: str
    record: Mapping[str, Any]


def seed_of(*numbers: int) -> int:
    """One seed from several numbers, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:7], "big")


def play(
    model: nn.Module, tokenizer: Tokenizer, prompts: Sequence[tuple[int, list[int], Mapping[str, Any]]], cfg: RolloutConfig,
    seed: int, number: int,
) -> list[Episode]:  # fmt: skip
    """``prompts`` : (which it is in the global rollout, ids, record). Returns cfg.samples episodes for each, next to each other."""
    was, engine = model.training, Engine(model, tokenizer, max_batch=cfg.max_batch)
    asked, sampling = [], []
    for which, ids, _ in prompts:
        for k in range(cfg.samples):
            asked.append(ids)
            sampling.append(Sampling(max_tokens=cfg.max_tokens, temperature=cfg.temperature, stop=cfg.stop, logprobs=True,
                                     seed=seed_of(seed, number, which, k)))  # fmt: skip
    done = engine.generate(asked, sampling)
    model.train(was)
    records = [record for _, _, record in prompts for _ in range(cfg.samples)]
    return [
        Episode([*ids, *c.tokens], [0] * len(ids) + [1] * len(c.tokens), [0.0] * len(ids) + c.logps, c.text, c.finish, record)
        for ids, c, record in zip(asked, done, records, strict=True)
    ]


def rows_of(episodes: Sequence[Episode], keep: Tensor, pad_id: int) -> tuple[Batch, Tensor]:
    """Episodes as rows padded on the right, labels only where ``keep`` (B,), and (B, T) log-probs beside the labels."""
    longest = max(len(e.ids) for e in episodes)
    width = -(-longest // MULTIPLE) * MULTIPLE
    tokens, mask = torch.full((len(episodes), width), pad_id), torch.zeros(len(episodes), width)
    old = torch.zeros(len(episodes), width)
    for r, e in enumerate(episodes):
        n = len(e.ids)
        tokens[r, :n], mask[r, :n] = torch.tensor(e.ids), torch.tensor(e.trained, dtype=torch.float)
        old[r, : n - 1] = torch.tensor(e.logps[1:])
    seq = Seq.ragged(torch.tensor([len(e.ids) for e in episodes]), width)
    return Batch.shifted(tokens, mask * keep[:, None], seq), old
