"""The verbs of `zero2llm data`: what they print and write, what they refuse, and that nothing is lost or overwritten unasked."""

from __future__ import annotations

import csv
import gzip
import json
import os
import random
import re

import pytest
from click.testing import CliRunner

from zero2llm.cli_data import data
from zero2llm.data.readers.record import BadRecords
from zero2llm.data.sources import read_records
from zero2llm.lab.data_tools import reservoir, split_of
from zero2llm.tokenizers.tokenizer import Tokenizer

ENGLISH, CHINESE = "Call me Ishmael. Some years ago, never mind how long.", "春眠不覺曉，\n處處聞啼鳥。"
TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "你好"}, {"role": "assistant", "content": "Hi"}]
CALLS = [{"name": "天气", "arguments": {"city": "北京"}}]
TOOLS = [{"type": "function", "function": {"name": "天气", "parameters": {"type": "object"}}}]


def run(*args, code: int = 0) -> str:
    """Output of a verb that ends with ``code``."""
    done = CliRunner().invoke(data, list(map(str, args)))
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.output


def refused(*args) -> str:
    """The error of a verb, on one line as the program prints it."""
    done = CliRunner().invoke(data, list(map(str, args)))
    assert isinstance(done.exception, ValueError), done.output
    return str(done.exception)


def write(path, *records, **raw):
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def read(path) -> list:
    bad = BadRecords()
    return [record.value for record in read_records([str(path)], bad)]


@pytest.fixture
def texts(tmp_path):
    return write(tmp_path / "texts.jsonl", *({"text": f"{text} {i}", "id": i} for i in range(100) for text in (ENGLISH, CHINESE)))


@pytest.fixture
def chats(tmp_path):
    long = [*TURNS, {"role": "user", "content": "And?"}, {"role": "assistant", "content": "好"}]
    return write(tmp_path / "chats.jsonl", {"messages": TURNS, "topic": "hello"}, {"messages": long, "topic": "long"})


def test_stats_counts_and_writes_a_page(tmp_path, texts):
    out = run("stats", texts, "--html", tmp_path / "s.html")
    assert re.search(r"documents *│ 200 ", out) and "call 100" in out and "處處 100" in out and "schema text" in out and "200 records" in out
    page = (tmp_path / "s.html").read_text(encoding="utf-8")
    assert "Most frequent words" in page and "處" in page and "<script" not in page and "http" not in page
    assert "already exists" in refused("stats", texts, "--html", tmp_path / "s.html")
    run("stats", texts, "--html", tmp_path / "s.html", "--overwrite")


def test_stats_with_tokens_of_conversations_and_of_a_named_field(tmp_path, chats):
    Tokenizer.train([ENGLISH, CHINESE] * 3, 300).save(tmp_path / "tok")
    out = run("stats", chats, "--tokenizer", tmp_path / "tok", "--html", tmp_path / "s.html")
    assert "bytes per token" in out and "schema conversation" in out and "好 3" in out
    assert "bytes per token" in (tmp_path / "s.html").read_text(encoding="utf-8")
    assert re.search(r"documents *│ 2 ", run("stats", chats, "--field", "topic"))
    assert "no field 'nope'; it has: messages, topic" in refused("stats", chats, "--field", "nope")


def test_stats_page_escapes_what_it_is_given(tmp_path):
    file = write(tmp_path / "<script>alert(1)</script>&.jsonl".replace("/", ""), {"text": "<script>alert(2)</script> <b>bold"}, "{broken <i>")
    run("stats", file, "--html", tmp_path / "s.html", "--skip-bad-records")
    page = (tmp_path / "s.html").read_text(encoding="utf-8")
    assert "<script" not in page and "<b>" not in page and "&lt;script&gt;" in page and "Bad records" in page


@pytest.mark.parametrize("verb", [("stats",), ("split", "--out", "o"), ("sample", "--out", "o.jsonl", "--n", "1"), ("convert", "--out", "o.jsonl"),
                                  ("inspect", "--n", "5")])  # fmt: skip
def test_bad_records_end_a_verb_unless_they_may_be_skipped_and_then_are_listed(tmp_path, monkeypatch, verb):
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path / "a.jsonl", {"text": ENGLISH}, '{"text": "cut', {"text": CHINESE})
    assert "a.jsonl, line 2: not JSON" in refused(*verb, file) and not list(tmp_path.glob("o*/*")) and not (tmp_path / "o.jsonl").exists()
    out = run(*verb, file, "--skip-bad-records")
    assert "left out" in out and "line 2: not JSON" in out
    assert not list(tmp_path.rglob(".*part*")), "an unfinished file stayed"


def test_inspect_shows_fields_blanks_and_turns(tmp_path, chats):
    file = write(tmp_path / "a.jsonl", {"text": f"\t{CHINESE} [red]x[/red] \x1b[31m", "n": 3, "tags": ["a"], "none": None})
    out = run("inspect", file)
    for words in ("a.jsonl, line 1", "schema text", "⇥春眠不覺曉，↵", "·[red]x[/red]·\\x1b[31m", "int", "list of 1", '["a"]', "null"):
        assert words in out, words
    assert "\x1b" not in out, "a record may not speak to the terminal"
    out = run("inspect", chats, "--n", 1)
    assert "system: Be·brief." in out and "user: 你好" in out and "assistant: Hi" in out and "topic" in out and "schema conversation" in out
    assert "… 51 more characters" in run("inspect", write(tmp_path / "b.jsonl", {"text": ENGLISH}), "--characters", 2)


def test_inspect_one_line_or_some_at_random(tmp_path, texts, chats):
    assert f"{ENGLISH} 50".replace(" ", "·") in re.sub(r"\s", "", run("inspect", texts, "--line", 101))
    assert "no record begins on line 999" in refused("inspect", texts, "--line", 999)
    assert "name one file, not 2" in refused("inspect", texts, chats, "--line", 1)
    one, two = run("inspect", texts, "--random", "--n", 4), run("inspect", texts, "--random", "--n", 4)
    assert one == two != run("inspect", texts, "--random", "--n", 4, "--seed", 2)
    lines = [int(n) for n in re.findall(r"line (\d+)", one)]
    assert len(lines) == 4 == len(set(lines)) and lines == sorted(lines) and max(lines) > 10
    write(texts.parent / "odd.jsonl", {"x": 1}, "[1, 2]", {"messages": ["hello", {"role": "user", "content": "q", "name": "Ada"}]})
    out = run("inspect", texts.parent / "odd.jsonl")
    assert "schema other" in out and "[1,·2]" in out and "not a turn but a str" in out and "name: Ada" in out


def test_validate_lists_every_fault_and_exits_1(tmp_path, chats):
    file = write(tmp_path / "a.jsonl", {"text": ENGLISH}, "{broken", {"text": " "}, {"messages": [{"role": "alien", "content": "x"}]}, {"y": 1}, {"text": CHINESE})
    (tmp_path / "c.json").write_text('[{"text": "a"}, {"text": "b"}, {"te', encoding="utf-8")
    out = run("validate", file, tmp_path / "c.json", chats, "--report", tmp_path / "r.jsonl", code=1)
    for words in ("a.jsonl, line 2: not JSON", "a.jsonl, line 3: field 'text'", "line 4: message 0: role 'alien'", "line 5: it fits no schema", "c.json, line 1"):
        assert words in out, words
    assert "5 bad, 6 good" in out and re.search(r"conversation *│ 2 ", out) and re.search(r"text *│ 4 ", out)
    faults = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [f["line"] for f in faults] == [2, 3, 4, 5, 1] and faults[0]["file"] == str(file) and "not JSON" in faults[0]["reason"]
    assert "already exists" in refused("validate", file, "--report", tmp_path / "r.jsonl")
    assert "0 bad, 2 good" in run("validate", chats)


def test_validate_goes_on_after_a_file_that_cannot_be_read(tmp_path, texts):
    (tmp_path / "empty.jsonl").write_text("")
    with gzip.open(tmp_path / "cut.jsonl.gz", "wb") as file:
        file.write(texts.read_bytes() * 20)
    whole = (tmp_path / "cut.jsonl.gz").read_bytes()
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    out = run("validate", tmp_path / "empty.jsonl", tmp_path / "cut.jsonl.gz", texts, code=1)
    assert "empty.jsonl: the file is empty" in out and "cut.jsonl.gz: cannot be read to its end" in out and "2 bad" in out


def test_validate_requires_a_schema(tmp_path, texts, chats):
    out = run("validate", texts, chats, "--schema", "conversation", code=1)
    assert "200 bad, 2 good" in out and "... and 180 more; --report FILE writes them all" in out
    assert "there is no schema 'converstion'" in refused("validate", chats, "--schema", "converstion")


FORMATS = ["a.jsonl", "a.json", "a.parquet", "a.jsonl.gz", "a.jsonl.zst", "a.json.xz", "a.csv", "a.tsv.gz"]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_records_back(tmp_path, name):
    if name.endswith("zst"):
        pytest.importorskip("zstandard")
    records = [{"text": f'{ENGLISH} "quoted", {i}\r\n\tend', "note": CHINESE, "tag": "a;b,c"} for i in range(3000 if "parquet" in name else 30)]
    file = write(tmp_path / "in.jsonl", *records)
    assert f"{len(records):,} records" in run("convert", file, "--out", tmp_path / name)
    assert read(tmp_path / name) == records
    first = (tmp_path / name).read_bytes()
    assert "already exists" in refused("convert", file, "--out", tmp_path / name)
    run("convert", file, "--out", tmp_path / name, "--overwrite")
    assert (tmp_path / name).read_bytes() == first, "the same records must give the same bytes"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["in.jsonl", name])


def test_parquet_keeps_nested_records_and_counts_absent_as_null(tmp_path):
    records = [{"messages": TURNS, "n": 1}, {"messages": [{**TURNS[2], "tool_calls": [{"name": "f"}]}], "n": 2**60, "tags": []}, {"messages": [], "x": {"y": 1.5}}]
    run("convert", write(tmp_path / "a.jsonl", *records), "--out", tmp_path / "a.parquet")
    strip = lambda v: {k: strip(x) for k, x in v.items() if x is not None} if isinstance(v, dict) else [strip(x) for x in v] if isinstance(v, list) else v
    assert strip(read(tmp_path / "a.parquet")) == records
    for records in ([{"a": 1}, {"a": "x"}], [{"a": 2**60 + 1}, {"a": 0.5}], [{"a": True}, {"a": 1}], [{"a": 2**70}], [[1]]):
        error = refused("convert", write(tmp_path / "b.jsonl", *map(json.dumps, records)), "--out", tmp_path / "b.parquet")
        assert "b.jsonl, line" in error and not (tmp_path / "b.parquet").exists(), error
        assert not list(tmp_path.glob(".*")), "the spool stayed"


def test_a_table_of_text_refuses_what_a_cell_cannot_hold(tmp_path, chats):
    assert "field 'messages' holds a list, which a cell cannot" in refused("convert", chats, "--out", tmp_path / "a.csv")
    file = write(tmp_path / "b.jsonl", {"a": "x", "n": 3, "ok": True}, {"a": "", "n": None})
    run("convert", file, "--out", tmp_path / "b.csv")
    assert list(csv.reader((tmp_path / "b.csv").open(encoding="utf-8", newline=""))) == [["a", "n", "ok"], ["x", "3", "true"], ["", "", ""]]
    file = write(tmp_path / "c.jsonl", {"a": "", "b": "1"}, {"b": "2"})
    assert "field 'a' is absent or null in" in refused("convert", file, "--out", tmp_path / "c.csv")


def test_txt_holds_documents_and_nothing_else(tmp_path, texts):
    error = refused("convert", texts, "--out", tmp_path / "a.txt")
    assert "would lose: id (200 records, first: " in error and "texts.jsonl, line 1" in error and "--drop-fields id" in error
    out = run("convert", texts, "--out", tmp_path / "a.txt", "--drop-fields", "id", "--separator", r"\n\n")
    documents = (tmp_path / "a.txt").read_text(encoding="utf-8").split("\n\n")
    assert documents == [record["text"] for record in read(texts)] and "200 x 'id' left out" in out
    assert len(read(tmp_path / "a.txt")) == 1
    error = refused("convert", texts, "--out", tmp_path / "b.txt", "--drop-fields", "id", "--separator", r"\n")
    assert "line 2: the text holds '\\n', which stands between documents" in error
    assert "--drop-fields idd: no record has it" in refused("convert", texts, "--out", tmp_path / "c.jsonl", "--drop-fields", "idd")


WANTED = {
    "messages": {"messages": TURNS, "k": 1},
    "conversations": {"conversations": TURNS, "k": 1},
    "sharegpt": {"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "你好"}, {"from": "gpt", "value": "Hi"}], "k": 1},
    "alpaca": {"instruction": "你好", "input": "", "output": "Hi", "system": "Be brief.", "k": 1},
    "prompt-response": {"prompt": "你好", "response": "Hi", "system": "Be brief.", "k": 1},
    "prompt-completion": {"prompt": "你好", "completion": "Hi", "system": "Be brief.", "k": 1},
}  # fmt: skip


@pytest.mark.parametrize("target", WANTED)
@pytest.mark.parametrize("start", WANTED)
def test_every_chat_shape_becomes_every_other(tmp_path, start, target):
    run("convert", write(tmp_path / "a.jsonl", WANTED[start]), "--to-schema", target, "--out", tmp_path / "b.jsonl")
    assert read(tmp_path / "b.jsonl") == [WANTED[target]]


def test_tools_thoughts_history_and_pictures_go_along(tmp_path):
    turns = [*TURNS, {"role": "user", "content": "天气?"}, {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": CALLS},
             {"role": "tool", "content": '{"t": 3}'}, {"role": "assistant", "content": "3°"}]  # fmt: skip
    file = write(tmp_path / "a.jsonl", {"messages": turns, "tools": TOOLS, "image": ["x.png"]})
    run("convert", file, "--to-schema", "sharegpt", "--out", tmp_path / "b.jsonl")
    found = read(tmp_path / "b.jsonl")[0]
    assert found["tools"] == TOOLS and found["image"] == ["x.png"] and found["conversations"][5] == {"from": "observation", "value": '{"t": 3}'}
    assert found["conversations"][4] == {"from": "gpt", "value": "", "reasoning_content": "hm", "tool_calls": CALLS}
    run("convert", tmp_path / "b.jsonl", "--to-schema", "messages", "--out", tmp_path / "c.jsonl")
    assert read(tmp_path / "c.jsonl") == [{"messages": turns, "tools": TOOLS, "image": ["x.png"]}]
    assert "do not alternate" in refused("convert", file, "--to-schema", "alpaca", "--out", tmp_path / "d.jsonl")
    run("convert", file, "--to-schema", "messages", "--drop-fields", "reasoning_content,image", "--out", tmp_path / "e.jsonl")
    assert "reasoning_content" not in (tmp_path / "e.jsonl").read_text() and "tool_calls" in (tmp_path / "e.jsonl").read_text()


def test_what_a_single_turn_cannot_hold_is_refused_or_becomes_history(tmp_path, chats):
    run("convert", chats, "--to-schema", "alpaca", "--out", tmp_path / "a.jsonl")
    assert read(tmp_path / "a.jsonl")[1] == {"instruction": "And?", "input": "", "output": "好", "system": "Be brief.", "history": [["你好", "Hi"]], "topic": "long"}
    run("convert", tmp_path / "a.jsonl", "--to-schema", "messages", "--out", tmp_path / "b.jsonl")
    assert read(tmp_path / "b.jsonl") == read(chats)
    assert "line 2: 4 turns; prompt-response holds one" in refused("convert", chats, "--to-schema", "prompt-response", "--out", tmp_path / "c.jsonl")
    thought = write(tmp_path / "t.jsonl", {"messages": [TURNS[1], {**TURNS[2], "reasoning_content": "hm"}]})
    assert "would lose: reasoning_content (1 records" in refused("convert", thought, "--to-schema", "alpaca", "--out", tmp_path / "c.jsonl")
    run("convert", thought, "--to-schema", "alpaca", "--out", tmp_path / "c.jsonl", "--drop-fields", "reasoning_content")
    assert read(tmp_path / "c.jsonl") == [{"instruction": "你好", "input": "", "output": "Hi"}]


def test_conversion_refuses_doubt(tmp_path):
    both = write(tmp_path / "a.jsonl", {"messages": TURNS, "prompt": "p", "completion": "c"})
    assert "2 conversations in it" in refused("convert", both, "--to-schema", "messages", "--out", tmp_path / "o.jsonl")
    clash = write(tmp_path / "b.jsonl", {"messages": TURNS, "prompt": "p"})
    assert "field 'prompt' stands in the record already" in refused("convert", clash, "--to-schema", "prompt-response", "--out", tmp_path / "o.jsonl")
    never = write(tmp_path / "c.jsonl", {"prompt": "p", "completion": "rude", "label": False})
    assert "label is false" in refused("convert", never, "--to-schema", "messages", "--out", tmp_path / "o.jsonl")
    assert "--to-schema alpacca: unknown" in refused("convert", never, "--to-schema", "alpacca", "--out", tmp_path / "o.jsonl")
    for name, words in (("o.docx", "must end in"), ("o.parquet.gz", "parquet compresses itself"), (".", "must end in")):
        assert words in refused("convert", never, "--out", tmp_path / name)
    (tmp_path / "dir.jsonl").mkdir()
    assert "is a folder" in refused("convert", never, "--out", tmp_path / "dir.jsonl", "--overwrite")
    assert not (tmp_path / "o.jsonl").exists()


def test_preferences_and_renamed_text(tmp_path):
    answer = lambda text: [TURNS[1], {"role": "assistant", "content": text}]
    pair = write(tmp_path / "a.jsonl", {"prompt": "你好", "chosen": answer("Hi"), "rejected": answer("Go"), "score": 2})
    run("convert", pair, "--to-schema", "preference", "--out", tmp_path / "b.jsonl")
    assert read(tmp_path / "b.jsonl") == [{"prompt": [TURNS[1]], "chosen": [answer("Hi")[1]], "rejected": [answer("Go")[1]], "score": 2}]
    body = write(tmp_path / "c.jsonl", {"body": CHINESE, "id": 1})
    run("convert", body, "--to-schema", "text", "--field", "body", "--out", tmp_path / "d.jsonl")
    assert read(tmp_path / "d.jsonl") == [{"text": CHINESE, "id": 1}]
    assert "a chat becomes text by a chat template" in refused("convert", pair, "--to-schema", "text", "--out", tmp_path / "e.jsonl")


def test_a_file_may_be_replaced_by_itself_and_a_failure_keeps_the_old(tmp_path, monkeypatch, texts):
    before = texts.read_bytes()
    run("convert", texts, "--out", texts, "--overwrite")
    assert texts.read_bytes() == before

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "no space left while writing" in refused("convert", texts, "--out", texts, "--overwrite", "--drop-fields", "id")
    assert texts.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["texts.jsonl"]


def test_split_never_parts_equal_texts_whatever_their_order_or_file(tmp_path):
    dice = random.Random(3)
    records = [{"text": f"{text} {i}", "copy": copy} for i in range(300) for copy in range(2) for text in (ENGLISH, CHINESE)]
    for name in ("a", "b"):
        dice.shuffle(records)
        write(tmp_path / f"{name}.jsonl", *records)
    out = run("split", tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--out", tmp_path / "s", "--valid", 0.2, "--test", 0.1)
    parts = {name: read(tmp_path / "s" / f"{name}.jsonl") for name in ("train", "valid", "test")}
    sets = {name: {r["text"] for r in part} for name, part in parts.items()}
    assert sum(map(len, parts.values())) == 2400 and sum(map(len, sets.values())) == 600 and len(set().union(*sets.values())) == 600
    assert 0.12 < len(sets["valid"]) / 600 < 0.28 and 0.05 < len(sets["test"]) / 600 < 0.16
    assert f"train.jsonl: {len(parts['train']):,} records" in out
    again = tmp_path / "again"
    run("split", tmp_path / "b.jsonl", "--out", again, "--valid", 0.2, "--test", 0.1, "--suffix", ".jsonl.gz")
    assert {r["text"] for r in read(again / "valid.jsonl.gz")} == sets["valid"]
    run("split", again / "train.jsonl.gz", "--out", tmp_path / "twice", "--valid", 0.2, "--seed", 2)  # the rest of a split is not special
    assert 0.1 < len(read(tmp_path / "twice" / "valid.jsonl")) / (2 * len(sets["train"])) < 0.3


def test_split_touches_nothing_but_its_files(tmp_path, texts):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "thesis.txt").write_text("years of work")
    run("split", texts, "--out", tmp_path / "s")
    assert "train.jsonl already exists" in refused("split", texts, "--out", tmp_path / "s")
    run("split", texts, "--out", tmp_path / "s", "--overwrite")
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == ["thesis.txt", "train.jsonl", "valid.jsonl"]
    for shares in (("--valid", 0), ("--valid", 1.2), ("--valid", 0.6, "--test", 0.5), ("--valid", -0.1)):
        assert "between 0 and 1, together below 1" in refused("split", texts, "--out", tmp_path / "t", *shares)
    assert "must end in" in refused("split", texts, "--out", tmp_path / "t", "--suffix", ".doc")


def test_split_shares_are_kept_on_average():
    shares = {"valid": 0.1, "test": 0.2}
    found = [split_of(f"{CHINESE}{i}", shares, seed=5) for i in range(4000)]
    assert abs(found.count("valid") / 4000 - 0.1) < 0.02 and abs(found.count("test") / 4000 - 0.2) < 0.025
    other = [split_of(f"{CHINESE}{i}", shares, seed=6) for i in range(4000)]
    assert sum(a == b == "valid" for a, b in zip(found, other, strict=True)) < 90


def test_sample_writes_records_in_their_order(tmp_path, texts):
    run("sample", texts, "--out", tmp_path / "s.jsonl", "--n", 50)
    kept, whole = read(tmp_path / "s.jsonl"), read(texts)
    at = [whole.index(record) for record in kept]
    assert len(kept) == 50 and at == sorted(set(at))
    run("sample", texts, "--out", tmp_path / "t.jsonl", "--n", 50, "--seed", 2)
    assert read(tmp_path / "t.jsonl") != kept


def fair(choose) -> None:
    """Every record, and every pair of neighbours, is chosen equally often; in order."""
    counts, pairs, n = [0] * 20, [0] * 19, 3000
    for seed in range(n):
        kept = choose(iter(range(20)), 5, seed)
        assert len(kept) == 5 and kept == sorted(set(kept))
        for i in kept:
            counts[i] += 1
        for i in range(19):
            pairs[i] += i in kept and i + 1 in kept
    assert all(abs(c - n / 4) < 4.5 * (n * 3 / 16) ** 0.5 for c in counts), counts
    assert all(abs(c - n / 19) < 4.5 * (n / 19) ** 0.5 for c in pairs), pairs  # 5/20 x 4/19 = 1/19


def test_every_choice_is_equally_likely():
    fair(reservoir)


def _wrong(slot, ordered=True):
    """A reservoir whose later record i takes ``slot(chance, i, n)``."""

    def choose(records, n, seed):
        chance, kept = random.Random(seed).random, []
        for i, record in enumerate(records, 1):
            if i <= n:
                kept.append((i, record))
            elif (at := slot(chance, i, n)) < n:
                kept[at] = i, record
        return [record for _, record in (sorted(kept) if ordered else kept)]

    return choose


WRONG = {
    "the first n": _wrong(lambda chance, i, n: n),
    "every later one enters": _wrong(lambda chance, i, n: int(chance() * n)),
    "counts from the end of the reservoir": _wrong(lambda chance, i, n: int(chance() * (i - n + 1))),
    "always the first slot": _wrong(lambda chance, i, n: 0 if chance() < n / i else n),
    "half as likely": _wrong(lambda chance, i, n: int(chance() * 2 * i)),
    "out of order": _wrong(lambda chance, i, n: int(chance() * i), ordered=False),
}


@pytest.mark.parametrize("bug", WRONG)
def test_planted_bugs_in_choosing_are_caught(bug):
    with pytest.raises(AssertionError):
        fair(WRONG[bug])
    fair(_wrong(lambda chance, i, n: int(chance() * i)))  # the right one in the same clothes


def test_sample_by_share_and_its_refusals(tmp_path, texts):
    assert re.search(r"s.json: \d+ of 200 records", run("sample", texts, "--out", tmp_path / "s.json", "--share", 0.25))
    kept = read(tmp_path / "s.json")
    assert 25 < len(kept) < 75 and all(record in read(texts) for record in kept)
    assert "there are only 200 records" in refused("sample", texts, "--out", tmp_path / "t.jsonl", "--n", 201)
    assert "give either --n or --share" in refused("sample", texts, "--out", tmp_path / "t.jsonl")
    assert "--share 2.0 must lie" in refused("sample", texts, "--out", tmp_path / "t.jsonl", "--share", 2)
    assert "at least 1" in refused("sample", texts, "--out", tmp_path / "t.jsonl", "--n", 0)
    assert not (tmp_path / "t.jsonl").exists()


def test_reading_options_reach_every_verb(tmp_path):
    (tmp_path / "a.txt").write_text("一\n二\n三\n", encoding="gb18030")
    assert re.search(r"documents *│ 3 ", run("stats", tmp_path / "a.txt", "--encoding", "gb18030", "--text-documents", "line"))
    (tmp_path / "a.csv").write_text("text;n\n春;1\n", encoding="utf-8")
    run("convert", tmp_path / "a.csv", "--delimiter", ";", "--out", tmp_path / "b.jsonl")
    assert read(tmp_path / "b.jsonl") == [{"text": "春", "n": "1"}]


@pytest.mark.parametrize("verb", ["stats", "inspect", "validate", "convert", "split", "sample"])
def test_help_says_what_each_option_does(verb):
    out = run(verb, "--help")
    assert "FILES..." in out and "--encoding" in out and all(len(line.split()) > 1 for line in out.splitlines() if line.strip().startswith("--") and "[" not in line)
    assert CliRunner().invoke(data, [verb, "nowhere.jsonl", *(["--out", "x.jsonl"] if verb in ("convert", "split", "sample") else [])]).exit_code != 0
