"""The rows of a policy-gradient method: every answer, with its advantage.

    rollout -> A = method.advantages -> rows with old, adv (ref; returns, values of a critic)

With `rounds` (DAPO 2503.14476 section 3.2) prompts whose answers all got the same reward make room for further prompts, until none
is left or the rounds are over; then flat ones fill up, so that a step always has the same number of answers.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from zero2llm.core.batch import Batch
from zero2llm.train.rl.policy import Method, Played
from zero2llm.train.rl.source import Rollouts, Taken, flat_groups


class PolicyGradient:
    unit = 1

    def __init__(self, method: Method):
        self.method, self.also = method, method.also
        self.samples, self.rounds, self.values = self.also.samples, self.also.rounds, self.also.critic is not None
        self.reference = method.kl is not None or self.also.reward_kl is not None

    def wanted(self, rows: int) -> int:
        return rows

    def take(self, played: Played, rows: int) -> Taken:
        if self.rounds == 1:
            return Taken(torch.arange(len(played.batch)), rows, {})
        flat = flat_groups(played.reward, played.ok, played.samples)
        groups = torch.argsort(flat.int(), stable=True)[: rows // played.samples]  # varied ones first, else as they came
        index = (groups[:, None] * played.samples + torch.arange(played.samples)).flatten()
        return Taken(index, min(int((~flat).sum()) * played.samples, rows), {})

    def rows(self, played: Played) -> tuple[Batch, dict[str, float]]:
        extra = {"adv": self.method.advantages(played).expand_as(played.old).contiguous(), "old": played.old}
        if played.ref is not None:
            extra["ref"] = played.ref
        if self.also.critic is not None:
            extra |= {"values": played.values, "returns": self.also.critic.returns(played)}
        notes = {} if self.also.critic is None else {"explained": explained(played, extra["returns"])}
        if self.also.reward_kl is not None:
            notes["kl_beta"] = self.also.reward_kl.beta
            answers = played.mask.any(1).sum().clamp(min=1)
            self.also.reward_kl.adapt(float(((played.old - played.ref) * played.mask).sum() / answers))
        return replace(played.batch, extra=extra), notes

    def before_step(self, batch: Batch, source: Rollouts) -> Batch:
        if self.also.bounds is None:
            return batch
        return replace(batch, extra=batch.extra | self.also.bounds(source.logps(source.model, batch), batch, source.world))

    def state_dict(self) -> dict:
        return {} if self.also.reward_kl is None else {"kl_beta": self.also.reward_kl.beta}

    def load_state_dict(self, state: dict) -> None:
        if self.also.reward_kl is not None:
            self.also.reward_kl.beta = state["kl_beta"]


def explained(played: Played, returns: Tensor) -> float:
    """1 - var(returns - values) / var(returns) over the tokens; 0 where all returns are the same."""
    right, wrong = returns[played.mask], (returns - played.values)[played.mask]
    whole = float(right.var(correction=0)) if len(right) else 0.0
    return 1 - float(wrong.var(correction=0)) / whole if whole > 0 else 0.0
