"""Rejection-sampling fine-tuning: answer often, keep what is right, and imitate it.

    D = { y_k ~ pi(. | x) : R(y_k) >= right, y_k distinct, at most `most` per prompt },    L = -sum log pi(y | x)         (clm.py)

Source: 2308.01825 section 3.3 (K = 100 at temperature 0.7; distinct chains); STaR 2203.14465 and RAFT 2304.06767 do so in turns, as here.
Why: supervised learning from one's own right answers; no ratio, no clip, no negative example.
Easy prompts would dominate, hence `most`. Distinct are answers that differ in a token. A rollout without a right
answer is followed by another, `rounds` times in all; if there is still none the step is skipped.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch

from zero2llm.core.batch import IGNORE, Batch
from zero2llm.core.config import config
from zero2llm.train.objectives.clm import CLMConfig
from zero2llm.train.rl.policy import Played, Sampled
from zero2llm.train.rl.source import Rollouts, Taken


@config
class RFTConfig:
    """right : the least reward that counts as right.  most : answers kept of one prompt.  rounds : of sampling, at most."""

    kind: Literal["rft"] = "rft"
    right: float = 1.0
    most: int = 4
    rounds: int = 4

    def __post_init__(self) -> None:
        if self.most < 1 or self.rounds < 1 or not math.isfinite(self.right):
            raise ValueError(f"rft needs most >= 1, rounds >= 1 and a finite `right`, not {self.most}, {self.rounds}, {self.right}")

    def build(self) -> Kept:
        return Kept(self)

    def objective(self) -> Sampled:
        return Sampled(CLMConfig(kind="sft").build())


class Kept:
    samples, unit, reference, values = 1, 1, False, False

    def __init__(self, cfg: RFTConfig):
        self.right, self.most, self.rounds = cfg.right, cfg.most, cfg.rounds

    def wanted(self, rows: int) -> int:
        return 1

    def take(self, played: Played, rows: int) -> Taken:
        right = (played.ok & (played.reward >= self.right) & played.mask.any(1)).tolist()
        kept, repeated = [], 0
        for first in range(0, len(right), played.samples):
            said: set[tuple[int, ...]] = set()
            for row in range(first, first + played.samples):
                if not right[row]:
                    continue
                answer = tuple(played.batch.labels[row][played.batch.labels[row] != IGNORE].tolist())
                repeated += answer in said
                if answer not in said and len(said) < self.most:
                    kept.append(row)
                    said.add(answer)
        notes = {"kept": len(kept) / len(right), "repeated": repeated / max(sum(right), 1)}
        return Taken(torch.tensor(kept, dtype=torch.long), len(kept), notes)

    def rows(self, played: Played) -> tuple[Batch, dict[str, float]]:
        return replace(played.batch, extra={}), {}

    def before_step(self, batch: Batch, source: Rollouts) -> Batch:
        return batch

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        assert state == {}, state
