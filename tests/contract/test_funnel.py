"""The funnel page: whole from any subset of its parts, self-contained, everything escaped, and honest about its own sums."""

from __future__ import annotations

import copy
import io
import json
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from zero2llm.data.stats import Stats
from zero2llm.lab import data_charts
from zero2llm.lab.data_view import n_bytes, view
from zero2llm.lab.funnel import SECTIONS, duplicates, funnel_page, funnel_table, step_view

EVIL = '<script>alert(1)</script> & "it\'s" [red] {{ 7 * 7 }} $x^2$'
VOID = {"meta", "br", "link", "img", "hr"}
ENGLISH = "Call me Ishmael. Some years ago, never mind how long precisely, I thought I would sail about a little."
CHINESE = "春眠不覺曉，處處聞啼鳥。夜來風雨聲，花落知多少。"


class Page(HTMLParser):
    """Checks that tags balance, and gathers what a browser would load or run, and the text."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(html)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing, at {self.getpos()}"

    def handle_data(self, data):
        self.text += data

    def sections(self) -> list[str]:
        return [value for tag, name, value in self.attributes if (tag, name) == ("section", "id")]


class Shown:
    """Stands for a tokenizer."""

    def show(self, i: int) -> str:
        return f"·piece{i}"


def size(documents: int, n: int, tokens: int | None) -> dict:
    return {"documents": documents, "bytes": n, "tokens": tokens}


def pile(n: int, tokens: bool = True) -> dict:
    stats = Stats()
    for i in range(n):
        text, code = ((ENGLISH, "en"), (CHINESE, "zh"))[i % 2]
        stats.add(text[: 20 + i], code, [i % 7, 3] if tokens else None)
    return stats.to_dict(most=1000)


def example(i: int, text: str = CHINESE) -> dict:
    return {"where": f"语料/a.jsonl, line {i}", "detail": f"{i} < 50", "text": text}


def funnel() -> dict:
    few = {"documents": 60, "bytes": 3_000, "tokens": 900, "examples": [example(i) for i in range(10)]}
    rare = {"documents": 1, "bytes": 40, "tokens": 9, "examples": [example(77, ENGLISH)]}
    group = {"size": 40, "where": [f"b.jsonl, line {i}" for i in range(5)], "texts": [CHINESE, CHINESE + "！", ENGLISH]}
    return {
        "title": "Classics, cleaned", "made": "2026-11-21", "seconds": 12.4, "versions": {"zero2llm": "0.1.0", "python": "3.11"},
        "recipe": {"out": "data", "sources": [{"paths": ["语料/*.jsonl"]}], "steps": [{"kind": "gopher", "min_words": 50}]},
        "sources": [{"name": "novels", "documents": 600, "bytes": 60_000, "bad": 1}, {"name": "宋词", "documents": 400, "bytes": 30_000, "bad": 2}],
        "bad_records": ["a.jsonl, line 3: not JSON (cut off)", "a.jsonl, line 9: not UTF-8"], "bad_total": 3,
        "steps": [
            {"name": "normalise", "kind": "normalise", "in": size(1000, 90_000, 30_000), "out": size(1000, 90_400, 30_100),
             "notes": {"mojibake": 12}, "removed": {}, "groups": None, "seconds": 1.25},
            {"name": "quality", "kind": "gopher", "in": size(1000, 90_400, 30_100), "out": size(939, 87_360, 29_191), "notes": {},
             "removed": {"no stop word": rare, "too few words": few}, "groups": None, "seconds": 2.0},
            {"name": "near-duplicates", "kind": "minhash", "in": size(939, 87_360, 29_191), "out": size(872, 80_000, 26_000), "notes": {},
             "removed": {"near-duplicate": {"documents": 67, "bytes": 7_360, "tokens": 3_191, "examples": [example(5)]}},
             "groups": {"sizes": {"2": 14, "3": 2, "12": 1, "40": 1}, "largest": [group]}, "seconds": 3.0},
        ],
        "splits": {"train": size(860, 79_000, 25_700), "valid": size(12, 1_000, 300)},
        "before": pile(60), "after": pile(40),
    }  # fmt: skip


@pytest.fixture(scope="module")
def full() -> tuple[dict, str]:
    found = json.loads(json.dumps(funnel(), ensure_ascii=False))  # as it is read from funnel.json
    return found, funnel_page(found, Shown())


def test_the_page_is_well_formed_and_holds_every_section(full):
    page = Page(full[1])
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) and page.sections() == list(SECTIONS)
    used = set(re.findall(r"url\(#([^)]+)\)", full[1])) | {v[1:] for _, n, v in page.attributes if n == "href" and v[:1] == "#"}
    assert used <= set(ids), "a chart or a link refers to nothing"
    assert page.tags.count("svg") == 1 + 1 + 3 + 2  # funnel; groups; lengths, languages, bytes per token; words, tokens
    assert full[1].startswith("<!DOCTYPE html>") or full[1].lstrip().startswith("<!DOCTYPE html>")


def test_it_says_what_was_removed_and_why(full):
    text = Page(full[1]).text
    for words in ("872 of 1,000", "87.2 %", "near-duplicate 67 documents (7.1 %), 7.36 kB, 3,191 tokens", "too few words 60 documents (6 %)",
                  "语料/a.jsonl, line 3 · 3 < 50", CHINESE, "mojibake 12", "+400 B (0.4 %)", "−61 (6.1 %)", "40 alike", "b.jsonl, line 4",
                  "train", "860 (98.6 %)", "宋词", "line 9: not UTF-8", "… and 1 more", "min_words: 50", "0.1.0", "·piece3 (3)", "unchanged"):  # fmt: skip
        assert words in text, words
    assert text.index("too few words") < text.index("no stop word"), "the most frequent reason stands first"
    assert "does not add up" not in text


def test_nothing_is_fetched_and_nothing_runs(full):
    page = Page(full[1])
    assert "http://" not in full[1] and "https://" not in full[1] and "@import" not in full[1]
    assert not {"script", "link", "iframe", "object", "embed", "img"} & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on") or name in ("src", "srcset", "action")]
    assert ("meta", "name", "viewport") in page.attributes and "prefers-color-scheme: dark" in full[1]


def poisoned(value):
    if isinstance(value, dict):
        fixed = ("in", "out", "splits", "lengths", "zipf", "token_zipf", "distinct", "undercount", "sizes")
        return {(k if k in KEYS else EVIL + k): v if k in fixed else poisoned(v) for k, v in value.items()}
    return [poisoned(v) for v in value] if isinstance(value, list) else EVIL if isinstance(value, str) else value


KEYS = {key for part in (funnel(), *funnel()["steps"], funnel()["sources"][0], funnel()["before"]) for key in part} | {
    "sizes", "largest", "size", "where", "texts", "text", "detail", "examples", "documents", "bytes", "tokens",
}  # fmt: skip


def test_everything_from_outside_is_escaped():
    evil = poisoned(funnel())
    evil["splits"] = {EVIL: size(872, 80_000, 26_000)}
    evil["steps"][1]["removed"] = {EVIL: {"documents": 61, "bytes": 3_040, "examples": [{"where": EVIL, "detail": EVIL, "text": EVIL}]}}

    class Bad:
        def show(self, i: int) -> str:
            return EVIL

    html = funnel_page(evil, Bad())
    page = Page(html)
    assert "script" not in page.tags and "<script" not in html and page.text.count(EVIL) > 30
    assert "49" not in "".join(re.findall(r"\{\{.*?\}\}", html)) and "{{ 7 * 7 }}" in page.text, "text was run as a template"


@pytest.mark.parametrize("part", sorted(funnel()))
def test_each_part_alone(part):
    page = Page(funnel_page({part: funnel()[part]}))
    shown = {"steps": ["funnel", "steps", "duplicates"], "before": ["pile", "frequencies"], "after": ["pile", "frequencies"], "splits": ["splits"],
             "sources": ["sources"], "bad_records": ["bad"], "bad_total": ["bad"], "recipe": ["recipe"], "versions": ["recipe"]}  # fmt: skip
    assert page.sections() == shown.get(part, [])


def test_without_tokens_steps_or_anything():
    found = funnel()
    for step in found["steps"]:
        step["in"]["tokens"] = step["out"]["tokens"] = None
        del step["seconds"]
    found["before"], found["after"] = pile(9, tokens=False), pile(5, tokens=False)
    page = Page(funnel_page(found))
    assert ("td", "data-name", "tokens") not in page.attributes and ("td", "data-name", "changed") in page.attributes
    assert "tokens kept" not in page.text and page.tags.count("svg") == 1 + 1 + 2 + 1
    assert Page(funnel_page({})).sections() == [] and "Data funnel" in Page(funnel_page({"steps": []})).text
    found["after"] = Stats().to_dict()  # everything was removed
    assert "No language" not in Page(funnel_page(found)).text
    assert Page(funnel_page({"before": pile(3), "after": Stats().to_dict()})).sections() == ["pile", "frequencies"]


def test_a_pile_without_words_or_languages():
    stats = Stats()
    stats.add("12345 !!")
    parts = view([("", "blue", stats.to_dict())], None)
    assert parts["words"] == [] and parts["zipf"] == [] and parts["languages"] == [] and parts["sizes"][0] == ("documents", ["1"])
    page = Page(funnel_page({"before": stats.to_dict(), "after": pile(4)})).text
    assert "Of the text before the languages were not identified." in page and "No language" not in page
    assert "No language was identified" in Page(funnel_page({"before": stats.to_dict()})).text


@pytest.mark.parametrize("where,words", [
    (("steps", 1, "in", "documents"), "normalise gave 1,000 documents, quality got 999"),
    (("sources", 0, "documents"), "the sources gave 1,399 documents, normalise got 1,000"),
    (("splits", "train", "documents"), "near-duplicates gave 872 documents, the splits hold 1,011"),
])  # fmt: skip
def test_sums_that_do_not_add_up_are_said(where, words):
    found = copy.deepcopy(funnel())
    inner = found
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = 999
    assert words in Page(funnel_page(found)).text


def test_groups_are_counted_by_hand():
    found = duplicates(funnel()["steps"][2])
    assert "18 groups hold 86 members" in found["figure"]["note"] and "68 are repeats" in found["figure"]["note"]
    svg = str(found["figure"]["svg"])
    assert all(name in svg for name in ("2 alike", "3 alike", "11 to 30 alike", "31 to 100 alike")) and "4 to 5" not in svg
    assert duplicates(funnel()["steps"][0]) is None


def test_a_step_that_adds_documents_says_so():
    step = {"name": "chunk", "in": size(10, 1000, None), "out": size(35, 1000, None)}
    row = step_view(step)
    assert row["change"]["documents"]["moved"] == "+25" and row["change"]["tokens"] is None and row["removed"] == []
    assert "+25 (250 %)" in Page(funnel_page({"steps": [step]})).text


def test_the_same_funnel_makes_the_same_page(full):
    assert funnel_page(full[0], Shown()) == full[1]


def test_the_table_for_a_terminal_keeps_brackets_and_chinese():
    found = funnel()
    found["steps"][1]["removed"]["[bold]太短"] = {"documents": 0, "bytes": 5, "examples": []}
    out = io.StringIO()
    Console(file=out, width=140).print(funnel_table(found))
    text = out.getvalue()
    for words in ("as it came", "near-duplicates", "−67", "7.1 %", "too few words", "[bold]太短", "changed: mojibake 12", "→ train", "26,000"):
        assert words in text, words
    Console(file=out).print(funnel_table({}))


def test_numbers_are_short_and_never_round_to_a_lie():
    assert [n_bytes(n) for n in (0, 512, 1234, 5_000_000, 2_500_000_000)] == ["0 B", "512 B", "1.23 kB", "5 MB", "2.5 GB"]
    assert [data_charts.percent(x) for x in (0, 0.0001, 0.125, 0.5, 0.9999, 1)] == ["0 %", "< 0.1 %", "12.5 %", "50 %", "> 99.9 %", "100 %"]
    assert data_charts.label("近似去重近似去重近似去重近似去重") == "近似去重近似去重近似…" and data_charts.label("a\nb") == "a b"
