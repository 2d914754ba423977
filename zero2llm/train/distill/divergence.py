"""How far the student's next-token distribution q is from the teacher's p, per token.

    forward    KL(p || q) = sum_v p (log p - log q)                  beta = 0: q must cover all that p does
    reverse    KL(q || p)                                            beta = 1: q may keep to a part of p
    JSD        beta KL(p || m) + (1 - beta) KL(q || m),  m = beta p + (1 - beta) q          0 < beta < 1

    p = softmax(z_teacher / T),  q = softmax(z_student / T)          over the tokens of the vocabulary, without its padding
    of the teacher's k likeliest tokens S alone:
    bucket         all other tokens are one more token: p' = (p_S, 1 - sum p_S), q' alike
    renormalise    p' = p_S / sum p_S, q' alike: says nothing of how much lies outside of S

Source: 1503.02531 section 2 (T); generalised JSD: 2306.13649 eq. 1 with beta as its section 2 and TRL's GKDTrainer have it.
beta = 0 and 1 are not the JSD's limits, which are 0, but the two KLs (what the JSD / beta and / (1 - beta) go to).
What top-k loses: KL(p || q) = KL(p' || q') + p_tail KL(p | tail || q | tail) with the bucket, so it is a lower bound, tight where
nothing is left in the tail.
Memory: `in_chunks` makes logits of both models for ``chunk`` tokens at a time and makes them again in the backward pass:
2 * chunk * V floats (and what their softmax keeps) instead of 2 * tokens * V. FLOPs: one more product of the vocabulary.
Shapes: log-probabilities (N, V), values (N,), nats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zero2llm.core.batch import IGNORE, Batch
from zero2llm.ops.xent import CHUNK, cap

TailKind = Literal["bucket", "renormalise"]


@dataclass(frozen=True)
class Head:
    """Hidden states with what turns them into logits. hidden : (N, D).  weight : (V, D)."""

    hidden: Tensor
    weight: Tensor
    softcap: float | None

    def __len__(self) -> int:
        return len(self.hidden)

    def part(self, at: slice) -> Head:
        return Head(self.hidden[at], self.weight, self.softcap)

    def logits(self) -> Tensor:
        """(N, V) in fp32 or wider."""
        z = F.linear(self.hidden, self.weight)
        return cap(z.to(torch.promote_types(z.dtype, torch.float32)), self.softcap)


@dataclass(frozen=True)
class TopK:
    """A teacher's k likeliest tokens. logps, ids : (N, k).  tail : (N,) log of the probability of all others."""

    logps: Tensor
    ids: Tensor
    tail: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, at: slice) -> TopK:
        return TopK(self.logps[at], self.ids[at], self.tail[at])

    def buckets(self, kind: TailKind) -> Tensor:
        """(N, k + 1) or (N, k) log-probabilities that add up to 1, whatever rounding did to the stored ones."""
        values = self.logps if kind == "renormalise" else torch.cat([self.logps, self.tail[:, None]], 1)
        return values.log_softmax(-1)


def likeliest(logp: Tensor, k: int) -> TopK:
    """The k likeliest tokens of each row of (N, V) log-probabilities. Raises ValueError if no token is left for the tail."""
    if not 1 <= k < logp.shape[1]:
        raise ValueError(f"top_k = {k} must be from 1 to {logp.shape[1] - 1}: the vocabulary has {logp.shape[1]} tokens")
    values, ids = logp.topk(k, -1)
    return TopK(values, ids, outside(logp, ids))


def outside(logp: Tensor, ids: Tensor) -> Tensor:
    """(N,) log of the probability of all tokens but ``ids``; added up itself, for 1 - sum would round to 0 or below."""
    return logp.scatter(1, ids, -torch.inf).logsumexp(-1)


def buckets(logp: Tensor, ids: Tensor, kind: TailKind) -> Tensor:
    """What a full distribution (N, V) says of the same buckets as `TopK.buckets`."""
    kept = logp.gather(1, ids)
    return kept.log_softmax(-1) if kind == "renormalise" else torch.cat([kept, outside(logp, ids)[:, None]], 1)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """(N,) KL(p || q) from log-probabilities (N, V)."""
    return (p.exp() * (p - q)).sum(-1)


def divergence(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """(N,) from log-probabilities (N, V)."""
    if beta == 0:
        return kl(teacher, student)
    if beta == 1:
        return kl(student, teacher)
    share = torch.tensor(beta, dtype=student.dtype, device=student.device)
    middle = torch.logaddexp(teacher + share.log(), student + torch.log1p(-share))
    return beta * kl(teacher, middle) + (1 - beta) * kl(student, middle)


def log_probs(logits: Tensor, vocab: int, temperature: float) -> Tensor:
    """(N, vocab): what stands behind the vocabulary's end pads the table and is no token."""
    return (logits[:, :vocab] / temperature).log_softmax(-1)


def check_beta(name: str, beta: float, temperature: float) -> None:
    if not 0 <= beta <= 1:
        raise ValueError(f"{name}.beta = {beta} must be from 0 (forward KL) to 1 (reverse KL)")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"{name}.temperature = {temperature} must be positive")


Measure = Callable[[Tensor, Head | TopK, Tensor], tuple[Tensor, ...]]


def in_chunks(measure: Measure, student: Head, teacher: Head | TopK, labels: Tensor, chunk: int = CHUNK) -> tuple[Tensor, ...]:
    """``measure`` of (student's logits (n, V), teacher, labels (n,)) for ``chunk`` tokens at a time, put together again.

    Each value that it returns has one entry a token; of the student it may keep the gradient.
    """

    def one(hidden: Tensor, weight: Tensor, at: slice) -> tuple[Tensor, ...]:
        return measure(Head(hidden, weight, student.softcap).logits(), teacher.part(at), labels[at])

    starts = range(0, max(len(student), 1), chunk)  # no token: one empty part, connected to the graph
    parts = [
        checkpoint(one, student.hidden[at], student.weight, at, use_reentrant=False, preserve_rng_state=False)
        for at in (slice(start, start + chunk) for start in starts)
    ]
    return tuple(torch.cat(values) for values in zip(*parts, strict=True))


@torch.compiler.disable  # how many labels there are differs from batch to batch; the model around it compiles
def measured(measure, model: nn.Module, hidden: Tensor, batch: Batch, said: Head | TopK | None = None) -> tuple[Tensor, ...]:
    """`in_chunks` on the labelled tokens of a batch, from the student's hidden states (B, T, D). Prompts and padding cost nothing."""
    keep = batch.labels != IGNORE
    student = Head(hidden[keep], model.head_weight, model.logit_softcap)
    return in_chunks(measure, student, student if said is None else said, batch.labels[keep])
