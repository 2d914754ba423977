"""Stages with `fit.compile`: the same steps as without, whatever shapes answers have."""

from __future__ import annotations

import pytest

import zero2llm
from tests.contract.stages import recipe
from tests.contract.test_distill_stage import root, student  # noqa: F401
from tests.contract.test_online_stage import rl
from zero2llm.train.telemetry import read_metrics

pytestmark = pytest.mark.slow
MADE = {
    "dpo": lambda at, out: recipe(at, "dpo", out=str(out)),
    "grpo": lambda at, out: rl(at, "grpo", out, eval={"every": 4}),
    "ppo": lambda at, out: rl(at, "ppo", out, eval={"every": 4}),
    **{name: lambda at, out, name=name: student(at, name, out) for name in ("distill", "hidden", "gkd", "minillm")},
}


@pytest.mark.parametrize("name", MADE)
def test_compiled_is_eager(root, tmp_path, name):  # noqa: F811
    if name in ("grpo", "ppo"):
        lines = [f'{{"prompt": "the sea {i % 3} {i}", "answer": "the"}}\n' for i in range(40)]
        (root / "data" / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")
    found = []
    for compiled in (False, True):
        made = MADE[name](root, tmp_path / f"run{compiled}")
        made["fit"] = {"steps": 3, "micro_rows": 4, "compile": compiled}
        zero2llm.run(zero2llm.make_recipe(**made), quiet=True)
        rows = read_metrics(tmp_path / f"run{compiled}" / "metrics.jsonl", "train")
        found.append([(row["loss"], row["grad_norm"]) for row in rows])
    for eager, compiled in zip(*found, strict=True):
        assert compiled == pytest.approx(eager, rel=1e-3, abs=1e-5)
