"""The loop: same step for any micro-batching, guards, skipped batches, precision, schedules."""

from __future__ import annotations

import json
import math

import pytest
import torch

from zero2llm.core.batch import IGNORE, Batch
from zero2llm.core.config import parse, to_dict
from zero2llm.core.seq import Seq
from zero2llm.model.lm import LM
from zero2llm.model.presets import preset
from zero2llm.model.spec import ModelConfig
from zero2llm.optim.adamw import AdamW, AdamWConfig
from zero2llm.optim.build import build_optim, split_parameters
from zero2llm.optim.muon import MuonConfig, newton_schulz
from zero2llm.optim.scale import LossScale
from zero2llm.optim.schedule import ConstantConfig, CosineConfig, WSDConfig
from zero2llm.train.fit import FitConfig, fit
from zero2llm.train.guard import NonFiniteError
from zero2llm.train.loss import Loss
from zero2llm.train.objectives.clm import CLM
from zero2llm.train.objectives.dpo import DPOConfig
from zero2llm.train.objectives.reference import Frozen


def tiny(vocab: int = 31, **changes) -> LM:
    data = to_dict(preset("qwen3-nano")) | {"vocab_size": vocab, "d_model": 16, "max_len": 64}
    data["layers"] = {"pattern": ["qwen3"], "repeat": 2}
    data["blocks"]["qwen3"]["mixer"] |= {"n_heads": 2, "n_kv_heads": 1, "head_dim": 8}
    data["blocks"]["qwen3"]["ffn"]["hidden"] = 24
    return LM(parse(ModelConfig, data | changes))


def ragged(rows: int = 6, T: int = 12, vocab: int = 31) -> Batch:
    """Rows with very different numbers of targets, so that a mean of means would be visible."""
    tokens = torch.randint(0, vocab, (rows, T))
    trainable = torch.rand(rows, T) < torch.linspace(0.1, 1.0, rows)[:, None]
    return Batch.shifted(tokens, trainable, Seq.ragged(torch.arange(rows) % 5 + 7, T))


class Repeat:
    def __init__(self, *batches):
        self.batches = batches

    def __iter__(self):
        while True:
            yield from self.batches


@pytest.mark.parametrize("cfg", [AdamWConfig(lr=1e-2), MuonConfig(lr=1e-2)], ids=["adamw", "muon"])
@pytest.mark.parametrize("micro", [1, 4])
def test_one_batch_is_many_micro_batches(cfg, micro):
    model, batch = tiny().double(), ragged()
    twin = LM.clone(model).double()
    twin.load_state_dict(model.state_dict())
    norms = []
    for m, rows in ((model, len(batch)), (twin, micro)):
        fit(m, CLM(), Repeat(batch), build_optim(m, cfg), FitConfig(steps=3, micro_rows=rows), hooks=[lambda s: norms.append(s.metrics)])
    assert [a["loss"] for a in norms[:3]] == pytest.approx([b["loss"] for b in norms[3:]], abs=1e-6)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-7, rtol=0)


def test_mean_of_means_would_be_caught():
    batch = ragged()
    counts = [part.n_targets() for part in batch.split(1)]
    assert max(counts) > 4 * max(min(counts), 1)


def test_pairs_are_not_split():
    batch = Batch(torch.zeros(6, 4, dtype=torch.long), torch.zeros(6, 4, dtype=torch.long), Seq.rows(6, 4), group=2)
    assert [len(part) for part in batch.split(3)] == [2, 2, 2]
    assert [len(part) for part in batch.split(1)] == [2, 2, 2]


def test_gradient_is_clipped_once_at_the_end():
    model, batch = tiny(), ragged()
    seen = []
    optim = build_optim(model, AdamWConfig(lr=1e-9))
    optim.step = lambda: seen.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm())
    fit(model, CLM(), Repeat(batch), optim, FitConfig(steps=1, clip=0.01, micro_rows=2))
    assert float(seen[0]) == pytest.approx(0.01, rel=1e-3)


def test_gradient_equals_plain_mean():
    model, batch = tiny().double(), ragged()
    hidden, _ = model(batch.tokens, batch.seq)
    torch.nn.functional.cross_entropy(model.logits(hidden).flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE).backward()
    want = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    got, optim = [], build_optim(model, AdamWConfig())
    optim.step = lambda: got.extend(p.grad.clone() for p in model.parameters())
    fit(model, CLM(), Repeat(batch), optim, FitConfig(steps=1, clip=None, micro_rows=4))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("recompute", [False, True])
def test_batch_without_targets_changes_nothing(recompute):
    model, batch = tiny(), ragged()
    empty = Batch(batch.tokens, torch.full_like(batch.labels, IGNORE), batch.seq)
    padding = Batch(batch.tokens, empty.labels, Seq(batch.seq.pos, torch.zeros_like(batch.seq.seg)))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = fit(model, CLM(), Repeat(empty, padding), build_optim(model, AdamWConfig()), FitConfig(steps=2, recompute=recompute))
    assert state.metrics["skipped"] == 1 and math.isfinite(state.metrics["loss"])
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_recompute_gives_the_same_step():
    model, batch = tiny(), ragged()
    twin = LM.clone(model)
    for m, recompute in ((model, False), (twin, True)):
        fit(m, CLM(), Repeat(batch), build_optim(m, AdamWConfig(lr=1e-2)), FitConfig(steps=2, recompute=recompute))
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_user_tokens_get_no_gradient_through_the_trainer():
    """Change a masked label: nothing may move. The bug that SFT trainers ship most often."""
    model, batch = tiny(), ragged()
    other = batch.labels.clone()
    masked = batch.labels == IGNORE
    twin = LM.clone(model)
    fit(model, CLM(), Repeat(batch), build_optim(model, AdamWConfig()), FitConfig(steps=1))
    fit(twin, CLM(), Repeat(Batch(batch.tokens, torch.where(masked, IGNORE, other), batch.seq)), build_optim(twin, AdamWConfig()), FitConfig(steps=1))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    logits = model.logits(model(batch.tokens, batch.seq)[0]).detach().requires_grad_()
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE).backward()
    assert (logits.grad[masked] == 0).all() and (logits.grad[~masked] != 0).any()


def test_nan_stops_before_the_weights_change_and_names_the_module():
    model, batch = tiny(), ragged()
    with torch.no_grad():
        model.blocks[1].ffn.down_proj.register_forward_hook(lambda m, a, out: out * float("nan"))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(NonFiniteError, match=r"step 0, micro-batch 0.*blocks\.1\.ffn"):
        fit(model, CLM(), Repeat(batch), build_optim(model, AdamWConfig()), FitConfig(steps=3))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_loss_that_is_infinite_is_named():
    model, batch = tiny(), ragged()

    def objective(m, b):
        loss = CLM()(m, b)
        return Loss(loss.total * float("inf"), loss.count, loss.metrics)

    with pytest.raises(NonFiniteError, match="the loss is inf"):
        fit(model, objective, Repeat(batch), build_optim(model, AdamWConfig()), FitConfig(steps=1))


def test_data_that_ends_early_is_an_error():
    model, batch = tiny(), ragged()
    with pytest.raises(ValueError, match="ended after 1 of 3"):
        fit(model, CLM(), [batch], build_optim(model, AdamWConfig()), FitConfig(steps=3))


def test_loss_scale_follows_the_rule():
    scale = LossScale(True, 1024.0)
    for finite, want in ((True, 1024.0), (False, 512.0), (True, 512.0)):
        scale.update(finite)
        assert scale.scale == want
    for _ in range(1999):
        scale.update(True)
    assert scale.scale == 1024.0
    off = LossScale(False)
    off.update(False)
    assert off.scale == 1.0


def test_overfits_one_batch():
    model, batch = tiny(), ragged()
    state = fit(model, CLM(), Repeat(batch), build_optim(model, MuonConfig(lr=2e-2)), FitConfig(steps=150, schedule=ConstantConfig()))
    assert state.metrics["loss"] < 0.05


def test_schedules_by_hand():
    cosine, wsd = CosineConfig(warmup=0.1, floor=0.1), WSDConfig(warmup=0.1, decay=0.2)
    assert [cosine.factor(t, 20) for t in (0, 1)] == [0.5, 1.0]
    assert cosine.factor(2, 20) == pytest.approx(1.0) and cosine.factor(11, 20) == pytest.approx(0.1 + 0.9 * 0.5)
    assert cosine.factor(20, 20) == pytest.approx(0.1)
    assert [wsd.factor(t, 20) for t in (0, 1, 2, 15, 16, 18, 20)] == pytest.approx([0.5, 1, 1, 1, 1, 0.5, 0])
    assert WSDConfig(warmup=0.0, decay=1.0, shape="sqrt").factor(5, 20) == pytest.approx(0.5)


@pytest.mark.parametrize(("make", "says"), [
    (lambda: CosineConfig(warmup=1.0), "warmup = 1.0 must be a share"), (lambda: CosineConfig(warmup=-0.1), "warmup = -0.1"),
    (lambda: CosineConfig(floor=1.5), "floor = 1.5"), (lambda: ConstantConfig(warmup=200.0), "warmup = 200.0"),
    (lambda: WSDConfig(warmup=0.5, decay=0.6), "warmup = 0.5 and decay = 0.6 .* together at most 1"),
    (lambda: WSDConfig(decay=-0.1), "decay = -0.1"), (lambda: WSDConfig(floor=-0.1), "floor = -0.1"),
    (lambda: MuonConfig(adamw_lr=0.0), "adamw_lr = 0.0 must be positive"), (lambda: MuonConfig(adamw_lr=-1.0), "adamw_lr = -1.0"),
    (lambda: MuonConfig(weight_decay=-0.1), "weight_decay = -0.1"),
], ids=lambda x: x if isinstance(x, str) else "")  # fmt: skip
def test_impossible_schedules_and_rates_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_parameter_groups_partition():
    model = tiny()
    groups = split_parameters(model)
    names = [name for group in groups.values() for name, _ in group]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert [name for name, _ in groups["embedding"]] == ["embed.weight"]
    assert all(p.ndim == 2 for _, p in groups["matrix"]) and all(p.ndim == 1 for _, p in groups["vector"])
    untied = split_parameters(tiny(tie_embeddings=False))
    assert [name for name, _ in untied["embedding"]] == ["embed.weight", "head.weight"]


@pytest.mark.parametrize("dtype,tol", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_adamw_equals_torch(dtype, tol):
    ours = torch.nn.Parameter(torch.randn(5, 3, dtype=dtype))
    theirs = torch.nn.Parameter(ours.detach().clone())
    a = AdamW([{"params": [ours]}], AdamWConfig(lr=0.05, weight_decay=0.1))
    b = torch.optim.AdamW([theirs], lr=0.05, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(7):
        ours.grad = theirs.grad = torch.randn(5, 3, dtype=dtype)
        a.step(), b.step()
        torch.testing.assert_close(ours, theirs, atol=tol, rtol=tol)


@pytest.mark.parametrize("shape", [(8, 4), (4, 8), (6, 6)])
def test_muon_equals_torch(shape):
    """torch's iteration always runs in bf16, hence the tolerance; the rule itself is checked exactly below."""
    from torch.optim import Muon as TorchMuon

    from zero2llm.optim.muon import Muon

    ours = torch.nn.Parameter(torch.randn(shape))
    theirs = torch.nn.Parameter(ours.detach().clone())
    a = Muon([{"params": [ours]}], MuonConfig(lr=0.02, weight_decay=0.1))
    b = TorchMuon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(7):
        ours.grad = theirs.grad = torch.randn(shape)
        a.step(), b.step()
    torch.testing.assert_close(ours, theirs, atol=6e-3, rtol=0)


def test_newton_schulz_by_svd():
    x = torch.randn(3, 8, 20, dtype=torch.float64)
    u, s, vt = torch.linalg.svd(x / x.norm(dim=(1, 2), keepdim=True), full_matrices=False)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    torch.testing.assert_close(newton_schulz(x), u @ torch.diag_embed(s) @ vt, atol=1e-5, rtol=0)
    assert 0.6 < float(s.min()) and float(s.max()) < 1.2


def test_muon_steps_matrices_only():
    model = tiny()
    optim = build_optim(model, MuonConfig())
    muon, adamw = optim.parts
    assert {id(p) for p in muon.param_groups[0]["params"]} == {id(p) for _, p in split_parameters(model)["matrix"]}
    assert all(g["weight_decay"] == 0 for g in adamw.param_groups)


def test_optimizer_state_survives_json_free_storage():
    model, batch = tiny(), ragged()
    optim = build_optim(model, MuonConfig())
    fit(model, CLM(), Repeat(batch), optim, FitConfig(steps=2))
    saved = {k: v.clone() for k, v in optim.state_tensors().items()}
    assert "blocks.0.mixer.q_proj.weight/m" in saved and "embed.weight/v" in saved and "embed.weight/step" in saved
    fresh = build_optim(model, MuonConfig())
    fresh.load_state_tensors(saved)
    assert all(torch.equal(v, fresh.state_tensors()[k]) for k, v in saved.items())
    with pytest.raises(ValueError, match="belongs to no parameter"):
        fresh.load_state_tensors({"nobody.weight/m": torch.zeros(1)})
    json.dumps(sorted(saved))


def test_dpo_learns_the_preference():
    model = tiny()
    tokens = torch.randint(0, 31, (8, 10))
    tokens[1::2, :5] = tokens[0::2, :5]
    trainable = torch.zeros(8, 10)
    trainable[:, 5:] = 1
    batch = Batch.shifted(tokens, trainable, Seq.rows(8, 10), group=2)
    objective, seen = DPOConfig(beta=0.5).build(Frozen(LM.clone(model))), []
    fit(model, objective, Repeat(batch), build_optim(model, AdamWConfig(lr=3e-3)), FitConfig(steps=40, micro_rows=4), hooks=[lambda s: seen.append(s.metrics)])
    assert seen[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and seen[0]["margin"] == pytest.approx(0, abs=1e-5)
    assert seen[-1]["moved_right"] == 1.0 and seen[-1]["loss"] < 0.2
