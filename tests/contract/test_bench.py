"""The benchmark scripts run: tiny shapes, no peers, seconds. Their numbers are not looked at."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"


def run(script: str, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, BENCH / script, "--smoke", *options], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_train_step_writes_every_turn_and_names_what_cannot_run(tmp_path):
    table = run("train_step.py", "--candidates", "ours+mb2,unheard_of", "--json", str(tmp_path / "out.json"))
    found = json.loads((tmp_path / "out.json").read_text())
    assert "| ours+mb2 |" in table and "| unheard_of | failed: " in table
    assert len(found["results"]["ours+mb2"]["turns"]) == 2 and found["results"]["ours+mb2"]["rss_mb"] > 0
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


def test_mixers_state_what_they_cost():
    table = run("mixers.py", "--mixers", "retnet", "--d", "32", "--heads", "2")
    assert "| retnet |" in table and "predicted" not in table


def test_data_dedup():
    pytest.importorskip("datasketch")
    assert "failed" not in run("data.py", "--rounds", "2")


def test_loader():
    assert "| rows, StoredRows |" in run("loader.py")


def test_reading_large_files():
    assert "jsonl" in run("read_large.py")


def test_tokenizing():
    assert "failed" not in run("tokenizing.py", "--what", "encode", "--candidates", "ours")


@pytest.mark.slow
def test_adapters_and_nf4():
    assert "failed" not in run("adapters.py") and "failed" not in run("nf4.py", "--candidates", "full+mb1,nf4+mb1")


@pytest.mark.slow
def test_alignment():
    table = run("alignment.py", "--candidates", "ours_dpo,ours_dpo_stored,ours_grpo_kl+mb4", "--threads", "1")
    assert "failed" not in table and "| ours_grpo_kl+mb4 |" in table


@pytest.mark.slow
def test_alignment_beside_trl():
    pytest.importorskip("trl")
    assert "x that of trl_grpo" in run("alignment.py", "--kinds", "grpo", "--threads", "1")
