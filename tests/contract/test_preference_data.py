"""Data of preference objectives: judged rows and their mismatched ones, margins, pairs of one answer, what is refused by line."""

from __future__ import annotations

import json

import pytest
import torch

from tests.contract.test_data_shards import Bytes
from zero2llm.core.batch import IGNORE
from zero2llm.data.chats import judged_items, pair_items
from zero2llm.data.judged_rows import JudgedRows
from zero2llm.data.loader import Loader
from zero2llm.data.rows import PairRows
from zero2llm.data.schemas import as_preference, judged, preferences
from zero2llm.data.shards import build_shards
from zero2llm.data.sources import BadRecords

WORDS = "sea ship whale dark sail hand rope fish".split()


def lines(path, *records) -> list[str]:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return [str(path)]


def shards(folder, items, kind="kto"):
    folder.mkdir(parents=True, exist_ok=True)
    return build_shards(items, folder / f"{kind}-{len(list(folder.iterdir()))}", tokenizer=Bytes(), key="k", kind=kind)


def answers(n: int = 12) -> list:
    """Items of 7 or 8 tokens of which neighbours share a prompt, of 2 to 5 tokens: (ids, mask, label)."""
    made = []
    for i in range(n):
        prompt, answer = [10 + i // 3] * (2 + i // 3), [100 + i, *range(50, 54 - i // 3 + i % 2)]
        made.append((prompt + answer, [0] * len(prompt) + [1] * len(answer), {"label": i % 3 == 0}))
    return made


def test_mismatched_rows_by_hand(tmp_path):
    items = answers()
    begins = [m.index(1) for _, m, _ in items]
    rows = JudgedRows(shards(tmp_path / "j", items), 8, 1, None)
    batch = rows.numbered(list(range(12)))
    assert batch.group == 2 and batch.extra["label"].tolist() == [i % 3 == 0 for i in range(12) for _ in (0, 1)]
    chosen = set()
    for i, (ids, _, _) in enumerate(items):
        j = next(k for k in range(12) if 100 + k in batch.tokens[2 * i + 1].tolist())
        chosen.add(j)
        assert items[j][0][: begins[j]] != ids[: begins[i]], "the prompt of another answer"
        for row, want, begin in ((2 * i, ids, begins[i]), (2 * i + 1, (ids[: begins[i]] + items[j][0][begins[j] :])[:8], begins[i])):
            assert batch.tokens[row, : len(want)].tolist() == want and int(batch.seq.seg[row].sum()) == len(want)
            assert batch.labels[row][batch.labels[row] != IGNORE].tolist() == want[begin:]
    assert batch.tokens.shape[1] == 8 and len(chosen) > 6


def test_judged_rows_do_not_depend_on_ranks_or_epochs(tmp_path):
    rows = JudgedRows(shards(tmp_path, answers()), 12, 1, seed=3)
    whole = iter(Loader(rows, 8, seed=3))
    ranks = [iter(Loader(rows, 8, seed=3, rank=r, world=2)) for r in (0, 1)]
    for _ in range(5):
        batch, parts = next(whole), [next(r) for r in ranks]
        assert torch.equal(batch.extra["label"], torch.cat([p.extra["label"] for p in parts]))
        for row, part in zip(range(0, 8, 4), parts, strict=True):
            n = part.tokens.shape[1]
            assert torch.equal(batch.tokens[row : row + 4, :n], part.tokens) and (batch.seq.seg[row : row + 4, n:] == 0).all()
    seen = {tuple(b.tokens[1][:4].tolist()) for b in (rows.batch([(e, int((rows.order(e) == 5).argmax()))]) for e in range(4))}
    assert len(seen) == 1


def test_judged_rows_refuse_what_cannot_be_compared(tmp_path):
    same = [([7, 8, 20 + i], [0, 0, 1], {"label": True}) for i in range(4)]
    with pytest.raises(ValueError, match="all 4 answers are to the same prompt"):
        JudgedRows(shards(tmp_path / "a", same), 8, 1, None)
    with pytest.raises(ValueError, match="of no answer whether it is good"):
        JudgedRows(shards(tmp_path / "b", [item[:2] for item in answers()]), 8, 1, None)


def test_pairs_are_read_as_two_judged_answers(tmp_path):
    files = lines(tmp_path / "a.jsonl", {"prompt": "q", "chosen": "yes", "rejected": "no"}, {"prompt": "p", "completion": "x", "label": False},
                  {"prompt": "q", "chosen": "a", "rejected": "a"}, {"prompt": "r", "chosen": "b", "rejected": "c"})  # fmt: skip
    bad = BadRecords()
    found = list(judged(files, bad))
    assert [(j.prompt[0]["content"], j.completion[0]["content"], j.label) for j in found] == [
        ("q", "yes", True), ("q", "no", False), ("p", "x", False), ("r", "b", True), ("r", "c", False),
    ]  # fmt: skip
    assert dict(bad.noted) == {"pairs read as two judged answers each": 2} and bad.total == 1 and "line 3" in bad.found[0]
    assert [item[2] for item in judged_items(found, Bytes(), 40, bad)] == [{"label": label} for label in (True, False, False, True, False)]


def test_one_answer_twice_is_left_out_and_listed(tmp_path):
    records = [{"prompt": w, "chosen": w, "rejected": w + " "} for w in WORDS[:2]] + [{"prompt": "q", "chosen": "good", "rejected": "bad"}]
    bad = BadRecords()
    items = list(pair_items(preferences(lines(tmp_path / "a.jsonl", *records), bad), Bytes(), 60, bad))
    assert len(items) == 2 and bad.total == 2 and "line 1: chosen and rejected are the same" in bad.found[0]

    class Deaf(Bytes):
        def encode(self, text):
            return super().encode(text.lower())

    bad = BadRecords()
    records = [{"prompt": "q", "chosen": "Yes", "rejected": "yes"}, {"prompt": "q", "chosen": "Yes", "rejected": "no"}]
    items = list(pair_items(preferences(lines(tmp_path / "b.jsonl", *records), bad), Deaf(), 60, bad))
    assert len(items) == 2 and "line 1: chosen and rejected are the same once the chat template" in bad.found[0]


@pytest.mark.parametrize(
    "record,match",
    [
        ({"prompt": "q", "chosen": "", "rejected": "b"}, "line 2: field 'chosen' holds no text"),
        ({"prompt": "q", "chosen": "a", "rejected": [{"role": "assistant", "content": " "}]}, "line 2: message 0 .assistant.: content holds no text"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": "much"}, "line 2: margin is 'much'"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": True}, "line 2: margin is True"),
        ({"prompt": "q" * 60, "chosen": "a", "rejected": "b"}, "line 2: 67 tokens do not fit into 60"),
    ],
)
def test_what_is_refused_by_line(tmp_path, record, match):
    files = lines(tmp_path / "a.jsonl", {"prompt": "q", "chosen": "a", "rejected": "b"}, record)
    bad = BadRecords()
    with pytest.raises(ValueError, match=match):
        list(pair_items(preferences(files, bad), Bytes(), 60, bad))
    bad = BadRecords(skip=True)
    assert len(list(pair_items(preferences(files, bad), Bytes(), 60, bad))) == 2 and bad.total == 1


def test_margins_reach_the_batch(tmp_path):
    records = [{"prompt": "q", "chosen": w, "rejected": "no"} | ({"margin": i} if i else {}) for i, w in enumerate(WORDS)]
    assert as_preference(records[2]).margin == 2.0 and as_preference(records[0]).margin == 0.0
    bad = BadRecords()
    for margins in (True, False):
        made = pair_items(preferences(lines(tmp_path / "a.jsonl", *records), bad), Bytes(), 60, bad, margins=margins)
        batch = PairRows(shards(tmp_path / f"pairs{margins}", made, "pairs"), 1, None).numbered([3, 0])
        assert batch.extra["pair"].tolist() == [3, 3, 0, 0]
        assert ("margin" in batch.extra) == margins
    batch = PairRows(shards(tmp_path / "m", pair_items(preferences([str(tmp_path / "a.jsonl")], bad), Bytes(), 60, bad, margins=True), "pairs"), 1, None).numbered([3, 0])
    assert batch.extra["margin"].tolist() == [3, 3, 0, 0]


def test_rows_are_no_wider_than_the_model_reads(tmp_path):
    items = [([5] * 18, [0] + [1] * 17), ([6] * 3, [0, 1, 1])]
    assert PairRows(shards(tmp_path, items, "pairs"), 1, None, 18).numbered([0]).tokens.shape == (2, 18)
    assert PairRows(shards(tmp_path, items, "pairs"), 1, None).numbered([0]).tokens.shape == (2, 32)
