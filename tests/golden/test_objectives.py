"""Losses worked by hand in loops, and their gradients, on ragged rows in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from zero2llm.core.batch import IGNORE, Batch
from zero2llm.core.seq import Seq
from zero2llm.ops.xent import cross_entropy_plain, cross_entropy_sum, token_logps
from zero2llm.train.objectives.dpo import DPOConfig, preference_loss
from zero2llm.train.objectives.pairs import sequence_logps
from zero2llm.train.objectives.reference import Frozen


def case(dtype=torch.float64, n=20, d=16, v=50):
    hidden = torch.randn(n, d, dtype=dtype, requires_grad=True)
    weight = torch.randn(v, d, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, v, (n,))
    labels[[0, 7, 8, 19]] = IGNORE
    return hidden, weight, labels


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunked_cross_entropy_by_hand(chunk):
    hidden, weight, labels = case()
    want = 0.0
    for h, y in zip(hidden.tolist(), labels.tolist(), strict=True):
        if y != IGNORE:
            z = [sum(a * b for a, b in zip(h, w, strict=True)) for w in weight.tolist()]
            top = max(z)
            want += top + math.log(sum(math.exp(x - top) for x in z)) - z[y]
    assert float(cross_entropy_sum(hidden, weight, labels, chunk=chunk).detach()) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunked_cross_entropy_gradients(chunk):
    hidden, weight, labels = case()
    got = torch.autograd.grad(3.0 * cross_entropy_sum(hidden, weight, labels, chunk=chunk), (hidden, weight))
    want = torch.autograd.grad(3.0 * F.cross_entropy(hidden @ weight.t(), labels, ignore_index=IGNORE, reduction="sum"), (hidden, weight))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)  # the chunk's softmax runs in fp32
    assert (got[0][labels == IGNORE] == 0).all()


def test_forms_agree_and_torch_agrees():
    hidden, weight, labels = case(torch.float32)
    plain = cross_entropy_plain(hidden, weight, labels)
    torch.testing.assert_close(cross_entropy_sum(hidden, weight, labels, chunk=7), plain, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(-token_logps(hidden, weight, labels, chunk=7).sum(), plain, atol=1e-4, rtol=1e-5)
    if hasattr(F, "linear_cross_entropy"):  # new in torch 2.13
        theirs = F.linear_cross_entropy(hidden, weight, labels, ignore_index=IGNORE, reduction="sum")
        torch.testing.assert_close(plain, theirs, atol=1e-4, rtol=1e-5)


def test_all_ignored_is_zero_and_connected():
    hidden, weight, labels = case()
    loss = cross_entropy_sum(hidden, weight, torch.full_like(labels, IGNORE))
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert float(loss.detach()) == 0 and all(float(g.abs().sum()) == 0 for g in grads)


def test_token_logps_gradient_with_weights():
    hidden, weight, labels = case()
    coefficient = torch.randn(20, dtype=torch.float64)
    got = torch.autograd.grad((token_logps(hidden, weight, labels, chunk=7) * coefficient).sum(), (hidden, weight))
    logp = (hidden @ weight.t()).log_softmax(-1)
    keep = labels != IGNORE
    want = torch.autograd.grad((logp[keep, labels[keep]] * coefficient[keep]).sum(), (hidden, weight))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


class Bigram(torch.nn.Module):
    """A language model of one matrix: position t's hidden state is the embedding of token t."""

    def __init__(self, vocab: int = 11, d: int = 4):
        super().__init__()
        self.logit_softcap = None
        self.table, self.head_weight = torch.nn.Parameter(torch.randn(vocab, d).double()), torch.nn.Parameter(torch.randn(vocab, d).double())

    def forward(self, tokens, seq):
        return self.table[tokens], {}


def pairs() -> Batch:
    """Two pairs with completions of 6, 4, 3 and 5 tokens after prompts of 2 and 3."""
    tokens, trainable = torch.randint(0, 11, (4, 9)), torch.zeros(4, 9)
    lengths = []
    for row, (prompt, answer) in enumerate([(2, 6), (2, 4), (3, 3), (3, 5)]):
        trainable[row, prompt : prompt + answer] = 1
        lengths.append(prompt + answer)
    return Batch.shifted(tokens, trainable, Seq.ragged(torch.tensor(lengths), 9), group=2)


def by_hand(model: Bigram, batch: Batch, row: int) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for t in range(8):
        if batch.labels[row, t] != IGNORE:
            z = model.head_weight @ model.table[batch.tokens[row, t]]
            total = total + z[batch.tokens[row, t + 1]] - z.exp().sum().log()
    return total


def test_sequence_logps_are_sums_over_the_completion_only():
    model, batch = Bigram(), pairs()
    assert [(batch.labels[r] != IGNORE).sum().item() for r in range(4)] == [6, 4, 3, 5]
    for row, value in enumerate(sequence_logps(model, batch)):
        assert float(value.detach()) == pytest.approx(float(by_hand(model, batch, row).detach()), rel=1e-6)


@pytest.mark.parametrize("eps,sft", [(0.0, 0.0), (0.1, 0.0), (0.0, 0.5)])
def test_dpo_loss_and_gradient_by_formula(eps, sft):
    model, reference, batch = Bigram(), Bigram(), pairs()
    cfg = DPOConfig(beta=0.3, label_smoothing=eps, sft_weight=sft)
    want = torch.zeros((), dtype=torch.float64)
    for chosen in (0, 2):
        d = by_hand(model, batch, chosen) - by_hand(model, batch, chosen + 1)
        d = 0.3 * (d - by_hand(reference, batch, chosen) + by_hand(reference, batch, chosen + 1))
        want = want - (1 - eps) * torch.log(1 / (1 + torch.exp(-d))) - eps * torch.log(1 / (1 + torch.exp(d)))
        want = want - sft * by_hand(model, batch, chosen) / (6, 0, 3)[chosen]
    want_grad = torch.autograd.grad(want, model.table)[0]
    loss = cfg.build(Frozen(reference))(model, batch)
    assert float(loss.total.detach()) == pytest.approx(float(want.detach()), rel=1e-6) and int(loss.count) == 2
    torch.testing.assert_close(torch.autograd.grad(loss.total, model.table)[0], want_grad, atol=1e-6, rtol=1e-5)


def test_dpo_stays_finite_at_extreme_ratios():
    values = torch.tensor([800.0, -800.0, 0.0], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(3, dtype=torch.float64)
    loss = preference_loss(values, zero, zero, zero, DPOConfig(beta=1.0))
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([0.0, 800.0, math.log(2)]) and torch.isfinite(values.grad).all()


def test_empty_preference_mask_would_be_constant_ln2():
    """The trap: a mask that is empty trains nothing while the loss looks plausible. The loader refuses such pairs."""
    model, batch = Bigram(), pairs()
    empty = Batch(batch.tokens, torch.full_like(batch.labels, IGNORE), batch.seq, group=2)
    loss = DPOConfig().build(Frozen(Bigram()))(model, empty)
    assert float(loss.total.detach()) / 2 == pytest.approx(math.log(2))


@pytest.mark.parametrize("bug", ["unshifted", "averaged", "swapped", "no reference"])
def test_planted_bugs_are_caught(bug):
    """Four ways in which DPO is often wrong; each must move the loss away from the formula."""
    model, reference, batch = Bigram(), Bigram(), pairs()
    right = float(DPOConfig(beta=0.3).build(Frozen(reference))(model, batch).total)
    logps, ref = sequence_logps(model, batch), sequence_logps(reference, batch)
    if bug == "unshifted":
        wrong = Batch(batch.tokens, torch.where(batch.labels != IGNORE, batch.tokens, IGNORE), batch.seq, group=2)
        logps = sequence_logps(model, wrong)
    elif bug == "averaged":
        logps = logps / (batch.labels != IGNORE).sum(-1)
    elif bug == "swapped":
        logps, ref = logps.flip(0), ref.flip(0)
    else:
        ref = torch.zeros_like(ref)
    loss = preference_loss(logps[0::2], logps[1::2], ref[0::2], ref[1::2], DPOConfig(beta=0.3)).sum()
    assert abs(float(loss.detach()) - right) > 1e-3
