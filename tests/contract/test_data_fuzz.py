"""Files that crashes, full disks and bad cables leave behind: every line is read or listed, whatever stands beside it."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.contract.fuzzed import check_lines, junk, line, put, read, record, text
from zero2llm.data import json_stream
from zero2llm.data.readers import values
from zero2llm.data.sources import BadRecords, read_unit, units

MANY = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
SOME = settings(MANY, max_examples=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@MANY
@given(rows=st.lists(line(), min_size=1, max_size=8))
def test_every_line_is_read_or_listed(folder, rows):
    check_lines(folder, rows)


@SOME
@given(rows=st.lists(line(), min_size=1, max_size=6), cap=st.integers(8, 60))
def test_with_a_short_longest_line(folder, rows, cap):
    check_lines(folder, rows, cap)


@SOME
@given(data=st.binary(max_size=300) | st.lists(junk, max_size=12).map(b"".join))
@example(data=bytes(18) + b"\x05")  # zeros pad between the parts of an .xz, but not before the first, nor when what failed is read again
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.html", "a.csv", "a.tsv", "a.jsonl.gz", "a.json.xz", "a.zip", "a.tar", "a.tar.gz", "a.parquet"])
def test_any_bytes_give_records_or_a_list(folder, name, data):
    found, bad = read(put(folder, name, data))
    assert found or bad.total or bad.noted["empty"]
    if name in ("a.jsonl", "a.txt", "a.html") and bad.noted["empty"]:
        assert not data.strip(b"\xff\xfe\xef\xbb\xbf \t\r\n\v\f")
    for mode in ("line", "paragraph"):
        read(put(folder, "b.txt", data), text_documents=mode)
        read(put(folder, "b.csv", data), encoding="utf-16")


PACK = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}
try:
    import zstandard

    PACK[".zst"] = zstandard.compress
except ImportError:
    pass


@SOME
@given(n=st.integers(1, 400), cut=st.floats(0, 1), suffix=st.sampled_from(sorted(PACK)))
def test_a_cut_file_gives_a_beginning_and_says_so(folder, n, cut, suffix):
    rows = [{"id": i, "text": f"第 {i} {i * i * 7919 % 10007}"} for i in range(n)]
    whole = PACK[suffix]("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode())
    at = int(cut * len(whole))
    found, bad = read(put(folder, "a.jsonl" + suffix, whole[:at]))
    assert [r.value for r in found] == rows[: len(found)]
    assert bad.total == (0 < at < len(whole)) and (at < len(whole) or len(found) == n)


@SOME
@given(st.data())
@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_a_damaged_archive_never_crashes_and_is_never_silent(folder, kind, data):
    rows, out = [{"id": i, "text": f"{i} 春" * 3} for i in range(20)], io.BytesIO()
    body = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode()
    names = ["a.jsonl", "d/b.jsonl", "长" * 60 + ".jsonl"]
    if kind == "zip":
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
            for name in names:
                z.writestr(name, body)
    else:
        with tarfile.open(fileobj=out, mode="w:gz" if kind == "tar.gz" else "w") as t:
            for name in names:
                info = tarfile.TarInfo(name)
                info.size = len(body)
                t.addfile(info, io.BytesIO(body))
    whole = out.getvalue()
    cut = data.draw(st.integers(1, len(whole) - 1))
    found, bad = read(put(folder, f"a.{kind}", whole[:cut]))
    assert [r.value for r in found] == (rows * 3)[: len(found)]
    assert bad.total or len(found) == 60, (cut, len(whole))
    spoilt = bytearray(whole)
    spoilt[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    path = put(folder, f"b.{kind}", bytes(spoilt))
    found, bad = read(path)
    if kind != "tar":  # a tar has no checksum of its data
        assert bad.total or [r.value for r in found] in (rows * 3, rows * 2), len(found)  # a name that is no longer .jsonl
    again = BadRecords(skip=True)
    assert [r for u in units([path]) for r in read_unit(u, again)] == found and again.total == bad.total


@SOME
@given(st.data(), st.lists(record, min_size=1, max_size=6), st.sampled_from([None, 0, 1, 4]), st.sampled_from([1, 7, 64, 1 << 20]))
def test_a_spoilt_element_takes_none_before_it_and_invents_none(folder, data, rows, indent, chunk):
    rows = [{"id": i, **{k: v for k, v in row.items() if k != "id"}} for i, row in enumerate(rows)]
    kept, json_stream.CHUNK = json_stream.CHUNK, chunk
    try:
        pieces = [json.dumps(row, ensure_ascii=False, indent=indent) for row in rows]
        glue = data.draw(st.sampled_from([",", ", ", ",\n", "\n,"]))
        if indent:
            pieces, glue = [" " * indent + p.replace("\n", "\n" + " " * indent) for p in pieces], ",\n"
        whole = ("[\n" + glue.join(pieces) + "\n]").encode()
        found, bad = read(put(folder, "a.json", whole))
        assert [r.value for r in found] == rows and not bad.total
        k = data.draw(st.integers(0, len(rows) - 1))
        raw = pieces[k].encode()
        at = data.draw(st.integers(0, len(raw)))
        pieces[k] = raw[:at] + data.draw(junk) + raw[at + data.draw(st.integers(0, 3)) :]
        spoilt = [p if isinstance(p, bytes) else p.encode() for p in pieces]
        found, bad = read(put(folder, "a.json", b"[\n" + glue.encode().join(spoilt) + b"\n]"))
        got = [r.value for r in found]
        assert got[:k] == rows[:k]
        if got != rows and not bad.total:  # still an array: the splice changed a value, or made other elements of it
            assert got == json.loads(b"[\n" + glue.encode().join(spoilt) + b"\n]")
        after = [v for v in got[k:] if v in rows[k + 1 :]]
        assert after == [v for v in rows[k + 1 :] if v in after] and (bad.total or len(got) >= len(rows) - 1)
        read(put(folder, "a.json", whole[: data.draw(st.integers(0, len(whole)))]))
    finally:
        json_stream.CHUNK = kept


@SOME
@given(rows=st.lists(st.tuples(text, text), min_size=1, max_size=6), delimiter=st.sampled_from([",", "\t"]))
def test_tables_of_any_text(folder, rows, delimiter):
    import csv

    rows = [tuple(x.replace("\x00", "") for x in row) for row in rows]  # Python 3.10's csv module refuses NUL
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=delimiter, quoting=csv.QUOTE_ALL)
    writer.writerows([("a", "b"), *rows])
    name = "a.csv" if delimiter == "," else "a.tsv"
    found, bad = read(put(folder, name, out.getvalue().encode()))
    assert [(r.value["a"], r.value["b"]) for r in found] == rows and not bad.total


# ----------------------------------------------------------------------------------------------------------- planted bugs

ROWS = [b'{"t": "one"}', b'{"t": NaN}', b'{"t": "x"}{"t": "y"}', b'{"t": 1, "t": 2}', b"", b'{"t": "\xff"}', b'{"t": "half', b'{"t": "\\ud800"}', b'{"t": "last"}']


def test_the_example_of_the_planted_bugs_passes(folder):
    found, bad = check_lines(folder, ROWS)
    assert [r.value["t"] for r in found] == ["one", "x", "y", "last"] and bad.total == 5


def lax_decoder(monkeypatch):
    decoder = json.JSONDecoder()
    monkeypatch.setattr(values, "DECODER", decoder)


def silent(monkeypatch):
    add = BadRecords.add
    monkeypatch.setattr(BadRecords, "add", lambda self, file, line, reason: add(self, file, line, reason) if "UTF-8" not in reason else None)


def stops_at_the_first(monkeypatch):
    from zero2llm.data.readers import reading

    whole = reading.json_lines

    def until_bad(opened, unit, bad):
        for r in whole(opened, unit, bad):
            if bad.total:
                return
            yield r

    monkeypatch.setattr(reading, "json_lines", until_bad)


def first_of_two(monkeypatch):
    from zero2llm.data.readers import lines

    monkeypatch.setattr(lines, "parse_several", lambda text: [])


def blank_lines_uncounted(monkeypatch):
    from zero2llm.data.readers import lines

    plain = lines.lines

    def skipping(file, most, number=1):
        for _, raw, size in plain(file, most, number):
            if raw.strip():
                yield number, raw, size
                number += 1

    monkeypatch.setattr(lines, "lines", skipping)


def half_characters_pass(monkeypatch):
    monkeypatch.setattr(values, "half_character", lambda text: "")


@pytest.mark.parametrize("bug", [lax_decoder, silent, stops_at_the_first, first_of_two, blank_lines_uncounted, half_characters_pass])
def test_planted_bugs_are_caught(folder, monkeypatch, bug):
    bug(monkeypatch)
    with pytest.raises((AssertionError, ValueError)):
        check_lines(folder, ROWS)
