"""A data recipe where it could lose, mix up or overwrite something: names that collide, files that are cut, two runs at once."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.contract.test_data_pipeline import STEPS, corpus, data, english, recipe  # noqa: F401
from zero2llm.core.config import parse
from zero2llm.data.document import Document, Removed
from zero2llm.data.pipeline import engines, task
from zero2llm.data.pipeline.recipe import DataRecipe, ShardsConfig, segments
from zero2llm.data.pipeline.run import plan, run, run_share
from zero2llm.data.pipeline.task import Tools, Work


def jsonl(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return path


def small(tmp_path, rows, **changes):
    source = {"name": "web", "paths": [str(jsonl(tmp_path / "src" / "a.jsonl", rows))]} | changes.pop("source", {})
    base = {"out": str(tmp_path / "out"), "sources": [source], "workers": 1, "splits": {}}
    return parse(DataRecipe, base | changes)


def rows_of(out, pattern="*.jsonl"):
    return [json.loads(line) for p in sorted(out.glob(pattern)) for line in p.read_text(encoding="utf-8").splitlines()]


def test_a_records_own_fields_do_not_replace_the_text(tmp_path):
    record = {"content": "正文 the body", "text": "a summary", "source": "wikipedia", "where": "p. 3", "document": 7, "id": 1}
    funnel = run(small(tmp_path, [record], source={"field": "content"}))
    [row] = rows_of(tmp_path / "out")
    assert row["text"] == "正文 the body" and row["source"] == "web" and row["where"].endswith("line 1")
    assert (row["original_text"], row["original_source"], row["original_where"]) == ("a summary", "wikipedia", "p. 3")
    assert row["document"] == 7 and row["id"] == 1
    assert sum(funnel["sources"][0]["noted"].values()) == 3


def test_a_field_called_document_does_not_part_equal_texts(tmp_path):
    rows = [{"text": f"text {i // 2}", "document": i} for i in range(200)]
    run(small(tmp_path, rows, splits={"valid": 0.5}))
    split = {}
    for path in (tmp_path / "out").glob("*.jsonl"):
        for row in rows_of(tmp_path / "out", path.name):
            assert split.setdefault(row["text"], path.name) == path.name
    assert len(set(split.values())) == 2


def test_splits_whose_names_begin_alike_stay_apart_in_shards(tmp_path):
    from zero2llm.tokenizers.tokenizer import Tokenizer

    Tokenizer.train([english(i) for i in range(5)], 300).save(tmp_path / "tok")
    rows = [{"text": f"text number {i}"} for i in range(60)]
    cfg = small(tmp_path, rows, splits={"valid": 0.3, "valid-0": 0.3}, tokenizer=str(tmp_path / "tok"), shards={},
                out=str(tmp_path / "out[1]"))  # fmt: skip
    splits = run(cfg)["splits"]
    for name, size in splits.items():
        manifest = json.loads((tmp_path / "out[1]" / "tokens" / name / "manifest.json").read_text())
        assert manifest["items"] == size["documents"] > 0


@pytest.mark.parametrize("name", ["a/b", "..", "", "a b"])
def test_a_split_needs_a_name_that_a_file_can_have(tmp_path, name):
    with pytest.raises(ValueError, match="splits"):
        small(tmp_path, [], splits={name: 0.1})


def test_shards_need_a_size():
    with pytest.raises(ValueError, match="tokens_per_file = 0"):
        ShardsConfig(tokens_per_file=0)


@pytest.mark.parametrize("out", ["in/clean", "in"])
def test_output_and_sources_are_apart(corpus, tmp_path, out):  # noqa: F811
    before = {p.name: p.read_bytes() for p in corpus.iterdir()}
    with pytest.raises(ValueError, match="lies in"):
        run(recipe(corpus, tmp_path / out), overwrite=True)
    assert {p.name: p.read_bytes() for p in corpus.iterdir()} == before


def test_a_glob_that_would_find_the_work(corpus, tmp_path):  # noqa: F811
    cfg = {"out": str(corpus / "clean"), "sources": [{"paths": [str(corpus / "**" / "*.jsonl")]}], "workers": 1}
    with pytest.raises(ValueError, match="lies in"):
        run(parse(DataRecipe, cfg))
    assert not (corpus / "clean.work").exists()


@pytest.mark.parametrize("change, message", [({"out": "."}, "out = ."), ({"sources": [{"name": "x"}]}, "source 1: paths")])
def test_a_recipe_without_a_place_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        run(parse(DataRecipe, {"out": "x", "sources": [{"paths": ["embedded"]}]} | change))


def test_a_source_inside_the_output_is_not_overwritten(tmp_path):
    raw = jsonl(tmp_path / "out" / "raw.jsonl", [{"text": "only copy"}])
    cfg = parse(DataRecipe, {"out": str(tmp_path / "out"), "sources": [{"paths": [str(raw)]}], "workers": 1})
    with pytest.raises(ValueError, match="lies in"):
        run(cfg, overwrite=True)
    assert raw.is_file()


def test_a_folder_that_is_not_ours_is_not_taken_for_work(corpus, tmp_path):  # noqa: F811
    mine = jsonl(tmp_path / "out.work" / "thesis.jsonl", [{"text": "mine"}])
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="other files"):
            run(recipe(corpus, tmp_path / "out"), overwrite)
    assert mine.is_file()


@pytest.mark.skipif(os.name != "posix", reason="locks of open files")
def test_two_runs_at_once(corpus, tmp_path, monkeypatch):  # noqa: F811
    cfg = recipe(corpus, tmp_path / "out")
    met = []

    def meanwhile(todo):
        if not met:
            for other in (lambda: run(cfg), lambda: run(cfg, True), lambda: run_share(cfg, 0, 1)):
                with pytest.raises(ValueError, match="another run"):
                    other()
            met.append(todo)
        return task.run_task(todo)

    monkeypatch.setattr(engines, "run_task", meanwhile)
    run(cfg)
    assert met and not (tmp_path / "out.work").exists()


def test_a_part_is_on_disk_before_its_account(corpus, tmp_path, monkeypatch):  # noqa: F811
    real, flushed, order = os.fsync, set(), []
    inode = lambda path: os.stat(path).st_ino
    monkeypatch.setattr(os, "fsync", lambda fd: (flushed.add(os.fstat(fd).st_ino), real(fd)))
    replace = os.replace

    def renamed(src, dst):
        order.append(os.path.basename(dst))
        assert os.path.isdir(src) or inode(src) in flushed, dst
        replace(src, dst)

    monkeypatch.setattr(os, "replace", renamed)
    run(recipe(corpus, tmp_path / "out", keep_work=True))
    for segment in ("00", "01"):
        for path in (tmp_path / "out.work" / segment).glob("part-*"):
            assert inode(path) in flushed, path
    names = [n for n in order if n.startswith("part-000000")][:4]
    assert names[-1] == "part-000000.json" and "part-000000.sign.npy" in names and "part-000000.jsonl" in names


def test_a_part_that_was_cut_is_noticed(corpus, tmp_path, monkeypatch):  # noqa: F811
    cfg = recipe(corpus, tmp_path / "out", steps=STEPS[:1])
    from zero2llm.data.pipeline import run as module

    def spoilt(recipe, folder, by_segment, *rest):
        part = by_segment[-1][0].stem.with_suffix(".jsonl")
        part.write_text("".join(part.read_text(encoding="utf-8").splitlines(True)[:-1]), encoding="utf-8")
        return write_output(recipe, folder, by_segment, *rest)

    write_output = module.write_output
    monkeypatch.setattr(module, "write_output", spoilt)
    with pytest.raises(ValueError, match="part-000000"):
        run(cfg)
    assert not (tmp_path / "out").exists()


def work(*steps):
    recipe = parse(DataRecipe, {"out": "x", "sources": [{"paths": ["embedded"]}], "steps": [{"kind": "sample", "share": 1.0}] * len(steps)})
    return Work(Tools(recipe, segments(recipe)[0], list(steps), None))


@pytest.mark.parametrize("result", [[], lambda d: Removed("no", "why"), lambda d: Document("  ", "w"), lambda d: [Document(" ", "w")]])
def test_what_goes_is_counted_as_it_came(result):
    def step(doc):
        doc.text = "changed"
        return result(doc) if callable(result) else list(result)

    here = work(step)
    assert list(here.chain(Document("as it came 你好", "w"), 0)) == []
    count = here.counts[0].to_dict()
    [(_, loss)] = count["removed"].items()
    assert loss["documents"] == 1 and loss["bytes"] == len("as it came 你好".encode())
    assert loss["examples"][0]["text"] == "as it came 你好"


def test_pieces_add_up(tmp_path):
    steps = [{"kind": "chunk", "strategy": "fixed", "size": 30}, {"kind": "exact"}]
    funnel = run(small(tmp_path, [{"text": "a" * 100}, {"text": "b" * 20}, {"text": "c" * 30 + " " * 40 + "d"}], steps=steps))
    chunk, exact = funnel["steps"]
    gone = sum(loss["documents"] for loss in chunk["removed"].values())
    assert gone == 1
    assert chunk["in"]["documents"] + chunk["notes"]["documents made by cutting"] == chunk["out"]["documents"] + gone
    assert exact["in"]["documents"] == chunk["out"]["documents"]


def test_reference_files_and_tokenizers_belong_to_the_work(tmp_path):
    from zero2llm.tokenizers.tokenizer import Tokenizer

    test = jsonl(tmp_path / "eval" / "t.jsonl", [{"text": " ".join(f"word{i}" for i in range(20))}])
    Tokenizer.train([english(i) for i in range(5)], 300).save(tmp_path / "tok")
    steps = [{"kind": "decontaminate", "against": [{"name": "t", "paths": [str(test)]}]}]
    cfg = small(tmp_path, [{"text": "some text"}], steps=steps, tokenizer=str(tmp_path / "tok"))
    (tmp_path / "out.work").mkdir()
    plan(cfg, tmp_path / "out.work")
    plan(cfg, tmp_path / "out.work")
    jsonl(test, [{"text": " ".join(f"other{i}" for i in range(30))}])
    with pytest.raises(ValueError, match="other files"):
        plan(cfg, tmp_path / "out.work")
    plan(cfg, tmp_path / "out.work", overwrite=True)
    Tokenizer.train([english(i) for i in range(5)], 290).save(tmp_path / "tok2")
    (tmp_path / "tok2" / "tokenizer.json").replace(tmp_path / "tok" / "tokenizer.json")
    with pytest.raises(ValueError, match="other files"):
        plan(cfg, tmp_path / "out.work")


def test_half_characters_beside_the_text_end_no_run(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.jsonl").write_text('{"text": "good", "title": "\\ud800"}\n{"text": "fine"}\n', encoding="utf-8")
    base = {"out": str(tmp_path / "out"), "sources": [{"paths": [str(tmp_path / "src")]}], "skip_bad_records": True, "workers": 1}
    funnel = run(parse(DataRecipe, base | {"splits": {}}))
    assert funnel["bad_total"] == 1 and [r["text"] for r in rows_of(tmp_path / "out")] == ["fine"]


def test_signatures_of_a_large_part_are_not_held(tmp_path):
    from zero2llm.data.pipeline.part import Signatures

    class Signer:
        def sign_many(self, docs):
            return [np.full((int(d.text) % 3, 2), int(d.text), dtype=np.uint32) for d in docs]

    with Signatures(tmp_path, Signer()) as made:
        for i in range(1000):
            made.add(Document(str(i), ""))
        made.save(tmp_path / "part")
        assert made.spool.tell() == 4 * 2 * sum(i % 3 for i in range(1000))
    rows, lengths = np.load(tmp_path / "part.sign.npy"), np.load(tmp_path / "part.rows.npy")
    assert lengths.tolist() == [i % 3 for i in range(1000)] and rows.dtype == np.uint32
    assert rows.tolist() == [[i, i] for i in range(1000) for _ in range(i % 3)]
    with Signatures(tmp_path, Signer()) as made:
        made.save(tmp_path / "none")
    assert np.load(tmp_path / "none.sign.npy").shape == (0, 0)


def test_jobs_on_several_machines_do_every_segment(corpus, tmp_path, monkeypatch):  # noqa: F811
    run(recipe(corpus, tmp_path / "one"))
    cfg = recipe(corpus, tmp_path / "two")
    done = [[run_share(cfg, rank, 2) for rank in (1, 0)] for _ in range(6)]
    assert [max(segment for segment, _ in turn) for turn in done] == [0, 0, 1, 1, 2, 2]
    assert [sum(n for _, n in turn) for turn in done] == [3, 0, 3, 0, 3, 0]
    calls = []
    monkeypatch.setattr(engines, "run_task", lambda t: calls.append(t.done.is_file()) or task.run_task(t))
    run(cfg)
    assert all(calls) and data(tmp_path / "one") == data(tmp_path / "two")


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="looks for processes in /proc")
def test_workers_leave_with_a_killed_run(corpus, tmp_path):  # noqa: F811
    cfg = {"out": str(tmp_path / "two"), "sources": [{"paths": [str(corpus)]}], "steps": STEPS, "workers": 2}
    (tmp_path / "r.yaml").write_text(json.dumps(cfg), encoding="utf-8")
    command = [sys.executable, "-m", "zero2llm.cli", "data", "run", str(tmp_path / "r.yaml"), "--quiet"]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    while not list((tmp_path / "two.work" / "00").glob("part-*.json")) and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    end = time.time() + 10
    while (left := members(process.pid)) and time.time() < end:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def members(session: int) -> list[int]:
    """Processes of a session that live."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(pid))
    return found


def test_a_worker_that_is_killed_says_so(tmp_path):
    from zero2llm.data.pipeline.workers import pool

    with pytest.raises(ValueError, match="fewer workers"), pool(1) as running:
        running.submit(os._exit, 9).result()


def test_zst_is_asked_for_before_the_work(corpus, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ValueError, match="zst needs"):
        run(recipe(corpus, tmp_path / "out", compress="zst"))
    assert not (tmp_path / "out.work" / "00").exists()


def test_the_verb_takes_what_the_message_names(corpus, tmp_path):  # noqa: F811
    from click.testing import CliRunner

    from zero2llm.cli_data import data as verbs

    with open(corpus / "a.jsonl", "a", encoding="utf-8") as file:
        file.write("not json\n")
    cfg = {"out": str(tmp_path / "out"), "sources": [{"paths": [str(corpus)]}], "workers": 1}
    (tmp_path / "r.yaml").write_text(json.dumps(cfg), encoding="utf-8")
    done = CliRunner().invoke(verbs, ["run", str(tmp_path / "r.yaml"), "--quiet", "--skip-bad-records"], catch_exceptions=False)
    assert done.exit_code == 0 and (tmp_path / "out" / "report.html").is_file()
    assert json.loads((tmp_path / "out" / "funnel.json").read_text(encoding="utf-8"))["bad_total"] == 1


def test_the_report_appears_with_the_data(corpus, tmp_path):  # noqa: F811
    def dies(funnel):
        assert funnel["splits"]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(recipe(corpus, tmp_path / "out"), page=dies)
    assert not (tmp_path / "out").exists()
    run(recipe(corpus, tmp_path / "out"), page=lambda funnel: "the page")
    assert (tmp_path / "out" / "report.html").read_text() == "the page"


def test_a_large_packed_file_is_encoded_in_pieces(tmp_path, monkeypatch):
    from zero2llm.data import encode
    from zero2llm.data.sources import BadRecords, Source
    from zero2llm.tokenizers.tokenizer import Tokenizer

    tokenizer = Tokenizer.train([english(i) for i in range(20)], 300)
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": english(i)}) + "\n" for i in range(80))
        file.write("bad\n")
    jsonl(tmp_path / "src" / "b.jsonl", [{"text": english(i)} for i in range(80, 100)])
    sources = [Source(paths=(str(tmp_path / "a.jsonl.gz"), str(tmp_path / "src")))]

    def everything(name, workers):
        bad = BadRecords(skip=True)
        shards = encode.encode_documents(sources, tmp_path / name, tokenizer, key="k", workers=workers, bad=bad, keep=(0.2, 1.0))
        out = shards.tokens[:].tolist(), shards.offsets.tolist(), bad.total
        shards.close()
        return out

    whole = everything("one", 1)
    monkeypatch.setattr(encode, "UNIT", 4000)
    blocks = [len(ids) for ids, _, _ in encode.encoded(sources, tokenizer, 1, True, (0.0, 1.0))]
    assert len(blocks) > 10 and max(blocks) < 3 * 4000
    assert everything("two", 1) == everything("three", 2) == whole and whole[2] == 1


