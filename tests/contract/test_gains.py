"""The measured recipes stand in the package and say how to run them; the bench's table and pictures, without training anything."""

import argparse
import json
import sys
from pathlib import Path

import pytest

from zero2llm.lab.recipe import BUILT_IN, load_recipe

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import gains

ONLINE = list(gains.GROUPS["online"].needs)


def test_every_online_method_has_a_recipe_of_at_most_25_lines():
    from zero2llm.train.rl.methods import GradientConfig, OnlineDPOConfig, RFTConfig

    kinds = {kind.__dataclass_fields__["kind"].default for kind in (*GradientConfig.__args__, OnlineDPOConfig, RFTConfig)}
    assert kinds == set(ONLINE)
    for name in ONLINE:
        text = (BUILT_IN / f"{name}.yaml").read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 25 and f"#   zero2llm train {name}\n" in text, name


@pytest.mark.parametrize("group", gains.GROUPS)
def test_the_changes_of_a_group_fit_its_recipes(group):
    for name in gains.GROUPS[group].needs:
        assert load_recipe(name, list(gains.GROUPS[group].changes)).objective.kind == name


def test_online_recipes_spend_the_same():
    """So that their curves can be compared: answers sampled = prompts x samples x rollouts."""
    spent = set()
    for name in ONLINE:
        recipe = load_recipe(name)
        cfg = recipe.rollout
        spent.add(cfg.prompts * cfg.samples * recipe.fit.steps // (cfg.minibatches * cfg.epochs))
    assert len(spent) == 1, spent


def records(recipe):
    return [{"recipe": recipe, "seed": seed, "curve": [[0, 0.1], [4, 0.5 + seed / 100], [8, 0.9]], "kept": 0.9, "answers": 32, "cpu_s": 12.4, "peak_mb": 700.2}
            for seed in (1, 2, 3)]  # fmt: skip


def test_table_and_picture():
    runs = {name: records(name) for name in ("grpo", "ppo")}
    text = gains.table("online", runs, 0.95)
    assert "| `grpo` |" in text and "| 10.0 | 90.0 (90.0 to 90.0) | +80.0 | 90.0 (90.0 to 90.0) | 12 | 700 |" in text and "95.0 before" in text
    drawn = gains.picture(runs, "exact answers (%)", label="a label")
    assert all(word in str(drawn) for word in ("grpo", "ppo", "exact answers", "answers sampled", "3 seeds"))


def test_what_is_finished_is_not_run_again(tmp_path):
    run = gains.Run("online", "grpo", 1, tmp_path / "online" / "grpo-1")
    run.record.parent.mkdir()
    run.record.write_text(json.dumps({"done": True}))
    assert gains.finish(run, argparse.Namespace(out=tmp_path), judge=None) == {"done": True}
