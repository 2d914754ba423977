"""Counting a pile of documents: by hand on a few, parts that add up, memory that is bounded and says by how much it errs."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest

from zero2llm.data.stats import EDGES, SINGLE, UNKNOWN, Stats, ranking, zipf

TEXTS = ("Don't panic, the THE the café’s menu.", "春眠不覺曉，處處聞啼鳥。", "Mixed 你好 and こんにちは, 한국어 слово 123.", "", "a" * 5000)


def filled(texts=TEXTS, **more) -> Stats:
    stats = Stats(**more)
    for i, text in enumerate(texts):
        stats.add(text, "zh" if "春" in text else "en" if i else None, [1, 2, 2 + i])
    return stats


def test_every_number_by_hand():
    value = filled().to_dict()
    assert value["documents"] == 5 and value["bytes"] == sum(len(t.encode()) for t in TEXTS)
    assert value["characters"] == sum(map(len, TEXTS)) and value["tokens"] == 15
    assert value["bytes_per_token"] == value["bytes"] / 15
    assert value["languages"][UNKNOWN] == {"documents": 1, "bytes": len(TEXTS[0].encode()), "tokens": 3}
    assert value["languages"]["zh"]["documents"] == 1 and list(value["languages"])[0] == "en"  # most bytes first
    words = dict(map(tuple, value["words"]))
    assert words["the"] == 3 and words["don't"] == 1 and words["café’s"] == 1 and words["處"] == 2 and words["слово"] == 1
    assert words["한국어"] == 1 and words["こ"] == 1 and "123" not in words and "，" not in words
    pairs = dict(map(tuple, value["pairs"]))
    assert pairs["處處"] == 1 and pairs["你好"] == 1 and "曉，" not in pairs and "曉處" not in pairs
    assert sum(pairs.values()) == 4 + 4 + 1 + 4
    assert dict(map(tuple, value["token_counts"])) == {1: 5, 2: 6, 3: 1, 4: 1, 5: 1, 6: 1}
    lengths = dict(zip(value["lengths"]["edges"], value["lengths"]["counts"], strict=True))
    assert lengths[0] == 1 and lengths[3981] == 1 and lengths[10] == 1 and lengths[25] == 2 and sum(lengths.values()) == 5


@pytest.mark.parametrize("n,edge", [(0, 0), (1, 1), (2, 2), (3, 3), (5, 4), (6, 6), (99, 63), (100, 100), (10**8 + 5, 10**8)])
def test_a_length_falls_into_the_bin_that_begins_at_or_below_it(n, edge):
    from zero2llm.data import stats as module

    index = module.bisect_right(EDGES, n) - 1
    assert EDGES[index] == edge and list(EDGES) == sorted(set(EDGES))


def test_parts_add_up_to_the_whole_and_survive_json():
    whole, parts = filled(), Stats()
    for i, text in enumerate(TEXTS):
        part = Stats()
        part.add(text, "zh" if "春" in text else "en" if i else None, [1, 2, 2 + i])
        parts.merge(Stats.from_dict(json.loads(json.dumps(part.to_dict(), ensure_ascii=False))))
    assert parts.to_dict() == whole.to_dict() == Stats.from_dict(whole.to_dict()).to_dict()


def test_tokens_are_none_unless_every_document_was_encoded():
    stats = filled()
    stats.add("no ids here")
    value = stats.to_dict()
    assert value["tokens"] is None and value["bytes_per_token"] is None and value["languages"]["zh"]["tokens"] is None
    assert Stats.from_dict(value).encoded == 5
    assert Stats().to_dict()["tokens"] is None and filled(("a",)).to_dict()["tokens"] == 3


def test_a_report_lists_less_and_refuses_to_be_added_up():
    short = filled().to_dict(most=3)
    assert len(short["words"]) == 3 and short["distinct"]["words"] > 3 and short["zipf"] == filled().to_dict()["zipf"]
    with pytest.raises(ValueError, match="list 3 of .* words: they were written for a report"):
        Stats.from_dict(short)


def test_memory_is_bounded_and_the_error_is_known():
    dice, true, stats = random.Random(7), Counter(), Stats(most=200)
    for _ in range(400):
        words = [f"w{chr(97 + int(dice.paretovariate(0.6)) % 26)}{chr(97 + int(dice.paretovariate(0.4)) % 26)}x" for _ in range(40)]
        true.update(words)
        stats.add(" ".join(words))
        assert len(stats.words) <= 200
    assert len(true) > 400 and stats.undercount["words"] > 0
    for word, n in true.items():
        assert n - stats.undercount["words"] <= stats.words[word] <= n
    top = [word for word, n in ranking(true) if n > 3 * stats.undercount["words"]]
    assert top and set(top) <= {w for w, _ in stats.to_dict(most=len(top) + 20)["words"]}


def test_cut_counts_do_not_depend_on_the_order_within_a_document():
    one, two = Stats(most=10), Stats(most=10)
    words = [chr(97 + i) * 2 for i in range(26)]
    one.add(" ".join(words))
    two.add(" ".join(reversed(words)))
    assert one.to_dict() == two.to_dict() and [w for w, _ in one.to_dict()["words"]] == ["aa", "bb", "cc", "dd", "ee"]


def test_zipf_of_a_harmonic_list():
    line = zipf([1000 // r for r in range(1, 1001)])
    assert line["rank"][0] == 1 and line["rank"][-1] == 1000 and line["count"][0] == 1000 and line["count"][-1] == 1
    assert all(n == 1000 // r for r, n in zip(line["rank"], line["count"], strict=True)) and len(line["rank"]) < 61
    assert zipf([]) == {"rank": [], "count": []}


def test_wrong_use():
    with pytest.raises(ValueError, match="most = 1"):
        Stats(most=1)
    with pytest.raises(ValueError):
        Stats().add("half \ud800")
    value = filled().to_dict()
    value["lengths"]["edges"] = [0, 1]
    with pytest.raises(ValueError, match="other length bins"):
        Stats.from_dict(value)


def bug_case(monkeypatch, module):
    monkeypatch.setattr(module, "WORD", module.re.compile("[A-Za-z]+"))


def bug_pairs_do_not_overlap(monkeypatch, module):
    monkeypatch.setattr(module, "PAIR", module.re.compile(f"([{SINGLE}]{{2}})"))


def bug_length_bin_one_too_high(monkeypatch, module):
    monkeypatch.setattr(module, "bisect_right", lambda edges, n: min(__import__("bisect").bisect_left(edges, n) + 1, len(edges)))


def bug_no_undercount(monkeypatch, module):
    right = module.Stats._prune

    def prune(self):
        right(self)
        self.undercount = {"words": 0, "pairs": 0}

    monkeypatch.setattr(module.Stats, "_prune", prune)


def bug_ties_in_order_of_counting(monkeypatch, module):
    monkeypatch.setattr(module, "ranking", lambda counts: sorted(counts.items(), key=lambda item: -item[1]))


def bug_merge_forgets_languages(monkeypatch, module):
    right = module.Stats.merge

    def merge(self, other):
        kept = {code: list(sizes) for code, sizes in self.languages.items()}
        right(self, other)
        self.languages = kept or self.languages

    monkeypatch.setattr(module.Stats, "merge", merge)


BUGS = {
    bug_case: test_every_number_by_hand,
    bug_pairs_do_not_overlap: test_every_number_by_hand,
    bug_length_bin_one_too_high: lambda: test_a_length_falls_into_the_bin_that_begins_at_or_below_it(5, 4),
    bug_no_undercount: test_memory_is_bounded_and_the_error_is_known,
    bug_ties_in_order_of_counting: test_cut_counts_do_not_depend_on_the_order_within_a_document,
    bug_merge_forgets_languages: test_parts_add_up_to_the_whole_and_survive_json,
}


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_planted_bugs_are_caught(bug, monkeypatch):
    from zero2llm.data import stats as module

    if bug is bug_ties_in_order_of_counting:  # the test imported the right one by name
        monkeypatch.setitem(globals(), "ranking", module.ranking)
    bug(monkeypatch, module)
    with pytest.raises((AssertionError, KeyError)):
        BUGS[bug]()
