"""A data recipe end to end: the same bytes whoever does the work, nothing lost unseen, nothing done twice after a crash."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest

from zero2llm.core.config import parse
from zero2llm.data.pipeline import engines
from zero2llm.data.pipeline.recipe import DataRecipe, load_data_recipe, segments
from zero2llm.data.pipeline.run import run, run_share
from zero2llm.data.pipeline.task import run_task
from zero2llm.data.sources import documents


@cache
def texts(name: str) -> list[str]:
    return [text for text in documents([f"embedded:{name}"]) if 300 < len(text) < 3000]


def english(i: int) -> str:
    return texts("en_moby_dick")[i % 200]


def chinese(i: int) -> str:
    return texts("zh_classical_prose")[i]


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    rows = [{"text": english(i), "n": i} for i in range(60)] + [{"text": chinese(i)} for i in range(40)]
    rows += [{"text": english(3)}, {"text": "too short"}, {"text": english(5) + " mail me: a.b@example.com"}]
    (folder / "a.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    with gzip.open(folder / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": english(100 + i)}) + "\n" for i in range(30))
    (folder / "c.txt").write_text(english(150), encoding="utf-8")
    return folder


STEPS = [
    {"kind": "normalise", "fix_mojibake": False}, {"kind": "gopher"}, {"kind": "pii"}, {"kind": "exact"},
    {"kind": "minhash"}, {"kind": "sample", "share": 0.9},
]  # fmt: skip


def recipe(corpus, out, **changes):
    base = {"out": str(out), "sources": [{"name": "all", "paths": [str(corpus)]}], "steps": STEPS, "workers": 1}
    return parse(DataRecipe, base | {"splits": {"valid": 0.1, "test": 0.1}} | changes)


def data(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(out.glob("*.jsonl*"))}


def test_segments_are_cut_at_corpus_steps(corpus, tmp_path):
    assert [(s.steps, s.after, s.before) for s in segments(recipe(corpus, tmp_path / "x"))] == [
        ((0, 1, 2), None, 3), ((), 3, 4), ((5,), 4, None),
    ]  # fmt: skip


def test_every_document_is_accounted_for(corpus, tmp_path):
    out = tmp_path / "out"
    funnel = run(recipe(corpus, out))
    assert funnel["sources"] == [{"name": "all", "documents": 134, "bytes": funnel["before"]["bytes"], "bad": 0, "noted": {}}]
    steps = {s["name"]: s for s in funnel["steps"]}
    n = 134
    for step in funnel["steps"]:
        lost = sum(loss["documents"] for loss in step["removed"].values())
        assert step["in"]["documents"] == n and step["out"]["documents"] == n - lost
        n -= lost
        for loss in step["removed"].values():
            assert 0 < len(loss["examples"]) <= min(10, loss["documents"])
    assert steps["exact"]["in"]["documents"] - steps["exact"]["out"]["documents"] == 1
    assert steps["minhash"]["removed"]["near-duplicate (MinHash)"]["documents"] == 1 and n > 100
    assert steps["exact"]["groups"]["sizes"] == {"2": 1} and len(steps["exact"]["groups"]["largest"][0]["texts"]) == 2
    assert "too few words" in steps["gopher"]["removed"] and sum(steps["pii"]["notes"].values()) == 1
    assert steps["gopher"]["removed"]["too few words"]["examples"][0]["text"] == "too short"
    assert sum(s["documents"] for s in funnel["splits"].values()) == n == funnel["after"]["documents"]
    rows = [json.loads(line) for name, text in data(out).items() for line in text.decode().splitlines()]
    assert len(rows) == n and all(row["source"] == "all" and "line" in row["where"] for row in rows)
    assert any(row.get("n") == 7 for row in rows) and not any("@example" in row["text"] for row in rows)
    assert json.loads((out / "funnel.json").read_text()) == json.loads(json.dumps(funnel))
    assert not (tmp_path / "out.work").exists()


def test_same_bytes_for_any_number_of_workers(corpus, tmp_path):
    run(recipe(corpus, tmp_path / "one"))
    run(recipe(corpus, tmp_path / "two", workers=2))
    assert data(tmp_path / "one") == data(tmp_path / "two")
    run(recipe(corpus, tmp_path / "seed", seed=2))
    assert data(tmp_path / "one") != data(tmp_path / "seed")


def test_same_bytes_on_datatrove(corpus, tmp_path):
    pytest.importorskip("datatrove")
    run(recipe(corpus, tmp_path / "one"))
    run(recipe(corpus, tmp_path / "two", engine="datatrove"))
    assert data(tmp_path / "one") == data(tmp_path / "two")


def test_jobs_on_several_machines(corpus, tmp_path):
    run(recipe(corpus, tmp_path / "one"))
    cfg = recipe(corpus, tmp_path / "two")
    shares = [run_share(cfg, rank, 2) for rank in (1, 0)]
    assert sorted(n for _, n in shares) == [1, 2] and {segment for segment, _ in shares} == {0}
    run(cfg)
    assert data(tmp_path / "one") == data(tmp_path / "two")
    with pytest.raises(ValueError, match="rank 2"):
        run_share(cfg, 2, 2)


@pytest.mark.parametrize("survive", [1, 4, 8])
def test_a_crash_costs_no_finished_part(corpus, tmp_path, monkeypatch, survive):
    run(recipe(corpus, tmp_path / "one"))
    done = []

    def dying(task):
        if len(done) == survive:
            raise KeyboardInterrupt
        done.append(task.stem)
        return run_task(task)

    monkeypatch.setattr(engines, "run_task", dying)
    with pytest.raises(KeyboardInterrupt):
        run(recipe(corpus, tmp_path / "two"))
    assert not (tmp_path / "two").exists()
    before = {stem: stem.with_suffix(".jsonl").stat().st_mtime_ns for stem in done}
    monkeypatch.setattr(engines, "run_task", run_task)
    run(recipe(corpus, tmp_path / "two", keep_work=True))
    assert data(tmp_path / "one") == data(tmp_path / "two")
    assert {stem: stem.with_suffix(".jsonl").stat().st_mtime_ns for stem in done} == before


def test_kill_9(corpus, tmp_path):
    cfg = {"out": str(tmp_path / "two"), "sources": [{"name": "all", "paths": [str(corpus)]}], "steps": STEPS}
    cfg |= {"splits": {"valid": 0.1, "test": 0.1}, "workers": 2}
    (tmp_path / "r.yaml").write_text(json.dumps(cfg), encoding="utf-8")
    run(recipe(corpus, tmp_path / "one"))
    command = [sys.executable, "-m", "zero2llm.cli", "data", "run", str(tmp_path / "r.yaml"), "--quiet"]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    work = tmp_path / "two.work" / "00"
    while not list(work.glob("part-*.json")) and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert data(tmp_path / "one") == data(tmp_path / "two") and (tmp_path / "two" / "report.html").is_file()


def test_bad_records_end_the_run_or_are_listed(corpus, tmp_path):
    with open(corpus / "a.jsonl", "a", encoding="utf-8") as file:
        file.write('{"text": 5}\n{"other": "x"}\nnot json\n{"text": "\\ud800"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 104"):
        run(recipe(corpus, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    funnel = run(recipe(corpus, tmp_path / "out", skip_bad_records=True), overwrite=True)
    assert funnel["bad_total"] == 4 and funnel["sources"][0]["bad"] == 4
    assert [f"line {104 + i}" in text for i, text in enumerate(funnel["bad_records"])] == [True] * 4


def test_pieces_of_a_document_stay_in_one_split(corpus, tmp_path):
    steps = [{"kind": "chunk", "strategy": "fixed", "size": 100}]
    run(recipe(corpus, tmp_path / "out", steps=steps))
    split = {}
    for name, text in data(tmp_path / "out").items():
        for line in text.decode().splitlines():
            where = json.loads(line)["where"].partition("#")[0].strip()
            assert split.setdefault(where, name) == name
    assert len(set(split.values())) == 3


def test_shards_and_compression(corpus, tmp_path):
    from zero2llm.data.shards import TokenShards
    from zero2llm.tokenizers.tokenizer import Tokenizer

    tokenizer = Tokenizer.train([english(i) + chinese(i) for i in range(50)], 400)
    tokenizer.save(tmp_path / "tok")
    cfg = recipe(corpus, tmp_path / "out", tokenizer=str(tmp_path / "tok"), shards={"tokens_per_file": 2000}, compress="gz", workers=2)
    funnel = run(cfg)
    shards = TokenShards.open(tmp_path / "out" / "tokens" / "train", tokenizer.fingerprint(), verify=True)
    with gzip.open(tmp_path / "out" / "train-00000.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    assert len(shards) == len(texts) == funnel["splits"]["train"]["documents"] and shards.manifest["files"] > 2
    for i in (0, len(texts) - 1):
        a, b = shards.offsets[i : i + 2]
        assert shards.tokens[a:b].tolist() == [tokenizer.eos_id, *tokenizer.encode(texts[i])]
    assert funnel["splits"]["train"]["tokens"] == int(shards.offsets[-1])
    assert funnel["steps"][0]["in"]["tokens"] == funnel["before"]["tokens"] > 0
    shards.close()


def test_what_stands_there_is_not_overwritten(corpus, tmp_path, monkeypatch):
    cfg = recipe(corpus, tmp_path / "out")
    run(cfg)
    with pytest.raises(ValueError, match="already exists"):
        run(cfg)
    run(cfg, overwrite=True)
    monkeypatch.setattr(engines, "run_task", lambda task: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(recipe(corpus, tmp_path / "new"))
    with pytest.raises(ValueError, match="another recipe"):
        run(recipe(corpus, tmp_path / "new", seed=9))


@pytest.mark.parametrize(
    "change, message",
    [
        ("steps=[{kind: gophr}]", "gophr"), ("steps=[{kind: gopher, min_wrods: 3}]", "min_wrods"), ("sources=[]", "sources is empty"),
        ("splits={valid: 2}", "shares"), ("shards={}", "needs tokenizer"), ("wrokers=2", "workers"), ("engine=spark", "engine"),
    ],
)  # fmt: skip
def test_a_wrong_recipe_is_refused(tmp_path, change, message):
    (tmp_path / "r.yaml").write_text("out: x\nsources: [{paths: [embedded]}]\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_data_recipe(tmp_path / "r.yaml", [change])


def test_nothing_left_is_an_error(corpus, tmp_path):
    steps = [{"kind": "gopher", "languages": {k: {"min_words": 10**5} for k in ("en", "zh", "other")}}]
    with pytest.raises(ValueError, match="no document is left"):
        run(recipe(corpus, tmp_path / "out", steps=steps))
