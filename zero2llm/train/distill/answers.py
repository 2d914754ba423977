"""Batches for on-policy distillation: answers that the student wrote itself, or those of the data.

    with probability ``share`` (drawn for the whole step):  x from the prompts, y ~ q(y | x)     else (x, y) from the data

Source: 2306.13649 algorithm 1 (share is its lambda; no gradient through the sampling).
Why: at its own answers' beginnings, which it will be in when it is used, a student that saw only the data's was never taught.
Each rollout is one step: what is trained on was written by the model as it stands. The place in the data is the number of the
step and the loader's own, so a run that was killed goes on to the bit: it samples again from the same weights and seeds.
Extra tensors of an own batch: old (B, T), the log-probabilities it was sampled with; own, truncated, length (B,).
Cost: prompts * samples answers of the student a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, lru_cache
from random import Random
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from zero2llm.core.batch import Batch
from zero2llm.data.loader import Loader
from zero2llm.data.rows import identity, item_of, shuffled
from zero2llm.data.shards import TokenShards
from zero2llm.parallel.plan import World
from zero2llm.tokenizers.tokenizer import Tokenizer
from zero2llm.train.rl.rollout import RolloutConfig, play, rows_of, seed_of

CHOICE = 0x67D  # keeps the draw of the step apart from the draws of answers


class Prompts(Protocol):
    """`PromptRows`, or `AnswerPrompts` of the very conversations that are trained on."""

    identity: dict

    def prompt(self, g: int) -> tuple[list[int], dict[str, Any]]: ...


class AnswerPrompts:
    """Conversations as prompts: each up to where its last answer begins, in a fixed random order."""

    def __init__(self, shards: TokenShards, seed: int | None):
        self.shards, self.identity = shards, identity(shards, None)
        self.order = lru_cache(maxsize=2)(lambda epoch: shuffled(len(shards), seed, epoch))

    def __len__(self) -> int:
        return len(self.shards)

    def prompt(self, g: int) -> tuple[list[int], dict[str, Any]]:
        epoch, place = divmod(g, len(self))
        return self.question(int(self.order(epoch)[place])), {}

    def question(self, item: int) -> list[int]:
        tokens, mask = item_of(self.shards, item)
        begins = np.flatnonzero((mask[1:] != 0) & (mask[:-1] == 0))
        if not len(begins):
            raise ValueError(f"{self.shards.path}: conversation {item} has no answer behind a prompt")
        return tokens[: begins[-1] + 1].tolist()

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest question."""
        return max(len(self.question(item)) for item in range(len(self)))


class OwnAnswers:
    """``model`` is what writes: the student, or a mixture with its teacher (minillm.py)."""

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, prompts: Prompts, cfg: RolloutConfig, *, seed: int, world: World,
                 data: Loader | None = None, share: float = 1.0):  # fmt: skip
        if cfg.minibatches != 1 or cfg.epochs != 1:
            raise ValueError(f"rollout: minibatches = {cfg.minibatches}, epochs = {cfg.epochs}; on-policy distillation trains once on each answer: 1 and 1")
        if cfg.prompts % world.size:
            raise ValueError(f"rollout.prompts = {cfg.prompts} does not divide among {world.size} ranks")
        if not 0 <= share <= 1 or (share < 1 and data is None):
            raise ValueError(f"share = {share} must be from 0 (the data's answers) to 1 (its own), and below 1 there must be data")
        self.model, self.tokenizer, self.prompts, self.cfg = model, tokenizer, prompts, cfg
        self.seed, self.world, self.data, self.share = seed, world, data, share
        self.number = 0

    def __iter__(self) -> Iterator[Batch]:
        stream = None if self.data is None else iter(self.data)
        while True:
            number = self.number
            self.number += 1  # before the yield: the cursor points behind the batch that is being trained
            own = Random(seed_of(self.seed, number, CHOICE)).random() < self.share
            yield self.written(number) if own else marked(next(stream))

    def written(self, number: int) -> Batch:
        """This rank's part of one step's answers."""
        each = self.cfg.prompts // self.world.size
        first = number * self.cfg.prompts + self.world.rank * each
        asked = [(g, *self.prompts.prompt(g)) for g in range(first, first + each)]
        episodes = play(self.model, self.tokenizer, asked, self.cfg, self.seed, number)
        cut = torch.tensor([e.finish == "length" for e in episodes])
        keep = ~cut if self.cfg.truncated == "leave_out" else torch.ones_like(cut)
        batch, old = rows_of(episodes, keep, self.tokenizer.pad_id)
        return marked(batch, old, cut, torch.tensor([float(sum(e.trained)) for e in episodes]))

    def state_dict(self) -> dict:
        own = {"kind": "own-answers", "number": self.number, "seed": self.seed, "share": self.share, **self.prompts.identity}
        return own | {"loader": None if self.data is None else self.data.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError if the state is of other prompts, data, seed or share."""
        own = self.state_dict()
        for key in own:
            if key not in ("number", "loader") and state.get(key) != own[key]:
                raise ValueError(f"cannot resume: the prompts' {key} was {state.get(key)} and is now {own[key]}; restore it or start anew")
        if (state["loader"] is None) != (self.data is None):
            raise ValueError("cannot resume: one of the two runs has answers of the data and the other has none")
        self.number = state["number"]
        if self.data is not None:
            self.data.load_state_dict(state["loader"])


def marked(batch: Batch, old: Tensor | None = None, cut: Tensor | None = None, length: Tensor | None = None) -> Batch:
    """The batch with what tells own answers from the data's."""
    nothing = torch.zeros(len(batch))
    extra = {"own": torch.full_like(nothing, float(old is not None)), "old": torch.zeros(batch.tokens.shape) if old is None else old}
    extra |= {"truncated": nothing if cut is None else cut.float(), "length": nothing if length is None else length}
    return Batch(batch.tokens, batch.labels, batch.seq, batch.extra | extra, batch.group)


def about_answers(batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
    """For the log: share of own answers, and of those how many were cut and their length in tokens. Empty for plain batches."""
    if "own" not in batch.extra:
        return {}
    own = batch.extra["own"].sum()
    found = {"own": (own, torch.tensor(len(batch), device=own.device))}
    return found | {name: (batch.extra[name].sum(), own) for name in ("truncated", "length")}
