"""The SmolLM2 recipes of alignment: the commands in their headers run as printed, on a tiny model in its place."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

import zero2llm
from tests.contract.stages import recipe, write_data
from zero2llm.cli import app
from zero2llm.lab.recipe import BUILT_IN
from zero2llm.train.checkpoint import Checkpoint, latest
from zero2llm.train.telemetry import read_metrics

TINY = ("seq_len=512", "fit.steps=2", "eval.every=2", "device=cpu")
SMALLER = {
    "smollm2-dpo": (*TINY, "batch_tokens=2048"),
    "smollm2-grpo": (*TINY, "rollout.prompts=2", "rollout.samples=4", "rollout.max_tokens=4", "data.valid_rows=4"),
}
TARGET = {"smollm2-dpo": "valid_win_rate", "smollm2-grpo": "valid_reward"}


def commands(name: str) -> list[list[str]]:
    """The words of every command in a recipe's header, without what stands in brackets or after `then:` behind it."""
    lines = (BUILT_IN / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    found = [line.removeprefix("#   zero2llm ") for line in lines if line.startswith("#   zero2llm ")]
    return [shlex.split(line.split("    ")[0]) for line in found]


def run(words: list[str]) -> None:
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, (words, done.output, done.exception)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A model of 16 channels in place of the imported one, with room for prompts in bytes."""
    root = tmp_path_factory.mktemp("smollm2")
    write_data(root / "data")
    made = recipe(root, "pretrain") | {"fit": {"steps": 2, "micro_rows": 4}}
    made["model"] |= {"max_len": 512}
    zero2llm.run(zero2llm.make_recipe(**made), quiet=True)
    return latest(root / "pretrain").path


@pytest.mark.parametrize("name", SMALLER)
def test_the_printed_commands_run(tiny, tmp_path, monkeypatch, name):
    bring, tasks, train, merge = commands(name)
    assert [bring[0], tasks[:2], train, merge[0]] == ["import", ["data", "tasks"], ["train", name], "merge"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    Path(bring[-1]).symlink_to(tiny)
    run(tasks)
    run([*train, *SMALLER[name]])
    rows = read_metrics(tmp_path / "runs" / name / "metrics.jsonl", "valid")
    assert [row["step"] for row in rows] == [0, 2] and all(0 <= row[TARGET[name]] <= 1 for row in rows)
    run(merge)
    assert Checkpoint.open(tmp_path / "models" / "mine").adapter() is None
