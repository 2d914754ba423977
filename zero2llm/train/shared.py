"""Rows that begin with the same prompt: it is read once, and each row goes on from what the layers remember of it.

    states, h_prompt = model(prompt)                h_answer_i = model(answer_i, states)          i = 1 .. n

The eight answers to a question of RL and the two of a preference pair cost one prompt and n answers, forwards and backwards; hidden
states and gradients are those of whole rows (the gradients of the n answers add up in the prompt's states). It is the engine's way of
reading a prompt once, with a gradient. A prompt is what stands before a row's first label.

Not taken where something looks at several rows at once, a router's balance say (`whole_rows` of a layer), where activations are
recomputed, inside torch.compile, for packed rows and pictures, and where two short passes cost more than a long one: on two cores
models 64, 192 and 384 wide lose up to 30 % where (tokens saved) x width is far below `LEAST`, gain up to 70 % far above it, and draw at it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from zero2llm.core.batch import IGNORE, Batch
from zero2llm.core.seq import Seq

WORTH, LEAST = 0.15, 48_000  # share of the tokens that is saved, and their number times the model's width


class Prompts(NamedTuple):
    """tokens : (P, T') different prompts, padded on the right.  lengths : (P,).  of : (B,) each row's prompt.  ends : (B,) rows' lengths."""

    tokens: Tensor
    lengths: Tensor
    of: Tensor
    ends: Tensor


def shared_prompts(model: nn.Module, batch: Batch) -> Prompts | None:
    """The prompts of a padded batch (``seq.seg`` is there), if reading each once is possible and worth it."""
    seq, labelled = batch.seq, batch.labels != IGNORE
    if len(batch) < 2 or seq.grid is not None or not getattr(model, "continues", False):
        return None
    column = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
    if (seq.pos != column).any() or (seq.seg > 1).any() or not labelled.any(1).all():
        return None
    lengths = labelled.int().argmax(1) + 1  # up to the token that predicts the first label
    before = torch.where(column < lengths[:, None], batch.tokens, -1)[:, : int(lengths.max())]
    different, of = before.unique(dim=0, return_inverse=True)
    once = (different >= 0).sum(1)
    saved = int(lengths.sum() - once.sum())
    if saved < WORTH * int(seq.seg.sum()) or saved * model.head_weight.shape[1] < LEAST:
        return None
    return Prompts(different.clamp(min=0), once, of, seq.seg.sum(1))


def hidden_of_shared(model: nn.Module, batch: Batch, prompts: Prompts) -> Tensor:
    """(B, T, D) hidden states as of whole rows; those of padding are of no use."""
    tokens, (rows, width), read = batch.tokens, batch.tokens.shape, prompts.tokens.shape[1]
    states = model.init_states(len(prompts.tokens), width)
    asked, _ = model(prompts.tokens, Seq.ragged(prompts.lengths, read), states)
    begins, ends = prompts.lengths[prompts.of][:, None], prompts.ends[:, None]  # (B, 1)
    left = int((ends - begins).max())
    pos = begins + torch.arange(left, device=tokens.device)
    behind = Seq(pos, (pos < ends).to(torch.int32))
    said, _ = model(tokens.gather(1, pos.clamp(max=width - 1)), behind, [state.gather(prompts.of) for state in states])
    column = torch.arange(width, device=tokens.device).expand(rows, width)
    row = torch.arange(rows, device=tokens.device)[:, None]
    in_prompt = prompts.of[:, None] * read + column.clamp(max=read - 1)
    in_answer = asked.shape[:2].numel() + row * left + (column - begins).clamp(0, left - 1)
    found = torch.cat((asked.flatten(0, 1), said.flatten(0, 1)))
    return found.index_select(0, torch.where(column < begins, in_prompt, in_answer).flatten()).view(rows, width, -1)
