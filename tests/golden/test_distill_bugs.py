"""Planted bugs in distillation: each must be caught by the check that is named beside it.

That no check fails without a bug is what test_distill.py itself shows."""

import pytest
import torch
import torch.nn.functional as F

from tests.golden import test_distill as golden
from tests.golden.planted import fails
from zero2llm.core.batch import IGNORE
from zero2llm.train.distill import divergence as dv
from zero2llm.train.distill import gkd, hidden, logits, minillm
from zero2llm.train.distill.divergence import TopK
from zero2llm.train.distill.gkd import GKD
from zero2llm.train.distill.hidden import HiddenMatch
from zero2llm.train.distill.logits import Distill
from zero2llm.train.distill.minillm import MiniLLM

# The checks. Each raises AssertionError.


def divergences():
    for beta in (0.0, 0.1, 0.5, 1.0):
        golden.test_divergence_by_hand(beta)


def top_k():
    for kind in ("bucket", "renormalise"):
        golden.test_top_k_by_hand(kind)
    golden.test_what_the_tail_loses()
    golden.test_stored_values_add_up_to_one()


def distill_by_hand():
    for case in ((0.7, 2.0, 0.0, 11), (0.5, 3.0, 0.3, 13)):
        golden.test_distill_by_hand(*case)
    golden.test_distill_gradient_by_formula()


def gkd_by_hand():
    for beta in (0.0, 0.5):
        golden.test_gkd_by_hand(beta)


def minillm_by_hand():
    for case in ((1.0, True), (0.5, False)):
        golden.test_what_follows_by_hand(*case)
    golden.test_minillm_gradient_by_formula(1.0, True)


def hidden_by_hand():
    for match in ("mse", "cosine"):
        golden.test_hidden_by_hand(match)
    golden.test_projection_is_the_best_of_its_rank()


def micro_batches():
    for name in ("distill", "hidden"):
        golden.test_micro_batches_add_up(name)


def extremes():
    for form in ("full", "bucket"):
        for beta in (0.0, 0.5):
            golden.test_extreme_logits_stay_finite(1e4, form, beta)


CHECKS = {c.__name__: c for c in (divergences, top_k, distill_by_hand, gkd_by_hand, minillm_by_hand, hidden_by_hand, micro_batches, extremes)}


# Bugs of the divergence: (what is patched, the wrong variant, which check)


def everywhere(patch, name, wrong):
    for module in (dv, logits, gkd, minillm):
        if hasattr(module, name):
            patch.setattr(module, name, wrong)


def kl_the_other_way_round(patch):
    everywhere(patch, "kl", lambda p, q: (q.exp() * (q - p)).sum(-1))


def kl_without_the_teachers_entropy(patch):
    everywhere(patch, "kl", lambda p, q: (p.exp() * -q).sum(-1))


def kl_averaged_over_the_vocabulary(patch):
    everywhere(patch, "kl", lambda p, q: (p.exp() * (p - q)).mean(-1))


def beta_exchanged(patch):
    right = dv.divergence
    everywhere(patch, "divergence", lambda s, t, beta: right(s, t, 1 - beta))


def middle_of_log_probabilities(patch):
    def wrong(s, t, beta):
        m = beta * t + (1 - beta) * s
        return beta * dv.kl(t, m) + (1 - beta) * dv.kl(s, m) if 0 < beta < 1 else dv.kl(t, s) if beta == 0 else dv.kl(s, t)

    everywhere(patch, "divergence", wrong)


def middle_without_logs(patch):
    def wrong(s, t, beta):
        m = (beta * t.exp() + (1 - beta) * s.exp()).log()
        return beta * dv.kl(t, m) + (1 - beta) * dv.kl(s, m) if 0 < beta < 1 else (t.exp() * (t.exp() / s.exp()).log()).sum(-1)

    everywhere(patch, "divergence", wrong)
    patch.setattr(dv, "divergence", wrong)


# of the cut teacher


def tail_left_out(patch):
    patch.setattr(TopK, "buckets", lambda self, kind: self.logps)
    everywhere(patch, "buckets", lambda logp, ids, kind: logp.gather(1, ids))


def teacher_renormalised_student_not(patch):
    everywhere(patch, "buckets", lambda logp, ids, kind: logp.gather(1, ids) if kind == "renormalise" else torch.cat([logp.gather(1, ids), dv.outside(logp, ids)[:, None]], 1))


def students_own_top_k(patch):
    right = dv.buckets
    everywhere(patch, "buckets", lambda logp, ids, kind: right(logp, logp.topk(ids.shape[1]).indices, kind))


def tail_as_one_minus_sum(patch):
    everywhere(patch, "outside", lambda logp, ids: torch.log(1 - logp.gather(1, ids).exp().sum(-1)))


def tail_counts_the_kept(patch):
    everywhere(patch, "outside", lambda logp, ids: logp.logsumexp(-1))


def stored_values_as_they_are(patch):
    patch.setattr(TopK, "buckets", lambda self, kind: torch.cat([self.logps, self.tail[:, None]], 1) if kind == "bucket" else self.logps.log_softmax(-1))


# of the objective on logits


def no_square_of_the_temperature(patch):
    right = Distill.summed
    patch.setattr(Distill, "summed", lambda self, n, a, g, aux, c: right(self, n, a / self.cfg.temperature**2, g, aux, c))


def student_without_temperature(patch):
    right = logits.log_probs
    calls = []

    def wrong(z, vocab, t):
        calls.append(0)
        return right(z, vocab, 1.0 if len(calls) % 2 else t)

    patch.setattr(logits, "log_probs", wrong)


def labels_at_the_temperature_too(patch):
    right = Distill.measure

    def wrong(self, z, said, y):
        _, away, agree = right(self, z, said, y)
        return F.cross_entropy(z / self.cfg.temperature, y, reduction="none"), away, agree

    patch.setattr(Distill, "measure", wrong)


def alpha_exchanged(patch):
    right = Distill.summed

    def wrong(self, nats, away, agree, aux, count):
        return right(self, away * self.cfg.temperature**2, nats / self.cfg.temperature**2, agree, aux, count)

    patch.setattr(Distill, "summed", wrong)


def padding_of_the_table_is_a_token(patch):
    right = logits.log_probs
    patch.setattr(logits, "log_probs", lambda z, vocab, t: right(z, max(vocab, z.shape[1]), t)[:, :vocab])


def mean_over_the_micro_batch(patch):
    right = Distill.summed

    def wrong(self, nats, away, agree, aux, count):
        loss = right(self, nats, away, agree, aux, count)
        loss.total = loss.total / count
        return loss

    patch.setattr(Distill, "summed", wrong)


# of gkd


def gkd_with(change):
    right = GKD.measure

    def plant(patch):
        patch.setattr(GKD, "measure", lambda self, z, said, y: change(self, right, z, said, y))

    return plant


def squared(self, right, z, said, y):
    nats, away = right(self, z, said, y)
    return nats, away * self.cfg.temperature**2


def sides_exchanged(self, right, z, said, y):
    q, p = (dv.log_probs(x, self.teacher.vocab_size, self.cfg.temperature) for x in (z, said.logits()))
    return logits.entropy(z, y), dv.divergence(p, q, self.cfg.beta)


def only_the_labels_term(self, right, z, said, y):
    q, p = (dv.log_probs(x, self.teacher.vocab_size, self.cfg.temperature).gather(1, y[:, None]).squeeze(1) for x in (z, said.logits()))
    return -q, p.exp() * (p - q)


def at_temperature_one(self, right, z, said, y):
    q, p = (dv.log_probs(x, self.teacher.vocab_size, 1.0) for x in (z, said.logits()))
    return logits.entropy(z, y), dv.divergence(q, p, self.cfg.beta)


def symmetric(self, right, z, said, y):
    q, p = (dv.log_probs(x, self.teacher.vocab_size, self.cfg.temperature) for x in (z, said.logits()))
    return logits.entropy(z, y), 0.5 * (dv.kl(p, q) + dv.kl(q, p))


def labels_beside_it(self, right, z, said, y):
    nats, away = right(self, z, said, y)
    return nats, away + logits.entropy(z, y)


# of minillm


def own_token_in_what_follows(patch):
    patch.setattr(minillm, "after", minillm.return_to_go)


def reward_of_the_wrong_sign(patch):
    right = minillm.after
    patch.setattr(minillm, "after", lambda r, mask, g, n: right(-r, mask, g, n))


def not_normalised(patch):
    right = minillm.after
    patch.setattr(minillm, "after", lambda r, mask, g, n: right(r, mask, g, False))


def forward_kl_at_each_step(patch):
    right = minillm.kl
    patch.setattr(minillm, "kl", lambda p, q: right(q, p))


def weights_left_out(patch):
    right = MiniLLM.__call__

    def wrong(self, model, batch):
        extra = {name: value for name, value in batch.extra.items() if name != "old"}
        return right(self, model, type(batch)(batch.tokens, batch.labels, batch.seq, extra))

    patch.setattr(MiniLLM, "__call__", wrong)


def discount_from_the_rows_beginning(patch):
    """TRL's sum without lengths: gamma^i R_i, short of the division by gamma^t."""

    def wrong(reward, mask, gamma, normalise):
        powers = gamma ** torch.arange(reward.shape[1], dtype=reward.dtype)
        return (reward * mask * powers).flip(1).cumsum(1).flip(1) * mask

    patch.setattr(minillm, "return_to_go", wrong)


# of hidden states


def input_of_the_block(patch):
    from contextlib import contextmanager

    @contextmanager
    def wrong(model, blocks):
        found = {}
        handles = [model.blocks[i].register_forward_pre_hook(lambda b, given, i=i: found.__setitem__(i, given[0])) for i in set(blocks)]
        yield found
        for handle in handles:
            handle.remove()

    patch.setattr(hidden, "tapped", wrong)


def padding_counts(patch):
    patch.setattr(hidden, "real", lambda batch: torch.ones_like(batch.tokens, dtype=torch.bool))


def least_directions(patch):
    right = hidden._projection

    def wrong(moment, width):
        if width == len(moment):
            return right(moment, width)
        return right(torch.linalg.inv(moment + 1e-9 * torch.eye(len(moment), dtype=moment.dtype)), width)

    patch.setattr(hidden, "_projection", wrong)
    patch.setattr(golden, "fit_projections", hidden.fit_projections)


def means_without_their_count(patch):
    patch.setattr(hidden, "row_means", lambda x, mask: (x * mask).sum(1) / x.shape[1])


def every_row_weighs_the_same(patch):
    patch.setattr(hidden, "row_means", lambda x, mask: (x * mask).sum(1) / mask.sum(1).clamp(min=1) * len(x) / 2)


def cosine_itself(patch):
    right = HiddenMatch.apart
    patch.setattr(HiddenMatch, "apart", lambda self, a, b, j: 1 - right(self, a, b, j) if self.cfg.match == "cosine" else right(self, a, b, j))


BUGS = {
    "divergences": [kl_the_other_way_round, kl_without_the_teachers_entropy, kl_averaged_over_the_vocabulary, beta_exchanged, middle_of_log_probabilities],
    "extremes": [middle_without_logs, tail_as_one_minus_sum],
    "top_k": [tail_left_out, teacher_renormalised_student_not, students_own_top_k, tail_counts_the_kept, stored_values_as_they_are],
    "distill_by_hand": [no_square_of_the_temperature, student_without_temperature, labels_at_the_temperature_too, alpha_exchanged, padding_of_the_table_is_a_token],
    "micro_batches": [mean_over_the_micro_batch, every_row_weighs_the_same],
    "minillm_by_hand": [own_token_in_what_follows, reward_of_the_wrong_sign, not_normalised, forward_kl_at_each_step, weights_left_out, discount_from_the_rows_beginning],
    "hidden_by_hand": [input_of_the_block, padding_counts, least_directions, means_without_their_count, cosine_itself],
}
GKD_BUGS = [squared, sides_exchanged, only_the_labels_term, at_temperature_one, symmetric, labels_beside_it]


@pytest.mark.parametrize("check,bug", [(c, b) for c, bugs in BUGS.items() for b in bugs], ids=lambda x: getattr(x, "__name__", x))
def test_caught(check, bug, monkeypatch):
    bug(monkeypatch)
    assert fails(CHECKS[check]), f"{bug.__name__} passes {check}"


@pytest.mark.parametrize("change", GKD_BUGS, ids=lambda c: c.__name__)
def test_caught_in_gkd(change, monkeypatch):
    gkd_with(change)(monkeypatch)
    assert fails(gkd_by_hand), change.__name__


def test_a_dropped_mask_is_caught(monkeypatch):
    """Labels of another row's padding: what is IGNORE must not be gathered."""
    right = GKD.__call__

    def wrong(self, model, batch):
        return right(self, model, type(batch)(batch.tokens, batch.labels.masked_fill(batch.labels == IGNORE, 0), batch.seq, batch.extra))

    monkeypatch.setattr(GKD, "__call__", wrong)
    assert fails(gkd_by_hand)
