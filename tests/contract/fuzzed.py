"""Damaged files for the fuzz tests: strategies that make them, and a judge of what a reader must do with each line."""

from __future__ import annotations

import json
import re

from hypothesis import strategies as st

from zero2llm.data.sources import BadRecords, Source, read_records, read_unit, units

text = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from('{}[]",:\\\n\t 第春\u2028\x00😀'), max_size=12)
scalar = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text
value = st.recursive(scalar, lambda x: st.lists(x, max_size=3) | st.dictionaries(text, x, max_size=3), max_leaves=6)
record = st.dictionaries(text, value, max_size=3)


@st.composite
def dumped(draw, indent=False):
    v = draw(record)
    return json.dumps(v, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 1])) if indent else None).encode()


dirt = st.sampled_from(
    [b"\0", b"\0" * 9, b"\xff", b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xc3", b"\r", b"\x1a", b'"', b"{", b"}", b"]", b"[",
     b",", b"NaN", b"-Infinity", b"1e999", b"9" * 4400, b'{"a":1,"a":2}', b'"\\ud800"', b"[" * 300, b'{"a":' * 2000, b"\\", b"\xe7\xac"]
)  # fmt: skip
junk = st.binary(max_size=20) | dirt


@st.composite
def line(draw):
    """A good line, or one that is cut, spliced, joined with another, laced with bytes or nothing but bytes."""
    good = draw(dumped())
    kind = draw(st.sampled_from(["good", "good", "good", "cut", "laced", "joined", "woven", "junk", "blank"]))
    if kind == "cut":
        return good[: draw(st.integers(0, len(good)))]
    if kind == "laced":
        at = draw(st.integers(0, len(good)))
        return good[:at] + draw(junk) + good[at + draw(st.integers(0, 3)) :]
    if kind == "joined":
        return good + draw(st.sampled_from([b"", b" ", b",", b"\r"])) + draw(dumped())
    if kind == "woven":  # two writers at once
        other, at = draw(dumped()), draw(st.integers(0, len(good)))
        return good[:at] + other + good[at:]
    return draw(junk) if kind == "junk" else draw(st.sampled_from([b"", b"  ", b"\t\r"])) if kind == "blank" else good


def strictly(raw):
    """An independent judge: the value of a line that is one good object, else None."""

    def pairs(found):
        if len({k for k, _ in found}) != len(found):
            raise ValueError
        return dict(found)

    def depth(v):
        return 1 + max(map(depth, v.values() if isinstance(v, dict) else v), default=0) if isinstance(v, dict | list) else 0

    try:
        found = json.loads(raw.decode(), object_pairs_hook=pairs)
        json.dumps(found, ensure_ascii=False, allow_nan=False).encode()
        return found if isinstance(found, dict) and depth(found) <= 100 else None
    except (ValueError, RecursionError):
        return None


def put(folder, name, data):
    path = folder / name
    path.write_bytes(data)
    return str(path)


def read(path, **options):
    """(records, what was listed) with skipping on; an empty file is the only thing that still stops."""
    bad = BadRecords(skip=True)
    try:
        return list(read_records(Source(paths=(path,), **options), bad)), bad
    except ValueError as error:
        assert "is empty" in str(error)
        bad.noted["empty"] = 1
        return [], bad


def check_lines(folder, rows, cap=None):
    """Good lines are read, every other line that is not blank is read or listed, none twice."""
    data = b"\n".join(rows)
    options = {} if cap is None else {"max_line_mib": cap / (1 << 20)}
    path = put(folder, "a.jsonl", data)
    found, bad = read(path, **options)
    if bad.noted["empty"]:  # said in an error; a mark of UTF-16 alone is an empty file too
        assert data.strip() in (b"", b"\xef\xbb\xbf", b"\xfe\xff", b"\xff\xfe")
        return
    listed = [int(re.search(r", line (\d+): ", x)[1]) for x in bad.found]
    got: dict[int, list] = {}
    for r in found:
        got.setdefault(r.line, []).append(r.value)
        json.dumps(r.value, ensure_ascii=False, allow_nan=False).encode()
    physical = data.split(b"\n")
    physical[0] = physical[0].removeprefix(b"\xef\xbb\xbf")
    for number, raw in enumerate(physical, 1):
        if number in listed or number in got:
            assert listed.count(number) + (number in got) == 1, number
        else:
            assert not raw.strip(), (number, raw)
        good = strictly(raw)
        if good is not None and (cap is None or len(raw) <= cap - 3):
            assert got.get(number) == [good], (number, raw)
    parts = [(r.value, r.line) for u in units(Source(paths=(path,), **options), 1) for r in read_unit(u, BadRecords(skip=True))] if data.strip() else []
    assert parts == [(r.value, r.line) for r in found]
    return found, bad
