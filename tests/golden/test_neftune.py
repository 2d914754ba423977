"""Noise on embeddings: its size by the equation, equal to transformers' hook, the same after a resume; and planted bugs."""

from __future__ import annotations

import math
import shutil

import pytest
import torch

from tests.contract.stages import recipe, write_data
from tests.contract.test_fit import Repeat, tiny
from zero2llm.core.batch import Batch
from zero2llm.core.files import load_tensors
from zero2llm.core.seq import Seq
from zero2llm.lab.recipe import make_recipe
from zero2llm.lab.stage import run_stage
from zero2llm.model.lm import LM
from zero2llm.optim.adamw import AdamWConfig
from zero2llm.optim.build import build_optim
from zero2llm.train.checkpoint import latest
from zero2llm.train.evaluate import evaluate
from zero2llm.train.fit import FitConfig, fit
from zero2llm.train.objectives import clm, neftune
from zero2llm.train.objectives.clm import CLMConfig
from zero2llm.train.objectives.neftune import noise, noisy

PACKED = Seq.of_segments(torch.tensor([[1, 1, 1, 2, 2, 3, 3, 3, 3, 0, 0], [1] * 11]))
LENGTHS = [[3, 3, 3, 2, 2, 4, 4, 4, 4, 0, 0], [11] * 11]
WIDTH, ALPHA = 16, 5.0


def packed_batch() -> Batch:
    tokens = torch.randint(0, 31, (2, 11))
    return Batch.shifted(tokens, torch.ones_like(tokens), PACKED)


# The checks


def check_size_by_the_equation() -> None:
    """Each value stays within alpha / sqrt(L d), comes close to both ends, and is spread evenly between them."""
    wide = 4096
    found = neftune.noise(torch.zeros(2, 11, wide), PACKED, ALPHA)
    for row in range(2):
        for t, length in enumerate(LENGTHS[row]):
            values, edge = found[row, t], ALPHA / math.sqrt(length * wide) if length else 0.0
            if not length:
                assert (values == 0).all(), "padding gets no noise"
                continue
            assert values.abs().max() <= edge * (1 + 1e-6) and values.max() > 0.99 * edge and values.min() < -0.99 * edge
            assert float(values.pow(2).mean()) == pytest.approx(edge**2 / 3, rel=0.06), "uniform"
    for row, t0, t1 in ((0, 0, 3), (0, 3, 5), (0, 5, 9), (1, 0, 11)):  # of a whole document: alpha^2 / 3
        assert float(found[row, t0:t1].pow(2).sum()) == pytest.approx(ALPHA**2 / 3, rel=0.06)
    whole = neftune.noise(torch.zeros(2, 11, wide), Seq.rows(2, 11), ALPHA)
    assert whole.abs().max() <= ALPHA / math.sqrt(11 * wide) * (1 + 1e-6) and whole.abs().max() > 0.99 * ALPHA / math.sqrt(11 * wide)


def test_equals_transformers_hook():
    """Rows without padding that hold one document each: the same numbers from the same generator."""
    theirs = pytest.importorskip("transformers.integrations.neftune", exc_type=ImportError)  # asks for accelerate where peft is installed
    x, table = torch.randn(3, 7, WIDTH), torch.nn.Embedding(2, 2)
    table.neftune_noise_alpha = ALPHA
    torch.manual_seed(3)
    want = theirs.neftune_post_forward_hook(table, None, x)
    torch.manual_seed(3)
    torch.testing.assert_close(x + neftune.noise(x, Seq.rows(3, 7), ALPHA), want, atol=1e-6, rtol=0)


def check_what_the_blocks_read(scale: float | None = None) -> None:
    """In training the first block reads embeddings within the noise's edge of the clean ones; in evaluation the clean ones."""
    model, batch, read = tiny(embed_scale=scale), packed_batch(), []
    model.blocks[0].register_forward_pre_hook(lambda _, given: read.append(given[0].detach()))
    model(batch.tokens, batch.seq)
    CLMConfig(neftune=ALPHA).build()(model, batch)
    model.eval()
    CLMConfig(neftune=ALPHA).build()(model, batch)
    clean, moved, evaluated = read
    edge = ALPHA * torch.tensor(LENGTHS).clamp(min=1).mul(WIDTH).rsqrt()[..., None] * (torch.tensor(LENGTHS) > 0)[..., None]
    assert ((moved - clean).abs() <= edge * 1.001 + 1e-6).all() and ((moved - clean).abs().amax(-1) >= edge[..., 0] * 0.5).all()
    assert torch.equal(evaluated, clean)


def check_evaluation_is_clean() -> None:
    model, batch = tiny(), packed_batch()
    plain, with_noise = (evaluate(model, CLMConfig(neftune=a).build(), [batch]) for a in (None, ALPHA))
    assert plain == with_noise


CHECKS = [check_size_by_the_equation, check_what_the_blocks_read, lambda: check_what_the_blocks_read(4.0), check_evaluation_is_clean]


@pytest.mark.parametrize("check", CHECKS)
def test_noise(check):
    check()


def test_off_means_no_draw_and_no_hook():
    model, batch = tiny(), packed_batch()
    state = torch.get_rng_state()
    CLMConfig().build()(model, batch)
    assert torch.equal(torch.get_rng_state(), state)
    CLMConfig(neftune=ALPHA).build()(model, batch)
    assert not torch.equal(torch.get_rng_state(), state) and not model.embed._forward_hooks
    with pytest.raises(RuntimeError, match="inside"):
        with noisy(model, PACKED, ALPHA):
            raise RuntimeError("inside")
    assert not model.embed._forward_hooks


@pytest.mark.parametrize("alpha", [0, -1.0, math.inf, math.nan])
def test_impossible_noise_is_refused(alpha):
    with pytest.raises(ValueError, match="neftune = .* must be positive"):
        CLMConfig(neftune=alpha)


def test_half_precision_keeps_its_type():
    found = noise(torch.zeros(2, 11, WIDTH, dtype=torch.bfloat16), PACKED, ALPHA)
    assert found.dtype == torch.bfloat16 and found.abs().sum() > 0


def trained(micro: int, seed: int = 7, recompute: bool = False) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model, batch = tiny(), packed_batch()
    torch.manual_seed(seed)
    fit(model, CLMConfig(neftune=ALPHA).build(), Repeat(batch), build_optim(model, AdamWConfig(lr=1e-2)), FitConfig(steps=3, micro_rows=micro, recompute=recompute))
    return [p.detach() for p in model.parameters()]


def test_the_same_seed_gives_the_same_training_however_it_is_cut():
    once = trained(2)
    assert all(torch.equal(a, b) for a, b in zip(once, trained(2), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(once, trained(2, seed=8), strict=True))
    for again in (trained(1), trained(2, recompute=True)):
        for a, b in zip(once, again, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_a_resumed_run_draws_what_the_whole_run_draws(tmp_path):
    """Cut after step 5 of 8, in the middle between validations and samples."""
    write_data(tmp_path / "data")
    keys = recipe(tmp_path, "pretrain", objective={"kind": "clm", "neftune": ALPHA}, save={"every_s": 0.0, "keep": 9})
    run_stage(make_recipe(**keys), quiet=True)
    run = tmp_path / "pretrain"
    want = load_tensors(latest(run).path / "model")
    for step in (6, 7, 8):
        (newer,) = run.glob(f"checkpoints/step-*{step}")
        shutil.rmtree(newer)
    assert latest(run).manifest["step"] == 5
    run_stage(make_recipe(**keys), resume=True, quiet=True)
    got = load_tensors(latest(run).path / "model")
    assert all(torch.equal(want[name], got[name]) for name in want)
    keys["out"], keys["objective"] = str(tmp_path / "plain"), {"kind": "clm"}
    plain = run_stage(make_recipe(**keys), quiet=True)
    assert any(not torch.equal(want[name], t) for name, t in load_tensors(plain.checkpoint / "model").items()), "the noise reached the weights"


@pytest.mark.slow
def test_compiling_breaks_once_where_the_noise_begins():
    """The model and the loss are compiled, each as one graph; the noise reaches the weights all the same."""
    model, batch = tiny(), packed_batch()
    clean, noisy_one = LM.clone(model), LM.clone(model)
    torch._dynamo.reset()
    for twin, alpha in ((clean, None), (noisy_one, ALPHA)):
        torch._dynamo.utils.counters.clear()
        fit(twin, CLMConfig(neftune=alpha).build(), Repeat(batch), build_optim(twin, AdamWConfig(lr=1e-3)), FitConfig(steps=3, compile=True, micro_rows=2))
        assert sum(torch._dynamo.utils.counters["graph_break"].values()) == (alpha is not None)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    assert any(not torch.equal(a, b) for a, b in zip(clean.parameters(), noisy_one.parameters(), strict=True))
    assert all(torch.isfinite(p).all() for p in noisy_one.parameters()) and not noisy_one.embed._forward_hooks


# Planted bugs: each must be caught by a check above.


def the_padded_row_counts(patch):
    right = neftune.magnitude
    patch.setattr(neftune, "magnitude", lambda seq, width, alpha: right(Seq.rows(*seq.pos.shape), width, alpha) * (1 if seq.seg is None else (seq.seg > 0)[..., None]))


def the_row_not_the_document(patch):
    right = neftune.magnitude
    whole = lambda seq: Seq.of_segments((seq.seg > 0).int()) if seq.seg is not None else seq
    patch.setattr(neftune, "magnitude", lambda seq, width, alpha: right(whole(seq), width, alpha))


def no_square_root(patch):
    right = neftune.magnitude
    patch.setattr(neftune, "magnitude", lambda seq, width, alpha: right(seq, width, alpha) ** 2 / alpha)


def width_forgotten(patch):
    right = neftune.magnitude
    patch.setattr(neftune, "magnitude", lambda seq, width, alpha: right(seq, 1, alpha))


def normal_not_uniform(patch):
    patch.setattr(neftune, "noise", lambda x, seq, alpha: torch.randn(x.shape) * neftune.magnitude(seq, x.shape[-1], alpha))


def never_negative(patch):
    patch.setattr(neftune, "noise", lambda x, seq, alpha: torch.rand(x.shape) * neftune.magnitude(seq, x.shape[-1], alpha))


def one_draw_for_all_values(patch):
    patch.setattr(neftune, "noise", lambda x, seq, alpha: (torch.rand(*x.shape[:2], 1) * 2 - 1) * neftune.magnitude(seq, x.shape[-1], alpha) + 0 * x)


def noise_on_padding(patch):
    right = neftune.noise
    patch.setattr(neftune, "noise", lambda x, seq, alpha: right(x, Seq(seq.pos, None if seq.seg is None else seq.seg.clamp(min=1)), alpha))


def noise_in_evaluation(patch):
    right = clm.noisy

    def wrong(model, seq, alpha):
        model.train()
        return right(model, seq, alpha)

    patch.setattr(clm, "noisy", wrong)


def in_front_of_the_scale(patch):
    right = neftune.noise
    patch.setattr(neftune, "noise", lambda x, seq, alpha: right(x, seq, ALPHA))


BUGS = [the_padded_row_counts, the_row_not_the_document, no_square_root, width_forgotten, normal_not_uniform, never_negative,
        one_draw_for_all_values, noise_on_padding, noise_in_evaluation, in_front_of_the_scale]  # fmt: skip


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_planted_bugs_are_caught(bug, monkeypatch):
    bug(monkeypatch)
    caught = 0
    for check in CHECKS:
        torch.manual_seed(0)
        try:
            check()
        except AssertionError:
            caught += 1
    assert caught
