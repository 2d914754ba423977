"""Preference objectives worked out pair by pair in float64, on ragged rows: loss, gradient, extremes, micro-batches, metrics."""

from __future__ import annotations

import math

import pytest
import torch

from tests.golden.test_objectives import Bigram, by_hand, pairs
from zero2llm.core.batch import IGNORE, Batch
from zero2llm.core.seq import Seq
from zero2llm.model.heads import ScoreHead
from zero2llm.parallel.plan import World
from zero2llm.train.objectives import cpo, dpo, ipo, kto, orpo, reward, simpo
from zero2llm.train.objectives import pairs as pairs_module
from zero2llm.train.objectives.cpo import CPOConfig
from zero2llm.train.objectives.dpo import DPOConfig
from zero2llm.train.objectives.ipo import IPOConfig
from zero2llm.train.objectives.kto import KTOConfig, WithReferencePoint
from zero2llm.train.objectives.orpo import ORPOConfig
from zero2llm.train.objectives.reference import Frozen, nothing
from zero2llm.train.objectives.reward import RewardConfig, calibration
from zero2llm.train.objectives.simpo import SimPOConfig

LENGTHS = ((6, 4), (3, 5))  # of the answers in `pairs()`
REFERRED = (DPOConfig, IPOConfig, KTOConfig)
CONFIGS = {
    "dpo": DPOConfig(beta=0.3, sft_weight=0.5),
    "dpo smoothed": DPOConfig(beta=0.3, label_smoothing=0.1),
    "dpo free": DPOConfig(beta=0.3, reference="none"),
    "ipo": IPOConfig(beta=0.3),
    "ipo sums": IPOConfig(beta=0.3, average=False),
    "orpo": ORPOConfig(beta=0.4),
    "simpo": SimPOConfig(beta=2.5, gamma=0.7),
    "simpo sft": SimPOConfig(beta=2.5, gamma=0.7, sft_weight=0.3),
    "cpo": CPOConfig(beta=0.3, alpha=0.6),
    "cpo smoothed": CPOConfig(beta=0.3, alpha=0.6, label_smoothing=0.1),
}


class Scored(Bigram):
    """With a score head whose weights are random."""

    def __init__(self):
        super().__init__()
        self.score = ScoreHead(4).double()
        with torch.no_grad():
            self.score.weight.normal_()
            self.score.bias.fill_(0.3)


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def expected(cfg, w: torch.Tensor, v: torch.Tensor, ref_w, ref_v, n: int, m: int) -> torch.Tensor:
    """The loss of one pair: log p of chosen and rejected, of the reference, and their lengths."""
    if isinstance(cfg, DPOConfig):
        free = cfg.reference == "none"
        d = cfg.beta * ((w - (0 if free else ref_w)) - (v - (0 if free else ref_v)))
        eps = cfg.label_smoothing
        return -(1 - eps) * sigmoid(d).log() - eps * sigmoid(-d).log() - cfg.sft_weight * w / n
    if isinstance(cfg, IPOConfig):
        a, b = (n, m) if cfg.average else (1, 1)
        return ((w - ref_w) / a - (v - ref_v) / b - 1 / (2 * cfg.beta)) ** 2
    if isinstance(cfg, ORPOConfig):
        odds = [(x / k).exp() / (1 - (x / k).exp()) for x, k in ((w, n), (v, m))]
        return -w / n - cfg.beta * sigmoid(odds[0].log() - odds[1].log()).log()
    if isinstance(cfg, SimPOConfig):
        return -sigmoid(cfg.beta * (w / n - v / m) - cfg.gamma).log() - cfg.sft_weight * w / n
    d, eps = cfg.beta * (w - v), cfg.label_smoothing
    return -(1 - eps) * sigmoid(d).log() - eps * sigmoid(-d).log() - cfg.alpha * w / n


def built(cfg, reference):
    if not isinstance(cfg, REFERRED):
        return cfg.build()
    return cfg.build(nothing if cfg.reference == "none" else Frozen(reference))


def gradients(total, model):
    return torch.autograd.grad(total, [model.table, model.head_weight])


@pytest.mark.parametrize("name", CONFIGS)
def test_pairs_by_hand(name):
    model, reference, batch, cfg = Bigram(), Bigram(), pairs(), CONFIGS[name]
    want = torch.zeros((), dtype=torch.float64)
    for pair, (n, m) in enumerate(LENGTHS):
        rows = 2 * pair, 2 * pair + 1
        want = want + expected(cfg, *(by_hand(p, batch, r) for p in (model, reference) for r in rows), n, m)
    grads = gradients(want, model)
    loss = built(cfg, reference)(model, batch)
    torch.testing.assert_close(loss.total, want, atol=1e-10, rtol=0)
    assert int(loss.count) == 2
    for ours, theirs in zip(gradients(loss.total, model), grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)


def test_logged_values_of_pairs():
    model, reference, batch = Bigram(), Bigram(), pairs()
    loss = DPOConfig(beta=0.3).build(Frozen(reference))(model, batch)
    logps = [float(by_hand(model, batch, r).detach()) for r in range(4)]
    h = [x - float(by_hand(reference, batch, r).detach()) for r, x in enumerate(logps)]
    margins = [h[0] - h[1], h[2] - h[3]]
    want = {
        "margin": 0.3 * sum(margins), "moved_right": sum(m > 0 for m in margins), "logp_chosen": logps[0] + logps[2],
        "logp_rejected": logps[1] + logps[3], "win_rate": (logps[0] > logps[1]) + (logps[2] > logps[3]),
        "loss": float(loss.total.detach()),
    }  # fmt: skip
    assert loss.metrics.keys() == want.keys()
    for key, value in want.items():
        assert float(loss.metrics[key][0]) == pytest.approx(value, abs=1e-9) and int(loss.metrics[key][1]) == 2


def judged() -> Batch:
    """Three answers and their mismatched rows, in turn; good, bad, good; answers of 6, 4, 3, 5, 2 and 4 tokens."""
    tokens, trainable, lengths = torch.randint(0, 11, (6, 9)), torch.zeros(6, 9), []
    for row, (prompt, answer) in enumerate([(2, 6), (2, 4), (3, 3), (3, 5), (4, 2), (4, 4)]):
        trainable[row, prompt : prompt + answer] = 1
        lengths.append(prompt + answer)
    label = torch.tensor([True, True, False, False, True, True])
    return Batch.shifted(tokens, trainable, Seq.ragged(torch.tensor(lengths), 9), group=2, extra={"label": label})


def pointed(model, reference, batch, micro_rows=8):
    given = WithReferencePoint([batch], model, Frozen(reference), micro_rows=micro_rows, dtype=torch.float32, world=World())
    return next(iter(given))


@pytest.mark.parametrize("toward", [0.02, -0.02])
def test_kto_by_hand(toward):
    """With a reference that finds the mismatched rows less likely in the mean (z > 0), and one that finds them likelier
    (z = 0); one of the three rows goes the other way."""
    model, batch, cfg = Bigram(), judged(), KTOConfig(beta=0.3, desirable_weight=1.2, undesirable_weight=0.7)
    reference = Bigram()
    reference.load_state_dict(model.state_dict())
    for _ in range(5):
        up = gradients(sum(k * by_hand(reference, batch, r) for k, r in ((1, 1), (1, 3), (-0.6, 5))), reference)[0]
        with torch.no_grad():
            reference.table -= toward * up
    apart = [by_hand(model, batch, r) - by_hand(reference, batch, r).detach() for r in range(6)]
    z = max(0.0, float(sum(apart[1::2]).detach()) / 3)
    assert (z > 0) == (toward > 0) and len({float(x) > 0 for x in apart[1::2]}) == 2
    want = 1.2 * (1 - sigmoid(0.3 * (apart[0] - z))) + 0.7 * (1 - sigmoid(0.3 * (z - apart[2]))) + 1.2 * (1 - sigmoid(0.3 * (apart[4] - z)))
    grads = gradients(want, model)
    answers = pointed(model, reference, batch)
    assert len(answers) == 3 and answers.group == 1 and answers.extra["label"].tolist() == [True, False, True]
    assert answers.extra["z"].tolist() == pytest.approx([z] * 3, abs=1e-10)
    loss = cfg.build(Frozen(reference))(model, answers)
    torch.testing.assert_close(loss.total, want, atol=1e-10, rtol=0)
    assert int(loss.count) == 3
    for ours, theirs in zip(gradients(loss.total, model), grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)
    logged = {name: (float(v), int(n)) for name, (v, n) in loss.metrics.items()}
    apart = [x.detach() for x in apart]
    assert logged["reward_chosen"] == (pytest.approx(0.3 * float(apart[0] + apart[4])), 2)
    assert logged["reward_rejected"] == (pytest.approx(0.3 * float(apart[2])), 1)
    assert logged["moved_right"] == (sum([apart[0] > 0, apart[2] < 0, apart[4] > 0]), 3)


def test_balance_of_judged_answers():
    cfg = KTOConfig(desirable_weight=1.5, undesirable_weight=0.5)
    assert cfg.balance(10, 30) == pytest.approx(1.0) and cfg.balance(3, 0) == math.inf


def scored_pairs() -> Batch:
    batch = pairs()
    batch.extra["margin"] = torch.tensor([0.4, 0.4, 0.0, 0.0], dtype=torch.float64)
    return batch


@pytest.mark.parametrize("center", [0.0, 0.2])
def test_reward_by_hand(center):
    model, batch = Scored(), scored_pairs()
    ends = [7, 5, 5, 7]  # 2 + 6, 2 + 4, 3 + 3, 3 + 5 tokens
    r = [model.table[batch.tokens[row, end]] @ model.score.weight + model.score.bias[0] for row, end in enumerate(ends)]
    want = -sigmoid(r[0] - r[1] - 0.4).log() - sigmoid(r[2] - r[3]).log() + center * ((r[0] + r[1]) ** 2 + (r[2] + r[3]) ** 2)
    weights = [model.table, model.score.weight]
    grads = torch.autograd.grad(want, weights)
    loss = RewardConfig(center=center).build()(model, batch)
    torch.testing.assert_close(loss.total, want, atol=1e-10, rtol=0)
    for ours, theirs in zip(torch.autograd.grad(loss.total, weights), grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)
    r = [x.detach() for x in r]
    logged = {name: (float(v), int(n)) for name, (v, n) in loss.metrics.items()}
    right = [float(r[0]) > float(r[1]), float(r[2]) > float(r[3])]
    assert logged["accuracy"] == (sum(right), 2) and logged["reward"] == (pytest.approx(float(sum(r))), 4)
    assert logged["longer_chosen"] == (1, 2) and logged["accuracy_shorter"] == (float(right[1]), 1)


def test_calibration_by_hand():
    """Differences of 0.1 and 0.05 (the lowest bin: confidence 0.52 and 0.51, one right), 2 and -2 (0.88) and 9 (0.9999)."""
    ahead = torch.tensor([0.1, -0.05, 2.0, -2.0, 9.0], dtype=torch.float64)
    low = abs(1 - sigmoid(ahead[0]) - sigmoid(-ahead[1]))
    mid = abs(1 - 2 * sigmoid(ahead[2]))
    want = float(low + mid + (1 - sigmoid(ahead[4]))) / 5
    whole = {name: float(value) / 5 for name, (value, n) in reward._gaps(ahead).items()}
    assert calibration(whole | {"accuracy": 0.6}) == {"accuracy": 0.6, "calibration": pytest.approx(want)}
    parts = [reward._gaps(ahead[:2]), reward._gaps(ahead[2:])]  # as ranks or micro-batches add them up
    joined = {name: float(parts[0][name][0] + parts[1][name][0]) / 5 for name in parts[0]}
    assert calibration(joined)["calibration"] == pytest.approx(want)
    assert float(sum(n for _, n in (p["gap_0"] for p in parts))) == 5


# Extremes, micro-batches, degenerate rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extremes_stay_finite(dtype):
    """Log-ratios of +-80, means of log p from -80 to 0 (an answer so certain that e^a rounds to 1)."""
    far = torch.tensor([80.0, -80.0, 0.0, 80.0], dtype=dtype, requires_grad=True)
    zero = torch.zeros(4, dtype=dtype)
    mean = torch.tensor([-80.0, -1e-9, 0.0, -3.0], dtype=dtype, requires_grad=True)
    other = torch.tensor([0.0, -80.0, 0.0, -1e-30], dtype=dtype, requires_grad=True)
    label = torch.tensor([True, False, True, False])
    losses = [
        dpo.preference_loss(far, -far, zero, zero, DPOConfig(beta=1.0, label_smoothing=0.1)), ipo.identity_loss(far, -far, 0.1),
        kto.prospect_loss(far, zero, label, KTOConfig(beta=1.0)), kto.prospect_loss(zero - far, -far.detach(), label, KTOConfig()),
        orpo.odds_loss(mean, other), simpo.simple_loss(mean, other, 10.0, 1.0), simpo.simple_loss(far, -far, 10.0, 1.0),
        cpo.contrastive_loss(far, -far, CPOConfig(beta=1.0)), reward.bradley_terry(far, -far, zero, 0.01),
    ]  # fmt: skip
    for loss in losses:
        grads = torch.autograd.grad(loss.sum(), [far, mean, other], allow_unused=True)
        assert torch.isfinite(loss).all() and all(g is None or torch.isfinite(g).all() for g in grads)
    assert losses[0].tolist()[1] == pytest.approx(0.9 * 160) and losses[8].tolist()[1] == pytest.approx(160)


def test_log_odds_keep_their_digits():
    a = torch.tensor([-1e-12, -1e-4, -0.6, -0.8, -30.0], dtype=torch.float64)
    want = [x - math.log(-math.expm1(x)) for x in a.tolist()]
    assert orpo.log_odds(a).tolist() == pytest.approx(want, rel=1e-14)
    assert float(orpo.log_odds(torch.tensor(-1e-4))) == pytest.approx(-1e-4 - math.log(-math.expm1(-1e-4)), rel=1e-6)


def all_kinds():
    reference = Bigram()
    kinds = {name: (built(cfg, reference), pairs()) for name, cfg in CONFIGS.items()}
    return kinds | {"reward": (RewardConfig(center=0.2).build(), scored_pairs())}, reference


def test_micro_batches_add_up():
    model = Scored().eval()
    kinds, reference = all_kinds()
    made = judged()
    kinds["kto"] = KTOConfig().build(Frozen(reference)), pointed(model, reference, made, micro_rows=2)
    assert torch.equal(kinds["kto"][1].extra["z"], pointed(model, reference, made).extra["z"])
    for objective, batch in kinds.values():
        whole, parts = objective(model, batch), [objective(model, part) for part in batch.split(1)]
        assert len(parts) == len(batch) // batch.group and int(whole.count) == sum(int(p.count) for p in parts)
        torch.testing.assert_close(sum(p.total for p in parts), whole.total, atol=1e-12, rtol=0)
        for name, (value, n) in whole.metrics.items():
            sums = [p.metrics[name] for p in parts]
            assert float(value) == pytest.approx(float(sum(v for v, _ in sums)), abs=1e-6), name
            assert int(n) == int(sum(k for _, k in sums)), name


@pytest.mark.parametrize("pad", [0, 7])
def test_padding_changes_nothing(pad):
    model = Scored()
    kinds, _ = all_kinds()
    for objective, batch in kinds.values():
        wide = lambda x, fill, n=pad: torch.nn.functional.pad(x, (0, n), value=fill)
        seq = Seq.ragged(batch.seq.seg.sum(1), batch.tokens.shape[1] + pad)
        more = Batch(wide(batch.tokens, 3), wide(batch.labels, IGNORE), seq, batch.extra, 2)
        torch.testing.assert_close(objective(model, more).total, objective(model, batch).total, atol=1e-12, rtol=0)


def test_a_row_without_labels_is_no_nan():
    """The loaders refuse such a row; a mean over none is still a number."""
    batch = pairs()
    batch.labels[0] = IGNORE
    kinds, _ = all_kinds()
    for objective, _ in kinds.values():
        loss = objective(Scored(), Batch(batch.tokens, batch.labels, batch.seq, group=2))
        assert torch.isfinite(loss.total), objective


def test_only_labelled_positions_pay_for_the_vocabulary(monkeypatch):
    right, seen = pairs_module.token_logps, []
    monkeypatch.setattr(pairs_module, "token_logps", lambda h, *a: (seen.append(len(h)), right(h, *a))[1])
    pairs_module.row_logps(Bigram(), pairs())
    assert seen == [18]


@pytest.mark.parametrize(
    "make,match",
    [
        (lambda: DPOConfig(beta=0), "beta > 0.*not 0"), (lambda: DPOConfig(label_smoothing=0.5), "0.5"), (lambda: IPOConfig(beta=-1), "not -1"),
        (lambda: KTOConfig(undesirable_weight=0), "undesirable_weight > 0"), (lambda: ORPOConfig(beta=0), "objective sft"),
        (lambda: SimPOConfig(gamma=-1), "gamma >= 0"), (lambda: CPOConfig(alpha=-1), "alpha >= 0"), (lambda: RewardConfig(center=-1), "center >= 0"),
    ],
)  # fmt: skip
def test_what_no_equation_allows(make, match):
    with pytest.raises(ValueError, match=match):
        make()
