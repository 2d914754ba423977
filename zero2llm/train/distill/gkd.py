"""Generalised knowledge distillation: the teacher corrects what the student writes, token by token.

    L = sum_t D_beta(p_t, q_t)          over the answer's tokens, the student's own with probability lambda (answers.py)

Source: 2306.13649 eq. 1 and algorithm 1; defaults of TRL's GKDTrainer (beta 0.5, lambda 0.5; it divides logits by T = 0.9 in the
loss and samples at 0.9; the paper has 1). No T^2, as there.
Why: distillation on fixed answers trains on beginnings that the student would not write; here it is shown how to go on from its own.
beta: 0 = forward KL, 1 = reverse KL, which on own answers (lambda = 1) is MiniLLM's aim without its policy gradient.
Cost: a forward pass of the teacher a step, and the student's sampling in a share lambda of the steps.
The logged `loss` is the cross-entropy of the labels (own answers: their surprise), `divergence` is D.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from zero2llm.core.batch import IGNORE, Batch
from zero2llm.core.config import config
from zero2llm.train.distill.answers import about_answers
from zero2llm.train.distill.divergence import Head, check_beta, divergence, log_probs, measured
from zero2llm.train.distill.logits import entropy
from zero2llm.train.distill.teacher import Teacher
from zero2llm.train.loss import Loss


@config
class GKDConfig:
    kind: Literal["gkd"] = "gkd"
    beta: float = 0.5
    temperature: float = 1.0  # of both distributions in the loss; that of sampling stands in rollout
    share: float = 0.5  # lambda: of the steps that train on the student's own answers

    def __post_init__(self) -> None:
        check_beta("gkd", self.beta, self.temperature)
        if not 0 <= self.share <= 1:
            raise ValueError(f"gkd.share = {self.share} must be from 0 (the data's answers) to 1 (its own)")

    def build(self, teacher: Teacher) -> GKD:
        return GKD(self, teacher)


class GKD:
    def __init__(self, cfg: GKDConfig, teacher: Teacher):
        self.cfg, self.teacher = cfg, teacher

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        hidden, aux = model(batch.tokens, batch.seq)
        keep = batch.labels != IGNORE
        nats, away = measured(self.measure, model, hidden, batch, self.teacher(batch, keep))
        count = keep.sum()
        total = away.sum() + sum(value for name, value in aux.items() if name.endswith("_loss")) * count
        log = {"loss": (nats.detach().sum(), count), "divergence": (away.detach().sum(), count)} | about_answers(batch)
        return Loss(total, count, log | {name: (value.detach(), count.new_ones(())) for name, value in aux.items()})

    def measure(self, z: Tensor, said: Head, labels: Tensor) -> tuple[Tensor, ...]:
        q, p = (log_probs(logits, self.teacher.vocab_size, self.cfg.temperature) for logits in (z, said.logits()))
        return entropy(z.detach(), labels), divergence(q, p, self.cfg.beta)
