"""Options of the model that reach training through a recipe: muP's learning rates, predictions several tokens ahead."""

from __future__ import annotations

import pytest
import torch

import zero2llm
from tests.contract.stages import recipe, write_data
from zero2llm.lab import online
from zero2llm.lab.recipe import make_recipe
from zero2llm.optim.build import build_optim
from zero2llm.train.checkpoint import Checkpoint, latest
from zero2llm.train.telemetry import MEANING, read_metrics


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("options")
    write_data(root / "data")
    return root


@pytest.fixture(scope="module")
def ahead(root):
    """A run with two depths."""
    keys = recipe(root, "pretrain")
    keys["model"] |= {"mtp": {"depth": 2}}
    keys["objective"] |= {"mtp_weight": 0.3}
    return zero2llm.run(make_recipe(**keys), quiet=True).run


def test_depths_train_are_logged_and_saved(ahead):
    metrics = read_metrics(ahead / "metrics.jsonl", kind="train")
    assert all(r["mtp"] > 0 for r in metrics) and metrics[-1]["mtp"] < metrics[0]["mtp"] and "mtp" in MEANING
    valid = read_metrics(ahead / "metrics.jsonl", kind="valid")
    assert valid[-1]["valid_mtp"] > 0 and "valid_ppl" in valid[-1]
    names = latest(ahead).load_model().state_dict()
    assert any(n.startswith("mtp.depths.1.") for n in names)


def test_a_later_stage_leaves_idle_depths_as_they_are(root, ahead):
    before = latest(ahead).load_model().state_dict()
    later = zero2llm.run(make_recipe(**recipe(root, "sft", init=str(ahead))), quiet=True).run
    after = latest(later).load_model().state_dict()
    assert all(torch.equal(before[n], after[n]) for n in before if n.startswith("mtp."))
    assert not torch.equal(before["embed.weight"], after["embed.weight"])


def test_fine_tuning_may_train_the_depths_too(root, ahead):
    keys = recipe(root, "sft", init=str(ahead), out=str(root / "sft_ahead"))
    keys["objective"] |= {"mtp_weight": 0.1}
    run = zero2llm.run(make_recipe(**keys), quiet=True).run
    before, after = latest(ahead).load_model(), latest(run).load_model()
    assert not torch.equal(before.mtp.depths[0].join_proj.weight, after.mtp.depths[0].join_proj.weight)


def test_a_checkpoint_without_depths_cannot_train_them(root):
    plain = zero2llm.run(make_recipe(**recipe(root, "pretrain", out=str(root / "plain"))), quiet=True).run
    keys = recipe(root, "sft", init=str(plain), out=str(root / "refused"))
    keys["objective"] |= {"mtp_weight": 0.1}
    with pytest.raises(ValueError, match="was trained without `mtp`"):
        zero2llm.run(make_recipe(**keys), quiet=True)


def test_mup_reaches_the_optimizer_of_a_stage(root, monkeypatch):
    keys = recipe(root, "pretrain", out=str(root / "mup"), optim={"kind": "adamw", "lr": 0.01})
    keys["model"] |= {"init": {"kind": "mup", "base_width": 4, "base_head_dim": 8}}
    keys["fit"] |= {"steps": 2}
    made = []

    def seen(*args):
        made.append(build_optim(*args))
        return made[-1]

    monkeypatch.setattr(online, "build_optim", seen)
    run = zero2llm.run(make_recipe(**keys), quiet=True).run
    assert [g["peak_lr"] for g in made[0].groups] == [0.0025, 0.01, 0.01]
    model = Checkpoint.open(run).load_model()
    assert model.width_ratio == 0.25 and model.cfg.init.kind == "mup"


@pytest.mark.parametrize(("model", "more", "says"), [
    ({"blocks": {"qwen3": {"mixer": {"window": 0}}}}, {}, "blocks.qwen3: window = 0"),
    ({"blocks": {"qwen3": {"mixer": {"n_heads": 3, "n_kv_heads": 2}}}}, {}, "n_heads = 3 must be a multiple"),
    ({"blocks": {"qwen3": {"ffn": {"kind": "moe", "n_experts": 2, "top_k": 3, "hidden": 8}}}}, {}, "top_k = 3"),
    ({"blocks": {"qwen3": {"ffn": {"kind": "expert_choice", "n_experts": 2, "hidden": 8}}}}, {}, "cannot generate"),
    ({"score_head": True}, {}, "objective reward adds it"),
    ({"logit_softcap": 0}, {}, "logit_softcap = 0"),
    ({}, {"optim": {"kind": "adamw", "eps": -1}}, "eps = -1"),
])  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_is_read(root, model, more, says):
    keys = recipe(root, "pretrain")
    given = {"preset": "qwen3-nano", "vocab_size": 300, "d_model": 16, "max_len": 64, "layers": {"repeat": 2}}
    with pytest.raises(ValueError, match=says):
        make_recipe(**(keys | {"model": given | model} | more))


def test_dpo_trains_what_layers_report_as_losses():
    from tests.contract.test_fit import ragged
    from zero2llm.core.batch import Batch
    from zero2llm.core.config import parse, to_dict
    from zero2llm.lab.variants import swapped
    from zero2llm.model.lm import LM
    from zero2llm.model.presets import llama
    from zero2llm.model.spec import ModelConfig
    from zero2llm.train.objectives.dpo import DPOConfig
    from zero2llm.train.objectives.reference import Frozen

    base = to_dict(llama(31, 32, 1, 2, 2, 48, 64, tied=True))
    model = LM(parse(ModelConfig, swapped(swapped(base, "mixer", "dsa"), "ffn", "moe")))
    batch = ragged()
    loss = DPOConfig().build(Frozen(LM.clone(model)))(model, Batch(batch.tokens, batch.labels, batch.seq, group=2))
    loss.total.backward()
    indexer = [p.grad for n, p in model.named_parameters() if "index" in n]
    assert indexer and all(g is not None and g.abs().sum() > 0 for g in indexer)


@pytest.mark.slow
def test_compiling_holds_with_recomputation():
    from tests.contract.test_fit import Repeat, ragged, tiny
    from zero2llm.optim.adamw import AdamWConfig
    from zero2llm.train.fit import FitConfig, fit
    from zero2llm.train.objectives.clm import CLM

    batch, model = ragged(), tiny()
    twin = zero2llm.LM.clone(model)
    fit(model, CLM(), Repeat(batch), build_optim(model, AdamWConfig(lr=1e-3)), FitConfig(steps=3, micro_rows=6))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    both = FitConfig(steps=3, compile=True, recompute=True, micro_rows=6)
    fit(twin, CLM(), Repeat(batch), build_optim(twin, AdamWConfig(lr=1e-3)), both)
    assert not torch._dynamo.utils.counters["graph_break"], "a broken graph runs uncompiled"
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
