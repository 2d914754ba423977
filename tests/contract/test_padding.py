"""Columns that are padding in every row of a micro-batch cost nothing and change nothing."""

from __future__ import annotations

import pytest
import torch

from tests.contract.test_fit import tiny
from zero2llm.core.batch import Batch
from zero2llm.core.seq import Seq
from zero2llm.train.loss import hidden_states
from zero2llm.train.objectives.dpo import DPOConfig
from zero2llm.train.objectives.pairs import row_logps
from zero2llm.train.objectives.reference import nothing


def rows(lengths: list[int], width: int) -> Batch:
    tokens = torch.randint(1, 31, (len(lengths), width), generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(len(lengths), width)
    for row, n in zip(mask, lengths, strict=True):
        row[2:n] = 1
    return Batch.shifted(tokens, mask, Seq.ragged(torch.tensor(lengths), width), group=2)


def model():
    torch.manual_seed(0)
    return tiny(vocab=31, max_len=32).double()


def widths(monkeypatch, model) -> list[int]:
    seen, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda tokens, seq, states=None: seen.append(tokens.shape[1]) or forward(tokens, seq, states))
    return seen


@pytest.mark.parametrize("lengths", [[5, 7, 3, 6], [24, 7, 3, 6]])
def test_hidden_states_of_real_tokens_are_those_of_the_whole_row(monkeypatch, lengths):
    lm, batch = model(), rows(lengths, 24)
    whole, _ = lm(batch.tokens, batch.seq)
    seen = widths(monkeypatch, lm)
    found, _ = hidden_states(lm, batch)
    real = batch.seq.seg != 0
    assert seen == [max(lengths)] and found.shape == whole.shape
    torch.testing.assert_close(found[real], whole[real], atol=1e-12, rtol=0)


def test_loss_and_gradient_do_not_see_the_padding():
    lm, objective = model(), DPOConfig().build(nothing)
    totals, grads = [], []
    for width in (7, 24):
        lm.zero_grad()
        loss = objective(lm, rows([5, 7, 3, 6], width) if width == 24 else narrow(rows([5, 7, 3, 6], 24), 7))
        loss.total.backward()
        totals.append(loss.total.detach())
        grads.append([p.grad.clone() for p in lm.parameters() if p.grad is not None])
    torch.testing.assert_close(totals[0], totals[1], atol=1e-12, rtol=0)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def narrow(batch: Batch, width: int) -> Batch:
    return Batch(batch.tokens[:, :width], batch.labels[:, :width], batch.seq.window(0, width), {}, batch.group)


def test_rows_without_padding_and_rows_of_nothing_else():
    lm = model()
    plain = Batch(torch.full((2, 6), 3), torch.full((2, 6), 4), Seq.rows(2, 6), group=2)
    torch.testing.assert_close(hidden_states(lm, plain)[0], lm(plain.tokens, plain.seq)[0])
    blank = Batch(torch.full((2, 6), 3), torch.full((2, 6), -100), Seq.ragged(torch.tensor([0, 0]), 6), group=2)
    sums, counts, _ = row_logps(lm, blank)
    assert not sums.any() and not counts.any() and torch.isfinite(hidden_states(lm, blank)[0]).all()
