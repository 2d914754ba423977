"""Distillation of next-token distributions: besides which token came, how likely the teacher found all the others.

    L = sum_t  alpha T^2 D(p_t, q_t) + (1 - alpha) (-log q1_t[y_t])          over the labelled tokens
    p = softmax(z_teacher / T),  q = softmax(z_student / T),  q1 at T = 1;  D as in divergence.py, by default KL(p || q)

Source: 1503.02531 section 2. T^2 keeps the gradient's size, which falls as 1 / T^2 where logits are small against T.
Why: a label is one token; p also says which others would have done. Where the student is too small to be right everywhere, it
shows it what to be wrong about.
Works on any batch with labels: documents, conversations, both. Widths and depths may differ; vocabularies may not (teacher.py).
With `top_k` only the teacher's k likeliest tokens are compared; a cached teacher (cache.py) has no more.
Cost: a forward pass of the teacher beside each training pass, and its weights; cached: reading 6 k + 4 bytes a labelled token.
The logged `loss` is the cross-entropy alone, so that it compares with any other run's; `divergence` is D.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zero2llm.core.batch import IGNORE, Batch
from zero2llm.core.config import config
from zero2llm.core.seq import Aux
from zero2llm.train.distill.divergence import (
    Head,
    TailKind,
    TopK,
    buckets,
    check_beta,
    divergence,
    likeliest,
    log_probs,
    measured,
)
from zero2llm.train.distill.teacher import Stored, Teaches
from zero2llm.train.loss import Loss


@config
class DistillConfig:
    kind: Literal["distill"] = "distill"
    alpha: float = 0.9  # share of the teacher; 0 = labels alone
    temperature: float = 2.0
    beta: float = 0.0  # 0 = forward KL, 1 = reverse KL, between = JSD
    top_k: int | None = None  # None = all tokens
    tail: TailKind = "bucket"

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"distill.alpha = {self.alpha} must be from 0 (labels alone) to 1 (teacher alone)")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"distill.top_k = {self.top_k} must be at least 1; null = all tokens")
        check_beta("distill", self.beta, self.temperature)

    def build(self, teacher: Teaches) -> Distill:
        """``teacher``: a `Teacher`, or the `Stored` one of cached rows. Raises ValueError if that was stored otherwise."""
        if isinstance(teacher, Stored) and (teacher.k, teacher.temperature) != (self.top_k, self.temperature):
            raise ValueError(
                f"the teacher's cache holds top_k = {teacher.k} at temperature {teacher.temperature}, the objective asks for "
                f"{self.top_k} at {self.temperature}: make them equal, or write the cache again"
            )
        return Distill(self, teacher)


class Distill:
    def __init__(self, cfg: DistillConfig, teacher: Teaches):
        self.cfg, self.teacher, self.vocab_size = cfg, teacher, teacher.vocab_size

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        hidden, aux = model(batch.tokens, batch.seq)
        said = None if self.cfg.alpha == 0 else self.teacher(batch, batch.labels != IGNORE)
        if said is None and self.cfg.alpha and model.training:  # of a cached teacher nothing is stored for validation rows
            raise ValueError("the batch carries no teacher's tokens: its rows must come through CachedRows")
        return self.loss(model, hidden, aux, batch, said)

    def loss(self, model: nn.Module, hidden: Tensor, aux: Aux, batch: Batch, said: Head | TopK | None) -> Loss:
        """From the student's hidden states (B, T, D), what its layers report, and the teacher's word on the labelled tokens."""
        count = (batch.labels != IGNORE).sum()
        if said is None:
            (nats,) = measured(lambda z, _, y: (entropy(z, y),), model, hidden, batch)
            return self.summed(nats, None, None, aux, count)
        return self.summed(*measured(self.measure, model, hidden, batch, said), aux, count)

    def measure(self, z: Tensor, said: Head | TopK, labels: Tensor) -> tuple[Tensor, ...]:
        """(n,) cross-entropy, divergence, and whether both find the same token likeliest."""
        cfg, q = self.cfg, log_probs(z, self.vocab_size, self.cfg.temperature)
        if isinstance(said, Head):
            p = log_probs(said.logits(), self.vocab_size, cfg.temperature)
            best, said = p.argmax(-1), p if cfg.top_k is None else likeliest(p, cfg.top_k)
        else:
            best = said.ids[:, 0]
        away = compared(q, said, cfg.tail, cfg.beta)
        return entropy(z, labels), away, (q.argmax(-1) == best).float()

    def summed(self, nats: Tensor, away: Tensor | None, agree: Tensor | None, aux: Aux, count: Tensor) -> Loss:
        alpha, square = self.cfg.alpha, self.cfg.temperature**2
        total = (1 - alpha) * nats.sum()
        log = {"loss": (nats.detach().sum(), count)}
        if away is not None:
            total = total + alpha * square * away.sum()
            log |= {"divergence": (away.detach().sum(), count), "agree": (agree.sum(), count)}
        total = total + sum(value for name, value in aux.items() if name.endswith("_loss")) * count
        return Loss(total, count, log | {name: (value.detach(), torch.ones_like(count)) for name, value in aux.items()})


def compared(q: Tensor, said: Tensor | TopK, tail: TailKind, beta: float) -> Tensor:
    """(n,) divergence of the student's log-probabilities (n, V) from the teacher's, full or cut."""
    if isinstance(said, TopK):
        return divergence(buckets(q, said.ids, tail), said.buckets(tail).to(q.dtype), beta)
    return divergence(q, said, beta)


def entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """(n,) -log q[y] in nats."""
    return F.cross_entropy(logits, labels, reduction="none")
