"""A prompt that several rows begin with is read once: hidden states and gradients are those of whole rows, for every mechanism."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.contract.test_fit import tiny
from tests.golden.planted import bug_tests
from tests.laws.test_model_laws import CASES, build
from zero2llm.adapters.lora import LoRAConfig
from zero2llm.adapters.wrap import wrap
from zero2llm.core.batch import IGNORE, Batch
from zero2llm.core.seq import Seq
from zero2llm.layers.kv import KVState
from zero2llm.layers.memory import Memory
from zero2llm.train import loss as loss_page
from zero2llm.train import shared
from zero2llm.train.adapted import Undressed
from zero2llm.train.loss import hidden_states
from zero2llm.train.objectives.dpo import DPOConfig
from zero2llm.train.objectives.reference import Frozen

WHOLE = ("moe", "dsa", "batch norm")  # begin the names of cases in which something looks at all tokens


@pytest.fixture(autouse=True)
def however_few(monkeypatch):
    """Batches here are small on purpose."""
    monkeypatch.setattr(shared, "LEAST", 0)


def rows(prompts=(9, 13), of=(0, 0, 1, 0, 1, 1), ends=(30, 17, 25, 11, 14, 28), width: int = 33, vocab: int = 29) -> Batch:
    """Rows that begin with one of ``prompts`` (lengths), not next to each other; labels on all that follows."""
    generator = torch.Generator().manual_seed(3)
    heads = [torch.randint(0, vocab, (n,), generator=generator) for n in prompts]
    tokens, mask = torch.randint(0, vocab, (len(of), width), generator=generator), torch.zeros(len(of), width)
    for row, labelled, which, end in zip(tokens, mask, of, ends, strict=True):
        row[: prompts[which]] = heads[which]
        labelled[prompts[which] : end] = 1
    return Batch.shifted(tokens, mask, Seq.ragged(torch.tensor(ends), width), group=2)


def passes(model, batch: Batch, weigh) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Hidden states and gradients of a sum over real tokens, of whole rows and as the page computes them."""
    real, found = batch.seq.seg != 0, []
    for compute in (lambda: model(batch.tokens, batch.seq)[0], lambda: hidden_states(model, batch)[0]):
        model.zero_grad()
        hidden = compute()
        (hidden[real] * weigh).sum().backward()
        found.append((hidden[real].detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    return found


def check_equal(model=None, batch=None):
    model, batch = model or build("mha rope"), batch or rows()
    weigh = torch.randn(int((batch.seq.seg != 0).sum()), model.cfg.d_model, dtype=torch.float64)
    assert shared.shared_prompts(model, batch) is not None
    (whole, expected), (once, found) = passes(model, batch, weigh)
    torch.testing.assert_close(once, whole, atol=1e-11, rtol=0)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10 * max(1.0, float(b.abs().max())), rtol=0)


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith(WHOLE)])
def test_states_and_gradients_of_shared_prompts_are_those_of_whole_rows(name):
    check_equal(build(name))


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(WHOLE)])
def test_where_a_layer_looks_at_all_tokens_rows_stay_whole(name):
    assert shared.shared_prompts(build(name), rows()) is None


def check_recurrent():
    check_equal(build("gated delta"))


def check_window():
    check_equal(build("window 3"))


def check_short():
    """Answers of one token; a prompt that nobody shares beside one that all others share."""
    check_equal(batch=rows(prompts=(8, 6), of=(0, 0, 1, 0), ends=(9, 9, 7, 9), width=16))
    check_equal(batch=rows(prompts=(8, 6), of=(0, 1, 0), ends=(9, 16, 12), width=16))


def tokens_read(model, batch: Batch) -> int:
    read, forward = [], model.forward
    model.forward = lambda tokens, seq, states=None: read.append(tokens.numel()) or forward(tokens, seq, states)
    try:
        hidden_states(model, batch)
    finally:
        del model.forward
    return sum(read)


def check_saving():
    """Eight answers cost one prompt."""
    batch = rows(prompts=(20,), of=(0,) * 8, ends=(24,) * 8, width=32)
    assert tokens_read(build("mha rope"), batch) == 20 + 8 * 4


def check_loss():
    """DPO and its reference, as if nothing were shared."""
    model, batch = build("mha rope"), rows(prompts=(9, 13), of=(0, 0, 1, 1), ends=(30, 17, 25, 14))
    objective, found = DPOConfig().build(Frozen(build("mha rope"))), []
    right = loss_page.shared_prompts
    for way in (right, lambda *_: None):
        loss_page.shared_prompts = way
        try:
            model.zero_grad()
            made = objective(model, batch)
            made.total.backward()
        finally:
            loss_page.shared_prompts = right
        found.append([made.total.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-9)


def no_fork(mp):
    mp.setattr(KVState, "gather", lambda self, rows: KVState(self.k[rows * 0], self.v[rows * 0], self.ring))


def detached(mp):
    right = KVState.gather

    def gather(self, rows):
        forked = right(self, rows)
        return KVState(forked.k.detach(), forked.v.detach(), forked.ring)

    mp.setattr(KVState, "gather", gather)


def copied_in_place(mp):
    def write(self, **new):
        for name, tensor in new.items():
            self.tensors[name].copy_(tensor)

    mp.setattr(Memory, "write", write)


def last_token_unread(mp):
    right = shared.shared_prompts
    mp.setattr(loss_page, "shared_prompts", lambda model, batch: (p := right(model, batch)) and p._replace(ends=p.ends - 1))


def first_prompt_for_all(mp):
    right = shared.shared_prompts
    mp.setattr(loss_page, "shared_prompts", lambda model, batch: (p := right(model, batch)) and p._replace(of=p.of * 0))


def never(mp):
    mp.setattr(loss_page, "shared_prompts", lambda *_: None)


def slots_unseen(mp):
    right = KVState._stored_positions
    mp.setattr(KVState, "_stored_positions", lambda self, last, seq: right(self, last, seq)[:, :-4])


BUGS = {
    no_fork: {"check_equal", "check_loss"},
    detached: {"check_equal", "check_loss"},
    copied_in_place: {"check_recurrent"},
    last_token_unread: {"check_equal", "check_recurrent"},
    first_prompt_for_all: {"check_equal", "check_short"},
    never: {"check_saving"},
    slots_unseen: {"check_equal", "check_window"},
}
CHECKS = [check_equal, check_recurrent, check_window, check_short, check_saving, check_loss]
test_shared_prompts_hold, test_planted_bugs_are_caught = bug_tests(BUGS, CHECKS, also=(RuntimeError,))


def test_what_is_not_shared():
    model, batch = tiny(29).double(), rows()
    assert shared.shared_prompts(model, batch) is not None
    model.recompute = True
    assert shared.shared_prompts(model, batch) is None, "activations are recomputed"
    model.recompute = False
    apart = replace(batch, seq=Seq(batch.seq.pos, batch.seq.seg * torch.where(batch.seq.pos > 9, 2, 1).int()))
    unlabelled = replace(batch, labels=torch.where(torch.arange(6)[:, None] == 2, IGNORE, batch.labels))
    later = replace(batch, seq=Seq(batch.seq.pos + 1, batch.seq.seg))
    short = rows(prompts=(2, 3))
    for other in (apart, unlabelled, later, short, batch.rows(slice(0, 1)), rows(prompts=(9,) * 6, of=range(6))):
        assert shared.shared_prompts(model, other) is None
        whole = model(other.tokens, other.seq)[0]
        torch.testing.assert_close(hidden_states(model, other)[0][other.seq.seg != 0], whole[other.seq.seg != 0], atol=1e-12, rtol=0)


def test_few_tokens_are_read_whole(monkeypatch):
    model, batch = tiny(29), rows()
    saved = 2 * 9 + 2 * 13  # rows 0, 1, 3 begin with 9 tokens and rows 2, 4, 5 with 13; one of each is read
    for least, taken in ((saved * model.cfg.d_model, True), (saved * model.cfg.d_model + 1, False)):
        monkeypatch.setattr(shared, "LEAST", least)
        assert (shared.shared_prompts(model, batch) is not None) == taken


def test_the_base_under_an_adapter_shares_too():
    model, batch = tiny(29).double(), rows()
    plain = model(batch.tokens, batch.seq)[0].detach()
    wrap(model, LoRAConfig(r=2), "default")
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    base, real = Undressed(model), batch.seq.seg != 0
    assert shared.shared_prompts(base, batch) is not None
    torch.testing.assert_close(hidden_states(base, batch)[0][real], plain[real], atol=1e-12, rtol=0)
    check_equal(model, batch)
    assert not torch.allclose(hidden_states(model, batch)[0][real], plain[real])


def test_in_bfloat16_autocast_it_differs_by_rounding_alone():
    model, batch = tiny(29), rows()
    with torch.autocast("cpu", torch.bfloat16):
        whole, once = model(batch.tokens, batch.seq)[0], hidden_states(model, batch)[0]
    real = batch.seq.seg != 0
    exact = model(batch.tokens, batch.seq)[0][real]
    rounding = (whole[real].float() - exact).abs().max()
    assert (once[real].float() - exact).abs().max() < 2 * rounding
