"""kill -9 exactly while a run samples, updates, saves: resumed, it is the run that was never touched, to the bit."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import zero2llm
from tests.contract.stages import recipe, write_data
from tests.contract.test_online_stage import rl
from tests.contract.test_resume import ENV
from zero2llm.core.files import load_tensors, read_json
from zero2llm.train.checkpoint import latest
from zero2llm.train.telemetry import read_metrics

CLOCK = {"time", "seconds", "tokens_per_s", "step_s", "rollout_s", "valid_seconds", "memory_mb"}
TWICE = {"rollout": {"prompts": 4, "samples": 4, "max_tokens": 6, "minibatches": 2, "epochs": 2}, "fit": {"steps": 8, "micro_rows": 8}}
RUNS = {  # two rollouts, each of four steps
    "grpo": {"objective": {"kind": "grpo", "kl": {"weight": 0.1}}},
    "ppo": {"objective": {"kind": "ppo", "reward_kl": {"target": 0.05, "gain": 0.5}}},
    "dapo": {
        "objective": {"kind": "dapo", "rounds": 4},
        "rollout": TWICE["rollout"] | {"prompts": 8, "samples": 2},
        "reward": [{"kind": "regex", "pattern": ".*e.*"}],
    },
    "online_dpo": {"objective": {"kind": "online_dpo"}},
    "trpo": {"objective": {"kind": "trpo"}},
    "rft": {"objective": {"kind": "rft"}, "reward": [{"kind": "regex", "pattern": ".+"}]},
}
QUICK = {
    "grpo": ["sampling", "update", "saving"],
    "ppo": ["sampling", "update", "saving"],
    "dapo": ["sampling again", "update", "saving"],
    "online_dpo": ["sampling", "update", "saving"],
}
SLOW = {
    "grpo": ["scoring", "renaming", "pruning", "logging"],
    "ppo": ["scoring", "logging"],
    "dapo": ["sampling", "scoring"],
    "trpo": ["sampling", "trial", "saving"],
    "rft": ["sampling", "update", "saving"],
}
STANDS = {"sampling": 4, "sampling again": 4, "scoring": 4, "update": 5, "saving": 4, "trial": 5, "renaming": 4, "pruning": 5, "logging": 4}  # newest checkpoint


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A tiny model that has seen a little text, and prompts."""
    root = tmp_path_factory.mktemp("kills")
    write_data(root / "data")
    zero2llm.run(zero2llm.make_recipe(**recipe(root, "pretrain") | {"fit": {"steps": 2, "micro_rows": 4}}), quiet=True)
    lines = [json.dumps({"prompt": f"the sea {'and the ship ' * (i % 3)}{i}", "answer": "the"}) for i in range(40)]
    (root / "data" / "prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def ended():
    """(recipe, moment, resume) -> how that run ended."""
    command = [sys.executable, "-m", "tests.contract.online_killer"]
    with subprocess.Popen(command, env=ENV, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def run(recipe, moment=None, resume=False):
            process.stdin.write(json.dumps([recipe, moment, resume]) + "\n")
            process.stdin.flush()
            return int(process.stdout.readline())

        yield run
        process.stdin.close()


def timeless(data):
    """Without what the clock says, however deep; ``note.rollout_s`` is carried by the rows of a rollout."""
    if isinstance(data, dict):
        return {key: timeless(value) for key, value in data.items() if key.rpartition(".")[2] not in CLOCK}
    return [timeless(value) for value in data] if isinstance(data, list) else data


def outcome(run):
    """All that a run leaves: weights, optimizer, random states, its place, its log."""
    end = latest(run)
    tensors = {
        f"{part} {name}": value
        for part, some in {"model": ("model",), "optim": ("train", "optim"), "rng": ("train", "rng")}.items()
        for name, value in load_tensors(end.path / some[0], *some[1:]).items()
    }
    place = timeless(read_json(end.path / "train" / "state.json"))
    return end.step, tensors, place, [timeless(row) for kind in ("train", "valid") for row in read_metrics(run / "metrics.jsonl", kind)]


def same(got, want):
    assert got[0] == want[0] == 8
    assert got[1].keys() == want[1].keys() and all(want[1][name].equal(value) for name, value in got[1].items()), "weights or states differ"
    assert got[2] == want[2], "the place in the data differs"
    assert [row["step"] for row in got[3]] == [row["step"] for row in want[3]]
    for a, b in zip(got[3], want[3], strict=True):
        assert a == b, "a metric differs"


SELDOM = {"save": {"every_s": 1e9, "keep": 9}}  # only at the end


def check(root, folder, ended, kind, moments, killed=None):
    """``killed`` : changes of the recipe that dies; it saves at every step unless they say otherwise."""
    made = lambda name, **changes: rl(root, kind, folder / name, **TWICE | RUNS[kind] | changes)
    assert ended(made("whole", **SELDOM)) == 0
    want = outcome(folder / "whole")
    for moment in moments:
        assert ended(made(moment, **killed or {}), moment) == -9, f"{moment} never came"
        found = latest(folder / moment)
        assert (found.step if found else 0) == (0 if killed else STANDS[moment]), moment
        assert ended(made(moment, **SELDOM), None, True) == 0
        same(outcome(folder / moment), want)
    return want


@pytest.mark.parametrize("kind", QUICK)
def test_killed_in_each_phase_and_resumed_to_the_bit(root, tmp_path, ended, kind):
    _, _, place, rows = check(root, tmp_path, ended, kind, QUICK[kind])
    steps = [row for row in rows if row["kind"] == "train"]
    assert place["data"]["number"] == 2 and not any(row["skipped"] for row in steps), "two rollouts, each used four times"
    if kind == "dapo":
        assert steps[4]["resampled"] >= 1, "the kill fell into the second sampling of a rollout"
    if kind == "ppo":
        assert place["data"]["shape"]["kl_beta"] != 0.05, "the adaptive weight has moved"


@pytest.mark.slow
@pytest.mark.parametrize("kind", SLOW)
def test_killed_anywhere_else_and_resumed_to_the_bit(root, tmp_path, ended, kind):
    check(root, tmp_path, ended, kind, SLOW[kind])


@pytest.mark.slow
def test_killed_before_anything_was_saved(root, tmp_path, ended):
    """All of it is made again, log included."""
    check(root, tmp_path, ended, "grpo", ["sampling", "update"], killed=SELDOM)
