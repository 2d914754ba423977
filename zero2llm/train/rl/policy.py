"""What all policy-gradient methods share: log-probabilities of the sampled tokens, the reference, and what the log says.

    L = surrogate(log pi, log pi_old, A, mask)  +  weight * penalty(log pi, log pi_ref)        the penalty per token, aggregated alike

A method (grpo.py, dapo.py, gspo.py ...) is two functions: `advantages` of a finished rollout, and `surrogate`. What few of them
need beside that (a KL in the reward, a critic, bounds of the whole step, further sampling) they say in `also`.
Shapes: (B, T) where batch.extra has old, adv, ref; position t holds what belongs to the token that t predicts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from zero2llm.core.batch import IGNORE, Batch
from zero2llm.ops.xent import token_logps
from zero2llm.parallel.plan import World
from zero2llm.train.loss import Loss, Objective, hidden_states
from zero2llm.train.rl.kl import KLConfig, RewardKL, k3, penalty
from zero2llm.train.rl.ratios import LARGE

Sums = dict[str, tuple[Tensor, Tensor]]
NOTE = "note."  # extra["note.x"] (B,) is what a rollout says of itself, the same in all its rows: metric x
MEANING = {  # of the metrics, for the reader of a log
    "reward": "mean of the scored answers",
    "ratio": "pi / pi_old per token; exactly 1 at the first update after sampling",
    "clip_fraction": "share of tokens whose gradient the clip took away (CISPO: held down); 0 at the first update after sampling",
    "logp_gap": "largest |log pi - log pi_old| in fresh rows: sampler and training disagree by so much (rounding, unless there is a bug)",
    "kl": "estimated KL(pi || ref) per token",
    "kl_beta": "weight of the KL inside the reward; an adaptive one moves",
    "surprise": "mean -log pi of the sampled tokens: an estimate of the entropy",
    "flat": "share of prompts whose answers all got the same reward: they teach nothing",
    "truncated": "share of answers cut at max_tokens",
    "failed": "share of answers whose reward could not be computed: they teach nothing",
    "length": "tokens that the policy wrote in an answer",
    "turns": "answers of the policy in a conversation, tools' replies between them",
    "tool_calls": "tool calls of an answer that were answered; those of its last turn are not",
    "tool_errors": "of those, calls that got an error: no JSON, an unknown tool, other arguments, an expression with a fault",
    "resampled": "rounds of further prompts that a rollout needed",
    "bound_low": "BAPO: lower clip bound of this step",
    "bound_high": "BAPO: upper clip bound of this step",
    "value_loss": "PPO: half the squared error of the critic, per token",
    "explained": "PPO: share of the returns' variance that the critic explains; below 0 it is worse than their mean",
    "tied": "online DPO: share of prompts whose answers all got the same reward, and made no pair",
    "kept": "RFT: share of all answers that are right and distinct, and trained on",
    "repeated": "RFT: share of the right answers that say the same as another, and were left out",
    "step_kl": "TRPO: KL(old || new) per token of the step that was taken",
    "step_scale": "TRPO: share of the full step that the line search took; 0 = none, the weights stayed",
    "rollout_s": "seconds of sampling and scoring, per rollout",
}


@dataclass(frozen=True)
class Played:
    """A finished rollout of all ranks: ``samples`` rows for each prompt, next to each other.

    batch : tokens with labels on what the policy sampled (none in a row without a reward).  old : (B, T) log-probs.
    reward : (B,), 0 where ok (B,) is False.  ref, values : (B, T); None without a reference, a critic.
    """

    batch: Batch
    old: Tensor
    reward: Tensor
    ok: Tensor
    samples: int
    ref: Tensor | None = None
    values: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        return self.batch.labels != IGNORE


@dataclass(frozen=True)
class Surrogate:
    """total, count : as in aggregate.py.  clipped : (B, T) or (B, 1) bool, where the clip took the gradient away."""

    total: Tensor
    count: Tensor
    clipped: Tensor


class Critic(Protocol):
    """Values of the model's score head, (B, T)."""

    def returns(self, played: Played) -> Tensor: ...  # (B, T), what the values should have been
    def __call__(self, values: Tensor, extra: Mapping[str, Tensor], mask: Tensor) -> tuple[Tensor, Sums]: ...  # loss, a sum over tokens


@dataclass(frozen=True)
class Also:
    """What a method needs beside its two functions; most need nothing.

    samples : the fewest answers to a prompt that make sense.  reward_kl : a KL that `advantages` reads.  critic : its targets
    and loss; the surrogate must then count tokens.  bounds : (log pi now, this rank's rows of a step, world) -> tensors for
    batch.extra, before each step.  rounds : how often to sample at most, until no prompt of the rollout is flat.
    """

    samples: int = 2
    reward_kl: RewardKL | None = None
    critic: Critic | None = None
    bounds: Callable[[Tensor, Batch, World], dict[str, Tensor]] | None = None
    rounds: int = 1


class Method(Protocol):
    kl: KLConfig | None
    also: Also

    def advantages(self, played: Played) -> Tensor: ...  # (B, 1) or (B, T)
    def surrogate(self, logp: Tensor, old: Tensor, adv: Tensor, mask: Tensor, extra: Mapping[str, Tensor]) -> Surrogate: ...
    def aggregate(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]: ...


class PolicyLoss:
    """temperature, vocab : those of sampling (the tokenizer's size, where the model's table has more rows): the policy is the
    distribution that was sampled from."""

    def __init__(self, method: Method, temperature: float, vocab: int | None = None):
        self.method, self.temperature, self.vocab = method, temperature, vocab

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        hidden, aux = hidden_states(model, batch)
        logp = policy_logps(model, hidden, batch.labels, self.temperature, self.vocab)
        mask, extra, critic = batch.labels != IGNORE, batch.extra, self.method.also.critic
        made = self.method.surrogate(logp, extra["old"], extra["adv"], mask, extra)
        total, metrics = made.total, shared_metrics(logp.detach(), made, batch)
        if self.method.kl is not None:
            cfg = self.method.kl
            total = total + cfg.weight * self.method.aggregate(penalty(cfg.estimator, logp, extra["old"], extra["ref"]), mask)[0]
        if critic is not None:
            further, found = critic(model.score(hidden), extra, mask)
            total, metrics = total + further, metrics | found
        total = total + sum(value for name, value in aux.items() if name.endswith("_loss")) * made.count
        return Loss(total, made.count, {"loss": (total.detach(), made.count)} | metrics)


class Sampled:
    """Another objective (DPO, SFT) on rows that a rollout made: it says what the rollout was, and leaves out rows
    that only fill up; a step of nothing else is skipped."""

    def __init__(self, objective: Objective):
        self.objective = objective

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        real = batch.extra["real"].bool()
        some = real.any()
        loss = self.objective(model, batch.rows(real) if some else batch)
        found = {name: (value * some, units * some) for name, (value, units) in loss.metrics.items()}
        return Loss(loss.total * some, loss.count * some, found | rollout_metrics(batch))


def policy_logps(model: nn.Module, hidden: Tensor, labels: Tensor, temperature: float, vocab: int | None = None) -> Tensor:
    """(B, T) log-probabilities under the distribution that is sampled from; 0 where there is no label."""
    return token_logps(hidden, model.head_weight[:vocab], labels, model.logit_softcap, temperature=temperature)


def rollout_metrics(batch: Batch) -> Sums:
    n = torch.tensor(len(batch), device=batch.tokens.device)
    return {name.removeprefix(NOTE): (value.sum(), n) for name, value in batch.extra.items() if name.startswith(NOTE)}


def shared_metrics(logp: Tensor, made: Surrogate, batch: Batch) -> Sums:
    mask, extra = batch.labels != IGNORE, batch.extra
    n, away = mask.sum(), ((logp - extra["old"]) * mask).clamp(-LARGE, LARGE)
    found = {"ratio": ((away.exp() * mask).sum(), n), "clip_fraction": ((made.clipped & mask).sum(), n), "surprise": (-logp.sum(), n)}
    if "ref" in extra:
        found["kl"] = ((k3(logp, extra["ref"]) * mask).sum(), n)
    fresh = extra["fresh"]
    found["logp_gap"] = ((away.abs().amax(1) * fresh).sum(), fresh.sum())
    return found | rollout_metrics(batch)
