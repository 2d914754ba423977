"""Online DPO: the model answers, the reward says which of two answers is better, and DPO learns from that pair.

    y, y' ~ pi(. | x),   chosen = the one with the higher reward:    L = -log sigmoid(beta (h_chosen - h_rejected))      (dpo.py)

Source: 2402.04792 (OAIF; two samples, beta 0.1). With more samples the best and the worst make the pair.
Why: pairs of somebody else's answers say little about what this model would say; these are its own, of this step.
A prompt whose answers all got the same makes no pair (metric `tied`). If none made one, further prompts are sampled, `rounds` times
in all; if there is still none the step is skipped.
Cost: sampling, and the frozen reference of DPO.
Shapes: rows chosen 0, rejected 0, chosen 1 ... (batch.group = 2), as dpo.py wants them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from zero2llm.core.batch import Batch
from zero2llm.core.config import config
from zero2llm.train.objectives.dpo import DPOConfig
from zero2llm.train.objectives.reference import Reference
from zero2llm.train.rl.policy import Played, Sampled
from zero2llm.train.rl.source import Rollouts, Taken


@config
class OnlineDPOConfig:
    """rounds : of sampling, at most, until there is a pair for every minibatch."""

    kind: Literal["online_dpo"] = "online_dpo"
    dpo: DPOConfig = DPOConfig()
    rounds: int = 4

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"online_dpo.rounds = {self.rounds} must be at least 1")
        if self.dpo.reference == "precomputed":
            raise ValueError("online_dpo.dpo.reference: precomputed needs pairs that stand before training; take model or none")

    def build(self) -> Pairs:
        return Pairs(self.rounds)

    def objective(self, reference: Reference) -> Sampled:
        return Sampled(self.dpo.build(reference))


class Pairs:
    samples, unit, reference, values = 2, 2, False, False  # DPO holds its own reference

    def __init__(self, rounds: int):
        self.rounds = rounds

    def wanted(self, rows: int) -> int:
        return 2

    def take(self, played: Played, rows: int) -> Taken:
        reward, ok = played.reward.view(-1, played.samples), played.ok.view(-1, played.samples)
        best, worst = torch.where(ok, reward, -torch.inf).argmax(1), torch.where(ok, reward, torch.inf).argmin(1)
        side = torch.arange(len(reward))
        won = ok.any(1) & (reward[side, best] > reward[side, worst])
        index = (torch.stack((best, worst), 1) + side[:, None] * played.samples)[won].flatten()
        return Taken(index, len(index), {"tied": float((~won).float().mean())})

    def rows(self, played: Played) -> tuple[Batch, dict[str, float]]:
        return replace(played.batch, extra={}, group=2), {}

    def before_step(self, batch: Batch, source: Rollouts) -> Batch:
        return batch

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        assert state == {}, state
