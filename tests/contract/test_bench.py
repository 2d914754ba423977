"""The benchmark scripts run: tiny shapes, no peers, seconds. Their numbers are not looked at."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"


def run(script: str, *options: str) -> str:
    done = subprocess.run([sys.executable, BENCH / script, "--smoke", *options], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_train_step_writes_every_turn(tmp_path):
    table = run("train_step.py", "--candidates", "ours+mb4,ours+mb2", "--json", str(tmp_path / "out.json"))
    found = json.loads((tmp_path / "out.json").read_text())
    assert "| ours+mb2 |" in table and "failed" not in table
    assert all(len(row["turns"]) == 2 and row["rss_mb"] > 0 for row in found["results"].values())
    assert set(found["machine"]) >= {"cpu", "cores", "simd", "ram_gib", "torch"} and "host" not in found["machine"]


@pytest.mark.slow
def test_decode():
    assert "failed" not in run("decode.py", "--candidates", "ours")


def test_linear_rows_forms_agree():
    assert "| 64 x 32 | 2 |" in run("linear_rows.py")


@pytest.mark.slow
def test_startup():
    assert "failed" not in run("startup.py")


@pytest.mark.slow
def test_time_to_loss_with_the_embedded_text(tmp_path):
    pytest.importorskip("transformers")
    assert "| 1 |" in run("time_to_loss.py", "--out", str(tmp_path))


def test_a_candidate_that_cannot_run_is_named_not_fatal():
    table = run("train_step.py", "--candidates", "ours+mb4,unheard_of")
    assert "| unheard_of | failed: " in table
