"""Distillation beside independent implementations: torch's kl_div, torchtune's reverse KL, TRL's JSD and MiniLLM, torch's SVD."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from tests.golden.test_distill import VOCAB, answered, logits_of, ragged, tiny
from zero2llm.core.batch import IGNORE
from zero2llm.core.seq import Seq
from zero2llm.train.distill import divergence as dv
from zero2llm.train.distill.gkd import GKDConfig
from zero2llm.train.distill.logits import DistillConfig
from zero2llm.train.distill.minillm import MiniLLMConfig, Mixed, after, return_to_go
from zero2llm.train.distill.teacher import Teacher


def pair(n: int = 24, v: int = 13, size: float = 3.0):
    torch.manual_seed(0)
    return (size * torch.randn(n, v, dtype=torch.float64)).requires_grad_(), size * torch.randn(n, v, dtype=torch.float64)


def same(got: torch.Tensor, want: torch.Tensor, z: torch.Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(got, want.to(got), atol=atol, rtol=0)
    (a,), (b,) = (torch.autograd.grad(x, z, retain_graph=True) for x in (got, want))
    torch.testing.assert_close(a, b.to(a), atol=atol, rtol=0)


@pytest.mark.parametrize("t", [1.0, 2.0, 4.0])
def test_forward_kl_is_torchs(t):
    z, w = pair()
    q, p = (z / t).log_softmax(-1), (w / t).log_softmax(-1)
    same(t * t * dv.divergence(q, p, 0.0).sum(), t * t * F.kl_div(q, p, log_target=True, reduction="sum"), z)


def trl_jsd():
    pytest.importorskip("trl")
    from trl.experimental.gkd import GKDTrainer

    return GKDTrainer.generalized_jsd_loss


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("t", [1.0, 0.9])
def test_jsd_is_trls(beta, t):
    z, w = pair()
    theirs = trl_jsd()(z[None], w[None], beta=beta, temperature=t, reduction="sum")
    same(dv.divergence((z / t).log_softmax(-1), (w / t).log_softmax(-1), beta).sum(), theirs, z)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_gkd_is_trls_through_whole_models(beta):
    """Loss per valid token and the gradient of every weight, on ragged rows."""
    student, teacher, batch = tiny(0), tiny(1, width=24), answered(tiny(0))
    loss = GKDConfig(beta=beta, temperature=0.9).build(Teacher(teacher, VOCAB))(student, batch)
    (loss.total / loss.count).backward()
    got = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    z = student.logits(student(batch.tokens, batch.seq)[0])
    theirs = trl_jsd()(z, logits_of(teacher, batch), labels=batch.labels, beta=beta, temperature=0.9)
    theirs.backward()
    assert float((loss.total / loss.count).detach()) == pytest.approx(float(theirs.detach()), abs=1e-10)
    for a, p in zip(got, student.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, atol=1e-10, rtol=1e-8)


def torchtune_reverse():
    """From its file alone: the package wants torchao at its top, the losses want torch only."""
    package = importlib.util.find_spec("torchtune")
    if package is None:
        pytest.skip("torchtune is not installed")
    path = Path(package.submodule_search_locations[0]) / "modules" / "loss" / "kd_losses.py"
    spec = importlib.util.spec_from_file_location("torchtune_kd_losses", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ReverseKLLoss()


def test_reverse_kl_is_torchtunes():
    loss = torchtune_reverse()
    z, w = pair()
    labels = torch.randint(0, 13, (24,))
    labels[[0, 5, 6, 23]] = IGNORE
    keep = labels != IGNORE
    ours = dv.divergence(z.log_softmax(-1), w.log_softmax(-1), 1.0)[keep].mean()
    same(ours, loss(z, w, labels), z, atol=1e-6)  # theirs is in fp32


def test_distill_is_cross_entropy_and_kl_of_torch():
    student, teacher, batch = tiny(0, rows=13), tiny(1, width=24, rows=16), ragged()
    DistillConfig(alpha=0.7, temperature=2.0).build(Teacher(teacher, VOCAB))(student, batch).total.backward()
    got = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    z, keep = student.logits(student(batch.tokens, batch.seq)[0]), batch.labels != IGNORE
    q, p = ((x[keep][:, :VOCAB] / 2).log_softmax(-1) for x in (z, logits_of(teacher, batch)))
    hard = F.cross_entropy(z.transpose(1, 2), batch.labels, ignore_index=IGNORE, reduction="sum")
    (0.7 * 4 * F.kl_div(q, p, log_target=True, reduction="sum") + 0.3 * hard).backward()
    for a, x in zip(got, student.parameters(), strict=True):
        torch.testing.assert_close(a, x.grad, atol=1e-10, rtol=1e-8)


def trl_minillm(gamma: float, normalise: bool):
    pytest.importorskip("trl")
    try:
        from trl.experimental.minillm import MiniLLMTrainer
    except ImportError:
        pytest.skip("this trl has no MiniLLM")
    stub = SimpleNamespace(gamma=gamma, length_normalization=normalise)
    return MiniLLMTrainer, lambda q, p, mask: MiniLLMTrainer._compute_advantage(stub, q, p, mask)


@pytest.mark.parametrize("gamma,normalise", [(1.0, False), (0.5, True), (1.0, True)])
def test_return_to_go_is_trls(gamma, normalise):
    """Where its code does what its text says (not gamma within (0, 1) without lengths), on answers without padding before them.

    With lengths it counts a masked token as 1e-4 of one, so rows that are shorter agree to that."""
    _, theirs = trl_minillm(gamma, normalise)
    torch.manual_seed(0)
    q, p = (-3 * torch.rand(4, 6, dtype=torch.float64) for _ in range(2))
    mask = torch.arange(6) < torch.tensor([6, 3, 4, 5])[:, None]
    want = theirs(q, p, mask) * mask
    got = return_to_go((p - q) * mask, mask, gamma, normalise)
    torch.testing.assert_close(got[:1], want[:1], atol=1e-6, rtol=0)
    torch.testing.assert_close(got, want, atol=5e-3 if normalise else 1e-6, rtol=0)


def test_one_step_reverse_kl_is_trls():
    trainer, _ = trl_minillm(1.0, True)
    z, w = pair()
    q, p = z.log_softmax(-1), w.log_softmax(-1)
    theirs = trainer._single_step_decomposition_loss(SimpleNamespace(), q[None], p[None], torch.ones(1, len(q), dtype=torch.bool))
    same(dv.kl(q, p).mean(), theirs, z)


def test_expected_minillm_gradient_is_that_of_the_sequence_kl():
    """Three tokens long, every answer enumerated: sampled from the student, the unnormalised sum is exactly the gradient of
    KL(q(y) || p(y))."""
    torch.manual_seed(0)
    v, steps = 3, 3
    z = torch.randn(steps, v, v, dtype=torch.float64, requires_grad=True)  # logits by step and last token
    w = torch.randn(steps, v, v, dtype=torch.float64)
    q, p = z.log_softmax(-1), w.log_softmax(-1)
    answers = torch.cartesian_prod(*[torch.arange(v)] * steps)
    before = torch.cat([torch.zeros(len(answers), 1, dtype=torch.long), answers[:, :-1]], 1)
    t = torch.arange(steps)
    chosen = lambda x: x[t, before, answers]  # (answers, steps)
    whole = (chosen(q).sum(1).exp() * (chosen(q) - chosen(p)).sum(1)).sum()
    (want,) = torch.autograd.grad(whole, z, retain_graph=True)
    mask = torch.ones(len(answers), steps, dtype=torch.bool)
    later = after((chosen(p) - chosen(q)).detach(), mask, 1.0, False)
    kl = (q.exp() * (q - p)).sum(-1)[t, before]
    chance = chosen(q).sum(1).exp().detach()
    (got,) = torch.autograd.grad((chance[:, None] * (kl - later * chosen(q))).sum(), z)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


def test_minillm_weights_are_those_of_the_mixture():
    """With what was sampled from being the mixture itself, w = q / (mix p + (1 - mix) q) at the sampled token."""
    student, teacher, batch = tiny(0), Teacher(tiny(1, width=24), VOCAB), ragged()
    mixed = Mixed(student, teacher, 0.2)
    n = len(batch)
    states = mixed.init_states(n, 16)
    hidden, _ = mixed(batch.tokens, Seq.rows(n, 8), states)
    got = mixed.logits(hidden).softmax(-1)
    plain = Seq.rows(n, 8)
    q, p = (m.logits(m(batch.tokens, plain)[0]).softmax(-1) for m in (student, teacher.model))
    torch.testing.assert_close(got, 0.2 * p + 0.8 * q, atol=1e-12, rtol=0)
    assert MiniLLMConfig().mix == 0.2
