"""Deduplication against datasketch, rensa and simhash: the same curve, the same law, the same fingerprints."""

import numpy as np
import pytest

from tests.golden import test_dedup as golden
from zero2llm.data import shingles as sh
from zero2llm.data.steps import minhash, simhash
from zero2llm.data.steps.minhash import MinHashConfig, Permutations, chance

BANDS, ROWS, SLOTS, PAIRS, SIZE = 21, 6, 126, 300, 80


def datasketch_pairs(similarity):
    """(PAIRS,) bool: whether datasketch's index returns the pair; (PAIRS,) its estimates."""
    datasketch = pytest.importorskip("datasketch")
    sets = [part for seed in range(PAIRS) for part in golden.pair_of_sets(similarity, SIZE, 10_000 + seed)[:2]]
    made = datasketch.MinHash.bulk([[x.tobytes() for x in part] for part in sets], num_perm=SLOTS, seed=1)
    index = datasketch.MinHashLSH(num_perm=SLOTS, params=(BANDS, ROWS))
    for i in range(0, 2 * PAIRS, 2):
        index.insert(i, made[i])
    found = np.array([i - 1 in index.query(made[i]) for i in range(1, 2 * PAIRS, 2)])
    return found, np.array([made[i].jaccard(made[i + 1]) for i in range(0, 2 * PAIRS, 2)])


def our_pairs(engine, similarity, threshold=0.0):
    rows, exact = golden.signed_pairs(engine, similarity, SIZE, PAIRS)
    step = minhash.MinHash(MinHashConfig(bands=BANDS, rows=ROWS, threshold=threshold), engine)
    verdict = step.decide(np.pad(rows, ((0, 0), (0, 1))), np.arange(2 * PAIRS))
    return (
        ~verdict.keep[1::2],
        minhash.agreement(rows, np.arange(0, 2 * PAIRS, 2), np.arange(1, 2 * PAIRS, 2), SLOTS),
        exact,
    )


@pytest.mark.parametrize("similarity", [0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
def test_recall_curve_is_that_of_datasketch(similarity):
    """Same slots, bands and rows: both find as many pairs, within three standard deviations of their difference."""
    theirs, estimates = datasketch_pairs(similarity)
    ours, own, exact = our_pairs(Permutations(SLOTS, 0), similarity)
    p = chance(exact, BANDS, ROWS)
    sd = (2 * p * (1 - p) / PAIRS) ** 0.5
    assert abs(ours.mean() - theirs.mean()) <= 3 * sd + 1 / PAIRS, (ours.mean(), theirs.mean(), p)
    sd = (exact * (1 - exact) / SLOTS) ** 0.5
    assert own.std() < 1.2 * sd and estimates.std() < 1.2 * sd
    assert abs(own.mean() - estimates.mean()) < 3 * sd * (2 / PAIRS) ** 0.5


@pytest.mark.parametrize("similarity", [0.3, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("size", [20, 300])
def test_rensa_estimates_the_same(size, similarity):
    pytest.importorskip("rensa")
    golden.check_unbiased(minhash.rensa_engine(SLOTS, 0), SLOTS, size, similarity)


@pytest.mark.parametrize("similarity", [0.4, 0.6, 0.8])
def test_rensa_finds_no_less(similarity):
    """Its slots are not independent: the estimate varies less (0.75 of the formula's), so the curve is no shallower."""
    pytest.importorskip("rensa")
    found, estimates, exact = our_pairs(minhash.rensa_engine(SLOTS, 0), similarity)
    p = chance(exact, BANDS, ROWS)
    assert abs(found.mean() - p) < 3 * (p * (1 - p) / PAIRS) ** 0.5 + 0.05
    assert estimates.std() < 1.1 * (exact * (1 - exact) / SLOTS) ** 0.5


def test_documents_found_are_those_that_datasketch_finds():
    """On texts, with shingles cut by each side's own code: of planted pairs at 0.9 and above both find all."""
    datasketch = pytest.importorskip("datasketch")
    texts, truth = golden.planted("zh", 300, 100)
    made = datasketch.MinHash.bulk(
        [[" ".join(t).encode() for t in golden.tuples_of(text)] for text in texts], num_perm=SLOTS, seed=1
    )
    index = datasketch.MinHashLSH(num_perm=SLOTS, params=(BANDS, ROWS))
    for i, sketch in enumerate(made):
        index.insert(i, sketch)
    verdict, _ = golden.judge(MinHashConfig(threshold=0).build(), golden.docs_of(texts))
    near = [(a, b) for b, (a, similarity) in truth.items() if similarity >= 0.9]
    assert len(near) > 20
    assert all(a in index.query(made[b]) for a, b in near) and all(verdict.group[b] == a for a, b in near)


def as_number(word):
    return int(word) if word.isdigit() else 0  # the library first asks with a word of its own


def test_fingerprint_is_that_of_the_library():
    """The package simhash with our hashes: features are counted, a tie is 0."""
    library = pytest.importorskip("simhash")
    for text in golden.TEXTS[:5]:
        hashes = sh.shingles([text, text[: len(text) // 2]], 1)[0]
        values, counts = np.unique(hashes, return_counts=True)
        features = {str(int(x)): int(n) for x, n in zip(values, counts, strict=True)}
        theirs = library.Simhash(features, f=64, hashfunc=as_number)
        assert int(simhash.fingerprint(hashes)[0]) == theirs.value
        other = library.Simhash(["1", "2", "3"], f=64, hashfunc=as_number)
        both = np.array([theirs.value, other.value], dtype=np.uint64)
        assert int(simhash.distance(both[:1], both[1:])[0]) == theirs.distance(other)


def test_search_is_that_of_the_library():
    library = pytest.importorskip("simhash")
    prints = golden.crowded(150, 3, 5)
    index = library.SimhashIndex([(str(i), library.Simhash(int(x), f=64)) for i, x in enumerate(prints)], f=64, k=3)
    theirs = {
        (min(i, int(j)), max(i, int(j)))
        for i, x in enumerate(prints)
        for j in index.get_near_dups(library.Simhash(int(x), f=64))
        if i != int(j)
    }
    ours = {
        tuple(sorted(p)) for a, b in simhash.near_pairs(prints, 3) for p in zip(a.tolist(), b.tolist(), strict=True)
    }
    assert ours == theirs
