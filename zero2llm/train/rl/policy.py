"""What all policy-gradient methods share: log-probabilities of the sampled tokens, the reference, and what the log says.

    L = surrogate(log pi, log pi_old, A, mask)  +  weight * penalty(log pi, log pi_ref)        the penalty per token, aggregated alike

A method (grpo.py, dapo.py, gspo.py ...) is two functions: `advantages` of a finished rollout, and `surrogate`.
Shapes: (B, T) where batch.extra has old, adv, ref; position t holds what belongs to the token that t predicts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from zero2llm.core.batch import IGNORE, Batch
from zero2llm.ops.xent import token_logps
from zero2llm.parallel.plan import World
from zero2llm.train.loss import Loss
from zero2llm.train.rl.kl import KLConfig, k3, penalty
from zero2llm.train.rl.ratios import LARGE

MEANING = {  # of the metrics, for the reader of a log
    "reward": "mean of the scored answers",
    "ratio": "pi / pi_old per token; exactly 1 at the first update after sampling",
    "clip_fraction": "share of tokens whose gradient the clip took away; 0 at the first update after sampling",
    "logp_gap": "largest |log pi - log pi_old| in fresh rows: sampler and training disagree by so much (rounding, unless there is a bug)",
    "kl": "estimated KL(pi || ref) per token",
    "surprise": "mean -log pi of the sampled tokens: an estimate of the entropy",
    "flat": "share of prompts whose answers all got the same reward: they teach nothing",
    "truncated": "share of answers cut at max_tokens",
    "failed": "share of answers whose reward could not be computed: they teach nothing",
    "length": "tokens that the policy wrote in an answer",
}


@dataclass(frozen=True)
class Played:
    """A finished rollout of this rank: ``samples`` rows for each prompt, next to each other.

    batch : tokens with labels on what the policy sampled (none in a row without a reward).  old, ref : (B, T) log-probs;
    ref is None without a reference.  reward : (B,), 0 where ok (B,) is False.
    """

    batch: Batch
    old: Tensor
    ref: Tensor | None
    reward: Tensor
    ok: Tensor
    samples: int
    world: World

    @property
    def mask(self) -> Tensor:
        return self.batch.labels != IGNORE


@dataclass(frozen=True)
class Surrogate:
    """total, count : as in aggregate.py.  clipped : (B, T) or (B, 1) bool, where the clip took the gradient away."""

    total: Tensor
    count: Tensor
    clipped: Tensor


class Method(Protocol):
    kl: KLConfig | None

    def advantages(self, played: Played) -> Tensor: ...  # (B, 1) or (B, T)
    def surrogate(self, logp: Tensor, old: Tensor, adv: Tensor, mask: Tensor) -> Surrogate: ...
    def aggregate(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]: ...


class PolicyLoss:
    """temperature : that of sampling: the policy is the distribution that was sampled from."""

    def __init__(self, method: Method, temperature: float):
        self.method, self.temperature = method, temperature

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        hidden, aux = model(batch.tokens, batch.seq)
        logp = policy_logps(model, hidden, batch.labels, self.temperature)
        mask, extra = batch.labels != IGNORE, batch.extra
        made = self.method.surrogate(logp, extra["old"], extra["adv"], mask)
        total, metrics = made.total, shared_metrics(logp.detach(), made, batch)
        if self.method.kl is not None:
            cfg = self.method.kl
            total = total + cfg.weight * self.method.aggregate(penalty(cfg.estimator, logp, extra["old"], extra["ref"]), mask)[0]
        total = total + sum(value for name, value in aux.items() if name.endswith("_loss")) * made.count
        return Loss(total, made.count, {"loss": (total.detach(), made.count)} | metrics)


def policy_logps(model: nn.Module, hidden: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """(B, T) log-probabilities under the distribution that is sampled from; 0 where there is no label."""
    return token_logps(hidden, model.head_weight, labels, model.logit_softcap, temperature=temperature)


def shared_metrics(logp: Tensor, made: Surrogate, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
    mask, extra = batch.labels != IGNORE, batch.extra
    n, away = mask.sum(), ((logp - extra["old"]) * mask).clamp(-LARGE, LARGE)
    found = {"ratio": ((away.exp() * mask).sum(), n), "clip_fraction": ((made.clipped & mask).sum(), n), "surprise": (-logp.sum(), n)}
    if "ref" in extra:
        found["kl"] = ((k3(logp, extra["ref"]) * mask).sum(), n)
    fresh = extra["fresh"]
    gap = (away.abs() * fresh[:, None]).amax(1) if away.shape[1] else away.sum(1)
    found |= {"logp_gap": (gap.sum(), fresh.sum())}
    found |= {"reward": (extra["reward"].sum(), extra["ok"].sum()), "failed": (len(batch) - extra["ok"].sum(), _n(batch))}
    return found | {key: (extra[key].sum(), _n(batch)) for key in ("flat", "truncated", "length")}


def _n(batch: Batch) -> Tensor:
    return torch.tensor(len(batch), device=batch.tokens.device)
