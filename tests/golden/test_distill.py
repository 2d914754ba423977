"""Distillation worked by hand in loops: divergences, top-k buckets, the objectives, returns, matched hidden states."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from zero2llm.core.batch import IGNORE, Batch
from zero2llm.core.config import parse, to_dict
from zero2llm.core.seq import Seq
from zero2llm.model.lm import LM
from zero2llm.model.presets import preset
from zero2llm.model.spec import ModelConfig
from zero2llm.train.distill import divergence as dv
from zero2llm.train.distill import hidden, minillm
from zero2llm.train.distill.divergence import Head, TopK
from zero2llm.train.distill.gkd import GKDConfig
from zero2llm.train.distill.hidden import HiddenConfig, fit_projections
from zero2llm.train.distill.logits import DistillConfig
from zero2llm.train.distill.minillm import MiniLLMConfig
from zero2llm.train.distill.teacher import Teacher

VOCAB = 11


def tiny(seed: int, width: int = 16, blocks: int = 2, rows: int = VOCAB) -> LM:
    """An LM in float64 whose distributions are far from flat; ``rows``: of its table, perhaps more than the vocabulary."""
    data = to_dict(preset("qwen3-nano")) | {"d_model": width, "vocab_size": rows, "layers": {"pattern": ["qwen3"], "repeat": blocks}}
    block = data["blocks"]["qwen3"]
    block["mixer"] |= {"n_heads": 2, "n_kv_heads": 2, "head_dim": 8}
    block["ffn"]["hidden"] = 24
    torch.manual_seed(seed)
    model = LM(parse(ModelConfig, data)).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.25)
    return model


def ragged(seed: int = 3, lengths=(6, 3, 4, 5)) -> Batch:
    torch.manual_seed(seed)
    width = 8
    tokens = torch.randint(0, VOCAB, (len(lengths), width))
    seq = Seq.ragged(torch.tensor(lengths), width)
    mask = (torch.arange(width) >= 1) & (torch.arange(width) < torch.tensor(lengths)[:, None])
    return Batch.shifted(tokens, mask, seq)


def answered(student: LM, seed: int = 3) -> Batch:
    """The batch as if it was sampled from something near the student."""
    batch = ragged(seed)
    torch.manual_seed(seed)
    nothing = torch.zeros(len(batch))
    old = -3 * torch.rand(batch.tokens.shape, dtype=torch.float64)
    extra = {"old": old, "own": nothing + 1, "truncated": nothing, "length": nothing + 2}
    return Batch(batch.tokens, batch.labels, batch.seq, extra)


def softmax(z: list[float], t: float = 1.0) -> list[float]:
    top = max(z)
    e = [math.exp((x - top) / t) for x in z]
    return [x / sum(e) for x in e]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def by_hand(p: list[float], q: list[float], beta: float) -> float:
    if beta == 0:
        return kl(p, q)
    if beta == 1:
        return kl(q, p)
    m = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def logits_of(model: LM, batch: Batch, vocab: int | None = VOCAB) -> torch.Tensor:
    return model.logits(model(batch.tokens, batch.seq)[0]).detach()[..., :vocab]


def labelled(batch: Batch):
    return [(b, t, int(batch.labels[b, t])) for b in range(len(batch)) for t in range(batch.labels.shape[1]) if batch.labels[b, t] != IGNORE]


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_divergence_by_hand(beta):
    torch.manual_seed(0)
    a, b = 2 * torch.randn(5, 7, dtype=torch.float64), 2 * torch.randn(5, 7, dtype=torch.float64)
    got = dv.divergence(a.log_softmax(-1), b.log_softmax(-1), beta)
    want = [by_hand(softmax(t), softmax(s), beta) for s, t in zip(a.tolist(), b.tolist(), strict=True)]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", ["bucket", "renormalise"])
def test_top_k_by_hand(kind):
    torch.manual_seed(0)
    student, teacher = (2 * torch.randn(4, 9, dtype=torch.float64) for _ in range(2))
    lq, lp = student.log_softmax(-1), teacher.log_softmax(-1)
    top = dv.likeliest(lp, 3)
    got = dv.divergence(dv.buckets(lq, top.ids, kind), top.buckets(kind), 0.0)
    for i in range(4):
        p, q = softmax(teacher[i].tolist()), softmax(student[i].tolist())
        best = sorted(range(9), key=lambda v: -p[v])[:3]
        assert sorted(best) == sorted(top.ids[i].tolist())
        ps, qs = [p[v] for v in best], [q[v] for v in best]
        if kind == "bucket":
            ps, qs = [*ps, 1 - sum(ps)], [*qs, 1 - sum(qs)]
        else:
            ps, qs = [x / sum(ps) for x in ps], [x / sum(qs) for x in qs]
        assert float(got[i]) == pytest.approx(kl(ps, qs), abs=1e-12)


def test_what_the_tail_loses():
    """KL(p || q) = KL(p' || q') + p_tail KL(p | tail || q | tail)"""
    torch.manual_seed(1)
    lq, lp = (torch.randn(6, 9, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    top = dv.likeliest(lp, 4)
    cut = dv.divergence(dv.buckets(lq, top.ids, "bucket"), top.buckets("bucket"), 0.0)
    inside = [x.scatter(1, top.ids, -math.inf).log_softmax(-1) for x in (lp, lq)]
    rest = (inside[0].exp() * (inside[0] - inside[1]).nan_to_num(0)).sum(-1)
    torch.testing.assert_close(dv.kl(lp, lq), cut + top.tail.exp() * rest, atol=1e-12, rtol=0)
    assert (cut <= dv.kl(lp, lq) + 1e-12).all()


@pytest.mark.parametrize("alpha,t,beta,rows", [(0.7, 2.0, 0.0, 11), (1.0, 1.0, 1.0, 11), (0.5, 3.0, 0.3, 13), (0.0, 2.0, 0.0, 11)])
def test_distill_by_hand(alpha, t, beta, rows):
    student, teacher, batch = tiny(0, rows=rows), tiny(1, width=24, blocks=1, rows=16), ragged()
    loss = DistillConfig(alpha=alpha, temperature=t, beta=beta).build(Teacher(teacher, VOCAB))(student, batch)
    z, w, full = logits_of(student, batch), logits_of(teacher, batch), logits_of(student, batch, None)
    want = nats = 0.0
    for b, s, y in labelled(batch):
        nll = -math.log(softmax(full[b, s].tolist())[y])
        want += alpha * t * t * by_hand(softmax(w[b, s].tolist(), t), softmax(z[b, s].tolist(), t), beta) + (1 - alpha) * nll
        nats += nll
    assert float(loss.total.detach()) == pytest.approx(want, abs=1e-9)
    assert float(loss.metrics["loss"][0]) == pytest.approx(nats, abs=1e-9) and int(loss.count) == batch.n_targets()


def test_distill_gradient_by_formula():
    """d(T^2 KL)/dz = T (q - p), and of the cross-entropy q1 - onehot."""
    torch.manual_seed(0)
    h, w = torch.randn(6, 4, dtype=torch.float64, requires_grad=True), torch.eye(4, dtype=torch.float64)
    other, y = torch.randn(6, 4, dtype=torch.float64), torch.randint(0, 4, (6,))
    distill = DistillConfig(alpha=0.6, temperature=3.0).build(Fixed(4))
    nats, away, _ = dv.in_chunks(distill.measure, Head(h, w, None), Head(other, w, None), y)
    (0.6 * 9 * away.sum() + 0.4 * nats.sum()).backward()
    q, p = (h / 3).softmax(-1), (other / 3).softmax(-1)
    want = 0.6 * 3 * (q - p) + 0.4 * (h.softmax(-1) - torch.nn.functional.one_hot(y, 4))
    torch.testing.assert_close(h.grad, want.detach(), atol=1e-10, rtol=0)


class Fixed:
    """A vocabulary's size and nothing to say."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_gkd_by_hand(beta):
    student, teacher, batch = tiny(0), tiny(1, width=24), answered(tiny(0))
    loss = GKDConfig(beta=beta, temperature=0.9).build(Teacher(teacher, VOCAB))(student, batch)
    z, w = logits_of(student, batch), logits_of(teacher, batch)
    want = sum(by_hand(softmax(w[b, t].tolist(), 0.9), softmax(z[b, t].tolist(), 0.9), beta) for b, t, _ in labelled(batch))
    assert float(loss.total.detach()) == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize("gamma,normalise", [(1.0, True), (0.5, True), (0.5, False), (1.0, False)])
def test_what_follows_by_hand(gamma, normalise):
    torch.manual_seed(0)
    reward, batch = torch.randn(4, 8, dtype=torch.float64), ragged()
    mask = batch.labels != IGNORE
    own, behind = (f(reward, mask, gamma, normalise) for f in (minillm.return_to_go, minillm.after))
    for b in range(4):
        places = [t for t in range(8) if mask[b, t]]
        for i, t in enumerate(places):
            for got, first in ((own, i), (behind, i + 1)):
                weights = [gamma**n for n in range(len(places) - first)]
                total = sum(g * float(reward[b, s]) for g, s in zip(weights, places[first:], strict=True))
                want = total / sum(weights) if normalise and weights else total
                assert float(got[b, t]) == pytest.approx(want, abs=1e-12)
    assert not own[~mask].any() and not behind[~mask].any()


@pytest.mark.parametrize("gamma,normalise", [(1.0, True), (0.7, False)])
def test_minillm_gradient_by_formula(gamma, normalise):
    """The gradient of eq. 7, put together from those of KL(q || p) and log q at every token."""
    student, teacher, batch = tiny(0), tiny(1, width=24), answered(tiny(0))
    cfg = MiniLLMConfig(gamma=gamma, normalise=normalise)
    cfg.build(Teacher(teacher, VOCAB))(student, batch).total.backward()
    got = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    q = student.logits(student(batch.tokens, batch.seq)[0]).log_softmax(-1)
    p = logits_of(teacher, batch).log_softmax(-1)
    total = 0.0
    for b in range(len(batch)):
        mine = [(t, y) for r, t, y in labelled(batch) if r == b]
        reward = [float(p[b, t, y] - q[b, t, y].detach()) for t, y in mine]
        for i, (t, y) in enumerate(mine):
            weights = [gamma**n for n in range(len(mine) - i - 1)]
            later = sum(g * r for g, r in zip(weights, reward[i + 1 :], strict=True)) / ((sum(weights) or 1) if normalise else 1)
            w = math.exp(float(q[b, t, y].detach()) - float(batch.extra["old"][b, t]))
            total = total + w * ((q[b, t].exp() * (q[b, t] - p[b, t])).sum() - later * q[b, t, y])
    total.backward()
    for a, x in zip(got, student.parameters(), strict=True):
        torch.testing.assert_close(a, x.grad, atol=1e-9, rtol=1e-9)


def states_of(model: LM, batch: Batch) -> list[torch.Tensor]:
    """The residual stream after each block, without hooks."""
    x, out = model.embed(batch.tokens), []
    for block in model.blocks:
        x, _ = block(x, batch.seq.fresh())
        out.append(x)
    return out


@pytest.mark.parametrize("match", ["mse", "cosine"])
def test_hidden_by_hand(match):
    student, teacher, batch = tiny(0, width=8), tiny(1, width=16, blocks=3), ragged()
    known = fit_projections(teacher, [batch], [0, 2], 8)
    cfg = HiddenConfig(layers=((0, 0), (1, 2)), weight=0.5, match=match, logits=DistillConfig(alpha=0.0))
    loss = cfg.build(Teacher(teacher, VOCAB), known)(student, batch)
    ours, theirs, want = states_of(student, batch), states_of(teacher, batch), 0.0
    real = batch.seq.seg != 0
    for i, j in cfg.layers:
        goal = theirs[j] @ known[j].matrix.double().T
        energy = goal[real].square().sum(-1).mean()
        for b in range(len(batch)):
            values = []
            for t in range(8):
                if real[b, t]:
                    h, g = ours[i][b, t].detach(), goal[b, t].detach()
                    values.append(float((h - g).square().sum() / energy if match == "mse" else 1 - h @ g / (h.norm() * g.norm())))
            want += 0.5 * sum(values) / len(values) * int((batch.labels[b] != IGNORE).sum())
    alone = DistillConfig(alpha=0.0).build(Teacher(teacher, VOCAB))(student, batch)
    assert float(loss.total.detach() - alone.total.detach()) == pytest.approx(want, rel=1e-6)


def test_projection_is_the_best_of_its_rank():
    """Its rows are orthonormal, and no other ones keep more: those of torch's own SVD of all states."""
    teacher, batch = tiny(1, width=16), ragged()
    found = fit_projections(teacher, [batch.rows(slice(0, 1)), batch.rows(slice(1, 4))], [1], 6)[1]
    h = states_of(teacher, batch)[1][batch.seq.seg != 0]
    torch.testing.assert_close(found.matrix @ found.matrix.T, torch.eye(6), atol=1e-5, rtol=0)
    s = torch.linalg.svdvals(h).square()
    assert float(found.kept) == pytest.approx(float(s[:6].sum() / s.sum()), rel=1e-5)
    kept = (h @ found.matrix.double().T).square().sum()
    assert float(kept) == pytest.approx(float(s[:6].sum()), rel=1e-5)


OBJECTIVES = {
    "distill": lambda t: DistillConfig(alpha=1.0).build(t),
    "reverse": lambda t: DistillConfig(alpha=1.0, beta=1.0).build(t),
    "bucket": lambda t: DistillConfig(alpha=1.0, top_k=3).build(t),
    "renormalise": lambda t: DistillConfig(alpha=1.0, top_k=3, tail="renormalise").build(t),
    "gkd": lambda t: GKDConfig().build(t),
    "hidden": lambda t: HiddenConfig(layers=((0, 0), (1, 1)), logits=DistillConfig(alpha=1.0)).build(t, identity(t)),
    "cosine": lambda t: HiddenConfig(layers=((0, 0),), match="cosine", logits=DistillConfig(alpha=1.0)).build(t, identity(t)),
    "minillm": lambda t: MiniLLMConfig().build(t),
}


def identity(teacher: Teacher):
    return fit_projections(teacher.model, [ragged()], [0, 1], teacher.model.cfg.d_model)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_teacher_itself_has_nothing_to_learn(name):
    student = tiny(0)
    loss = OBJECTIVES[name](Teacher(copy.deepcopy(student), VOCAB))(student, ragged())
    loss.total.backward()
    assert abs(float(loss.total.detach())) < 1e-10
    assert max(float(p.grad.abs().max()) for p in student.parameters()) < 1e-7


def totals(objective, student: LM, parts: list[Batch]):
    student.zero_grad()
    losses = [objective(student, part) for part in parts]
    sum(loss.total for loss in losses).backward()
    grads = torch.cat([p.grad.flatten() for p in student.parameters()])
    return sum(float(loss.total.detach()) for loss in losses), sum(int(loss.count) for loss in losses), grads


@pytest.mark.parametrize("name", OBJECTIVES)
def test_micro_batches_add_up(name):
    student, teacher = tiny(0), Teacher(tiny(1), VOCAB)
    objective, batch = OBJECTIVES[name](teacher), answered(student)
    whole = totals(objective, student, [batch])
    for rows in (1, 3):
        parts = totals(objective, student, batch.split(rows))
        assert parts[0] == pytest.approx(whole[0], abs=1e-9) and parts[1] == whole[1]
        torch.testing.assert_close(parts[2], whole[2], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_masked_tokens_change_nothing(name):
    """Padding alters no loss or gradient; nor do the last tokens of a row whose labels are off (but for hidden states)."""
    student, objective, batch = tiny(0), OBJECTIVES[name](Teacher(tiny(1), VOCAB)), answered(tiny(0))
    want = totals(objective, student, [batch])
    tokens = torch.where(batch.seq.seg == 0, (batch.tokens + 1) % VOCAB, batch.tokens)
    got = totals(objective, student, [Batch(tokens, batch.labels, batch.seq, batch.extra)])
    assert got[0] == pytest.approx(want[0], abs=1e-10)
    torch.testing.assert_close(got[2], want[2], atol=1e-10, rtol=0)
    if name in ("hidden", "cosine"):
        return
    labels = batch.labels.clone()
    labels[:, 2:] = IGNORE
    some = [Batch(t, labels, batch.seq, batch.extra) for t in (batch.tokens, torch.cat([batch.tokens[:, :3], tokens.flip(1)[:, 3:]], 1))]
    first, second = (totals(objective, student, [one]) for one in some)
    assert first[0] == pytest.approx(second[0], abs=1e-10) and first[1] == int((labels != IGNORE).sum())


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_chunks_change_nothing(chunk):
    torch.manual_seed(0)
    student, teacher, y = leaf(13, 6), leaf(13, 9), torch.randint(0, VOCAB, (13,))
    w, v = leaf(VOCAB, 6), leaf(16, 9)
    measure = DistillConfig(top_k=4).build(Fixed(VOCAB)).measure
    run = lambda size: dv.in_chunks(measure, Head(student, w, 5.0), Head(teacher.detach(), v.detach(), None), y, size)
    got, want = run(chunk), measure(Head(student, w, 5.0).logits(), Head(teacher, v, None), y)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    grads = [torch.autograd.grad((2 * out[0] + out[1]).sum(), (student, w)) for out in (got, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=0)


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("size", [80.0, 1e4])
@pytest.mark.parametrize("form", ["full", "bucket", "renormalise"])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_extreme_logits_stay_finite(size, form, beta):
    torch.manual_seed(0)
    z = (torch.randn(5, 8).sign() * size).requires_grad_()
    teacher = torch.randn(5, 8).sign() * size
    p, q = teacher.log_softmax(-1), z.log_softmax(-1)
    if form != "full":
        top = dv.likeliest(p, 3)
        p, q = top.buckets(form), dv.buckets(q, top.ids, form)
    loss = dv.divergence(q, p, beta).sum()
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(z.grad).all()


def test_no_label_no_loss_but_a_gradient():
    student = tiny(0)
    batch = ragged()
    empty = Batch(batch.tokens, torch.full_like(batch.labels, IGNORE), batch.seq)
    for name, make in OBJECTIVES.items():
        student.zero_grad()
        loss = make(Teacher(tiny(1), VOCAB))(student, empty)
        loss.total.backward()
        assert float(loss.total.detach()) == 0 and int(loss.count) == 0, name
        assert all(float(p.grad.abs().max()) == 0 for p in student.parameters() if p.grad is not None), name


def test_stored_values_add_up_to_one():
    """fp16 rounds the log-probabilities; what is compared is a distribution all the same."""
    torch.manual_seed(0)
    top = dv.likeliest((6 * torch.randn(50, 40)).log_softmax(-1), 8)
    rough = TopK(top.logps.half().float(), top.ids, top.tail)
    for kind in ("bucket", "renormalise"):
        torch.testing.assert_close(rough.buckets(kind).exp().sum(-1), torch.ones(50), atol=1e-6, rtol=0)


def test_hooks_are_gone_afterwards():
    model, batch = tiny(0), ragged()
    with hidden.tapped(model, [0, 1]) as states:
        model(batch.tokens, batch.seq)
    assert set(states) == {0, 1} and not any(block._forward_hooks for block in model.blocks)
    for got, want in zip((states[0], states[1]), states_of(model, batch), strict=True):
        torch.testing.assert_close(got, want)
