"""Preference objectives against TRL 1.12: its trainers' own losses, called without a trainer, in float64 on ragged pairs.

Each comparison is of loss and gradient, from logits to the scalar. TRL's batches are chosen, chosen, rejected, rejected and
its losses are means; ours are sums in turn. Where the two differ on purpose the test says how.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.golden.test_objectives import Bigram, pairs
from tests.golden.test_preference import Scored, judged, pointed, scored_pairs
from zero2llm.core.batch import IGNORE, Batch
from zero2llm.train.objectives.cpo import CPOConfig, contrastive_loss
from zero2llm.train.objectives.dpo import DPOConfig, preference_loss
from zero2llm.train.objectives.ipo import IPOConfig
from zero2llm.train.objectives.kto import KTOConfig
from zero2llm.train.objectives.orpo import ORPOConfig, odds_loss
from zero2llm.train.objectives.reference import Frozen, stored
from zero2llm.train.objectives.reward import RewardConfig
from zero2llm.train.objectives.simpo import SimPOConfig

trl = pytest.importorskip("trl")
same = lambda x: x
WORLD = SimpleNamespace(
    device=torch.device("cpu"), num_processes=1, process_index=0, sync_gradients=True, gather=same, gather_for_metrics=same,
    reduce=same, unwrap_model=same,
)  # fmt: skip


class Theirs(nn.Module):
    """Our bigram as TRL calls a model."""

    is_gradient_checkpointing = False

    def __init__(self, model: Bigram):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask=None, **more):
        return SimpleNamespace(logits=self.model.table[input_ids] @ self.model.head_weight.t(), aux_loss=None)


def stub(**more) -> SimpleNamespace:
    metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    args = SimpleNamespace(gradient_checkpointing_kwargs=None, center_rewards_coefficient=None)
    fields = {"accelerator": WORLD, "_metrics": metrics, "_total_train_tokens": 0, "_tp_size": 1, "aux_loss_enabled": False, "args": args}
    return SimpleNamespace(**fields | {"is_encoder_decoder": False, "label_smoothing": 0.0, "alpha": 0.0, "simpo_gamma": 0.0} | more)


def trained(batch: Batch) -> torch.Tensor:
    """(B, T) where a token is itself a target: TRL marks the token, our labels the position before it."""
    mask = torch.zeros_like(batch.tokens)
    mask[:, 1:] = batch.labels[:, :-1] != IGNORE
    return mask


def turned(x: torch.Tensor) -> torch.Tensor:
    return torch.cat((x[0::2], x[1::2]))


def agree(ours, theirs, weights, n, atol=1e-10):
    """Our sum over n units against their mean: loss and gradient."""
    torch.testing.assert_close(ours / n, theirs, atol=atol, rtol=0)
    keep = {"retain_graph": True}  # some cases share their log-probabilities
    for a, b in zip(torch.autograd.grad(ours / n, weights, **keep), torch.autograd.grad(theirs, weights, **keep), strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=0)


def dpo_trainer(model, reference, kind, batch, beta, precomputed=False):
    from trl import DPOTrainer

    self = stub(loss_types=[kind], loss_weights=[1.0], beta=beta, f_divergence_type="reverse_kl", f_alpha_divergence_coef=0.5,
                ld_alpha=None, use_weighting=False, precompute_ref_logps=precomputed, model=Theirs(model), ref_model=Theirs(reference))  # fmt: skip
    inputs = {"input_ids": turned(batch.tokens), "attention_mask": turned((batch.seq.seg > 0).long()), "completion_mask": turned(trained(batch))}
    if precomputed:
        inputs |= {"ref_chosen_logps": batch.extra["ref"][0::2], "ref_rejected_logps": batch.extra["ref"][1::2]}
    return DPOTrainer._compute_loss(self, self.model, inputs, False)


@pytest.mark.parametrize("kind,cfg", [("sigmoid", DPOConfig(beta=0.3)), ("ipo", IPOConfig(beta=0.3))], ids=["dpo", "ipo"])
@pytest.mark.parametrize("ratios", ["near", "far"])
def test_dpo_and_ipo(kind, cfg, ratios):
    model, reference, batch = Bigram(), Bigram(), pairs()
    if ratios == "far":
        with torch.no_grad():
            model.table *= 8
    theirs = dpo_trainer(model, reference, kind, batch, 0.3)
    agree(cfg.build(Frozen(reference))(model, batch).total, theirs, [model.table, model.head_weight], 2)


def test_precomputed_reference():
    model, batch = Bigram(), pairs()
    batch.extra["ref"] = torch.randn(4, dtype=torch.float64) * 5
    theirs = dpo_trainer(model, Bigram(), "sigmoid", batch, 0.3, precomputed=True)
    agree(DPOConfig(beta=0.3).build(stored)(model, batch).total, theirs, [model.table, model.head_weight], 2)


def test_sft_term_of_one_pair():
    """TRL averages it over the tokens of the batch, we per answer: the same where the batch is one pair."""
    model, reference, batch = Bigram(), Bigram(), pairs().rows(slice(0, 2))
    theirs = dpo_trainer(model, reference, "sigmoid", batch, 0.3) + 0.7 * dpo_trainer(model, reference, "sft", batch, 0.3)
    agree(DPOConfig(beta=0.3, sft_weight=0.7).build(Frozen(reference))(model, batch).total, theirs, [model.table, model.head_weight], 1)


def logps_of(model, batch, average):
    """TRL's own reduction: chosen, rejected."""
    from trl.experimental.cpo import CPOTrainer

    logits = model.table[batch.tokens] @ model.head_weight.t()
    labels = torch.where(trained(batch) > 0, batch.tokens, IGNORE)
    found = CPOTrainer.get_batch_logps(logits, labels, average_log_prob=average)
    return found[0::2], found[1::2]


def test_smoothing():
    """TRL smooths conservatively in its CPO; in terms of log-ratios that is our DPO."""
    from trl.experimental.cpo import CPOTrainer

    w, v = (torch.randn(6, dtype=torch.float64) * 20 for _ in range(2))
    w.requires_grad_()
    theirs = CPOTrainer.cpo_loss(stub(beta=0.3, loss_type="sigmoid", label_smoothing=0.1), w, v)[0].mean()
    zero = torch.zeros_like(v)
    agree(preference_loss(w, v, zero, zero, DPOConfig(beta=0.3, label_smoothing=0.1)).sum(), theirs, [w], 6)
    agree(contrastive_loss(w, v, CPOConfig(beta=0.3, label_smoothing=0.1)).sum(), theirs, [w], 6)


def test_simpo():
    from trl.experimental.cpo import CPOTrainer

    model, batch = Bigram(), pairs()
    theirs = CPOTrainer.cpo_loss(stub(beta=2.5, loss_type="simpo", simpo_gamma=0.7), *logps_of(model, batch, True))[0].mean()
    agree(SimPOConfig(beta=2.5, gamma=0.7).build()(model, batch).total, theirs, [model.table, model.head_weight], 2)


def test_cpo():
    """The likelihood term per answer; TRL's, per token of the batch, is that of a batch of one pair."""
    from trl.experimental.cpo import CPOTrainer

    model, batch = Bigram(), pairs()
    theirs = 0
    for one in batch.split(2):
        w, v = logps_of(model, one, False)
        nll = nn.functional.cross_entropy((model.table[one.tokens[:1]] @ model.head_weight.t()).flatten(0, 1), one.labels[:1].flatten())
        theirs = theirs + (CPOTrainer.cpo_loss(stub(beta=0.3, loss_type="sigmoid"), w, v)[0].mean() + 0.6 * nll) / 2
    agree(CPOConfig(beta=0.3, alpha=0.6).build()(model, batch).total, theirs, [model.table, model.head_weight], 2)


def test_orpo():
    """TRL works the odds out in fp32; its likelihood term, over prompts too, is not ours (the paper's is)."""
    from trl.experimental.orpo import ORPOTrainer

    model, batch = Bigram(), pairs()
    w, v = logps_of(model, batch, True)
    theirs = -ORPOTrainer.odds_ratio_loss(stub(beta=0.4), w, v)[0].double().mean()
    agree(0.4 * odds_loss(w, v).sum(), theirs, [model.table, model.head_weight], 2, atol=1e-7)
    theirs = -w.mean() - ORPOTrainer.odds_ratio_loss(stub(beta=0.4), w, v)[0].double().mean()
    agree(ORPOConfig(beta=0.4).build()(model, batch).total, theirs, [model.table, model.head_weight], 2, atol=1e-7)


@pytest.mark.parametrize("apart", [0.3, 3.0])
def test_kto(apart):
    from trl import KTOTrainer

    model, reference, batch = Bigram(), Bigram(), judged()
    with torch.no_grad():
        model.table *= apart
    cfg = KTOConfig(beta=0.3, desirable_weight=1.2, undesirable_weight=0.7)
    self = stub(beta=0.3, desirable_weight=1.2, undesirable_weight=0.7, loss_type="kto", calculate_KL=True, precompute_ref_logps=False,
                use_liger_kernel=False, model=Theirs(model), ref_model=Theirs(reference))  # fmt: skip
    self._compute_kl_logps = lambda *a: KTOTrainer._compute_kl_logps(self, *a)
    own, other = ({"input_ids": b.tokens, "attention_mask": b.seq.seg, "completion_mask": trained(b)} for b in (batch.rows(slice(s, None, 2)) for s in (0, 1)))
    inputs = own | {f"KL_{key}": value for key, value in other.items()} | {"label": batch.extra["label"][0::2]}
    theirs = KTOTrainer._compute_loss(self, self.model, inputs, False)
    answers = pointed(model, reference, batch)
    assert self._metrics["train"]["kl"][0] == pytest.approx(float(answers.extra["z"][0]), abs=1e-12)
    agree(cfg.build(Frozen(reference))(model, answers).total, theirs, [model.table, model.head_weight], 3)


@pytest.mark.parametrize("center", [None, 0.2])
def test_reward(center):
    from trl import RewardTrainer

    model, batch = Scored(), scored_pairs()

    class Classifier(nn.Module):
        def forward(self, input_ids, attention_mask, **more):
            last = attention_mask.sum(1) - 1
            hidden = model.table[input_ids][torch.arange(len(last)), last]
            return SimpleNamespace(logits=(hidden @ model.score.weight + model.score.bias)[:, None])

    self = stub()
    self.args.center_rewards_coefficient, self.model = center, Classifier()
    inputs = {"input_ids": turned(batch.tokens), "attention_mask": turned((batch.seq.seg > 0).long()), "margin": batch.extra["margin"][0::2]}
    theirs = RewardTrainer.compute_loss(self, self.model, inputs)
    loss = RewardConfig(center=center or 0.0).build()(model, batch)
    agree(loss.total, theirs, [model.table, model.score.weight], 2)
    assert float(loss.metrics["accuracy"][0]) / 2 == self._metrics["train"]["accuracy"][0]
