"""A reward model as a rule: the score of the whole conversation, at its last token.

    R = w . h_T + b              prompt and answer, as the chat template ends them

The ids are those that were sampled; what the template writes behind an answer's end is added, since a reward model was trained on such
rows, and an answer without an end (cut, or stopped by a string) is scored as if it had ended there. Needs the policy's own
tokenizer and chat template: other ids mean other text.
Source: 2203.02155 section 3.5; trained by objective reward (train/objectives/reward.py).
Cost: a forward pass over every answer, and the memory of a second model.
Why with care: the score is what people preferred, as far as a model learned it; a policy that is trained on it for long finds
what it overrates (2210.10760). Watch the answers, keep a KL term, and stop early.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from zero2llm.core.config import config
from zero2llm.core.seq import Seq
from zero2llm.model.heads import row_scores
from zero2llm.tokenizers.tokenizer import Tokenizer
from zero2llm.train.checkpoint import Checkpoint
from zero2llm.train.distill.teacher import WAY_OUT, same_vocabulary
from zero2llm.train.rl.answer import Answer, Together


@config
class ModelRewardConfig:
    """The score of a checkpoint (or the latest of a run) that objective reward trained; ``batch`` : answers scored together."""

    kind: Literal["model"] = "model"
    path: str
    weight: float = 1.0
    batch: int = 16

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"reward model: batch = {self.batch} must be at least 1")

    def build(self, tokenizer: Tokenizer, device: torch.device | str = "cpu") -> Together:
        """Raises ValueError for a checkpoint that scores nothing, or reads other tokens than the policy writes."""
        found = Checkpoint.open(self.path, resuming=False)
        same_tokens(Tokenizer.load(found.tokenizer_dir), tokenizer, self.path)
        model = found.load_model()
        if model.cfg.score_head != "reward":
            has = "no score head" if model.score is None else "a critic, which knows what its own policy was about to earn"
            raise ValueError(f"reward model: {self.path} has {has}; train one with objective reward (zero2llm train reward)")
        return Together(Scorer(model.to(device).requires_grad_(False), tokenizer, self.batch))


def same_tokens(theirs: Tokenizer, ours: Tokenizer, where: str) -> None:
    try:
        same_vocabulary(theirs, ours, where)
    except ValueError as error:
        reason = str(error).removeprefix("teacher ").removesuffix(f"; {WAY_OUT}")
        raise ValueError(f"reward model: {reason}; train one from a checkpoint with the policy's tokenizer") from None
    if theirs.template != ours.template:
        raise ValueError(f"reward model: {where} was trained with another chat template than the policy's; give both the same chat_template")


class Scorer:
    def __init__(self, model: nn.Module, tokenizer: Tokenizer, batch: int):
        self.model, self.tokenizer, self.batch = model, tokenizer, batch
        ids, mask = tokenizer.render([{"role": "user", "content": "."}, {"role": "assistant", "content": "."}])
        end = len(mask) - mask[::-1].index(1)
        self.tail = ids[end - 1 :]  # the end of a turn, and what the template writes behind it

    def closed(self, ids: Sequence[int]) -> list[int]:
        ids = list(ids)
        return [*(ids[:-1] if ids[-1] in self.tokenizer.stop_ids else ids), *self.tail]

    @torch.no_grad()
    def __call__(self, answers: Sequence[Answer]) -> list[float | str]:
        rows, most = [self.closed(answer.ids) for answer in answers], self.model.cfg.max_len
        found: list[float | str] = [f"an answer of {len(row)} tokens; the reward model reads {most}" for row in rows]
        fitting = [i for i, row in enumerate(rows) if len(row) <= most]
        for first in range(0, len(fitting), self.batch):
            part = fitting[first : first + self.batch]
            for i, score in zip(part, self.scored([rows[i] for i in part]), strict=True):
                found[i] = score
        return found

    def scored(self, rows: list[list[int]]) -> list[float]:
        longest, device = max(map(len, rows)), next(self.model.parameters()).device
        tokens = torch.full((len(rows), longest), self.tokenizer.pad_id)
        for row, ids in zip(tokens, rows, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        seq = Seq.ragged(torch.tensor([len(ids) for ids in rows]), longest).to(device)
        hidden, _ = self.model(tokens.to(device), seq)
        return row_scores(self.model.score(hidden), seq).tolist()
