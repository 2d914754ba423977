"""Answers sampled from the model that is being trained, with the log-probabilities that they were sampled with.

    prompt  ->  samples answers each, token by token, y_t ~ softmax(z_t / temperature)
    with tools:  prompt, answer 1 with a call, reply 1, answer 2, ...     up to ``turns`` answers; replies are not the policy's (trained 0)

Token ids are kept as they were sampled, never made again from text. What each answer draws depends on the seed, the number of
its rollout, its prompt and its place alone, so neither the ranks nor what shares its batch change it. No top-p, top-k or
penalty: the log-probabilities of what they do are not the policy's.
Each turn is prefilled anew: with tools a rollout costs about as many prompts as answers have turns.
This is the only file of train/ that knows the engine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zero2llm.core.batch import Batch
from zero2llm.core.config import config
from zero2llm.core.seq import Seq
from zero2llm.engine.engine import Completion, Engine
from zero2llm.engine.sampling import Sampling
from zero2llm.tokenizers.tokenizer import Tokenizer
from zero2llm.train.rl.tools import Call, Toolbox, ToolName

MULTIPLE = 16  # row length is rounded up to this, so that few different shapes occur


@config
class RolloutConfig:
    """prompts : per rollout, over all ranks.  samples : answers to each.  A rollout is trained on for ``epochs`` passes, each
    cut into ``minibatches`` optimizer steps.  max_batch : rows decoded together.  max_tokens : of everything behind the prompt:
    all turns, and with tools their results.  truncated : what becomes of answers that were cut there.  turns : answers of the model
    to one prompt, at most; calls in the last one are not answered."""

    prompts: int = 16
    samples: int = 8
    max_tokens: int = 64
    temperature: float = 1.0
    minibatches: int = 1
    epochs: int = 1
    max_batch: int = 64
    stop: tuple[str, ...] = ()
    truncated: Literal["score", "leave_out"] = "score"
    tools: tuple[ToolName, ...] = ()
    turns: int = 1

    def __post_init__(self) -> None:
        for name in ("prompts", "samples", "max_tokens", "minibatches", "epochs", "max_batch", "turns"):
            if getattr(self, name) < 1:
                raise ValueError(f"rollout.{name} = {getattr(self, name)} must be at least 1")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"rollout.temperature = {self.temperature} must be positive: greedy answers to one prompt are all the same")
        if bool(self.tools) != (self.turns > 1) or len(set(self.tools)) < len(self.tools):
            raise ValueError(f"rollout: tools = {list(self.tools)} and turns = {self.turns} go together: each tool once and at least 2 turns, or no tools and 1")
        if self.tools and self.stop:
            raise ValueError(f"rollout.stop = {list(self.stop)} cuts a turn before its end, behind which a tool answers: remove it, or tools")
        if self.prompts * self.samples % self.minibatches:
            raise ValueError(f"rollout: {self.prompts} x {self.samples} answers do not divide into {self.minibatches} minibatches")


@dataclass(frozen=True)
class Episode:
    """One answer. ids : prompt and everything after it.  trained : 1 on tokens that the policy sampled.  logps : of those,
    0 elsewhere.  text : of the last turn.  record : what stands beside the prompt.  turns : of the policy.  calls : that were answered."""

    ids: list[int]
    trained: list[int]
    logps: list[float]
    text: str
    finish: str
    record: Mapping[str, Any]
    turns: int = 1
    calls: tuple[Call, ...] = ()


@dataclass
class Talk:
    """An episode on its way."""

    prompt: list[int]
    said: list[int] = field(default_factory=list)  # behind the prompt
    trained: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    last: Completion | None = None
    finish: str | None = None
    turns: int = 0
    calls: tuple[Call, ...] = ()

    def policy(self, done: Completion) -> None:
        self.said += done.tokens
        self.trained += [1] * len(done.tokens)
        self.logps += done.logps or [0.0] * len(done.tokens)
        self.last, self.turns = done, self.turns + 1

    def environment(self, calls: list[Call], ids: list[int]) -> None:
        self.said += ids
        self.trained += [0] * len(ids)
        self.logps += [0.0] * len(ids)
        self.calls += tuple(calls)

    def episode(self, record: Mapping[str, Any]) -> Episode:
        n = len(self.prompt)
        return Episode([*self.prompt, *self.said], [0] * n + self.trained, [0.0] * n + self.logps, self.last.text, self.finish, record,
                       self.turns, self.calls)  # fmt: skip


def seed_of(*numbers: int) -> int:
    """One seed from several numbers, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:7], "big")


def play(
    model: nn.Module, tokenizer: Tokenizer, prompts: Sequence[tuple[int, list[int], Mapping[str, Any]]], cfg: RolloutConfig,
    seed: int, number: int,
) -> list[Episode]:  # fmt: skip
    """``prompts`` : (which it is in the global rollout, ids, record). Returns cfg.samples episodes for each, next to each other."""
    was, engine = model.training, Engine(model, tokenizer, max_batch=cfg.max_batch)
    each = [(which, k, ids, record) for which, ids, record in prompts for k in range(cfg.samples)]

    def sampling(row: int, turn: int, left: int) -> Sampling:
        drawn = seed_of(seed, number, each[row][0], each[row][1], *([turn] if turn else []))
        return Sampling(max_tokens=left, temperature=cfg.temperature, stop=cfg.stop, logprobs=True, seed=drawn)

    talks = converse(engine, [ids for _, _, ids, _ in each], cfg, sampling)
    model.train(was)
    return [talk.episode(record) for talk, (_, _, _, record) in zip(talks, each, strict=True)]


def converse(engine: Engine, prompts: Sequence[list[int]], cfg: RolloutConfig, sampling: Callable[[int, int, int], Sampling]) -> list[Talk]:
    """Answers to all prompts, turn by turn. ``sampling`` : (row, turn from 0, tokens left) -> what that turn is asked with."""
    tools = Toolbox(engine.tokenizer, cfg.tools) if cfg.tools else None
    talks = [Talk(list(ids)) for ids in prompts]
    for turn in range(cfg.turns):
        going = [row for row, talk in enumerate(talks) if talk.finish is None]
        asked = [[*talks[row].prompt, *talks[row].said] for row in going]
        done = engine.generate(asked, [sampling(row, turn, cfg.max_tokens - len(talks[row].said)) for row in going])
        for row, completion in zip(going, done, strict=True):
            talks[row].policy(completion)
            talks[row].finish = after(talks[row], tools, cfg, engine.max_len)
    return talks


def after(talk: Talk, tools: Toolbox | None, cfg: RolloutConfig, max_len: int) -> str | None:
    """How the talk has ended, or None: tools have answered, and the model goes on. A reply that leaves no room for a further token
    is not given: the answer counts as cut."""
    done = talk.last
    if tools is None or done.finish == "length" or talk.turns == cfg.turns or done.tokens[-1] != tools.end:
        return done.finish
    calls = tools.calls(done.tokens)
    if not calls:
        return done.finish
    reply = tools.reply(calls)
    behind = len(talk.said) + len(reply)
    if behind >= cfg.max_tokens or len(talk.prompt) + behind >= max_len:
        return "length"
    talk.environment(calls, reply)
    return None


def rows_of(episodes: Sequence[Episode], keep: Tensor, pad_id: int) -> tuple[Batch, Tensor]:
    """Episodes as rows padded on the right, labels only where ``keep`` (B,), and (B, T) log-probs beside the labels."""
    longest = max(len(e.ids) for e in episodes)
    width = -(-longest // MULTIPLE) * MULTIPLE
    tokens, mask = torch.full((len(episodes), width), pad_id), torch.zeros(len(episodes), width)
    old = torch.zeros(len(episodes), width)
    for r, e in enumerate(episodes):
        n = len(e.ids)
        tokens[r, :n], mask[r, :n] = torch.tensor(e.ids), torch.tensor(e.trained, dtype=torch.float)
        old[r, : n - 1] = torch.tensor(e.logps[1:])
    seq = Seq.ragged(torch.tensor([len(e.ids) for e in episodes]), width)
    return Batch.shifted(tokens, mask * keep[:, None], seq), old
