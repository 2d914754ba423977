"""Two gloo ranks make the gradients of one process in reinforcement learning, step by step, where ranks have something to get wrong."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from tests.contract.online_ranks import RUNS, STEPS
from tests.contract.test_resume import ENV
from zero2llm.core.files import load_tensors

CLOCK = ("tokens_per_s", "step_s", "rollout_s")
SHOWS = {  # what makes the comparison worth anything
    "ppo": lambda rows: 0 < rows[0]["failed"] < 1 and 0 < rows[0]["truncated"] < 1 and rows[0]["value_loss"] > 0,
    "dapo": lambda rows: rows[0]["resampled"] >= 1 and rows[0]["flat"] >= 0.5 and 1 < rows[0]["length"] < 5,
    "trpo": lambda rows: rows[0]["step_scale"] > 0 and 1 < rows[0]["length"] < 5,
    "bapo": lambda rows: 0 < rows[0]["failed"] < 1 and rows[0]["bound_high"] >= 1.2,
    "reinforce_pp": lambda rows: rows[-1]["ratio"] != 1,
    "online_dpo": lambda rows: 0 < rows[0]["tied"] < 1,
    "rft": lambda rows: 0 < rows[0]["kept"] < 1,
}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    import socket

    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.contract.online_ranks", str(folder), str(port)]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("kind", RUNS)
def test_two_ranks_have_the_gradients_of_one(out, kind):
    one, two = (load_tensors(out, f"{kind}-{n}") for n in (1, 2))
    rows = [json.loads((out / f"{kind}-{n}.json").read_text("utf-8")) for n in (1, 2)]
    steps = 1 if kind == "trpo" else STEPS
    assert SHOWS[kind](rows[0]) and len(rows[0]) == len(rows[1]) == steps
    grads = [name for name in one if name.startswith("grad")]
    assert len(grads) == steps and one.keys() == two.keys()
    for name in sorted(grads):  # the first to rounding; later ones are of weights that differ by what Adam makes of that
        largest, close = float(one[name].abs().max()), 1e-5 if name == "grad 0" else 2e-3
        assert largest > 0
        torch.testing.assert_close(two[name], one[name], atol=close * largest, rtol=0, msg=lambda m, name=name: f"{kind} {name}: {m}")
    for a, b in zip(*rows, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - set(CLOCK):
            assert a[name] == pytest.approx(b[name], rel=2e-3, abs=2e-5), (kind, name)


@pytest.mark.parametrize("kind", RUNS)
def test_what_a_rollout_says_of_itself_is_the_same_to_the_bit(out, kind):
    """Sampled apart and shared: rewards, lengths, and how often they sampled."""
    one, two = (json.loads((out / f"{kind}-{n}.json").read_text("utf-8")) for n in (1, 2))
    for name in ("reward", "length", "failed", "flat", "truncated", "resampled"):
        assert one[0][name] == pytest.approx(two[0][name], rel=1e-6), name
