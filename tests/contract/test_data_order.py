"""Orders without a list, rows without an index, mixtures and packing: each target once, the same for any cut."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.contract.test_data_loader import EOS, LENGTHS, PAD, Ids, fingerprint, numbered, targets
from zero2llm.core.batch import IGNORE
from zero2llm.data.loader import Loader
from zero2llm.data.mixture import BLOCK, MixtureRows, Phase, apportion
from zero2llm.data.pack import compare_packing, cut_rows
from zero2llm.data.rows import DocumentRows, FittedRows, StoredRows
from zero2llm.data.shards import build_shards, stream_items
from zero2llm.data.shuffle import Permutation


@given(st.integers(1, 3000), st.integers(0, 2**31), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_a_permutation_is_one(n, seed, epoch):
    order = Permutation(n, seed, epoch)
    places = order[np.arange(n)]
    assert sorted(places.tolist()) == list(range(n))
    assert int(order[n // 2]) == places[n // 2]


def test_permutations_differ_and_spread():
    n = 100_000
    a, b, c = (Permutation(n, *x)[np.arange(n)] for x in ((1, 0), (2, 0), (1, 1)))
    assert (a == b).mean() < 1e-3 and (a == c).mean() < 1e-3 and (a == np.arange(n)).mean() < 1e-3
    for x in (a, b, c):  # neighbours land far apart, and no tenth of the output is favoured by a tenth of the input
        assert abs(np.corrcoef(np.arange(n), x)[0, 1]) < 0.01
        assert abs(np.abs(np.diff(x)).mean() / (n / 3) - 1) < 0.02
        counts = np.bincount(x[: n // 10] // (n // 10), minlength=10)
        assert np.abs(counts - n / 100).max() < 5 * (n / 100) ** 0.5
    with pytest.raises(IndexError):
        Permutation(5, 0)[5]


def test_a_permutation_takes_no_memory():
    assert int(Permutation(10**15, 7)[10**15 - 1]) < 10**15


@pytest.fixture
def make(tmp_path):
    opened = []

    def build(items, limit=1 << 30):
        out = tmp_path / f"d{len(opened)}"
        opened.append(build_shards(items, out, tokenizer=Ids(), key="k", kind="test", limit=limit))
        return opened[-1]

    yield build
    for shards in opened:
        shards.close()


@pytest.mark.parametrize("kind", [StoredRows, FittedRows])
@pytest.mark.parametrize("seq_len", [2, 7, 63, 500])
@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("limit", [40, 1 << 30])
def test_every_target_exactly_once_an_epoch(make, kind, seq_len, seed, limit):
    source = kind(make([i for i in numbered(LENGTHS) if len(i[0]) <= 40], limit), seq_len, PAD, EOS, seed)
    kept = [n for n in LENGTHS if n < 40]
    n = len(source)
    for epoch in range(3):
        batches = [source.batch([(epoch, row)]) for row in range(n)]
        found, total = targets(batches), sum(kept)
        assert sum(found.values()) == total + len(kept) and found[EOS] == len(kept) and max(v for k, v in found.items() if k != EOS) == 1
        padding = sum(int((b.seq.seg == 0).sum()) for b in batches)
        assert padding == n * seq_len - total - len(kept)
        for b in batches:
            assert (b.tokens[b.seq.seg == 0] == PAD).all() and (b.labels[b.seq.seg == 0] == IGNORE).all()


def test_a_label_is_the_next_token(make):
    items = numbered(LENGTHS)
    follows = {}
    for ids, _ in items:
        follows |= dict(zip(ids[1:], [*ids[2:], EOS], strict=False))
    shards = make(items)
    for kind in (StoredRows, FittedRows):
        for batch in Loader(kind(shards, 31, PAD, EOS, 5), 2, seed=5, repeat=False):
            for tokens, labels, seg in zip(batch.tokens.tolist(), batch.labels.tolist(), batch.seq.seg.tolist(), strict=True):
                for token, label, number in zip(tokens, labels, seg, strict=True):
                    assert number == 0 or token == EOS or label == follows[token]


def test_stored_rows_cut_every_epoch_elsewhere(make):
    source = StoredRows(make(numbered([300])), 10, PAD, EOS, 5)
    begins = [{int(source.batch([(e, r)]).tokens[0, 0]) % 10 for r in range(len(source) - 1)} for e in range(6)]
    assert len({frozenset(b) for b in begins}) > 2


def test_fitted_rows_cut_only_what_is_too_long(make):
    lengths = np.array([5, 30, 3, 9, 10, 1, 12])
    pieces, rows = cut_rows(lengths, 10)
    whole = {d for d, o, n in pieces.tolist() if o == 0 and n == lengths[d]}
    assert whole == {0, 2, 3, 4, 5} and all(pieces[r][:, 2].sum() <= 10 for r in rows)
    assert sum(map(len, rows)) == len(pieces)
    report = compare_packing(lengths, 10)
    assert report["best_fit"]["cut"] == 0 and report["concat"]["cut"] == pytest.approx(2 / 7)
    assert report["concat"]["rows"] == 7 and report["best_fit"]["rows"] == len(rows)
    assert report["concat"]["padding"] == 0 and report["best_fit"]["padding"] == pytest.approx(1 - 70 / (10 * len(rows)))


def test_apportion():
    assert apportion([1, 1, 1], 4).tolist() == [2, 1, 1] and apportion([0.7, 0.3], 10).tolist() == [7, 3]
    assert apportion([1, 0], 5).tolist() == [5, 0]


def mixture(make, phases, seed=3):
    a, b = numbered([40] * 30), [([EOS, *[5000 + i for i in range(30)]], None)] * 8
    sources = [DocumentRows(make(items), 16, PAD, EOS, seed) for items in (a, b)]
    return MixtureRows(sources, phases, seed)


def test_mixture_keeps_its_weights_and_every_row_of_a_source_once(make):
    mixed = mixture(make, [Phase(0, (0.75, 0.25)), Phase(700, (0.1, 0.9))])
    places = [mixed.place(g) for g in range(3 * BLOCK)]
    for source in (0, 1):
        assert [k for s, k in places if s == source] == list(range(sum(s == source for s, _ in places)))
    counts = Counter(s for s, _ in places[:700])
    assert abs(counts[0] / 700 - 0.75) < 0.06
    assert Counter(s for s, _ in places[700 : 700 + BLOCK]) == {0: 102, 1: 922}
    assert mixed.before(2000).tolist() == [sum(s == i for s, _ in places[:2000]) for i in (0, 1)]
    assert mixed.epochs(2000)[1] > 10 > mixed.epochs(2000)[0]


def test_mixture_resumes_and_shares_exactly(make):
    mixed = mixture(make, [Phase(0, (1, 1)), Phase(20, (0, 1))])
    whole = [fingerprint(b) for b in islice(Loader(mixed, 4, seed=1), 12)]
    half = Loader(mixed, 4, seed=1)
    list(islice(half, 5))
    rest = Loader(mixed, 4, seed=1)
    rest.load_state_dict(half.state_dict())
    assert [fingerprint(b) for b in islice(rest, 7)] == whole[5:]
    ranks = [list(islice(Loader(mixed, 4, seed=1, rank=r, world=2), 12)) for r in (0, 1)]
    for i, (a, b) in enumerate(zip(*ranks, strict=True)):
        assert [x + y for x, y in zip(fingerprint(a), fingerprint(b), strict=True)] == whole[i]
    other = Loader(mixture(make, [Phase(0, (1, 1)), Phase(24, (0, 1))]), 4, seed=1)
    with pytest.raises(ValueError, match="phases"):
        other.load_state_dict(half.state_dict())


@pytest.mark.parametrize("phases", [[], [Phase(5, (1, 1))], [Phase(0, (1, 1)), Phase(0, (1, 0))], [Phase(0, (1,))], [Phase(0, (0, 0))]])
def test_a_mixture_that_cannot_be_is_refused(make, phases):
    with pytest.raises(ValueError):
        mixture(make, phases)


def test_items_over_several_files(make):
    items = [([EOS, *range(2, 2 + n)], [0] + [1] * n) for n in (3, 9, 4, 20, 1)]
    shards = make([(*item, {"label": i % 2 == 0, "image": f"图{i}.png"}) for i, item in enumerate(items)], limit=12)
    assert shards.manifest["files"] > 2
    for i, (ids, mask) in enumerate(items):
        a, b = shards.offsets[i : i + 2]
        assert shards.tokens[a:b].tolist() == ids and shards.mask[a:b].tolist() == mask
        assert shards.extra(i) == {"label": i % 2 == 0, "image": f"图{i}.png"}
    assert shards.tokens[2:30].tolist() == sum((ids for ids, _ in items), [])[2:30]
    with pytest.raises(ValueError, match="extra"):
        make([([1, 2], None, {"a": 1}), ([1, 2], None)])


def test_a_bare_stream_of_ids(tmp_path):
    file, tokenizer = tmp_path / "train.bin", Ids()
    tokenizer.bos_id = tokenizer.eos_id = EOS
    tokenizer.vocab_size = 50
    np.asarray([5, 6, EOS, EOS, 7, EOS, 8, 9], dtype=np.uint16).tofile(file)
    assert [ids for ids, _ in stream_items(file, tokenizer)] == [[EOS, 5, 6], [EOS, 7], [EOS, 8, 9]]
    tokenizer.vocab_size = 9
    with pytest.raises(ValueError, match="holds id 9"):
        list(stream_items(file, tokenizer))
    file.write_bytes(b"abc")
    with pytest.raises(ValueError, match="3 bytes"):
        list(stream_items(file, tokenizer))
