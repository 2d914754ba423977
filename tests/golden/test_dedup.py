"""Deduplication by hand: shingles, signatures and fingerprints in loops, exact search, planted near-duplicates."""

import random
from hashlib import blake2b
from itertools import combinations

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from zero2llm.data import shingles as sh
from zero2llm.data.document import Document, Removed
from zero2llm.data.sources import documents
from zero2llm.data.steps import minhash, simhash
from zero2llm.data.steps.exact import ExactConfig
from zero2llm.data.steps.lines import LinesConfig, pieces
from zero2llm.data.steps.minhash import MinHashConfig, Permutations, agreement, chance
from zero2llm.data.steps.simhash import SimHashConfig, fingerprint
from zero2llm.data.union import first_of_equal, join

WRAP = 1 << 64
TEXTS = (
    "It was the best of times, it was the WORST of times; it was the age of wisdom.",
    "床前明月光，疑是地上霜。舉頭望明月，低頭思故鄉。",
    "GPT-2 用 BPE 分词，each 汉字 is 3 bytes。",
    "two words",
    "字",
    "... !!! 。。。",
    "",
)

# Independent of the package: words by a regular expression, sets of tuples, Python integers.

UNIT = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Katakana}]|[\p{L}\p{M}\p{N}--[\p{Han}\p{Hiragana}\p{Katakana}]]+", regex.V1
)


def units_of(text):
    return UNIT.findall(text.lower())


def tuples_of(text, n=5):
    words = units_of(text)
    return [tuple(words[i : i + n]) for i in range(max(len(words) - n + 1, min(len(words), 1)))]


def jaccard(a, b):
    a, b = set(tuples_of(a)), set(tuples_of(b))
    return len(a & b) / len(a | b)


def mixed(x):
    x = ((x ^ (x >> 33)) * 0xFF51AFD7ED558CCD) % WRAP
    x = ((x ^ (x >> 33)) * 0xC4CEB9FE1A85EC53) % WRAP
    return x ^ (x >> 33)


def hash_by_loop(shingle, n):
    total = 0
    for word in (*shingle, *[None] * (n - len(shingle))):
        value = 0
        for j, letter in enumerate(word or ""):
            value += mixed((ord(letter) + 1) * 0x9E3779B97F4A7C15 % WRAP) * 0x9E3779B97F4A7C15**j
        total = total * 0xD1342543DE82EF95 + (mixed(value % WRAP) if word else 0)
    return mixed(total % WRAP)


def docs_of(texts):
    return [Document(text, f"line {i}") for i, text in enumerate(texts, 1)]


def judge(step, docs):
    """What the pipeline does: sign each, judge all, tell each. Returns (verdict, results)."""
    rows = [step.sign(doc) for doc in docs]
    counts = [len(r) for r in rows]
    verdict = step.decide(np.concatenate(rows), np.repeat(np.arange(len(docs)), counts))
    parts = np.split(verdict.keep, np.cumsum(counts)[:-1])
    return verdict, [step.apply(doc, part) for doc, part in zip(docs, parts, strict=True)]


def kept(results):
    return [i for i, result in enumerate(results) if not isinstance(result, Removed)]


# Shingles


@pytest.mark.parametrize("n", [1, 2, 5])
def test_shingles_equal_the_loop(n):
    hashes, at = sh.shingles(TEXTS, n)
    for text, start, end in zip(TEXTS, at[:-1], at[1:], strict=True):
        assert hashes[start:end].tolist() == [hash_by_loop(t, n) for t in tuples_of(text, n)], text


def test_shingles_are_the_same_on_every_machine():
    assert sh.shingles(["床前明月光"], 5)[0].tolist() == [0x974A9657928C14AB]
    assert sh.random_bits(2, 7).tolist() == [mixed((i + (7 << 32)) * 0x9E3779B97F4A7C15 % WRAP) for i in (1, 2)]


def test_case_punctuation_and_white_space_do_not_count():
    same = ("The end, of: the world!", "the END of\n\tthe   world")
    assert np.array_equal(sh.shingles(same[:1], 2)[0], sh.shingles(same[1:], 2)[0])
    assert not np.array_equal(sh.shingles(["a bc"], 2)[0], sh.shingles(["ab c"], 2)[0])
    assert not np.array_equal(sh.shingles(["abc"], 1)[0], sh.shingles(["acb"], 1)[0])


def test_a_long_text_is_hashed_in_blocks_without_a_seam():
    r = random.Random(0)
    words = ["".join(r.choices("abcdefgh", k=r.randint(1, 9))) for _ in range(40_000)]
    text = "".join(word + r.choice([" ", "\n", ", ", "。"]) for word in words)
    assert len(text) > 2 * sh.BLOCK
    assert np.array_equal(sh.hash_units([text])[0], sh.hash_units(words)[0])
    assert len(sh.shingles(["字" * 3 * sh.BLOCK], 5)[0]) == 3 * sh.BLOCK - 4


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=40), max_size=6), st.integers(1, 6))
def test_together_is_alone(texts, n):
    hashes, at = sh.shingles(texts, n)
    assert np.array_equal(hashes, np.concatenate([np.empty(0, np.uint64), *(sh.shingles([t], n)[0] for t in texts)]))
    assert at[-1] == len(hashes) and len(at) == len(texts) + 1


def test_half_a_character_is_no_reason_to_stop():
    for cfg in (ExactConfig(), MinHashConfig(), SimHashConfig(), LinesConfig(min_bytes=2)):
        assert cfg.build().sign(Document("half \ud83d a pair", "here")).shape[0] == 1


# Groups


def test_first_of_equal():
    a, b = np.array([3, 1, 3, 1, 3]), np.array([0, 5, 0, 6, 1])
    assert first_of_equal(a).tolist() == [0, 1, 0, 1, 0]
    assert first_of_equal(a, b).tolist() == [0, 1, 0, 3, 4]
    assert first_of_equal(a[:0]).tolist() == []


def components(n, pairs):
    group = list(range(n))
    for _ in range(n):
        for a, b in pairs:
            group[a] = group[b] = min(group[a], group[b])
    return group


def test_join_equals_the_loop():
    r = random.Random(1)
    for n in (1, 2, 9, 60):
        pairs = [(r.randrange(n), r.randrange(n)) for _ in range(n // 2 + 1)]
        group = np.arange(n)
        for part in (pairs[:3], pairs[3:]):
            join(group, np.array([a for a, _ in part], int), np.array([b for _, b in part], int))
        assert group.tolist() == components(n, pairs)
    chain = np.arange(50_000)
    join(chain, chain[:-1].copy(), chain[1:].copy())
    assert chain.max() == 0


# Exact


def test_exact_keeps_the_first():
    docs = docs_of(["a b", "春", "a b", "A  b", "春", "a b "])
    verdict, results = judge(ExactConfig().build(), docs)
    assert kept(results) == [0, 1, 3, 5] and verdict.group.tolist() == [0, 1, 0, 3, 1, 5]
    assert results[2] == Removed("exact duplicate") and results[0] is docs[0]
    assert kept(judge(ExactConfig(fold=True).build(), docs)[1]) == [0, 1]
    row = ExactConfig().build().sign(Document("春", "x"))
    assert row.shape == (1, 2) and row.tobytes() == blake2b("春".encode(), digest_size=16).digest()


# MinHash


def test_signature_equals_the_loop():
    hashes = sh.shingles(TEXTS[:2], 5)[0]
    engine = Permutations(10, 3)
    assert all(int(a) % 2 == 1 for a in engine.a) and len(set(engine.a.tolist()) | set(engine.b.tolist())) == 20
    slots = [
        min((int(a) * (int(x) % 2**32) + int(b)) % 2**32 for x in hashes)
        for a, b in zip(engine.a, engine.b, strict=True)
    ]
    assert engine(hashes, np.array([0, len(hashes)])).tolist() == [slots]


def test_signature_of_many_blocks_is_the_least_of_each():
    x = sh.random_bits(5 * minhash.SHINGLES + 7, 1)
    engine = Permutations(6, 0)
    whole = engine(x, np.array([0, len(x)]))
    assert np.array_equal(whole[0], engine(x, np.arange(len(x) + 1)).min(axis=0))


def pair_of_sets(similarity, size, seed):
    """Two (size,) arrays of random shingles whose sets overlap as told: |A & B| = 2 size J / (1 + J)."""
    common = round(2 * size * similarity / (1 + similarity))
    bits = sh.random_bits(2 * size - common, seed)
    return bits[:size], np.concatenate([bits[:common], bits[size:]]), common / (2 * size - common)


def signed_pairs(engine, similarity, size, pairs):
    sets = [pair_of_sets(similarity, size, seed) for seed in range(1000, 1000 + pairs)]
    flat = np.concatenate([part for a, b, _ in sets for part in (a, b)])
    return engine(flat, np.arange(2 * pairs + 1) * size), sets[0][2]


def check_unbiased(engine, slots, size, similarity, pairs=400):
    rows, exact = signed_pairs(engine, similarity, size, pairs)
    found = agreement(rows, np.arange(0, 2 * pairs, 2), np.arange(1, 2 * pairs, 2), slots)
    sd = (exact * (1 - exact) / slots) ** 0.5
    assert abs(found.mean() - exact) < 3 * sd / pairs**0.5, (found.mean(), exact)
    assert found.std() < 1.15 * sd


@pytest.mark.parametrize("similarity", [0.3, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("size", [20, 300])
def test_estimate_is_unbiased(size, similarity):
    check_unbiased(Permutations(126, 0), 126, size, similarity)


def test_s_curve_by_hand():
    assert chance(0.5, 3, 2) == pytest.approx(1 - (3 / 4) ** 3)
    said = {(0.8, 21, 6): 0.998, (0.6, 21, 6): 0.63, (0.8, 14, 8): 0.92, (0.6, 14, 8): 0.21}
    for (similarity, bands, rows), percent in said.items():
        assert chance(similarity, bands, rows) == pytest.approx(percent, abs=0.005), "the docstring's numbers"


def check_curve(engine, similarity, pairs=400, size=100):
    """Without the check by threshold, pairs become groups as often as the S curve says."""
    cfg = MinHashConfig(threshold=0)
    rows, exact = signed_pairs(engine, similarity, size, pairs)
    verdict = minhash.MinHash(cfg, engine).decide(np.pad(rows, ((0, 0), (0, 1))), np.arange(2 * pairs))
    found = (~verdict.keep).mean() * 2
    p = chance(exact, cfg.bands, cfg.rows)
    assert abs(found - p) < 3 * (p * (1 - p) / pairs) ** 0.5 + 1 / pairs, (found, p)
    assert np.array_equal(np.flatnonzero(~verdict.keep) - 1, verdict.group[~verdict.keep])


@pytest.mark.parametrize("similarity", [0.3, 0.5, 0.6, 0.7, 0.8, 0.9])
def test_candidates_follow_the_s_curve(similarity):
    check_curve(Permutations(126, 0), similarity)


def hand_rows():
    """2 bands of 2 slots and a length. 0-1 share band 0 and agree in 3 of 4; 2 shares a band with 0 but agrees in 2 of
    4; 3 agrees with 1 in 3 of 4 through band 1; 4 is alone; 5 is 4's slots in the wrong bands."""
    return np.array(
        [[1, 2, 3, 4, 10], [1, 2, 3, 9, 30], [1, 2, 7, 8, 20], [1, 5, 3, 9, 5], [6, 6, 5, 5, 1], [5, 5, 6, 6, 1]],
        dtype=np.uint32,
    )


def small(**options):
    return MinHashConfig(bands=2, rows=2, **options).build()


def test_decide_by_hand():
    rows, owner = hand_rows(), np.arange(6)
    verdict = small(threshold=0.75).decide(rows, owner)
    assert verdict.group.tolist() == [0, 0, 2, 0, 4, 5] and verdict.keep.tolist() == [1, 0, 1, 0, 1, 1]
    longest = small(threshold=0.75, keep="longest").decide(rows, owner)
    assert longest.group.tolist() == [0, 0, 2, 0, 4, 5] and longest.keep.tolist() == [0, 1, 1, 0, 1, 1]
    assert small(threshold=0.76).decide(rows, owner).keep.all()
    assert small(threshold=0).decide(rows, owner).group.tolist() == [0, 0, 0, 0, 4, 5]
    swapped = np.array([[1, 2, 3, 4, 1], [2, 1, 4, 3, 1]], dtype=np.uint32)
    assert small(threshold=0).decide(swapped, owner[:2]).keep.all(), "slots are compared with their own kind"
    rows[3, -1] = 30
    assert small(keep="longest").decide(rows, owner).keep.tolist() == [0, 1, 1, 0, 1, 1], "of equal ones the first"


def test_decide_leaves_no_alike_pair_of_a_bucket():
    """Against every pair in loops: groups are made of alike pairs, and of an alike pair in a bucket at most one stays."""
    cfg = MinHashConfig(bands=4, rows=2, threshold=0.6)
    rng = np.random.default_rng(0)
    base = rng.integers(0, 1000, (30, 9), dtype=np.uint32)
    rows = base[rng.integers(0, 30, 300)]
    noise = rng.random(rows.shape) < 0.25
    rows[noise] = rng.integers(0, 1000, noise.sum(), dtype=np.uint32)
    alike = [
        (a, b)
        for a, b in combinations(range(300), 2)
        if (same := rows[a, :8] == rows[b, :8]).mean() >= 0.6 and same.reshape(4, 2).all(axis=1).any()
    ]
    verdict = cfg.build().decide(rows, np.arange(300))
    loose = components(300, alike)
    assert len(alike) > 500
    assert not [(a, b) for a, b in alike if verdict.keep[a] and verdict.keep[b]]
    assert all(loose[i] == loose[g] for i, g in enumerate(verdict.group))
    assert np.array_equal(verdict.keep, verdict.group == np.arange(300)) and (verdict.group <= np.arange(300)).all()


def test_decide_reads_a_memory_map(tmp_path):
    rows = MinHashConfig().build().sign_many(docs_of(list(documents(["embedded:zh_poetry_small"]))))
    rows = np.concatenate(rows)
    np.save(tmp_path / "rows.npy", rows)
    on_disk = MinHashConfig().build().decide(np.load(tmp_path / "rows.npy", mmap_mode="r"), np.arange(len(rows)))
    assert np.array_equal(on_disk.group, MinHashConfig().build().decide(rows, np.arange(len(rows))).group)
    assert 5 < (~on_disk.keep).sum() < 100


def test_a_document_without_words_stays():
    docs = docs_of(["...", "春眠不覺曉處處聞啼鳥", "", "春眠不覺曉，處處聞啼鳥。", "?"])
    for cfg in (MinHashConfig(), SimHashConfig()):
        verdict, results = judge(cfg.build(), docs)
        assert kept(results) == [0, 1, 2, 4] and len(verdict.keep) == 2
        assert all(cfg.build().sign(doc).dtype == cfg.build().sign(docs[0]).dtype for doc in docs)


def test_nothing_to_judge():
    for cfg in (ExactConfig(), MinHashConfig(), SimHashConfig(), LinesConfig()):
        step = cfg.build()
        rows = step.sign(Document("some words that are more than forty-five bytes long", "x"))
        verdict = step.decide(rows[:0], np.empty(0, dtype=np.int64))
        assert len(rows) == 1 and verdict.keep.shape == verdict.group.shape == (0,)


def test_steps_sign_many_as_one_by_one():
    docs = docs_of([*TEXTS, *list(documents(["embedded:zh_poetry_small"]))[:40]])
    for cfg in (ExactConfig(), MinHashConfig(), SimHashConfig(), LinesConfig(min_bytes=9)):
        step = cfg.build()
        many = step.sign_many(docs)
        assert len(many) == len(docs) and step.sign_many([]) == []
        assert all(np.array_equal(step.sign(doc), rows) for doc, rows in zip(docs, many, strict=True))


@pytest.mark.parametrize(
    "options, says",
    [
        ({"bands": 2, "rows": 60}, "would find 0% of the pairs"),
        ({"bands": 0}, "bands = 0"),
        ({"threshold": 1.2}, "threshold = 1.2"),
        ({"ngram": 0}, "ngram = 0"),
        ({"seed": -1}, "seed = -1"),
    ],
)
def test_impossible_options_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        MinHashConfig(**options)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rensa", None)
    with pytest.raises(ValueError, match=r"pip install 'zero2llm\[data\]'"):
        MinHashConfig(engine="rensa").build()


# Planted near-duplicates


def vocabulary(language):
    """Words, or characters, in order of how often they come in the embedded texts."""
    texts = list(documents(["embedded:en_moby_dick" if language == "en" else "embedded:zh_songci"]))[:3000]
    counts = {}
    for text in texts:
        for unit in units_of(text):
            counts[unit] = counts.get(unit, 0) + 1
    return list(counts), list(counts.values())


def edited(units, similarity, r, words, weights):
    """A copy whose shingles overlap by about ``similarity``: a few units exchanged, the end cut off or replaced."""
    n = 5
    count = len(units) - n + 1
    lost = round(count * (1 - similarity) / (1 + similarity))  # (count - lost) / (count + lost) = similarity
    copy, way = list(units), r.randrange(3)
    if way == 0:
        return copy[: len(copy) - round(count * (1 - similarity))]
    single = lost // n if way == 1 else 0
    for i in r.sample(range(len(copy) // (2 * n)), single):
        copy[n - 1 + n * i] = r.choices(words, weights)[0]
    tail = lost - n * single
    return copy[: len(copy) - tail] + r.choices(words, weights, k=tail)


def planted(language, n, pairs, seed=0):
    """(texts, {number of the copy: (number of its original, true Jaccard similarity)}), similarities 0.6 to 1."""
    r = random.Random(seed)
    words, weights = vocabulary(language)
    glue = " " if language == "en" else ""
    units = [r.choices(words, weights, k=r.randint(80, 200)) for _ in range(n - pairs)]
    copies = [
        (original, edited(units[original], 0.6 + 0.4 * i / (pairs - 1), r, words, weights))
        for i, original in enumerate(r.sample(range(n - pairs), pairs))
    ]
    texts, place = [], list(range(n))
    r.shuffle(place)
    texts = [""] * n
    for at, unit in zip(place, [*units, *(copy for _, copy in copies)], strict=True):
        texts[at] = glue.join(unit)
    truth = {}
    for at, (original, _) in zip(place[n - pairs :], copies, strict=True):
        first, second = sorted((at, place[original]))
        truth[second] = (first, jaccard(texts[first], texts[second]))
    return texts, truth


def recall_and_precision(step, texts, truth):
    """Recall of the planted pairs at 0.8 and above. Precision: found pairs whose true similarity is at least 0.67, which
    is the threshold of 0.75 less two standard deviations of the estimate (0.039 each with 126 slots)."""
    docs = docs_of(texts)
    rows = np.concatenate([row for i in range(0, len(docs), 256) for row in step.sign_many(docs[i : i + 256])])
    verdict = step.decide(rows, np.arange(len(rows)))
    found = {int(i): int(verdict.group[i]) for i in np.flatnonzero(~verdict.keep)}
    close = {b: a for b, (a, similarity) in truth.items() if similarity >= 0.8}
    hit = sum(found.get(b) == a for b, a in close.items())
    right = sum(jaccard(texts[a], texts[b]) >= 0.67 for b, a in found.items())
    return hit / len(close), right / len(found), len(close), len(found)


def check_planted(step, language, n, pairs):
    texts, truth = planted(language, n, pairs)
    assert len(truth) == pairs
    similarities = sorted(similarity for _, similarity in truth.values())
    assert similarities[0] < 0.65 and similarities[-1] == 1.0 and abs(np.median(similarities) - 0.8) < 0.03
    recall, precision, close, found = recall_and_precision(step, texts, truth)
    assert recall >= 0.95 and precision >= 0.95 and found >= close * 0.95, (recall, precision, close, found)


@pytest.mark.parametrize("engine", ["handwritten", "rensa"])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_planted_near_duplicates_are_found(language, engine):
    if engine == "rensa":
        pytest.importorskip("rensa")
    check_planted(MinHashConfig(engine=engine).build(), language, 2_000, 200)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["handwritten", "rensa"])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_500_planted_in_20_000(language, engine):
    if engine == "rensa":
        pytest.importorskip("rensa")
    check_planted(MinHashConfig(engine=engine).build(), language, 20_000, 500)


# SimHash


def test_fingerprint_by_hand():
    bits = lambda *words: fingerprint(np.array(words, dtype=np.uint64))[0]
    assert bits(0b1100, 0b1010, 0b1001) == 0b1000, "three votes, more than half"
    assert bits(0b1100, 0b1010) == 0b1000, "a tie is 0"
    assert bits(0b0101, 0b0101, 0b1010) == 0b0101, "a shingle that comes twice has two votes"
    assert bits(1 << 63 | 1) == 1 << 63 | 1
    many = sh.random_bits(40_000, 0)
    by_loop = sum(1 << i for i in range(64) if 2 * sum(int(x) >> i & 1 for x in many.tolist()) > len(many))
    assert fingerprint(many)[0] == by_loop


def test_sign_is_the_fingerprint_of_the_shingles():
    step = SimHashConfig(ngram=2).build()
    for text in TEXTS[:5]:
        votes = [hash_by_loop(t, 2) for t in tuples_of(text, 2)]
        by_loop = sum(1 << i for i in range(64) if sum(1 if x >> i & 1 else -1 for x in votes) > 0)
        assert step.sign(Document(text, "x")).tolist() == [[by_loop]]


def test_distance_counts_bits():
    x, y = sh.random_bits(500, 1), sh.random_bits(500, 2)
    assert simhash.distance(x, y).tolist() == [(int(a) ^ int(b)).bit_count() for a, b in zip(x, y, strict=True)]
    assert simhash.distance(x[:1], ~x[:1]).tolist() == [64] and simhash.distance(x[:1], x[:1]).tolist() == [0]


def crowded(n, k, seed):
    """Fingerprints around a few centres, at distances around k."""
    r = random.Random(seed)
    centres = [r.getrandbits(64) for _ in range(n // 8 + 1)]
    return np.array(
        [r.choice(centres) ^ sum(1 << bit for bit in r.sample(range(64), r.randint(0, k + 1))) for _ in range(n)],
        dtype=np.uint64,
    )


def check_search(n, k):
    prints = crowded(n, k, n + k)
    found = {
        tuple(sorted(p)) for a, b in simhash.near_pairs(prints, k) for p in zip(a.tolist(), b.tolist(), strict=True)
    }
    words = prints.tolist()
    assert found == {(i, j) for i, j in combinations(range(n), 2) if (words[i] ^ words[j]).bit_count() <= k}
    verdict = SimHashConfig(distance=k).build().decide(prints[:, None], np.arange(n))
    assert verdict.group.tolist() == components(n, sorted(found))
    assert np.array_equal(verdict.keep, verdict.group == np.arange(n))


@pytest.mark.parametrize("k", [0, 1, 3, 6])
@pytest.mark.parametrize("n", [2, 40, 160])
def test_search_equals_brute_force(n, k):
    check_search(n, k)


@pytest.mark.parametrize("crowd", [0, 1])
def test_search_with_more_blocks_equals_brute_force(crowd, monkeypatch):
    monkeypatch.setattr(simhash, "CROWD", crowd)
    monkeypatch.setattr(simhash, "blocks_for", lambda n, k: k + 3)
    check_search(120, 3)


def test_blocks_grow_with_the_corpus():
    r = random.Random(4)
    assert [simhash.blocks_for(n, 3) for n in (10, 10**6, 10**7, 10**9)] == [4, 5, 5, 6]
    for b, k in ((4, 3), (5, 3), (6, 3), (3, 0), (7, 2)):
        words = [int(mask) for mask in simhash.masks(b, k)]
        assert len(set(words)) == len(words)
        for _ in range(200):  # whichever k bits differ, some choice of blocks has none of them
            spoilt = sum(1 << bit for bit in r.sample(range(64), k))
            assert any(not word & spoilt for word in words)


def one_word_changed(language, length, ngram, n=60):
    """Share of copies with one other word within 3 bits, mean distance of unrelated texts."""
    r = random.Random(3)
    words, weights = vocabulary(language)
    glue = " " if language == "en" else ""
    texts = [r.choices(words, weights, k=length) for _ in range(n)]
    copies = [[*text[: length // 2], r.choice(words), *text[length // 2 + 1 :]] for text in texts]
    signed = SimHashConfig(ngram=ngram).build().sign_many(docs_of([glue.join(text) for text in texts + copies]))
    prints = np.concatenate(signed)[:, 0]
    apart = simhash.distance(prints[:n], np.roll(prints[:n], 1))
    return (simhash.distance(prints[:n], prints[n:]) <= 3).mean(), apart.mean()


@pytest.mark.parametrize("language", ["en", "zh"])
def test_simhash_finds_long_documents_with_few_changes(language):
    """The docstring's numbers."""
    found, apart = one_word_changed(language, 1000, 2)
    assert found > 0.85 and 28 < apart < 34
    assert 0.05 < one_word_changed(language, 50, 2)[0] < 0.35
    if language == "en":
        assert 5 < one_word_changed(language, 1000, 1)[1] < 9
    with pytest.raises(ValueError, match="distance = 40"):
        SimHashConfig(distance=40)


# Lines

NOTICE = "All rights reserved; do not copy without permission of the author."
HINWEIS = "本網頁所有內容均受版權保護，未經許可不得轉載或複製。"
OWN = "This paragraph of more than sixty letters stands in one document and in no other."
EIGEN = "這一行只在一篇文章裡出現過一次，別的文章裡面都沒有這一行字，所以一定會留下來。"


@pytest.mark.parametrize("notice, own", [(NOTICE, OWN), (HINWEIS, EIGEN)])
def test_lines_keep_the_first_occurrence(notice, own):
    docs = docs_of([f"{own} 1\n{notice}\n", f"{notice.upper()}  \r\n{own} 2\n***\n", f"{notice}\n***", f"***\n{own} 1"])
    verdict, results = judge(LinesConfig().build(), docs)
    assert verdict.keep.tolist() == [True, True, False, True, False, False]
    assert verdict.group.tolist() == [0, 1, 1, 3, 1, 0]
    assert results[0].text == f"{own} 1\n{notice}\n" and not results[0].notes
    assert results[1].text == f"{own} 2\n***" and results[1].notes == {"line seen before": 1}
    assert results[2] == Removed("only lines seen before", "1 of 1")
    assert results[3] == Removed("only lines seen before", "1 of 1")


def test_lines_count_documents():
    refrain = docs_of([f"{NOTICE}\n{OWN}\n{NOTICE}\n{NOTICE}", OWN + "?"])
    assert judge(LinesConfig().build(), refrain)[0].keep.all(), "a refrain is no boilerplate"
    docs = docs_of([f"{OWN} {i}\n{NOTICE}\n{NOTICE if i == 1 else OWN}" for i in range(3)])
    for seen, lines in ((3, [3, 1, 2]), (4, [3, 3, 3])):
        _, results = judge(LinesConfig(seen=seen).build(), docs_of([d.text for d in docs]))
        assert [len(result.text.splitlines()) for result in results] == lines
    _, results = judge(LinesConfig(remove="all", seen=3).build(), docs)
    assert [NOTICE in result.text for result in results] == [False] * 3
    assert [OWN + "\n" in result.text + "\n" for result in results] == [True, False, True], (
        "two documents have it: stays"
    )


def test_paragraphs():
    first, second = f"{NOTICE}\n{OWN}", f"{OWN}\n{HINWEIS}"
    docs = docs_of([f"{first}\n\n{second}", f"{EIGEN}\n \n\n{first}\n\n{OWN}"])
    _, results = judge(LinesConfig(unit="paragraph").build(), docs)
    assert results[0].text == f"{first}\n\n{second}"
    assert results[1].text == f"{EIGEN}\n \n\n{OWN}" and results[1].notes == {"paragraph seen before": 1}


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab \n\r\t\u2028\u2029字", max_size=30), st.sampled_from(["line", "paragraph"]))
def test_pieces_joined_are_the_text(text, unit):
    assert "".join(pieces(text, unit)) == text and all(pieces(text, unit))


def test_lines_refuse_what_makes_no_sense():
    for options in ({"seen": 1}, {"min_bytes": 0}, {"min_left": -1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            LinesConfig(**options)
