"""Kill -9 at a random moment of each stage, resume, and get the weights of the uninterrupted run, bit for bit."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time

import pytest
import torch

from tests.contract.stages import ENV, recipe, write_data, write_recipe
from zero2llm.core.files import load_tensors
from zero2llm.lab.recipe import make_recipe
from zero2llm.lab.stage import run_stage
from zero2llm.train.checkpoint import Checkpoint, candidates, latest
from zero2llm.train.telemetry import read_metrics

STAGES = ("pretrain", "sft", "dpo")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """All stages, run through without interruption."""
    root = tmp_path_factory.mktemp("whole")
    write_data(root / "data")
    for stage in STAGES:
        run_stage(make_recipe(**recipe(root, stage)), quiet=True)
    return root


def weights(run):
    return load_tensors(latest(run).path / "model")


def command(path, *flags):
    return [sys.executable, "-m", "zero2llm.cli", "train", str(path), "--quiet", *flags]


@pytest.mark.parametrize("stage", STAGES)
def test_kill_and_resume_is_bit_identical(finished, tmp_path, stage):
    write_data(tmp_path / "data")
    for before in STAGES[: STAGES.index(stage)]:
        shutil.copytree(finished / before, tmp_path / before)
    path, run = write_recipe(tmp_path, stage), tmp_path / stage
    stop_after = random.Random(time.time_ns()).randint(1, 6)
    process = subprocess.Popen(command(path), env=ENV)
    deadline = time.monotonic() + 120
    while len(read_metrics(run / "metrics.jsonl", "train")) < stop_after and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    done = len(read_metrics(run / "metrics.jsonl", "train"))
    resumed = subprocess.run(command(path, "--resume"), env=ENV, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    want, got = weights(finished / stage), weights(run)
    assert all(torch.equal(want[name], got[name]) for name in want), f"killed after {done} steps"
    steps = [record["step"] for record in read_metrics(run / "metrics.jsonl", "train")]
    assert steps == list(range(1, 9)), "every step is logged exactly once"


def test_resume_of_a_finished_run_changes_nothing(finished):
    before = weights(finished / "sft")
    result = run_stage(make_recipe(**recipe(finished, "sft")), resume=True, quiet=True)
    assert all(torch.equal(before[k], v) for k, v in load_tensors(result.checkpoint / "model").items())


def test_a_flipped_byte_is_noticed_and_the_previous_checkpoint_used(finished, tmp_path, capsys):
    run = tmp_path / "pretrain"
    shutil.copytree(finished / "pretrain", run)
    newest = candidates(run)[-1]
    file = newest / "model" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="sha256 differs"):
        Checkpoint.open(newest)
    assert latest(run).path == candidates(run)[-2]
    assert "trying the one before" in " ".join(capsys.readouterr().err.split())


def test_another_format_version_is_refused(finished, tmp_path):
    run = tmp_path / "pretrain"
    shutil.copytree(finished / "pretrain", run)
    manifest = candidates(run)[-1] / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 99}))
    with pytest.raises(ValueError, match="format 99, this version of zero2llm reads 1"):
        Checkpoint.open(manifest.parent)


def test_resume_refuses_a_changed_recipe(finished):
    changed = make_recipe(**recipe(finished, "pretrain", seed=2))
    with pytest.raises(ValueError, match="'seed' was 1 and is now 2"):
        run_stage(changed, resume=True, quiet=True)


def test_a_full_folder_is_refused_without_a_flag(finished):
    with pytest.raises(ValueError, match="not empty; pass --resume"):
        run_stage(make_recipe(**recipe(finished, "pretrain")), quiet=True)


def test_keep_and_parent(finished):
    assert len(candidates(finished / "pretrain")) <= 4  # 3 newest and the best
    parent = latest(finished / "sft").manifest["parent"]
    assert parent == str(latest(finished / "pretrain").path)


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_are_one_process(finished, tmp_path, stage):
    """torchrun with two gloo ranks makes the steps of one process, in every stage."""
    write_data(tmp_path / "data")
    for before in STAGES[: STAGES.index(stage)]:
        shutil.copytree(finished / before, tmp_path / before)
    if stage == "pretrain":  # the same tokenizer: training it again is not what is tested
        shutil.copytree(finished / "pretrain" / "tokenizer", tmp_path / "tokenizer")
    changes = {"tokenizer": {"path": str(tmp_path / "tokenizer")}} if stage == "pretrain" else {}
    path = write_recipe(tmp_path, stage, **changes)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port", str(29500 + os.getpid() % 500)]
    done = subprocess.run([*torchrun, *command(path)[1:]], env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    want, got = weights(finished / stage), weights(tmp_path / stage)
    for name in want:
        torch.testing.assert_close(got[name], want[name], atol=2e-5, rtol=0)
    ours, theirs = (read_metrics(r / stage / "metrics.jsonl", "train") for r in (tmp_path, finished))
    assert [r["tokens"] for r in ours] == [r["tokens"] for r in theirs], "two processes really shared the batch"
    assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"], abs=1e-5)
