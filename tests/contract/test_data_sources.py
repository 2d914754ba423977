"""Records in every shape that people bring, and every fault with its file, line and reason."""

from __future__ import annotations

import gzip
import io
import json
import lzma

import pytest

from zero2llm.data import json_stream
from zero2llm.data.json_stream import elements
from zero2llm.data.schemas import as_conversation, as_preference, conversations, preferences
from zero2llm.data.sources import EMBEDDED, BadRecords, documents, expand, read_records


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def fails(what, *words):
    with pytest.raises(ValueError) as caught:
        list(what)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def U(text): return {"role": "user", "content": text}
def A(text): return {"role": "assistant", "content": text}
def S(text): return {"role": "system", "content": text}


RECORDS = [{"text": "one"}, {"text": "two\n第二"}, {"text": "three"}]
LINES = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in RECORDS)
TEXTS = [r["text"] for r in RECORDS]


def test_each_kind_of_file(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), tmp_path / "a.parquet")
    files = [
        str(tmp_path / "a.parquet"),
        write(tmp_path / "a.jsonl", "\ufeff" + LINES + "\n\n"),
        write(tmp_path / "a.json", json.dumps(RECORDS, indent=2)),
        write(tmp_path / "lines.json", LINES),
    ]
    (tmp_path / "b.jsonl.xz").write_bytes(lzma.compress(LINES.encode()))
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(json.dumps(RECORDS).encode()))
    for file in [*files, str(tmp_path / "b.jsonl.xz"), str(tmp_path / "b.json.gz")]:
        assert list(documents([file])) == TEXTS, file
    assert list(documents([write(tmp_path / "a.txt", "first\n\nsecond\n")])) == ["first\n\nsecond\n"]


def test_folders_globs_and_doubles(tmp_path):
    a, b = write(tmp_path / "a.jsonl", LINES), write(tmp_path / "b.txt", "four")
    write(tmp_path / "notes.cfg", "not data")
    assert list(documents([str(tmp_path)])) == [*TEXTS, "four"]
    assert list(documents([str(tmp_path / "*.txt"), b])) == ["four"]
    assert [str(p) for p in expand([b, a])] == [b, a]
    fails(documents([str(tmp_path / "none.jsonl")]), "none.jsonl", "no such file")
    fails(documents([str(tmp_path / "notes.cfg")]), "notes.cfg", ".jsonl")
    (tmp_path / "empty").mkdir()
    fails(documents([str(tmp_path / "empty")]), "empty", "holds no")


def test_embedded_text_in_both_languages():
    counts = {name: sum(1 for _ in documents([f"embedded:{name}"])) for name in EMBEDDED}
    assert counts == {"en_austen": 1523, "en_moby_dick": 513, "zh_classical_prose": 672, "zh_poetry_small": 1200, "zh_songci": 20139}
    fails(documents(["embedded:dickens"]), "dickens", "zh_songci")
    notices = (expand(["embedded"])[0].parent / "NOTICES.md").read_text(encoding="utf-8")
    assert all(name in notices for name in EMBEDDED)


@pytest.mark.parametrize(
    "line, words",
    [
        ('{"text": "x"', ["line 2", "not JSON"]),
        ('{"txt": "x", "id": 3}', ["line 2", "no field 'text'", "txt, id"]),
        ('{"text": 7}', ["line 2", "no text"]),
        ('{"text": "  "}', ["line 2", "no text"]),
        ('{"text": "a\\ud83d"}', ["line 2", "half a character", "ud83d"]),
        ("[1, 2]", ["line 2", "an object was expected"]),
        ("[" * 100_000, ["line 2", "not JSON"]),
    ],
)
def test_a_bad_record_is_named_or_skipped(tmp_path, line, words):
    file = write(tmp_path / "a.jsonl", '{"text": "good"}\n' + line + '\n{"text": "also good"}\n')
    fails(documents([file]), "a.jsonl", "--skip-bad-records", *words)
    bad = BadRecords(skip=True)
    assert list(documents([file], bad=bad)) == ["good", "also good"]
    assert len(bad.found) == 1 and all(word in bad.found[0] for word in words)


def test_bytes_that_are_not_utf8(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n{"text": "caf\xe9"}\n')
    (tmp_path / "a.txt").write_bytes("第一行\n".encode() + "第二行".encode("gbk"))
    (tmp_path / "a.json").write_bytes(b'[{"text": "good"},\n{"text": "caf\xe9"}]')
    for name in ("a.jsonl", "a.txt", "a.json"):
        fails(documents([str(tmp_path / name)]), name, "line 2", "not UTF-8")


def test_empty_and_damaged_files(tmp_path):
    for name in ("a.jsonl", "a.txt", "a.json"):
        fails(documents([write(tmp_path / name, " \n")]), name, "is empty")
    whole = lzma.compress(LINES.encode() * 100)
    (tmp_path / "cut.jsonl.xz").write_bytes(whole[:-20])
    (tmp_path / "no.jsonl.gz").write_bytes(b"plain text")
    (tmp_path / "no.jsonl.xz").write_bytes(b"plain text")
    (tmp_path / "no.parquet").write_bytes(b"plain text")
    for name in ("cut.jsonl.xz", "no.jsonl.gz", "no.jsonl.xz", "no.parquet"):
        fails(documents([str(tmp_path / name)]), name, "cannot be read")


def test_an_empty_file_is_named_even_after_skipped_records(tmp_path):
    first, second = write(tmp_path / "a.jsonl", "not json\n"), write(tmp_path / "b.jsonl", "")
    fails(documents([first, second], bad=BadRecords(skip=True)), "b.jsonl", "is empty")


@pytest.mark.parametrize("chunk", [1, 2, 7, 1 << 20])
def test_array_elements_at_any_chunk(monkeypatch, chunk):
    monkeypatch.setattr(json_stream, "CHUNK", chunk)
    values = [{"text": "a\\\"]}[{\n第二 😀", "n": [1, 2.5e-3, True, None]}, {"t": "é" * 50}, {}, "x"]
    for indent in (None, 1):
        for ascii_only in (True, False):
            text = json.dumps(values, indent=indent, ensure_ascii=ascii_only)
            found = list(elements(io.BytesIO(text.encode())))
            assert [v for v, _ in found] == values
            assert [line for _, line in found] == ([1] * 4 if indent is None else [2, 11, 14, 15])
    assert list(elements(io.BytesIO(b"[]"))) == []
    for text, words in [
        ('[{"a": 1},\n{"a": }]', ["line 2", "not JSON"]),
        ('[{"a": 1}\n{"a": 2}]', ["line 2", "','"]),
        ('[{"a": 1},\n{"a": 2}', ["line 2", "cut short"]),
        ('[{"a": 1}]\n[2]', ["line 2", "behind the end"]),
        ('"just text"', ["line 1", "an array"]),
        ('[{"a": "never closed', ["line 1", "not JSON"]),
    ]:
        fails(elements(io.BytesIO(text.encode())), *words)


def test_an_array_is_not_read_whole(tmp_path):
    file = write(tmp_path / "a.json", "[" + ",".join(['{"text": "%s"}' % ("x" * 1000)] * 8000) + "]")  # 8 MB

    class Counting(io.FileIO):
        taken = 0

        def read(self, n=-1):
            data = super().read(n)
            self.taken += len(data)
            return data

    with Counting(file) as handle:
        next(elements(handle))
        assert handle.taken <= 2 * json_stream.CHUNK


CONVERSATIONS = {
    "messages": ({"messages": [U("q"), A("a")]}, [U("q"), A("a")]),
    "content before role": ({"conversations": [{"content": "q", "role": "user"}, {"content": "a", "role": "assistant"}]}, [U("q"), A("a")]),
    "ShareGPT": (
        {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        [S("s"), U("q"), A("a")],
    ),
    "roles, not positions": ({"messages": [U("q1"), U("q2"), A("a1"), A("a2")]}, [U("q1"), U("q2"), A("a1"), A("a2")]),
    "instruction": ({"instruction": "i", "input": "x", "output": "o"}, [U("i\nx"), A("o")]),
    "instruction alone": ({"instruction": "i", "input": "", "output": "o"}, [U("i"), A("o")]),
    "history": ({"instruction": "i", "output": "o", "system": "s", "history": [["q", "a"]]}, [S("s"), U("q"), A("a"), U("i"), A("o")]),
    "prompt, response": ({"prompt": "q", "response": "a"}, [U("q"), A("a")]),
    "prompt, completion": ({"prompt": "q", "completion": "a"}, [U("q"), A("a")]),
    "lists": ({"prompt": [S("s"), U("q")], "completion": [A("a")]}, [S("s"), U("q"), A("a")]),
    "a last question without answer": ({"messages": [U("q"), A("a"), U("q2")]}, [U("q"), A("a")]),
    "empty system turn": ({"messages": [S(""), U("q"), A("a")]}, [S(""), U("q"), A("a")]),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations(tmp_path, name):
    record, expected = CONVERSATIONS[name]
    file = write(tmp_path / "a.jsonl", json.dumps(record))
    (found,) = conversations([file], BadRecords())
    assert found == expected and found.where == f"{file}, line 1"


@pytest.mark.parametrize(
    "record, words",
    [
        ({"text": "x", "id": 1}, ["messages", "prompt+completion", "it has: text, id"]),
        ({"messages": []}, ["non-empty list"]),
        ({"messages": [U("q")]}, ["no assistant message"]),
        ({"messages": [U("q"), A("")]}, ["message 1 (assistant)", "no text"]),
        ({"messages": [U("q"), {"role": "assistant", "content": None}]}, ["message 1 (assistant)", "None"]),
        ({"messages": [{"role": "robot", "content": "x"}]}, ["message 0", "'robot'"]),
        ({"messages": ["hello"]}, ["message 0", "str"]),
        ({"messages": [U("q"), {**A("a"), "tool_calls": "[{}]"}]}, ["message 1", "tool_calls"]),
        ({"instruction": "i", "output": None}, ["'output'", "None"]),
        ({"prompt": "q", "completion": "rude", "label": False}, ["label is false"]),
        ({"instruction": "i", "output": "o", "history": ["q"]}, ["history"]),
        ([U("q"), A("a")], ["object was expected"]),
    ],
)
def test_what_is_no_conversation(tmp_path, record, words):
    file = write(tmp_path / "a.jsonl", json.dumps({"prompt": "q", "response": "a"}) + "\n" + json.dumps(record))
    fails(conversations([file], BadRecords()), "a.jsonl, line 2", *words)
    bad = BadRecords(skip=True)
    assert len(list(conversations([file], bad))) == 1 and len(bad.found) == 1


Q, HISTORY = [U("q")], [S("s"), U("q0"), A("a0"), U("q")]
PREFERENCES = {
    "strings": ({"prompt": "q", "chosen": "good", "rejected": "bad"}, Q),
    "prompt list": ({"prompt": HISTORY, "chosen": "good", "rejected": [A("bad")]}, HISTORY),
    "shared turns": ({"chosen": [*HISTORY, A("good")], "rejected": [*HISTORY, A("bad")]}, HISTORY),
    "prompt apart and inside": ({"prompt": "q", "chosen": [*Q, A("good")], "rejected": [*Q, A("bad")]}, Q),
    "prompt inside one": ({"prompt": "q", "chosen": [*Q, A("good")], "rejected": [A("bad")]}, Q),
    "prompt is the last of the shared turns": ({"prompt": "q", "chosen": [*HISTORY, A("good")], "rejected": [*HISTORY, A("bad")]}, HISTORY),
    "prompt differs by a blank": ({"prompt": "q ", "chosen": [*Q, A("good")], "rejected": [*Q, A("bad")]}, [U("q ")]),
    "history apart and inside": ({"prompt": HISTORY, "chosen": [*HISTORY, A("good")], "rejected": [*HISTORY, A("bad")]}, HISTORY),
}


@pytest.mark.parametrize("name", PREFERENCES)
def test_preferences_never_double_the_prompt(tmp_path, name):
    record, prompt = PREFERENCES[name]
    file = write(tmp_path / "a.json", json.dumps([record]))
    (pair,) = preferences([file], BadRecords())
    assert (pair.prompt, pair.chosen, pair.rejected) == (prompt, [A("good")], [A("bad")])
    assert pair.where == f"{file}, line 1"


@pytest.mark.parametrize(
    "record, word",
    [
        ({"prompt": "q", "chosen": "x", "rejected": "x"}, "the same"),
        ({"prompt": "q", "chosen": "x", "rejected": " x "}, "the same"),
        ({"chosen": [*Q, A("x")], "rejected": [*Q, A("x")]}, "the same"),
        ({"chosen": [*Q, A("x"), U("y"), A("z")], "rejected": [*Q, A("x")]}, "beginning"),
        ({"chosen": "good", "rejected": "bad"}, "no prompt"),
        ({"chosen": [U("q1"), A("x")], "rejected": [U("q2"), A("y")]}, "no prompt"),
        ({"prompt": "q", "chosen": [U("q1"), A("x")], "rejected": [U("q2"), A("y")]}, "prompts differ"),
        ({"prompt": "q", "chosen": "good"}, "it has: prompt, chosen"),
        ({"prompt": "q", "chosen": "good", "rejected": ""}, "'rejected'"),
        ("text", "str"),
    ],
)
def test_what_is_no_preference(record, word):
    with pytest.raises(ValueError, match=word):
        as_preference(record)


def test_records_say_where_they_stand(tmp_path):
    file = write(tmp_path / "a.jsonl", "\n" + LINES)
    assert [r.line for r in read_records([file], BadRecords())] == [2, 3, 4]
    assert as_conversation({"prompt": "第一", "response": "第二"}) == [U("第一"), A("第二")]


def test_built_in_texts_have_the_same_name_on_every_machine():
    first = next(read_records(["embedded:zh_poetry_small"], BadRecords()))
    assert (first.file, first.line) == ("embedded:zh_poetry_small", 1)
