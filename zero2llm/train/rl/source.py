"""Batches for the loop, made by the model itself: sample, score, prepare, hand out; then again with what was learned.

    prompts -> play (rollout.py) -> rewards -> method.advantages -> epochs x minibatches of rows

The loop sees batches like any other. What is left of a rollout is part of the state that a checkpoint keeps, so a run that was
killed goes on to the bit: during sampling it samples again, from the same weights and seeds.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from zero2llm.core.batch import Batch
from zero2llm.core.log import log_once
from zero2llm.core.seq import Seq
from zero2llm.data.prompts import PromptRows
from zero2llm.parallel.plan import World
from zero2llm.tokenizers.tokenizer import Tokenizer
from zero2llm.train.rl.policy import Method, Played, policy_logps
from zero2llm.train.rl.rewards import Answer, Mixture
from zero2llm.train.rl.rollout import Episode, RolloutConfig, play, rows_of, seed_of


class Reference(Protocol):
    """A frozen model: (tokens, seq) -> hidden, with its head."""

    def __call__(self, tokens: Tensor, seq: Seq): ...


class Rollouts:
    """``prompts`` in a fixed random order; this rank plays its contiguous share. ``reference`` only for methods with a KL."""

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, prompts: PromptRows, reward: Mixture, method: Method,
                 cfg: RolloutConfig, *, seed: int, world: World, reference: nn.Module | None = None, micro_rows: int = 8):  # fmt: skip
        if cfg.prompts % world.size or cfg.prompts // world.size * cfg.samples % cfg.minibatches:
            raise ValueError(f"rollout: {cfg.prompts} prompts x {cfg.samples} answers do not divide among {world.size} ranks and {cfg.minibatches} minibatches")
        self.model, self.tokenizer, self.prompts, self.reward, self.method, self.cfg = model, tokenizer, prompts, reward, method, cfg
        self.seed, self.world, self.reference, self.micro_rows = seed, world, reference, micro_rows
        self.number, self.pending = 0, []

    def __iter__(self) -> Iterator[Batch]:
        while True:
            if not self.pending:
                self.pending = self.collect()
                self.number += 1
            yield self.pending.pop(0)

    def collect(self) -> list[Batch]:
        """One rollout of this rank, cut into the batches of its optimizer steps."""
        began = time.perf_counter()
        episodes = self.episodes()
        played, extra = self.scored(episodes)
        extra |= {"adv": self.method.advantages(played).expand_as(played.old).contiguous(), "old": played.old}
        if played.ref is not None:
            extra["ref"] = played.ref
        extra["rollout_s"] = torch.full((len(episodes),), (time.perf_counter() - began) / len(episodes))
        whole = played.batch
        return self.cut(Batch(whole.tokens, whole.labels, whole.seq, extra))

    def episodes(self) -> list[Episode]:
        each = self.cfg.prompts // self.world.size
        first = self.number * self.cfg.prompts + self.world.rank * each
        return play(self.model, self.tokenizer, [(g, *self.prompts.prompt(g)) for g in range(first, first + each)], self.cfg, self.seed, self.number)

    def scored(self, episodes: list[Episode]) -> tuple[Played, dict[str, Tensor]]:
        answers = [Answer(e.text, e.finish, sum(e.trained), e.record) for e in episodes]
        values = self.reward(answers)
        if self.reward.first_failure:
            log_once(f"a reward could not be computed, its answers are left out (metric failed): {self.reward.first_failure}")
        cut = torch.tensor([e.finish == "length" for e in episodes])
        ok = torch.tensor([v is not None for v in values])
        if self.cfg.truncated == "leave_out":
            ok &= ~cut
        reward = torch.tensor([0.0 if v is None else v for v in values]) * ok
        batch, old = rows_of(episodes, ok, self.tokenizer.pad_id)
        ref = None if self.reference is None else self.logps(self.reference, batch)
        groups = reward.view(-1, self.cfg.samples)
        flat = ((groups == groups[:, :1]) | ~ok.view_as(groups)).all(1).repeat_interleave(self.cfg.samples)
        extra = {"reward": reward, "ok": ok.float(), "flat": flat.float(), "truncated": cut.float(),
                 "length": torch.tensor([float(a.tokens) for a in answers])}  # fmt: skip
        return Played(batch, old, ref, reward, ok, self.cfg.samples, self.world), extra

    @torch.no_grad()
    def logps(self, model: nn.Module, batch: Batch) -> Tensor:
        """(B, T) under another model, at the temperature of sampling."""
        device, found = next(self.model.parameters()).device, []
        for part in batch.split(self.micro_rows):
            part = part.to(device)
            found.append(policy_logps(model, model(part.tokens, part.seq)[0], part.labels, self.cfg.temperature).cpu())
        return torch.cat(found)

    def cut(self, batch: Batch) -> list[Batch]:
        """``fresh`` marks the rows of the first step, which the policy that sampled them trains on."""
        out, size = [], len(batch) // self.cfg.minibatches
        for epoch in range(self.cfg.epochs):
            generator = torch.Generator().manual_seed(seed_of(self.seed, self.number, epoch))
            order = torch.randperm(len(batch), generator=generator) if self.cfg.minibatches > 1 else torch.arange(len(batch))
            for part in order.split(size):
                rows = batch.rows(part)
                out.append(Batch(rows.tokens, rows.labels, rows.seq, rows.extra | {"fresh": torch.full((len(rows),), float(not out))}))
        return out

    def state_dict(self) -> dict:
        own = {"kind": "rollouts", "number": self.number, "seed": self.seed, **self.prompts.identity}
        return own | {"pending": [packed(batch) for batch in self.pending]}

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError if the state is of other prompts or another seed."""
        own = self.state_dict()
        for key in own:
            if key not in ("number", "pending") and state.get(key) != own[key]:
                raise ValueError(f"cannot resume: the prompts' {key} was {state.get(key)} and is now {own[key]}; restore it or start anew")
        self.number, self.pending = state["number"], [unpacked(data) for data in state["pending"]]


def packed(batch: Batch) -> dict:
    """As JSON: numbers in fp32 come back to the bit."""
    named = {"tokens": batch.tokens, "labels": batch.labels, "pos": batch.seq.pos, "group": torch.tensor(batch.group)} | {
        f"extra.{key}": value for key, value in batch.extra.items()
    }
    named |= {} if batch.seq.seg is None else {"seg": batch.seq.seg}
    return {key: {"dtype": str(value.dtype).removeprefix("torch."), "values": value.tolist()} for key, value in named.items()}


def unpacked(data: dict) -> Batch:
    t = {key: torch.tensor(value["values"], dtype=getattr(torch, value["dtype"])) for key, value in data.items()}
    extra = {key.removeprefix("extra."): value for key, value in t.items() if key.startswith("extra.")}
    return Batch(t["tokens"], t["labels"], Seq(t["pos"], t.get("seg")), extra, int(t["group"]))


