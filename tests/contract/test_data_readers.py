"""Every kind of file, unpacked or in another, whole or in units, undamaged or cut: the same records with the same places."""

from __future__ import annotations

import bz2
import csv
import datetime
import gzip
import io
import json
import lzma
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from decimal import Decimal
from pathlib import Path

import pytest

from zero2llm.data import hub
from zero2llm.data.readers import archive, engines, lines, streams, tables, text
from zero2llm.data.sources import BadRecords, Source, documents, expand, read_records, read_unit, units

zstandard = pytest.importorskip("zstandard")
parquet = pytest.importorskip("pyarrow.parquet")
pyarrow = pytest.importorskip("pyarrow")

ROWS = [{"id": str(i), "text": t} for i, t in enumerate(["one", "two\n第二行", "it's \"quoted\", 好", "😀" * 30, "five"])]
LINES = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in ROWS)
PACK = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": zstandard.compress}


def table(delimiter):
    out = io.StringIO()
    writer = csv.DictWriter(out, ["id", "text"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return out.getvalue()


def parquet_bytes(rows=ROWS, size=2):
    out = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), out, row_group_size=size)
    return out.getvalue()


BYTES = {
    "a.jsonl": LINES.encode(),
    "a.NDJSON": LINES.encode(),
    "a.json": json.dumps(ROWS, indent=1).encode(),
    "a.csv": table(",").encode(),
    "a.tsv": table("\t").encode(),
    "a.parquet": parquet_bytes(),
}


def put(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


def read(paths, skip=False, **options):
    """(values, what was listed)"""
    bad = BadRecords(skip=skip)
    found = [r.value for r in read_records(Source(paths=tuple([paths] if isinstance(paths, str) else paths), **options), bad)]
    assert min(bad.total, 1000) == len(bad.found)
    bad.found += bad.lines()[1000:]
    return found, bad.found


def in_units(path, target=1, skip=True, **options):
    bad, found = BadRecords(skip=skip), []
    for unit in units(Source(paths=(path,), **options), target):
        found += [(r.value, r.line, r.file) for r in read_unit(unit, bad)]
    return found, bad.found


def fails(call, *words):
    with pytest.raises(ValueError) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("name", BYTES)
@pytest.mark.parametrize("packed", ["", *PACK])
def test_a_kind_alone_and_packed(tmp_path, name, packed):
    file = put(tmp_path / (name + packed), PACK[packed](BYTES[name]) if packed else BYTES[name])
    assert read(file) == (ROWS, [])
    bad = BadRecords()
    whole = [(r.value, r.line, r.file) for r in read_records([file], bad)]
    assert in_units(file, 1) == in_units(file, 60) == in_units(file, 1 << 20) == (whole, [])


def test_several_streams_and_padding_in_one_file(tmp_path):
    half = LINES.encode().partition(b"\n")
    first, rest = half[0] + half[1], half[2]
    for suffix, pack in PACK.items():
        padding = b"\0" * 8 if suffix in (".gz", ".xz") else b""
        file = put(tmp_path / f"a.jsonl{suffix}", pack(first) + padding + pack(rest) + padding)
        assert read(file) == (ROWS, []), suffix
    assert read(put(tmp_path / "b.txt.gz", gzip.compress(b"x" * 3_000_000)))[0] == [{"text": "x" * 3_000_000}]


@pytest.mark.parametrize("kind", ["zip", "stored.zip", "tar", "tar.gz", "tgz", "tar.zst"])
def test_members_of_archives(tmp_path, kind):
    inside = {f"data/{name}": data for name, data in BYTES.items()}
    inside["第一/packed.jsonl.gz"] = gzip.compress(BYTES["a.jsonl"])
    inside |= {"__MACOSX/._a.jsonl": b"\0\1", "data/.hidden.jsonl": b"x", "readme.cfg": b"x", "../up.jsonl": BYTES["a.jsonl"]}
    inside["long/" * 40 + "a.jsonl"] = BYTES["a.jsonl"]
    out = io.BytesIO()
    if kind.endswith("zip"):
        with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED if "stored" in kind else zipfile.ZIP_DEFLATED) as z:
            z.mkdir("data") if hasattr(z, "mkdir") else None
            for name, data in inside.items():
                z.writestr(name, data)
        data = out.getvalue()
    else:
        for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
            out = io.BytesIO()
            with tarfile.open(fileobj=out, mode="w", format=form) as t:
                for name, content in inside.items():
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    t.addfile(info, io.BytesIO(content))
                link = tarfile.TarInfo("link.jsonl")
                link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
                t.addfile(link)
            data = PACK.get("." + kind.rpartition(".")[2], gzip.compress if kind == "tgz" else lambda b: b)(out.getvalue())
            check_members(tmp_path / f"x.{kind}", data, 9)
    check_members(tmp_path / f"x.{kind}", data, 9)
    assert [p.name for p in tmp_path.iterdir()] == [f"x.{kind}"]  # nothing was written beside it


def check_members(path, data, n):
    file = put(path, data)
    bad = BadRecords()
    found = [(r.value, r.line, r.file) for r in read_records([file], bad)]
    assert [v for v, _, _ in found] == ROWS * n
    names = list(dict.fromkeys(f for _, _, f in found))
    assert names[0] == f"{file}!data/a.jsonl" and f"{file}!第一/packed.jsonl.gz" in names and len(names) == n
    assert in_units(file) == (found, [])


def test_what_an_archive_may_not_hold(tmp_path):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        z.writestr("inner.zip", b"PK")
        z.writestr("a.jsonl", LINES)
    file = put(tmp_path / "a.zip", out.getvalue())
    fails(lambda: read(file), "a.zip!inner.zip", "archive inside an archive", "unpack")
    assert read(file, skip=True)[0] == ROWS
    with zipfile.ZipFile(tmp_path / "none.zip", "w") as z:
        z.writestr("readme.cfg", "x")
    fails(lambda: read(str(tmp_path / "none.zip")), "none.zip", "holds no", ".jsonl")
    raw = bytearray(out.getvalue())
    for mark, at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        for begin in (i for i in range(len(raw)) if raw[i : i + 4] == mark):
            raw[begin + at] |= 1
    fails(lambda: read(put(tmp_path / "secret.zip", bytes(raw).replace(b"inner.zip", b"inner.txt"))), "secret.zip!inner.txt", "encrypted")


MANY = [{"id": i, "text": f"第 {i} of a number of lines {i * i}"} for i in range(3000)]
MANY_LINES = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in MANY).encode()


@pytest.mark.parametrize("suffix", PACK)
def test_a_truncated_file_gives_all_before_the_damage(tmp_path, suffix):
    whole = PACK[suffix](MANY_LINES)
    for cut in (len(whole) - 3, len(whole) // 2, 40, 1):
        file = put(tmp_path / f"a.jsonl{suffix}", whole[:cut])
        found, listed = read(file, skip=True)
        assert found == MANY[: len(found)] and len(listed) == 1 and "cannot be read to its end (it is cut short)" in listed[0]
        assert f"{len(found)} records stand before" in listed[0]
        fails(lambda file=file: read(file), "cannot be read", "cut short")
    if suffix != ".zst":
        assert len(read(put(tmp_path / f"a.jsonl{suffix}", whole[:-3]), skip=True)[0]) == len(MANY)


@pytest.mark.parametrize("suffix", PACK)
def test_a_damaged_file_gives_what_its_library_could_still_decode(tmp_path, suffix):
    whole = bytearray(PACK[suffix](MANY_LINES))
    whole[len(whole) * 2 // 3] ^= 0xFF
    found, listed = read(put(tmp_path / f"a.jsonl{suffix}", bytes(whole)), skip=True)
    assert "cannot be read to its end" in listed[-1] or suffix == ".bz2" and "more" in listed[-1]
    least = {".gz": 1900, ".xz": 1900, ".bz2": 0, ".zst": 0}[suffix]  # bzip2 and zstd lose a block; here that is the file
    assert found[:least] == MANY[:least] and ("may be wrong" in listed[-1] or suffix == ".bz2")
    for name, first in (("garbage", "cannot be read"), ("", "empty")):
        fails(lambda name=name: read(put(tmp_path / f"b.jsonl{suffix}", name)), first)
    wrong = bytearray(gzip.compress(MANY_LINES))
    wrong[-6] ^= 1  # of the checksum: everything can be decoded
    assert read(put(tmp_path / "d.jsonl.gz", bytes(wrong)), skip=True)[0] == MANY
    trailing = put(tmp_path / f"c.jsonl{suffix}", PACK[suffix](MANY_LINES) + b"GARBAGE behind the end")
    assert read(trailing, skip=True)[0] == MANY and len(read(trailing, skip=True)[1]) == 1


@pytest.mark.parametrize("flags", ["sizes in front", "sizes behind"])
def test_a_zip_without_its_directory_is_walked(tmp_path, flags):
    class NoSeek(io.BytesIO):
        def seekable(self):
            return flags == "sizes in front"

        def seek(self, *a):
            return super().seek(*a) if self.seekable() else self._refuse()

        def _refuse(self):
            raise OSError("a pipe")

    out = NoSeek()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
        for name in ("a.jsonl", "sub/", "b.jsonl", "c.jsonl"):
            z.writestr(name, b"" if name.endswith("/") else MANY_LINES)
    whole = out.getvalue()
    third = whole.index(b"c.jsonl")
    for cut, n in ((whole.index(b"PK\1\2"), 3), (third + 5000, 2), (third - 31, 2), (5000, 0)):
        file = put(tmp_path / "a.zip", whole[:cut])
        found, listed = read(file, skip=True)
        assert found[: n * 3000] == MANY * n and found[n * 3000 :] == MANY[: len(found) - n * 3000], (cut, len(found))
        assert (len(found) > n * 3000) == (cut in (5000, third + 5000)) and "a.zip: cannot be read to its end" in listed[-1]
        fails(lambda file=file: read(file), "cannot be read")
        assert [v for v, _, _ in in_units(file)[0]] == found


def test_a_wrong_checksum_in_a_zip_is_said(tmp_path):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as z:
        z.writestr("a.jsonl", MANY_LINES)
    raw = out.getvalue().replace(b"lines 25\"", b"lines 26\"")
    found, listed = read(put(tmp_path / "a.zip", raw), skip=True)
    assert len(found) == 3000 and len(listed) == 1 and "checksum" in listed[0]


def test_damaged_tars(tmp_path):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as t:
        for name in ("a.jsonl", "b.jsonl"):
            info = tarfile.TarInfo(name)
            info.size = len(MANY_LINES)
            t.addfile(info, io.BytesIO(MANY_LINES))
    whole = out.getvalue()
    second = whole.index(b"b.jsonl")
    spoilt = bytearray(whole)
    spoilt[second + 20] ^= 1
    cases = ((whole[: second + 20_000], 3000, 3600), (whole[:second], 3000, 3000), (bytes(spoilt), 3000, 3000), (whole[: second + 512 + len(MANY_LINES)], 6000, 6000))
    for data, least, most in cases:
        for name, pack in (("a.tar", bytes), ("a.tar.gz", gzip.compress)):
            found, listed = read(put(tmp_path / name, pack(data)), skip=True)
            assert least <= len(found) <= most and found == (MANY * 2)[: len(found)] and "cannot be read to its end" in listed[-1], name
    found, listed = read(put(tmp_path / "c.tar.gz", gzip.compress(whole)[:-6]), skip=True)
    assert found == MANY * 2 and len(listed) == 1


def test_jsonl_in_ranges_has_every_line_once(tmp_path):
    file = put(tmp_path / "a.jsonl", b"\xef\xbb\xbf\n" + MANY_LINES.replace(b'"id": 7,', b'"id": NaN,', 1) + b'{"id": 9}')
    whole = [(r.value, r.line) for r in read_records([file], BadRecords(skip=True))]
    for target in (1, 100, 4096, 50_000, 1 << 30):
        parts = units([file], target)
        assert parts[0].start == 0 and parts[-1].end in (None, Path(file).stat().st_size)
        assert all(a.end == b.start for a, b in zip(parts, parts[1:], strict=False))
        found, listed = in_units(file, target)
        assert [(v, n) for v, n, _ in found] == whole and len(listed) == 1 and "line 9: not JSON (NaN" in listed[0]
    assert len(units([file], 1)) == 3002 and len(units([file], 50_000)) == -(-len(MANY_LINES) // 50_000)


@pytest.mark.parametrize("block", [1, 3, 64])
def test_cuts_with_any_block(tmp_path, monkeypatch, block):
    data = b"a\n\nbcd\n" * 5 + b"x" * 30 + b"\nend"
    file = put(tmp_path / "a.jsonl", data)
    monkeypatch.setattr(lines, "BLOCK", block)
    for target in (1, 2, 5, 17, 100):
        found = lines.cuts(file, target, len(data))
        assert b"".join(data[a:b] for a, b, _ in found) == data
        assert all(n == 1 + data[:a].count(b"\n") and data[:a][-1:] in (b"", b"\n") for a, _, n in found)
        assert all(b - a >= target for a, b, _ in found[:-1])


BAD_LINES = {
    '{"t": NaN}': "NaN",
    '{"t": -Infinity}': "Infinity",
    '{"t": 1e999}': "too large",
    '{"t": ' + "9" * 5000 + "}": "4,300 digits",
    '{"t": 1, "t": 2}': "'t' stands twice",
    "[" * 101 + "]" * 101: "deep",
    "[" * 200_000: "deep",
    '{"t": "\\udc00"}': "half a character",
    '{"t": "a"} tail': "column 12",
    "\0\0\0": "not JSON",
    '{"t": "a\tb"}': "control",
    "x" * 5000: "not JSON",
    "{'t': 1}": "not JSON",
}


def test_lines_that_are_bad(tmp_path):
    good = '{"text": "好"}'
    file = put(tmp_path / "a.jsonl", "\n".join(part for line in BAD_LINES for part in (good, line)) + "\n" + good)
    found, listed = read(file, skip=True)
    assert found == [{"text": "好"}] * (len(BAD_LINES) + 1) and len(listed) == len(BAD_LINES)
    for i, (line, word) in enumerate(BAD_LINES.items()):
        assert f"a.jsonl, line {2 * i + 2}: " in listed[i] and word in listed[i], (line[:40], listed[i])
    assert read(put(tmp_path / "b.jsonl", '{"a": 1}{"a": 2} {"a": 3}\n'))[0] == [{"a": 1}, {"a": 2}, {"a": 3}]
    assert len(read(put(tmp_path / "b.jsonl", '{"a": 1}{"a": \n'), skip=True)[1]) == 1
    fails(lambda: read(put(tmp_path / "b.jsonl", '[\n{"a": 1},\n{"a": 2}]')), "line 1", "name it .json")


def test_a_line_that_is_too_long_is_listed_and_the_next_read(tmp_path):
    limit = 1 / 1024  # 1,024 bytes
    for length, fits in ((1024, True), (1025, False), (5000, False)):
        long = '{"t": "' + "x" * (length - 9) + '"}'
        for end in ("\n", ""):
            file = put(tmp_path / "a.jsonl", '{"t": 1}\n' + long + end + ('{"t": 2}' if end else ""))
            found, listed = read(file, skip=True, max_line_mib=limit)
            assert len(found) == 1 + bool(end) + fits and len(listed) == 1 - fits
            assert fits or f"{length + len(end):,} bytes long" in listed[0] and "line 2" in listed[0]
    file = put(tmp_path / "a.json", json.dumps([{"t": 1}, {"t": "x" * 5000}, {"t": 2}]))
    found, listed = read(file, skip=True, max_line_mib=limit)
    assert found == [{"t": 1}, {"t": 2}] and "max_line_mib" in listed[0]
    assert "max_line_mib" in read(put(tmp_path / "a.csv", "t\n" + "x" * 5000 + "\n"), skip=True, max_line_mib=limit)[1][0]
    assert "max_line_mib" in read(put(tmp_path / "a.html", "x" * 5000), skip=True, max_line_mib=limit)[1][0]


ARRAYS = {  # text -> (values, lines listed)
    '[{"a": 1},\n{"a": },\n{"a": 3}]': ([1, 3], [2]),
    '[{"a": 1}, {"a": NaN}, {"a": 3}]': ([1, 3], [1]),
    '[{"a": NaN},\n{"a": 2}]': ([2], [1]),
    '[{"a": 1, "a": 2}, {"a": 1e999}, {"a": "\\ud800"}, {"a": 4}]': ([4], [1, 1, 1]),
    '[{"a": 1},\n{"a": "he said "hi""},\n{"a": 3}]': ([1, 3], [2]),
    '[\n  {\n    "a": 1\n  },\n  {\n    "a": "x"y",\n    "b": {}\n  },\n  {\n    "a": 3\n  }\n]': ([1, 3], [6]),
    '[\n  {\n    "a": "x"y"\n  },\n  {\n    "a": 2\n  },\n  {\n    "a": "un"done"\n  }\n]': ([2], [3, 9]),
    '[{"a": "x"y"}, {"a": 2}]': ([], [1]),  # on one line nobody can tell
    '[{\n"a": "x"y"\n},\n{\n"a": 2\n}]': ([], [2]),  # without indentation neither
    '[{"a": 1}\n{"a": 2}]': ([1, 2], [2]),
    '[{"a": 1},,{"a": 2},]': ([1, 2], [1]),
    '[{"a": 1},\n{"a": 2': ([1], [2]),
    '[{"a": 1},\n{"a": 2},': ([1, 2], [2]),
    '{"a": 1}\n{"a": "x"y"}\n{"a": 3}\n': ([1, 3], [2]),
    '{"a": 1}\n{"a": "x"y"}\n': ([1], [2]),
    '{"a": 1}{"a": 2},\n{"a": 3}': ([1, 2, 3], []),
    '{\n "a": 1\n}': ([1], []),
    '[{"a": 1}]]': ([1], [1]),
    '[{"a": [[[]]}, {"a": 2}]': ([], [1]),
}


@pytest.mark.parametrize("chunk", [1, 5, 1 << 20])
@pytest.mark.parametrize("text", ARRAYS)
def test_a_bad_element_of_an_array(tmp_path, monkeypatch, text, chunk):
    monkeypatch.setattr("zero2llm.data.json_stream.CHUNK", chunk)
    values, places = ARRAYS[text]
    file = put(tmp_path / "a.json", text)
    found, listed = read(file, skip=True)
    assert [v["a"] for v in found] == values
    assert [int(line.partition(", line ")[2].partition(":")[0]) for line in listed] == places, listed
    assert all("left out" in line for line in listed) if not values and listed else True
    if listed:
        fails(lambda: read(file), "a.json, line ")


def test_numbers_and_bad_bytes_across_chunks(tmp_path, monkeypatch):
    for chunk in (1, 2, 3, 7):
        monkeypatch.setattr("zero2llm.data.json_stream.CHUNK", chunk)
        assert read(put(tmp_path / "a.json", "[12, 345.5e1, true, -7]"))[0] == [12, 3455.0, True, -7]
        file = put(tmp_path / "b.json", b'[{"a": "caf\xe9"},\n{"a": "\xe5\xa5\xbd"},\n{"a": "\xed\xa0\x80"}, {"a": 4}]')
        found, listed = read(file, skip=True)
        assert found == [{"a": "好"}, {"a": 4}] and len(listed) == 2 and all("not UTF-8" in line for line in listed)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.tsv"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "gb18030", "big5", "utf-16-le"])
def test_encodings(tmp_path, name, encoding):
    words = "第一 text\n中文" if name.endswith(".txt") else "中文"
    form = {"a.jsonl": '{"t": "%s"}\n', "a.json": '[{"t": "%s"}]', "a.txt": "%s"}.get(name, "t\n%s\n")
    file = put(tmp_path / name, (form % words).encode(encoding))
    marked = encoding in ("utf-8-sig", "utf-16")
    found, _ = read(file, encoding=None if marked else encoding)
    assert list(found[0].values()) == [words] and len(found) == 1
    assert [v for v, _, _ in in_units(file, encoding=None if marked else encoding)[0]] == found
    if encoding in ("gb18030", "big5"):
        fails(lambda: read(file), "not UTF-8", "gb18030", "latin-1" if "csv" not in name else "encoding") if name not in (
            "a.json", "a.csv", "a.tsv") else fails(lambda: read(file), "not UTF-8", "encoding")  # fmt: skip
    if marked:
        assert read(file, encoding="gb18030")[0] == found  # the mark in the file counts more than the option


def test_a_wrong_encoding_costs_one_line(tmp_path):
    data = '{"t": "中"}\n'.encode("gb18030") + b'{"t": "\xff\xff"}\n' + '{"t": "文"}\n'.encode("gb18030")
    found, listed = read(put(tmp_path / "a.jsonl", data), skip=True, encoding="gb18030")
    assert found == [{"t": "中"}, {"t": "文"}] and len(listed) == 1 and "line 2: not gb18030" in listed[0]
    with pytest.raises(ValueError, match="klingon"):
        Source(paths=("a",), encoding="klingon")
    with pytest.raises(ValueError, match="base64"):
        Source(paths=("a",), encoding="base64")
    dirty = b'\xff\xfe\x00\x12 no text\n{"t": 1}\n{"t": 2}\n'  # looks like a mark, and is none
    assert read(put(tmp_path / "b.jsonl", dirty), skip=True)[0] == [{"t": 1}, {"t": 2}]


def test_pages_and_their_declared_charset(tmp_path):
    page = '<html><head><meta charset="gb2312"></head>中文</html>'
    assert read(put(tmp_path / "a.html", page.encode("gb18030")))[0] == [{"text": page, "format": "html"}]
    assert read(put(tmp_path / "b.htm", page.replace("gb2312", "utf-8").encode()))[0][0]["format"] == "html"
    fails(lambda: read(put(tmp_path / "c.html", "中文".encode("gb18030"))), "not UTF-8", "gb18030")
    assert read(put(tmp_path / "d.md", "# 好\n"))[0] == [{"text": "# 好\n", "format": "md"}]


def test_text_by_file_paragraph_and_line(tmp_path):
    data = "\ufeffone\ntwo\n\n\n三\n \nfour"
    file = put(tmp_path / "a.txt", data)
    get = lambda mode: [(r.value["text"], r.line) for r in read_records(Source(paths=(file,), text_documents=mode), BadRecords())]
    assert get("file") == [(data[1:], 1)]
    assert get("paragraph") == [("one\ntwo\n\n", 1), ("三\n \n", 5), ("four", 7)]
    assert get("line") == [("one\n", 1), ("two\n", 2), ("三\n", 5), ("four", 7)]
    spoilt = put(tmp_path / "b.txt", b"one\n\ntw\xffo\n\nthree")
    for mode, n in (("file", 0), ("paragraph", 2), ("line", 2)):
        found, listed = read(spoilt, skip=True, text_documents=mode)
        assert len(found) == n and len(listed) == 1 and "line 3" in listed[0]


def test_a_huge_text_is_cut_at_paragraphs_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "DOCUMENT", 100)
    data = "".join(f"paragraph {i} 好\nsecond line\n\n" for i in range(30)) + "no end\n" * 100
    file, bad = put(tmp_path / "a.txt", data), BadRecords()
    found = [r.value for r in read_records([file], bad)]
    assert "".join(v["text"] for v in found) == data and [v["part"] for v in found] == list(range(1, len(found) + 1))
    assert all(v["text"].endswith("\n\n") for v in found[:6]) and max(len(v["text"].encode()) for v in found) < 300
    assert bad.noted == {text.CUT: len(found) - 1} and not bad.total
    assert "part" not in read(put(tmp_path / "b.txt", "short\n\nlines"))[0][0]


def test_tables_with_faults(tmp_path):
    data = 'id,text\n1,"a\nb"\n2\n3,c,d\n\n4,"he said "x""\n5,"第""五"""\n6,"never closed\n7,x\n'
    file = put(tmp_path / "a.csv", data)
    bad = BadRecords(skip=True)
    found = [(r.value["id"], r.value["text"], r.line) for r in read_records([file], bad)]
    assert found == [("1", "a\nb", 2), ("5", '第"五"', 8)]
    assert [line.partition("line ")[2][:2] for line in bad.found] == ["4:", "5:", "7:", "9:"]
    assert "1 columns, the header has 2" in bad.found[0] and "lines 9 to 10" in bad.found[-1] and "never closed" in bad.found[-1]
    for header, words in (("a,a\n1,2\n", ["'a'", "two"]), ("a,\n1,2\n", ["without a name"]), ("a;b\n1;2\n", ["delimiter: ';'"])):
        fails(lambda header=header: read(put(tmp_path / "b.csv", header)), "line 1", *words)
    assert read(str(tmp_path / "b.csv"), delimiter=";")[0] == [{"a": "1", "b": "2"}]
    fails(lambda: read(put(tmp_path / "c.csv", "a,b\n")), "empty")
    with pytest.raises(ValueError, match="one character"):
        Source(paths=("a",), delimiter="::")
    cut = gzip.compress(table(",").encode())[:-10]
    found, listed = read(put(tmp_path / "d.csv.gz", cut), skip=True)
    assert found == ROWS[: len(found)] and "cut short" in listed[-1] and len(listed) == 1


def test_a_long_table_field(tmp_path):
    long = "第" * 200_000  # the csv module's own limit is 131,072 characters
    assert read(put(tmp_path / "a.csv", f"t\n{long}\n"))[0] == [{"t": long}]


def test_parquet_values_and_damage(tmp_path):
    rows = [{"t": "好", "d": datetime.datetime(2026, 1, 2), "m": Decimal("1.50"), "b": b"\0\1", "f": float("nan"), "l": [1.5], "s": {"x": None}}]
    file, bad = tmp_path / "a.parquet", BadRecords()
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    (record,) = read_records([str(file)], bad)
    assert record.value == {"t": "好", "d": "2026-01-02T00:00:00", "m": "1.50", "b": "AAE=", "f": None, "l": [1.5], "s": {"x": None}}
    json.dumps(record.value, allow_nan=False)
    assert sum(bad.noted.values()) == 4
    big = [{"t": f"{i} {zlib.crc32(str(i).encode())}" * 9} for i in range(400)]
    raw = bytearray(parquet_bytes(big, 100))
    at = raw.index(b"250 ") if b"250 " in raw else len(raw) // 2
    raw[at - 400 : at + 400] = bytes(800)
    found, listed = read(put(tmp_path / "b.parquet", bytes(raw)), skip=True)
    assert found[:100] == big[:100] and found[-100:] == big[-100:] and len(found) >= 200 and any("rows " in line for line in listed)
    fails(lambda: read(put(tmp_path / "c.parquet", bytes(raw[:-10]))), "cannot be read as parquet")
    assert len(read(str(tmp_path / "c.parquet"), skip=True)[1]) == 1
    assert len(in_units(str(tmp_path / "c.parquet"))[1]) == 1


def test_parquet_text_that_is_no_text_costs_one_row(tmp_path):
    column = pyarrow.array([b"good", b"caf\xe9", b"\xe5\xa5\xbd"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"t": column}), tmp_path / "a.parquet")
    found, listed = read(str(tmp_path / "a.parquet"), skip=True)
    assert found == [{"t": "good"}, {"t": "好"}] and len(listed) == 1 and "row 2" in listed[0]


def test_the_list_of_bad_records_is_bounded_and_merges(tmp_path):
    bad = BadRecords(skip=True)
    assert list(read_records([put(tmp_path / "a.jsonl", "x\n" * 2500)], bad)) == []
    assert bad.total == 2500 and len(bad.found) == 1000 and bad.lines()[-1] == "... and 1,500 more"
    other = BadRecords(skip=True)
    other.add("b", 1, "y" * 10_000)
    assert len(other.found[0]) < 600
    other.merge(bad)
    assert other.total == 2501 and len(other.found) == 1000 and other.found[0].startswith("b, line 1")


def test_folders_leave_out_what_is_hidden(tmp_path):
    for name in ("a.jsonl", "b.CSV", ".cache/x.jsonl", ".y.jsonl", "__MACOSX/z.jsonl", "c.zip.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        put(tmp_path / name, "x")
    assert [p.name for p in expand([str(tmp_path)])] == ["a.jsonl", "b.CSV", "c.zip.txt"]
    fails(lambda: Source(paths="a.jsonl"), "a list")
    assert list(documents(Source(paths=(put(tmp_path / "d.jsonl", LINES),)))) == [r["text"] for r in ROWS]


# ------------------------------------------------------------------------------------------------------------------ hubs


def test_hub_names():
    for name, expected in {
        "hf://a/b": ("hf", "a/b", None, None),
        "hf://a/b:train": ("hf", "a/b", None, "train"),
        "hf://a/b/zh-cn:train": ("hf", "a/b", "zh-cn", "train"),
        "hf:///some/folder:valid": ("hf", "/some/folder", None, "valid"),
        "modelscope://a/b/c": ("modelscope", "a/b", "c", None),
    }.items():
        assert hub.parse_name(name) == expected and hub.is_hub(name)
    for name in ("hf://a", "hf://", "modelscope:///folder", "hf://a/b/c/d"):
        fails(lambda name=name: hub.parse_name(name), name, "hf://OWNER/NAME")
    assert expand(["hf://a/b"]) == ["hf://a/b"]
    fails(lambda: units(["hf:///no/such/folder"]), "no such folder")


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No test may reach for a network, nor write to the user's cache."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub._splits.cache_clear()
    yield datasets
    hub._splits.cache_clear()


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_local_data_set_through_its_library(tmp_path, offline, kind):
    folder = tmp_path / "set"
    folder.mkdir()
    for i in range(3):
        rows = [{"text": f"{i} {j} 好", "n": j} for j in range(4)]
        name = f"train-{i:05}-of-00003.{kind}"
        put(folder / name, parquet_bytes(rows) if kind == "parquet" else "".join(json.dumps(r) + "\n" for r in rows))
    put(folder / f"test.{kind}", parquet_bytes([{"text": "t", "n": 0}]) if kind == "parquet" else '{"text": "t", "n": 0}\n')
    name = f"hf://{folder}"
    found = units([name])
    assert [(u.member, u.start) for u in found] == [("train", 0), ("train", 1), ("train", 2), ("test", 0)]
    bad = BadRecords()
    records = [r for u in found for r in read_unit(u, bad)]
    assert [r.value["text"] for r in records] == [f"{i} {j} 好" for i in range(3) for j in range(4)] + ["t"]
    assert (records[5].file, records[5].line) == (f"{name}!train, shard 1", 2)
    assert list(documents([name + ":test"])) == ["t"] and len(list(read_records([name], bad))) == 13
    fails(lambda: units([name + ":none"]), "cannot be read", "none")


def test_a_hub_without_connection_is_one_clear_error(offline):
    fails(lambda: units(["hf://nobody/nothing-at-all"]), "hf://nobody/nothing-at-all", "endpoint", "folder")


def test_the_mirror_is_set(offline, monkeypatch):
    import huggingface_hub.constants as constants

    asked = []
    for module, name in ((offline.config, "HF_ENDPOINT"), (constants, "ENDPOINT"), (constants, "HUGGINGFACE_CO_URL_TEMPLATE")):
        monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setenv("HF_ENDPOINT", "x")
    monkeypatch.setattr(offline, "load_dataset", lambda *a, **k: asked.append((a, k)) or {"train": []})
    units(Source(paths=("hf://a/b/c:train",), endpoint="https://mirror.example/"))
    assert asked == [(("a/b", "c"), {"split": "train", "streaming": True})]
    assert offline.config.HF_ENDPOINT == constants.ENDPOINT == "https://mirror.example"


def test_model_scope_is_asked_to_stream_and_to_run_nothing(monkeypatch):
    asked = []

    class MsDataset:
        @staticmethod
        def load(name, **options):
            asked.append((name, options))
            return {"train": [{"text": "好"}, {"text": "x"}]}

    fake = type(sys)("modelscope.msdatasets")
    fake.MsDataset = MsDataset
    monkeypatch.setitem(sys.modules, "modelscope", type(sys)("modelscope"))
    monkeypatch.setitem(sys.modules, "modelscope.msdatasets", fake)
    monkeypatch.setenv("MODELSCOPE_DOMAIN", "x")
    hub._splits.cache_clear()
    assert list(documents(Source(paths=("modelscope://owner/set/sub",), endpoint="https://www.modelscope.ai"))) == ["好", "x"]
    assert asked == [("owner/set", {"subset_name": "sub", "split": None, "use_streaming": True, "trust_remote_code": False})]
    monkeypatch.setitem(sys.modules, "modelscope.msdatasets", None)
    hub._splits.cache_clear()
    fails(lambda: units(["modelscope://owner/other"]), "zero2llm[hub]")


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    fails(lambda: read(put(tmp_path / "a.jsonl.zst", b"x")), "a.jsonl.zst", "zero2llm[data]")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    fails(lambda: read(put(tmp_path / "a.parquet", b"x")), "a.parquet", "zero2llm[parquet]")


# ----------------------------------------------------------------------------------------------------------- planted bugs


def planted(monkeypatch, name):
    if name == "the block with the damage is lost":
        monkeypatch.setattr(streams.Inflated, "_again", lambda self: b"")
    elif name == "only the first of several streams":
        init = streams.Inflated.__init__
        monkeypatch.setattr(streams.Inflated, "__init__", lambda self, source, make, several=True, crc=None: init(self, source, make, False, crc))
    elif name == "output that zlib still holds is forgotten":
        monkeypatch.setattr(engines._Deflate, "decompress", lambda self, data, n: self.inner.decompress(self.inner.unconsumed_tail + data, n))
    elif name == "a range ends one byte late":
        cuts = lines.cuts
        monkeypatch.setattr("zero2llm.data.sources.cuts", lambda *a: [(s, e + 1, n) for s, e, n in cuts(*a)])
    elif name == "lines of a range count from 1":
        cuts = lines.cuts
        monkeypatch.setattr("zero2llm.data.sources.cuts", lambda *a: [(s, e, 1) for s, e, _ in cuts(*a)])
    elif name == "a damaged tar header is the end":
        monkeypatch.setattr(archive, "_tar_header", lambda file, at: _or_none(file))
    elif name == "rows count from the group":
        groups = tables.row_groups
        monkeypatch.setattr("zero2llm.data.sources.row_groups", lambda *a: [(s, e, 1) for s, e, _ in groups(*a)])
    elif name == "a bad element takes the next one along":
        from zero2llm.data.json_stream import _Window

        end = _Window.end_of_tokens
        monkeypatch.setattr(_Window, "end_of_tokens", lambda self: self.text.find("}", end(self) or 0) if (end(self) or 0) > 0 else end(self))


def _or_none(file):
    try:
        return tarfile.TarInfo.frombuf(file.read(512), "utf-8", "replace")
    except tarfile.HeaderError:
        return None


PLANTED = {
    "the block with the damage is lost": lambda t: test_a_damaged_file_gives_what_its_library_could_still_decode(t, ".gz"),
    "only the first of several streams": test_several_streams_and_padding_in_one_file,
    "output that zlib still holds is forgotten": test_several_streams_and_padding_in_one_file,
    "a range ends one byte late": test_jsonl_in_ranges_has_every_line_once,
    "lines of a range count from 1": test_jsonl_in_ranges_has_every_line_once,
    "a damaged tar header is the end": test_damaged_tars,
    "rows count from the group": lambda t: test_a_kind_alone_and_packed(t, "a.parquet", ""),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_bugs_are_caught(tmp_path, monkeypatch, name):
    planted(monkeypatch, name)
    with pytest.raises((AssertionError, ValueError, IndexError, zlib.error, struct.error)):
        PLANTED[name](tmp_path)


def test_a_resynchronisation_that_takes_the_next_one_along_is_caught(tmp_path, monkeypatch):
    planted(monkeypatch, "a bad element takes the next one along")
    text = '[{"a": 1}, {"a": NaN}, {"a": 3}]'
    with pytest.raises(AssertionError):
        test_a_bad_element_of_an_array(tmp_path, monkeypatch, text, 1 << 20)


def test_the_bench_of_memory_runs():
    script = Path(__file__).parents[2] / "bench" / "read_large.py"
    done = subprocess.run([sys.executable, script, "--smoke", "--kinds", "jsonl", "jsonl.gz"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| jsonl |" in done.stdout and "| jsonl.gz |" in done.stdout
