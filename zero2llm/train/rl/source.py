"""Batches for the loop, made by the model itself: sample, score, choose, prepare, hand out; then again with what was learned.

    prompts -> play (rollout.py) -> rewards -> shape.take, again if that was too little -> shape.rows -> epochs x minibatches

What rows become is the shape's business: gradient.py (PPO, GRPO ...), online_dpo.py (pairs), rft.py (right answers).
The loop sees batches like any other. Ranks sample apart and then share what they have, so that means, permutations and choices are
those of the whole rollout whatever the number of ranks; of each step a rank trains on its contiguous part.
What is left of a rollout is part of the state that a checkpoint keeps, so a run that was killed goes on to the bit: during
sampling it samples again, from the same weights and seeds.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from zero2llm.core.batch import IGNORE, Batch
from zero2llm.core.log import log_once
from zero2llm.data.prompts import PromptRows
from zero2llm.parallel.plan import World
from zero2llm.tokenizers.tokenizer import Tokenizer
from zero2llm.train.loss import hidden_states
from zero2llm.train.rl.answer import Answer
from zero2llm.train.rl.gather import gathered, joined, packed, unpacked
from zero2llm.train.rl.policy import NOTE, Played, policy_logps
from zero2llm.train.rl.rewards import Mixture
from zero2llm.train.rl.rollout import Episode, RolloutConfig, play, rows_of, seed_of


@dataclass(frozen=True)
class Taken:
    """Which rows of a rollout to train on, in order, units together. good : how many of them teach something; too few = sample
    again, if that is allowed.  notes : for the log."""

    index: Tensor
    good: int
    notes: dict[str, float]


class Shape(Protocol):
    samples: int  # the fewest answers to a prompt that make sense
    unit: int  # rows that stay together
    rounds: int  # of sampling, at most
    reference: bool  # Played.ref is wanted
    values: bool  # Played.values is wanted

    def wanted(self, rows: int) -> int: ...  # good rows that are enough, of a rollout that plays so many
    def take(self, played: Played, rows: int) -> Taken: ...
    def rows(self, played: Played) -> tuple[Batch, dict[str, float]]: ...  # of those taken, and notes
    def before_step(self, batch: Batch, source: Rollouts) -> Batch: ...
    def state_dict(self) -> dict: ...
    def load_state_dict(self, state: dict) -> None: ...


class Rollouts:
    """``prompts`` in a fixed random order; each rank plays its contiguous share. ``reference`` for shapes that want one."""

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, prompts: PromptRows, reward: Mixture, shape: Shape, cfg: RolloutConfig,
                 *, seed: int, world: World, reference: nn.Module | None = None, micro_rows: int = 8):  # fmt: skip
        if cfg.prompts % world.size or cfg.prompts * cfg.samples % (world.size * cfg.minibatches * shape.unit):
            raise ValueError(f"rollout: {cfg.prompts} prompts x {cfg.samples} answers do not divide among {world.size} ranks and {cfg.minibatches} minibatches")
        if cfg.samples < shape.samples:
            raise ValueError(f"rollout.samples = {cfg.samples}: this method compares answers to one prompt and needs at least {shape.samples}")
        if shape.reference and reference is None:
            raise ValueError("this method has a KL term and needs a reference model")
        if shape.values and model.score is None:
            raise ValueError("this method needs a critic: give the model `score_head: true`")
        self.model, self.tokenizer, self.prompts, self.reward, self.shape, self.cfg = model, tokenizer, prompts, reward, shape, cfg
        self.seed, self.world, self.reference, self.micro_rows = seed, world, reference if shape.reference else None, micro_rows
        self.number, self.drawn, self.pending = 0, 0, []

    def __iter__(self) -> Iterator[Batch]:
        while True:
            if not self.pending:
                self.pending = self.collect()
                self.number += 1
            batch = self.pending.pop(0)
            share = len(batch) // self.world.size
            yield self.shape.before_step(batch.rows(slice(self.world.rank * share, (self.world.rank + 1) * share)), self)

    def collect(self) -> list[Batch]:
        """One rollout of all ranks, cut into the batches of its optimizer steps."""
        began, rows = time.perf_counter(), self.cfg.prompts * self.cfg.samples
        enough = max(self.shape.wanted(rows), self.cfg.minibatches * self.shape.unit)
        parts = [self.play()]
        taken = self.shape.take(self.played(parts[0]), rows)
        while len(parts) < self.shape.rounds and taken.good < enough:
            parts.append(self.play())
            taken = self.shape.take(self.played(joined(parts)), rows)
        batch = joined(parts)
        chosen, notes = self.shape.rows(self.played(batch.rows(taken.index)))
        notes |= taken.notes | summary(batch, self.cfg.samples) | {"resampled": len(parts) - 1.0, "rollout_s": time.perf_counter() - began}
        chosen = with_blank(replace(chosen, extra=chosen.extra | {"real": torch.ones(len(chosen))}), batch, self.shape.unit)
        said = {NOTE + name: torch.full((len(chosen),), float(value)) for name, value in notes.items()}
        return self.cut(replace(chosen, extra=chosen.extra | said))

    def play(self) -> Batch:
        """Answers to the next prompts, scored, of all ranks; old, reward, ok, cut (and ref, values) in extra."""
        each = self.cfg.prompts // self.world.size
        first = self.drawn + self.world.rank * each
        self.drawn += self.cfg.prompts
        asked = [(g, *self.prompts.prompt(g)) for g in range(first, first + each)]
        return gathered(self.scored(play(self.model, self.tokenizer, asked, self.cfg, self.seed, self.number)), self.world)

    def scored(self, episodes: list[Episode]) -> Batch:
        answers = [Answer(e.text, e.finish, sum(e.trained), e.record, e.ids, e.calls) for e in episodes]
        values = self.reward(answers)
        if self.reward.first_failure:
            log_once(f"a reward could not be computed, its answers are left out (metric failed): {self.reward.first_failure}")
        cut = torch.tensor([e.finish == "length" for e in episodes])
        ok = torch.tensor([v is not None for v in values])
        if self.cfg.truncated == "leave_out":
            ok &= ~cut
        reward = torch.tensor([0.0 if v is None else float(v) for v in values]) * ok
        batch, old = rows_of(episodes, ok, self.tokenizer.pad_id)
        extra = {"old": old, "reward": reward, "ok": ok.float(), "failed": torch.tensor([float(v is None) for v in values])}
        extra |= {"cut": cut.float(), "length": torch.tensor([float(a.tokens) for a in answers])}
        if self.cfg.tools:
            extra |= {name: torch.tensor(counts) for name, counts in tool_counts(episodes).items()}
        if self.reference is not None:
            extra["ref"] = self.logps(self.reference, batch)
        if self.shape.values:
            extra["values"] = self.values(batch)
        return replace(batch, extra=extra)

    def played(self, batch: Batch) -> Played:
        e = batch.extra
        return Played(batch, e["old"], e["reward"], e["ok"].bool(), self.cfg.samples, e.get("ref"), e.get("values"))

    @torch.no_grad()
    def logps(self, model: nn.Module, batch: Batch) -> Tensor:
        """(B, T) under a model, at the temperature of sampling."""
        heat, vocab = self.cfg.temperature, self.tokenizer.vocab_size
        return self._in_parts(batch, lambda part: policy_logps(model, hidden_states(model, part)[0], part.labels, heat, vocab))

    @torch.no_grad()
    def values(self, batch: Batch) -> Tensor:
        return self._in_parts(batch, lambda part: self.model.score(hidden_states(self.model, part)[0])) * (batch.labels != IGNORE)

    def _in_parts(self, batch: Batch, compute) -> Tensor:
        device = next(self.model.parameters()).device
        return torch.cat([compute(part.to(device)).cpu() for part in batch.split(self.micro_rows)])

    def cut(self, batch: Batch) -> list[Batch]:
        """The last unit is blank: steps are filled up with it so that every rank has equally many, at least one. ``fresh`` marks
        the rows of the first step, which the policy that sampled them trains on."""
        out, unit = [], self.shape.unit
        for epoch in range(self.cfg.epochs):
            generator = torch.Generator().manual_seed(seed_of(self.seed, self.number, epoch))
            blank = len(batch) // unit - 1
            order = torch.randperm(blank, generator=generator) if self.cfg.minibatches > 1 else torch.arange(blank)
            for part in order.tensor_split(self.cfg.minibatches):
                missing = -len(part) % self.world.size if len(part) else self.world.size
                part = torch.cat((part.sort().values, torch.full((missing,), blank)))  # answers to one prompt side by side: it is read once
                rows = batch.rows((part[:, None] * unit + torch.arange(unit)).flatten())
                out.append(replace(rows, extra=rows.extra | {"fresh": torch.full((len(rows),), float(not out))}))
        return out

    def state_dict(self) -> dict:
        own = {"kind": "rollouts", "seed": self.seed, **self.prompts.identity}
        place = {"number": self.number, "drawn": self.drawn, "pending": [packed(batch) for batch in self.pending]}
        return own | place | {"shape": self.shape.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError if the state is of other prompts or another seed."""
        own = {"kind": "rollouts", "seed": self.seed, **self.prompts.identity}
        for key, value in own.items():
            if state.get(key) != value:
                raise ValueError(f"cannot resume: the prompts' {key} was {state.get(key)} and is now {value}; restore it or start anew")
        self.number, self.drawn = state["number"], state["drawn"]
        self.pending = [unpacked(data) for data in state["pending"]]
        self.shape.load_state_dict(state["shape"])


def flat_groups(reward: Tensor, ok: Tensor, samples: int) -> Tensor:
    """(prompts,) bool: all answers that were scored got the same."""
    r, ok = reward.view(-1, samples), ok.view(-1, samples).bool()
    top = torch.where(ok, r, -torch.inf).amax(1)
    return ~(ok & (r < top[:, None])).any(1)


def summary(batch: Batch, samples: int) -> dict[str, float]:
    """What everything that was played, taken or not, has to say of the policy."""
    e = batch.extra
    return {
        "reward": float(e["reward"].sum() / e["ok"].sum().clamp(min=1)),
        "failed": float(e["failed"].mean()),
        "flat": float(flat_groups(e["reward"], e["ok"], samples).float().mean()),
        "truncated": float(e["cut"].mean()),
        "length": float(e["length"].mean()),
    } | {name: float(e[name].mean()) for name in TOOL_COUNTS if name in e}


TOOL_COUNTS = ("turns", "tool_calls", "tool_errors")


def tool_counts(episodes: Sequence[Episode]) -> dict[str, list[float]]:
    """Of each answer: turns of the policy, calls that were answered, and those of them that got an error."""
    counts = [(e.turns, len(e.calls), sum(call.failed for call in e.calls)) for e in episodes]
    return {name: list(map(float, column)) for name, column in zip(TOOL_COUNTS, zip(*counts, strict=True), strict=True)}


def with_blank(chosen: Batch, batch: Batch, unit: int) -> Batch:
    """``chosen`` and a unit of rows of ``batch`` without labels, whose extra is all 0."""
    blank = batch.rows(torch.zeros(unit, dtype=torch.long))
    extra = {name: value.new_zeros(unit, *value.shape[1:]) for name, value in chosen.extra.items()}
    return joined([chosen, Batch(blank.tokens, torch.full_like(blank.labels, IGNORE), blank.seq, extra, chosen.group)])
