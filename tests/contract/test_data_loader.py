"""Rows and loaders: every target exactly once an epoch, exact resume, the same batch for any number of ranks."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zero2llm.core.batch import IGNORE
from zero2llm.data.inspect import inspect_html, inspect_terminal
from zero2llm.data.loader import Loader
from zero2llm.data.pack import best_fit, concat_rows, fill_row
from zero2llm.data.rows import ConversationRows, DocumentRows, PairRows
from zero2llm.data.shards import build_shards

EOS, PAD = 0, 1


class Ids:
    """As much of a tokenizer as token files need. Two control tokens, then ordinary ones."""

    vocab_size = 70_000

    def fingerprint(self): return "ids"
    def byte_lengths(self): return [0, 0] + [1] * (self.vocab_size - 2)
    def show(self, i): return {EOS: "<|end|>", PAD: "<|pad|>"}.get(i, f"<b>{i}&\"'")


@pytest.fixture
def make(tmp_path):
    """Token files from items; closed at the end, or Windows could not delete them."""
    opened = []

    def build(items):
        opened.append(build_shards(items, tmp_path / f"d{len(opened)}", tokenizer=Ids(), key="k", kind="test"))
        return opened[-1]

    yield build
    for shards in opened:
        shards.close()


def numbered(lengths):
    """Documents whose every text token is different: [EOS, 2, 3], [EOS, 4] ..."""
    items, at = [], 2
    for n in lengths:
        items.append(([EOS, *range(at, at + n)], None))
        at += n
    return items


LENGTHS = [0, 1, 5, 30, 2, 6, 7, 8, 100, 3, 0, 13]


def targets(batches):
    return Counter(label for b in batches for label in b.labels[b.labels != IGNORE].tolist())


@pytest.mark.parametrize("seq_len", [2, 7, 8, 63, 500])
@pytest.mark.parametrize("seed", [None, 5])
def test_every_target_exactly_once_an_epoch(make, seq_len, seed):
    source = DocumentRows(make(numbered(LENGTHS)), seq_len, PAD, EOS, seed)
    batches = list(Loader(source, 3, seed=5, repeat=False))
    total = sum(LENGTHS)
    expected = Counter({token: 1 for token in range(2, 2 + total)}) + Counter({EOS: len(LENGTHS)})
    assert targets(batches) == expected  # each document's end is a target too, and PAD never is
    rows = sum(len(b) for b in batches)
    assert rows == len(source) == -(-(total + len(LENGTHS)) // seq_len)
    padding = sum(int((b.seq.seg == 0).sum()) for b in batches)
    assert padding == rows * seq_len - total - len(LENGTHS) < seq_len  # only the last row is padded
    for b in batches:
        assert b.tokens.dtype == b.labels.dtype == b.seq.pos.dtype == torch.int64 and b.seq.seg.dtype == torch.int32
        assert (b.tokens[b.seq.seg == 0] == PAD).all() and (b.labels[b.seq.seg == 0] == IGNORE).all()


@pytest.mark.parametrize("seq_len", [7, 31])
def test_a_label_is_the_next_token_of_its_document(make, seq_len):
    items = numbered(LENGTHS)
    follows = {}
    for ids, _ in items:
        follows |= dict(zip(ids[1:], [*ids[2:], EOS], strict=False))
    starts = {ids[1] if len(ids) > 1 else EOS for ids, _ in items}
    for batch in Loader(DocumentRows(make(items), seq_len, PAD, EOS, 5), 2, seed=5, repeat=False):
        for tokens, labels, pos, seg in zip(batch.tokens, batch.labels, batch.seq.pos, batch.seq.seg, strict=True):
            for t in range(int((seg != 0).sum())):
                token, label = int(tokens[t]), int(labels[t])
                assert (label in starts) if token == EOS else (label == follows[token])
                new = t == 0 or seg[t] != seg[t - 1]
                assert int(pos[t]) == (0 if new else int(pos[t - 1]) + 1)
                assert (token == EOS) <= new  # EOS stands only where a document begins


def test_documents_never_share_a_segment(make):
    items = [([EOS] + [d + 2] * 5, None) for d in range(9)]
    for batch in Loader(DocumentRows(make(items), 7, PAD, EOS, 5), 2, seed=5, repeat=False):
        for tokens, seg in zip(batch.tokens, batch.seq.seg, strict=True):
            for number in set(seg.tolist()) - {0}:
                assert len(set(tokens[seg == number].tolist()) - {EOS}) <= 1


def test_the_rows_of_a_long_document_are_spread(make):
    source = DocumentRows(make(numbered([3000])), 10, PAD, EOS, 5)
    first = next(iter(Loader(source, 8, seed=5)))
    begins = sorted(first.tokens[:, 0].tolist())
    assert max(begins) - min(begins) > 800


def fingerprint(batch):
    return [x.tolist() for x in (batch.tokens, batch.labels, batch.seq.pos, batch.seq.seg)]


def masked(n, rng):
    items = []
    for _ in range(n):
        length = int(rng.integers(2, 30))
        mask = rng.integers(0, 2, length)
        mask[-1] = 1
        items.append((rng.integers(2, 90, length).tolist(), mask.tolist()))
    return items


def source_of(kind, make, seed=5):
    rng = np.random.default_rng(0)
    if kind == "documents":
        return DocumentRows(make(numbered(LENGTHS)), 7, PAD, EOS, seed)
    if kind == "conversations":
        return ConversationRows(make(masked(40, rng)), 31, PAD, seed)
    return PairRows(make(masked(22, rng)), PAD, seed)


KINDS = ["documents", "conversations", "pairs"]


@pytest.mark.parametrize("kind", KINDS)
def test_resume_equals_uninterrupted(make, kind):
    source = source_of(kind, make)
    whole = [fingerprint(b) for b in islice(Loader(source, 4, seed=5), 30)]  # several epochs
    assert 30 * 4 > 3 * len(source) * source.unit
    for stop in (0, 1, 4, 7, 13, 29):
        loader = Loader(source, 4, seed=5)
        head = [fingerprint(b) for b in islice(loader, stop)]
        state = json.loads(json.dumps(loader.state_dict()))
        other = Loader(source_of(kind, make), 4, seed=5)
        other.load_state_dict(state)
        assert head + [fingerprint(b) for b in islice(other, 30 - stop)] == whole


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_see_the_batch_of_one_process(make, kind, world):
    source = source_of(kind, make)
    ranks = [iter(Loader(source, 8, seed=5, rank=r, world=world)) for r in range(world)]
    for batch in islice(Loader(source, 8, seed=5), 12):
        shares = [next(r) for r in ranks]
        assert [len(s) for s in shares] == [8 // world] * world
        joined = [row[row_seg != 0].tolist() for s in shares for row, row_seg in zip(s.tokens, s.seq.seg, strict=True)]
        assert joined == [row[seg != 0].tolist() for row, seg in zip(batch.tokens, batch.seq.seg, strict=True)]
        assert sum((targets([s]) for s in shares), Counter()) == targets([batch])


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_lost_between_epochs(make, kind):
    """Batches that do not divide an epoch: n epochs of rows hold every row n times."""
    source = source_of(kind, make)
    n, unit = len(source), source.unit
    rows = 4 * unit
    assert n % 4
    count = targets if kind == "documents" else whole_rows  # documents are cut elsewhere in each epoch
    once = count(Loader(source, rows, seed=5, repeat=False))
    assert count(islice(Loader(source, rows, seed=5), n)) == Counter({item: 4 * c for item, c in once.items()})


def whole_rows(batches):
    return Counter(str(row) for b in batches for row in _plain(b))


def _plain(batch):
    return [(t[s != 0].tolist(), l[s != 0].tolist()) for t, l, s in zip(batch.tokens, batch.labels, batch.seq.seg, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_epochs_and_seeds_differ(make, kind):
    order = lambda seed, epoch: fingerprint(source_of(kind, make, seed).batch([(epoch, u) for u in range(4)]))
    assert order(5, 0) == order(5, 0) and order(5, 0) != order(5, 1) and order(5, 0) != order(6, 0)


def test_a_position_in_other_data_is_refused(make):
    loader = Loader(source_of("documents", make), 4, seed=5)
    state = loader.state_dict()
    other = numbered(LENGTHS)
    other[3][0][2] = 60_000  # one token
    for name, wrong in [
        ("seed", Loader(source_of("documents", make), 4, seed=6)),
        ("rows", Loader(source_of("documents", make), 2, seed=5)),
        ("seq_len", Loader(DocumentRows(make(numbered(LENGTHS)), 8, PAD, EOS, 5), 4, seed=5)),
        ("data", Loader(DocumentRows(make(other), 7, PAD, EOS, 5), 4, seed=5)),
    ]:
        before = wrong.step
        with pytest.raises(ValueError, match=f"cannot resume: .*({name}|units)"):
            wrong.load_state_dict(state)
        assert wrong.step == before


def test_too_little_data_and_odd_ranks(make):
    source = source_of("documents", make)
    with pytest.raises(ValueError, match=f"fills {len(source)} rows, one batch needs 400"):
        Loader(source, 400, seed=5)
    assert sum(map(len, Loader(source, 400, seed=5, repeat=False))) == len(source)
    for bad in ({"rows": 6, "world": 4}, {"rows": 0}):
        with pytest.raises(ValueError, match="does not divide"):
            Loader(source, seed=5, **bad)
    with pytest.raises(ValueError, match="groups of 2"):
        Loader(source_of("pairs", make), 3, seed=5)


def test_conversation_labels_follow_the_mask(make):
    """The first trained token is a target (a mask one late drops it), the end of turn is one, and nothing else is."""
    items = [([10, 11, 12, 13, EOS], [0, 0, 1, 1, 1]), ([20, 21, EOS, 23, 24, EOS], [0, 1, 1, 0, 1, 1]), ([30, EOS], [0, 1])]
    (batch,) = Loader(ConversationRows(make(items), 13, PAD, None), 1, seed=5, repeat=False)
    assert batch.tokens.tolist() == [[20, 21, EOS, 23, 24, EOS, 10, 11, 12, 13, EOS, 30, EOS]]
    assert batch.labels.tolist() == [[21, EOS, IGNORE, 24, EOS, IGNORE, IGNORE, 12, 13, EOS, IGNORE, EOS, IGNORE]]
    assert batch.seq.pos.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 0, 1]]
    assert batch.seq.seg.tolist() == [[1] * 6 + [2] * 5 + [3] * 2]


def test_conversations_are_neither_split_nor_lost(make):
    items = masked(60, np.random.default_rng(1))
    shards = make(items)
    found = []
    for batch in Loader(ConversationRows(shards, 31, PAD, 5), 4, seed=5, repeat=False):
        assert batch.tokens.shape[1] == 31
        for tokens, seg in zip(batch.tokens, batch.seq.seg, strict=True):
            found += [tokens[seg == n].tolist() for n in sorted(set(seg.tolist()) - {0})]
    assert sorted(found) == sorted(ids for ids, _ in items)


def test_pairs_stand_side_by_side(make):
    items = []
    for i in range(6):
        prompt, good, bad = [10 + i] * 3, [20 + i] * (i + 1), [30 + i] * (20 if i == 3 else 2)
        items += [(prompt + good + [EOS], [0] * 3 + [1] * (i + 2)), (prompt + bad + [EOS], [0] * 3 + [1] * (len(bad) + 1))]
    source = PairRows(make(items), PAD, 5)
    for batch in Loader(source, 4, seed=5, repeat=False):
        assert batch.group == 2 and batch.tokens.shape[1] % 16 == 0
        longest = int((batch.seq.seg != 0).sum(1).max())
        assert batch.tokens.shape[1] - longest < 16
        pair = batch.extra["pair"]
        assert pair[0::2].tolist() == pair[1::2].tolist()
        for row, i in enumerate(pair.tolist()):
            ids, mask = items[2 * i + row % 2]
            assert batch.tokens[row, : len(ids)].tolist() == ids and int(batch.seq.seg[row].sum()) == len(ids)
            assert batch.labels[row][batch.labels[row] != IGNORE].tolist() == [t for t, m in zip(ids, mask, strict=True) if m]
        for part in batch.split(3):
            assert len(part) % 2 == 0 and part.extra["pair"][0] == part.extra["pair"][1]


def test_what_trains_nothing_is_named(make):
    with pytest.raises(ValueError, match="item 1 has no trained token"):
        ConversationRows(make([([5, 6], [0, 1]), ([5, 6], [0, 0])]), 8, PAD, 5)
    with pytest.raises(ValueError, match="item 0 has no trained token"):  # nothing can predict a first token
        PairRows(make([([5, 6], [1, 0]), ([5, 6], [0, 1])]), PAD, 5)
    with pytest.raises(ValueError, match="no loss mask"):
        ConversationRows(make([([5, 6], None)]), 8, PAD, 5)
    with pytest.raises(ValueError, match="3 items; pairs"):
        PairRows(make([([5, 6], [0, 1])] * 3), PAD, 5)
    with pytest.raises(ValueError, match="item 0 has 9 tokens, a row 8"):
        ConversationRows(make([([5] * 9, [1] * 9)]), 8, PAD, 5)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=80), st.integers(40, 64))
def test_best_fit_places_everything_once(lengths, seq_len):
    lengths = np.array(lengths)
    rows = best_fit(lengths, seq_len)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    filled = [int(lengths[row].sum()) for row in rows]
    assert max(filled) <= seq_len
    # two rows that would fit into one: a fit was missed
    assert all(a + b > seq_len for a, b in zip(sorted(filled), sorted(filled)[1:], strict=False))


def test_best_fit_takes_the_fullest_row():
    assert best_fit(np.array([6, 5, 4, 3]), 10) == [[0, 2], [1, 3]]
    assert best_fit(np.array([7, 6, 3]), 10) == [[0, 2], [1]]
    assert best_fit(np.array([6, 7, 3]), 10) == [[1, 2], [0]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 25), min_size=1, max_size=30), st.integers(2, 20), st.integers(0, 2**32 - 1))
def test_concat_rows_cover_the_stream(lengths, seq_len, seed):
    lengths = np.array(lengths)
    order = np.random.default_rng(seed).permutation(len(lengths))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.arange(offsets[-1]) + 2
    pieces = concat_rows(lengths, order, seq_len)
    stream = np.concatenate([tokens[offsets[d] : offsets[d + 1]] for d in order])
    nexts = np.concatenate([np.append(tokens[offsets[d] + 1 : offsets[d + 1]], EOS) for d in order])
    parts = [fill_row(pieces[pieces[:, 0] == r], tokens, offsets, seq_len, PAD, EOS) for r in range(-(-len(stream) // seq_len))]
    row, labels, seg = (np.concatenate(x) for x in zip(*parts, strict=True))
    n = len(stream)
    assert (row[:n] == stream).all() and (labels[:n] == nexts).all() and (seg[:n] > 0).all()
    assert (row[n:] == PAD).all() and (labels[n:] == IGNORE).all() and (seg[n:] == 0).all()


def test_inspect_escapes_and_marks(make, capsys):
    items = [([10, 11, 12, EOS], [0, 0, 1, 1]), ([20, 21, 22], [0, 1, 1])]
    (batch,) = Loader(ConversationRows(make(items), 9, PAD, None), 1, seed=5, repeat=False)
    page = inspect_html(batch, Ids(), 3)
    assert "<b>" not in page and "&lt;b&gt;12&amp;" in page and "<script" not in page and "http" not in page
    assert page.count('class="t"') == 4 + 1  # four trained tokens, one in the key
    assert page.count('class="p"') == 2 + 1 and page.count("n s") == 2 + 1
    assert 'data-tip="id 11, position 1, document 1, predicts 12' in page
    inspect_terminal(batch, Ids(), 1)
    out = capsys.readouterr().out
    assert "4 targets" in out and "<|pad|>" not in out


def test_inspect_shows_the_end_of_a_document(make):
    """The end is a target that no position holds as its next token; a page without it would hide a missing one."""
    (batch,) = Loader(DocumentRows(make(numbered([3, 2])), 5, PAD, EOS, None), 2, seed=5, repeat=False)
    page = inspect_html(batch, Ids(), 2)
    row0, row1 = page.split("<h2>row ")[1:]
    assert row0.count('class="e"') == 2 and row0.count('class="e">&lt;|end|&gt;') == 1  # an end, and a cut at the border
    assert row1.count('class="e">&lt;|end|&gt;') == 1


def test_inspect_does_not_wrap_around_a_row(make):
    """One document fills the row and goes on: its last label must not colour the first token."""
    (batch,) = Loader(DocumentRows(make(numbered([9])), 5, PAD, EOS, None), 2, seed=5, repeat=False)
    rows = inspect_html(batch, Ids(), 2).split("<h2>row ")[1:]
    assert [row.count('class="n s"') for row in rows] == [1, 1]
