"""The quickstart's whole path, fast, killed once on the way; and the tools that look at its result."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time

import pytest

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def zero2llm(*args):
    return [sys.executable, "-m", "zero2llm.cli", *map(str, args)]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A finished fast run that was killed at a random part and continued."""
    out = tmp_path_factory.mktemp("quick") / "q"
    command = zero2llm("quickstart", "--fast-dev-run", "--out", out)
    victim = random.choice(["data", "pretrain", "judge-pretrain", "sft", "judge-sft", "dpo"])
    process = subprocess.Popen(command, env=ENV, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not (out / "parts" / f"{victim}.json").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    before = {p.name: p.stat().st_mtime_ns for p in (out / "parts").iterdir() if p.suffix == ".json"}
    done = subprocess.run(command, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    after = {p.name: p.stat().st_mtime_ns for p in (out / "parts").iterdir()}
    assert all(after[name] == t for name, t in before.items()), "a finished part was done again"
    return out


def test_every_part_left_its_result(out):
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert {c["stage"] for c in results["checks"]} == {"pretrain", "sft", "dpo"}
    assert [s["name"] for s in results["stages"]][0] == "tokenizer" and len(results["samples"]) > 6
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<svg" in page and "http://" not in page.replace("http://www.w3.org", "") and "<script src" not in page


def test_the_export_opens_in_transformers(out):
    from zero2llm.interop.verify import verify_hf
    from zero2llm.lab.talk import load_engine

    engine = load_engine(out, "cpu")
    found = verify_hf(out / "export", engine.model, engine.tokenizer, ["It was a dark night", "春风又绿江南岸"], [[{"role": "user", "content": "你好"}]])
    assert found.logit_diff <= 1e-4 and found.ids_equal and found.chat_equal


def test_chat_and_generate_from_the_shell(out):
    talk = subprocess.run(zero2llm("chat", out, "--max-tokens", "5"), input="hello\n/new\n你好\n/quit\n", env=ENV, capture_output=True, text=True)
    assert talk.returncode == 0 and talk.stdout.count("bot> ") == 2
    two = subprocess.run(zero2llm("generate", out / "pretrain", "--prompt", "It was", "--prompt", "春", "--max-tokens", "4", "--seed", "1"), env=ENV, capture_output=True, text=True)
    assert two.returncode == 0 and "It was" in two.stdout and "春" in two.stdout


def test_inspect_batch_shows_the_mask(out, tmp_path):
    page = tmp_path / "batch.html"
    done = subprocess.run(zero2llm("inspect-batch", out / "sft" / "recipe.json", "--html", page), env=ENV, capture_output=True, text=True)
    assert done.returncode == 0 and "targets" in done.stdout, done.stderr
    assert "im_start" in page.read_text(encoding="utf-8")


def test_a_finished_run_answers_at_once_and_another_size_is_refused(out):
    again = subprocess.run(zero2llm("quickstart", "--fast-dev-run", "--out", out), env=ENV, capture_output=True, text=True)
    assert again.returncode == 0 and "report:" in again.stdout
    other = subprocess.run(zero2llm("quickstart", "--out", out), env=ENV, capture_output=True, text=True)
    assert other.returncode == 2 and "holds a fast run" in other.stderr
