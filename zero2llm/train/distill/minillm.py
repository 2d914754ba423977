"""MiniLLM: reverse KL of whole answers, KL(q(y | x) || p(y | x)), by policy gradient with the teacher as reward.

    r_t = log p(y_t) - log q(y_t)                                what the teacher thinks of each token that the student wrote
    R_(t+1) = (sum_(s > t) gamma^(s-t-1) r_s) / (sum_(s > t) gamma^(s-t-1))         length-normalised; 0 behind the last token
    w_t = q(y_t) / p~(y_t),   y ~ p~ = mix p + (1 - mix) q       teacher-mixed sampling
    grad L = sum_t w_t [ grad KL(q_t || p_t)  -  R_(t+1) grad log q(y_t) ]           KL of the next token, over the vocabulary

Source: 2306.08543 eqs. 3 (the two terms), 4 and 5 (mixing 0.2; one token's weight in place of the product), 6 (normalisation)
and 7; gamma as in the authors' and TRL's code, 1 in the paper.
Why: forward KL makes a small student spread over all that a large teacher might say; reverse KL lets it keep to what it can say well.
The first term has no sampling noise; without the mean over what follows, long answers would be punished for their length alone.
Left out: the pretraining loss that the paper adds (L_PT), and PPO's clip: every answer is trained on once, where it has nothing to clip.
Sums are per token of the global batch, not per answer.
Cost: sampling from both models in every step, a forward pass of the teacher beside the student's.
The logged `reward` is r, `weight` is w (1 without mixing), `divergence` KL(q_t || p_t), `loss` -log q of the labels.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor, nn

from zero2llm.core.batch import IGNORE, Batch
from zero2llm.core.config import config
from zero2llm.core.seq import Aux, Seq, State, merge_aux
from zero2llm.model.lm import LM
from zero2llm.train.distill.answers import about_answers
from zero2llm.train.distill.divergence import Head, kl, log_probs, measured
from zero2llm.train.distill.teacher import Teacher
from zero2llm.train.loss import Loss
from zero2llm.train.rl.advantages import returns
from zero2llm.train.rl.ratios import LARGE


@config
class MiniLLMConfig:
    kind: Literal["minillm"] = "minillm"
    mix: float = 0.2  # share of the teacher in what is sampled from; 0 = the student alone
    gamma: float = 1.0
    normalise: bool = True  # R as a mean over what follows, not a sum

    def __post_init__(self) -> None:
        if not 0 <= self.mix < 1 or not 0 < self.gamma <= 1:
            raise ValueError(f"minillm needs mix in [0, 1) and gamma in (0, 1], not {self.mix}, {self.gamma}")

    def build(self, teacher: Teacher) -> MiniLLM:
        return MiniLLM(self, teacher)

    def sampler(self, student: LM, teacher: Teacher, temperature: float) -> nn.Module:
        """What the answers are drawn from. Raises ValueError at another temperature than 1, where w would be another thing."""
        if temperature != 1:
            raise ValueError(f"rollout.temperature = {temperature}: minillm samples from the distributions themselves; take 1")
        return Mixed(student, teacher, self.mix) if self.mix else student


def return_to_go(reward: Tensor, mask: Tensor, gamma: float, normalise: bool) -> Tensor:
    """(B, T) sum or weighted mean of the rewards from each token on, its own included; 0 off the mask."""
    total = returns(reward, mask, gamma)
    return total / returns(torch.ones_like(reward), mask, gamma).clamp(min=1) if normalise else total


def after(reward: Tensor, mask: Tensor, gamma: float, normalise: bool) -> Tensor:
    """(B, T) the same of what follows behind each token: R_(t+1)."""
    total = (returns(reward, mask, gamma) - reward * mask) / gamma
    length = (returns(torch.ones_like(reward), mask, gamma) - mask.to(reward.dtype)) / gamma
    return torch.where(length > 0, total / length.clamp(min=1), 0) if normalise else total


class MiniLLM:
    def __init__(self, cfg: MiniLLMConfig, teacher: Teacher):
        self.cfg, self.teacher = cfg, teacher

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        hidden, aux = model(batch.tokens, batch.seq)
        keep = batch.labels != IGNORE
        logq, logp, away = measured(self.measure, model, hidden, batch, self.teacher(batch, keep))
        reward = (logp - logq).detach()
        later = after(reward.new_zeros(keep.shape).masked_scatter(keep, reward), keep, self.cfg.gamma, self.cfg.normalise)[keep]
        old = batch.extra["old"][keep] if "old" in batch.extra else logq.detach()  # held-out answers nobody sampled
        weight = (logq.detach() - old).clamp(-LARGE, LARGE).exp()
        count = keep.sum()
        total = (weight * (away - later * logq)).sum()
        total = total + sum(value for name, value in aux.items() if name.endswith("_loss")) * count
        values = {"loss": -logq, "divergence": away, "reward": reward, "weight": weight}
        log = {name: (value.detach().sum(), count) for name, value in values.items()} | about_answers(batch)
        return Loss(total, count, log | {name: (value.detach(), count.new_ones(())) for name, value in aux.items()})

    def measure(self, z: Tensor, said: Head, labels: Tensor) -> tuple[Tensor, ...]:
        """(n,) log q(y), log p(y) and KL(q || p)."""
        q, p = (log_probs(logits, self.teacher.vocab_size, 1.0) for logits in (z, said.logits()))
        chosen = labels[:, None]
        return q.gather(1, chosen).squeeze(1), p.gather(1, chosen).squeeze(1), kl(q, p)


class Mixed(nn.Module):
    """Both models as one that the engine can sample from: p~ = mix p + (1 - mix) q, token by token."""

    def __init__(self, student: LM, teacher: Teacher, mix: float):
        super().__init__()
        self.student, self.teacher, self.mix, self.vocab_size = student, teacher.model, mix, teacher.vocab_size
        shorter = min(student.cfg.max_len, teacher.model.cfg.max_len)
        self.cfg = dataclasses.replace(student.cfg, max_len=shorter)

    @property
    def embed(self) -> nn.Module:
        return self.student.embed

    def train(self, mode: bool = True) -> Mixed:
        self.training = mode
        self.student.train(mode)  # the teacher stays as it is
        return self

    def init_states(self, batch: int, max_len: int) -> list[State]:
        return [*self.student.init_states(batch, max_len), *self.teacher.init_states(batch, max_len)]

    def forward(self, tokens: Tensor, seq: Seq, states: list[State]) -> tuple[Tensor, Aux]:
        n = len(self.student.blocks)
        pair = (self.student(tokens, seq, states[:n]), self.teacher(tokens, seq, states[n:]))
        return torch.cat([hidden for hidden, _ in pair], -1), merge_aux([aux for _, aux in pair])

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., V) log p~: its softmax is p~ itself."""
        width = self.student.cfg.d_model
        sides = (self.student.logits(hidden[..., :width]), self.teacher.logits(hidden[..., width:]))
        q, p = (z[..., : self.vocab_size].log_softmax(-1) for z in sides)
        share = torch.tensor(self.mix, dtype=q.dtype, device=q.device)
        return torch.logaddexp(p + share.log(), q + torch.log1p(-share))
