"""Prompts for reinforcement learning, from token files: a fixed random order, found at any place without having walked there."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from zero2llm.data.rows import identity, shuffled
from zero2llm.data.shards import TokenShards


class PromptRows:
    """``prompt(g)``: the g-th prompt of training, counted over all epochs: its ids and what stands beside it."""

    def __init__(self, shards: TokenShards, seed: int | None):
        self.shards, self.seed = shards, seed
        self.identity = identity(shards, None)
        self.order = lru_cache(maxsize=2)(lambda epoch: shuffled(len(shards), seed, epoch))

    def __len__(self) -> int:
        return len(self.shards)

    def prompt(self, g: int) -> tuple[list[int], dict[str, Any]]:
        epoch, place = divmod(g, len(self))
        item = int(self.order(epoch)[place])
        a, b = map(int, self.shards.offsets[item : item + 2])
        return self.shards.tokens[a:b].tolist(), self.shards.extra(item)
