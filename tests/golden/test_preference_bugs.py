"""Planted bugs in preference objectives: six of each, and each must be caught by the checks of its own objective.

The wrong variants are those that were made before: sums for means, a margin inside the product, a reference forgotten, a
coefficient on the wrong term, an answer compared with its own prompt.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from tests.contract import test_preference_data as data
from tests.golden import test_preference as golden
from tests.golden.planted import caught_by
from zero2llm.core.batch import IGNORE
from zero2llm.data import judged_rows
from zero2llm.train.objectives import cpo, dpo, ipo, kto, orpo, pairs, reference, reward, simpo

# The checks. Each raises AssertionError.


def by_hand(*names):
    def check(tmp_path):
        for name in names:
            torch.manual_seed(0)
            golden.test_pairs_by_hand(name)

    return check


def kto_by_hand(tmp_path):
    for toward in (0.02, -0.02):
        torch.manual_seed(0)
        golden.test_kto_by_hand(toward)


def mismatched_rows(tmp_path):
    data.test_mismatched_rows_by_hand(tmp_path)


def one_point_for_all_micro_batches(tmp_path):
    torch.manual_seed(0)
    golden.test_micro_batches_add_up()


def reward_by_hand(tmp_path):
    for center in (0.0, 0.2):
        torch.manual_seed(0)
        golden.test_reward_by_hand(center)


def calibration(tmp_path):
    golden.test_calibration_by_hand()


def extremes(tmp_path):
    golden.test_extremes_stay_finite(torch.float32)


CHECKS = {
    "dpo": [by_hand("dpo", "dpo smoothed", "dpo free")],
    "ipo": [by_hand("ipo", "ipo sums")],
    "kto": [kto_by_hand, mismatched_rows, one_point_for_all_micro_batches],
    "orpo": [by_hand("orpo"), extremes],
    "simpo": [by_hand("simpo", "simpo sft")],
    "cpo": [by_hand("cpo", "cpo smoothed")],
    "reward": [reward_by_hand, calibration],
}


# What several objectives can get wrong alike


def swapped(module):
    return lambda patch: patch.setattr(module, "sides", lambda rows: (rows[1::2], rows[0::2]))


def sums_for_means(module):
    return lambda patch: patch.setattr(module, "per_token", lambda sums, counts: sums)


def means_for_sums(module):
    def bug(patch):
        right = module.row_logps

        def wrong(model, batch):
            sums, counts, aux = right(model, batch)
            return pairs.per_token(sums, counts), counts, aux

        patch.setattr(module, "row_logps", wrong)

    return bug


def means_over_the_padded_width(module):
    return lambda patch: patch.setattr(module, "per_token", lambda sums, counts: sums / 9)


def labels_not_shifted(module):
    def bug(patch):
        right = module.row_logps

        def wrong(model, batch):
            labels = torch.where(batch.labels != IGNORE, batch.tokens, IGNORE)
            return right(model, SimpleNamespace(tokens=batch.tokens, labels=labels, seq=batch.seq))

        patch.setattr(module, "row_logps", wrong)

    return bug


def reference_forgotten(patch):
    patch.setattr(reference.Frozen, "__call__", lambda self, batch: reference.nothing(batch))


def smoothing_on_the_right_side_alone(module, name):
    def bug(patch):
        right = getattr(module, name)
        patch.setattr(module, name, lambda *a: right(*a) * (1 - a[-1].label_smoothing))

    return bug


def of(module, name, wrong):
    """A bug that replaces one function by another."""
    return lambda patch: patch.setattr(module, name, wrong)


def likelihood_of_the_rejected(module):
    def bug(patch):
        right = module.per_token
        swap = lambda x: x.view(-1, 2).flip(1).flatten()
        patch.setattr(module, "per_token", lambda sums, counts: swap(right(sums, counts)))

    return bug


def point(z):
    """KTO's reference point as ``z`` makes it of the log-ratios of all mismatched rows."""

    def bug(patch):
        def wrong(self, rows):
            with torch.no_grad():
                return z(pairs.sequence_logps(self.model, rows) - self.reference(rows))

        patch.setattr(kto.WithReferencePoint, "point", wrong)

    return bug


def point_of_the_answers_themselves(patch):
    right = kto.WithReferencePoint.__iter__

    def wrong(self):
        batches = self.batches
        self.batches = [b.rows(torch.arange(len(b)).view(-1, 2)[:, [0, 0]].flatten()) for b in batches]
        return right(self)

    patch.setattr(kto.WithReferencePoint, "__iter__", wrong)


def mismatched_with_its_own_answer(patch):
    patch.setattr(judged_rows.JudgedRows, "_others", lambda self: torch.arange(len(self)).numpy())


def mismatched_by_turns_alone(patch):
    """The next item of the file, which may well answer the same prompt."""
    patch.setattr(judged_rows.JudgedRows, "_others", lambda self: ((torch.arange(len(self)) + 1) % len(self)).numpy())


def the_prompt_counts_too(patch):
    right = judged_rows.JudgedRows._mismatched

    def wrong(self, i):
        tokens, mask = right(self, i)
        return tokens, mask * 0 + 1

    patch.setattr(judged_rows.JudgedRows, "_mismatched", wrong)


def weights_exchanged(h, z, label, cfg):
    good = cfg.undesirable_weight * torch.sigmoid(cfg.beta * (z - h))
    return torch.where(label, good, cfg.desirable_weight * torch.sigmoid(cfg.beta * (h - z)))


def log_of_the_value(h, z, label, cfg):
    good = -cfg.desirable_weight * F.logsigmoid(cfg.beta * (h - z))
    return torch.where(label, good, -cfg.undesirable_weight * F.logsigmoid(cfg.beta * (z - h)))


def score_at_the_last_column(scores, seq):
    return scores[:, -1]


def score_before_the_last_token(scores, seq):
    return scores.gather(1, seq.seg.sum(1, keepdim=True).long() - 2).squeeze(1)


def bins_of_the_signed_difference(ahead):
    sure, right = torch.sigmoid(ahead), (ahead > 0).float()
    where = (sure * reward.BINS).long().clamp(max=reward.BINS - 1)
    return {f"gap_{i}": (((right - sure) * (where == i)).sum(), torch.tensor(len(ahead))) for i in range(reward.BINS)}


sigmoid = F.logsigmoid
BUGS = {
    "dpo": {
        "answers exchanged": swapped(dpo),
        "means for sums": means_for_sums(dpo),
        "labels not shifted": labels_not_shifted(dpo),
        "reference forgotten": reference_forgotten,
        "beta on the policy alone": of(dpo, "preference_loss", lambda w, v, a, b, cfg: -sigmoid(cfg.beta * (w - v) - (a - b))),
        "smoothing scales the loss": smoothing_on_the_right_side_alone(dpo, "preference_loss"),
        "likelihood of the rejected": likelihood_of_the_rejected(dpo),
    },
    "ipo": {
        "answers exchanged": swapped(ipo),
        "always sums": sums_for_means(ipo),
        "reference forgotten": reference_forgotten,
        "distance 1 / beta": of(ipo, "identity_loss", lambda w, v, beta: (w - v - 1 / beta).square()),
        "beta times the distance": of(ipo, "identity_loss", lambda w, v, beta: (beta * (w - v) - 0.5).square()),
        "no square": of(ipo, "identity_loss", lambda w, v, beta: (w - v - 1 / (2 * beta)).abs()),
        "averaged over the width": means_over_the_padded_width(ipo),
    },
    "kto": {
        "z below 0": point(lambda h: h.mean()),
        "z the sum": point(lambda h: h.sum().clamp(min=0)),
        "z of the clamped": point(lambda h: h.clamp(min=0).mean()),
        "z of the answers": point_of_the_answers_themselves,
        "its own answer": mismatched_with_its_own_answer,
        "another answer to the same prompt": mismatched_by_turns_alone,
        "the prompt counts": the_prompt_counts_too,
        "weights exchanged": of(kto, "prospect_loss", weights_exchanged),
        "a log too many": of(kto, "prospect_loss", log_of_the_value),
        "reference forgotten": reference_forgotten,
    },
    "orpo": {
        "answers exchanged": swapped(orpo),
        "sums for means": sums_for_means(orpo),
        "ratio for odds": of(orpo, "log_odds", lambda a: a),
        "log(1 + p) for log(1 - p)": of(orpo, "log_odds", lambda a: a - torch.log1p(a.exp())),
        "certain answers infinite": of(orpo, "log_odds", lambda a: a - torch.log1p(-a.exp())),
        "odds not compared": of(orpo, "odds_loss", lambda w, v: -sigmoid(orpo.log_odds(w))),
    },
    "simpo": {
        "answers exchanged": swapped(simpo),
        "sums for means": sums_for_means(simpo),
        "gamma times beta": of(simpo, "simple_loss", lambda w, v, beta, gamma: -sigmoid(beta * (w - v - gamma))),
        "gamma added": of(simpo, "simple_loss", lambda w, v, beta, gamma: -sigmoid(beta * (w - v) + gamma)),
        "beta forgotten": of(simpo, "simple_loss", lambda w, v, beta, gamma: -sigmoid(w - v - gamma)),
        "averaged over the width": means_over_the_padded_width(simpo),
    },
    "cpo": {
        "answers exchanged": swapped(cpo),
        "means for sums": means_for_sums(cpo),
        "likelihood of the rejected": likelihood_of_the_rejected(cpo),
        "likelihood summed": sums_for_means(cpo),
        "beta forgotten": of(cpo, "contrastive_loss", lambda w, v, cfg: -sigmoid(w - v)),
        "smoothing scales the loss": smoothing_on_the_right_side_alone(cpo, "contrastive_loss"),
    },
    "reward": {
        "answers exchanged": swapped(reward),
        "margin added": of(reward, "bradley_terry", lambda w, v, m, c: -sigmoid(w - v + m) + c * (w + v).square()),
        "difference centred": of(reward, "bradley_terry", lambda w, v, m, c: -sigmoid(w - v - m) + c * (w - v).square()),
        "mean centred": of(reward, "bradley_terry", lambda w, v, m, c: -sigmoid(w - v - m) + c * ((w + v) / 2).square()),
        "score of padding": of(reward, "row_scores", score_at_the_last_column),
        "score too early": of(reward, "row_scores", score_before_the_last_token),
        "bins of the signed difference": of(reward, "_gaps", bins_of_the_signed_difference),
    },
}


@pytest.mark.parametrize("kind", CHECKS)
def test_right_as_it_is(kind, tmp_path):
    assert not caught_by(CHECKS[kind], [(tmp_path,)]) and len(BUGS[kind]) >= 6


@pytest.mark.parametrize("kind,bug", [(kind, bug) for kind, bugs in BUGS.items() for bug in bugs])
def test_planted_bugs_are_caught(kind, bug, monkeypatch, tmp_path):
    BUGS[kind][bug](monkeypatch)
    assert caught_by(CHECKS[kind], [(tmp_path,)])
