"""Unigram by hand: the lattice against all cuts written out, the batched passes and the trainer against loops."""

import math
import random
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zero2llm.tokenizers import lattice, lattice_batch, unigram_seed, unigram_train
from zero2llm.tokenizers.lattice_batch import NONE, Words
from zero2llm.tokenizers.unigram import BYTES, UNKNOWN, Unigram, words_of
from zero2llm.tokenizers.unigram_seed import State
from zero2llm.tokenizers.unigram_train import train_unigram

SCORES = {"a": -3.0, "b": -3.5, "c": -4.0, "ab": -4.0, "bc": -5.5, "abc": -7.75, "ca": -6.0, "aa": -6.0, "中": -5.0, "国": -5.25, "中国": -6.5}
PIECES = [(UNKNOWN, 0.0), *SCORES.items()]
WORDS = ["abc", "abcabca", "aaa", "中国中a", "b", "cabbac", "国国", "aabcaabb", "bcabaabca"]
TEXTS = [
    "the hug of a pug is a hug; the bun in the sun is fun, and the hugs are fun too. " * 2,
    "关关雎鸠，在河之洲。窈窕淑女，君子好逑。参差荇菜，左右流之。窈窕淑女，寤寐求之。",
    "求之不得，寤寐思服。悠哉悠哉，辗转反侧。参差荇菜，左右采之。窈窕淑女，琴瑟友之。",
    "unaffable affable unable able table stable unstable unaffable",
]


def all_cuts(word, scores=SCORES):
    """Every way to write a word as pieces, with its score."""
    for k in range(len(word)):
        for inner in combinations(range(1, len(word)), k):
            marks = [0, *inner, len(word)]
            pieces = tuple(word[i:j] for i, j in zip(marks, marks[1:], strict=False))
            if all(piece in scores for piece in pieces):
                yield pieces, sum(scores[piece] for piece in pieces)


def model(**options):
    return Unigram(PIECES, split="none", **options)


def as_pieces(word, steps):
    assert [begin for begin, _, _ in steps] == [0, *(end for _, end, _ in steps)][:-1]
    return tuple(word[begin:end] for begin, end, _ in steps)


@pytest.mark.parametrize("word", WORDS)
def test_viterbi_finds_the_best_of_all_cuts(word):
    ends, cuts = model().lattice(word), sorted(all_cuts(word), key=lambda cut: -cut[1])
    found = as_pieces(word, lattice.best_cut(ends))
    assert dict(cuts)[found] == pytest.approx(cuts[0][1])
    best = lattice.best_cuts(ends, 4)
    assert [score for score, _ in best] == pytest.approx([score for _, score in cuts[:4]])
    assert all(dict(cuts)[as_pieces(word, steps)] == pytest.approx(score) for score, steps in best)
    assert len({as_pieces(word, steps) for _, steps in best}) == len(best)


def test_viterbi_with_any_pieces():
    rng = random.Random(5)
    for _ in range(300):
        word = "".join(rng.choices("abc", k=8))
        substrings = sorted({word[i:j] for i in range(8) for j in range(i + 1, 9)})
        scores = {c: -rng.uniform(0, 9) for c in "abc"} | {s: -rng.uniform(0, 9) * len(s) for s in rng.sample(substrings, 12)}
        ends = Unigram([(UNKNOWN, 0.0), *scores.items()], split="none").lattice(word)
        best = max(score for _, score in all_cuts(word, scores))
        assert sum(scores[piece] for piece in as_pieces(word, lattice.best_cut(ends))) == pytest.approx(best)


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("theta", [0.0, 0.4, 1.0])
def test_forward_sums_all_cuts(word, theta):
    total = math.log(sum(math.exp(theta * score) for _, score in all_cuts(word)))
    assert lattice.log_sums(model().lattice(word), theta)[-1] == pytest.approx(total)


@pytest.mark.parametrize("word", WORDS)
def test_expected_counts_are_averages_over_all_cuts(word):
    cuts = list(all_cuts(word))
    total = sum(math.exp(score) for _, score in cuts)
    expected = Counter()
    for pieces, score in cuts:
        for piece in pieces:
            expected[piece] += math.exp(score) / total
    found = {PIECES[i][0]: n for i, n in lattice.expected_counts(model().lattice(word)).items()}
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("theta", [0.0, 0.3, 1.0])
def test_cuts_are_drawn_with_their_probability(theta):
    word, draws, rng = "abcabca", 4000, random.Random(1)
    ends = model().lattice(word)
    seen = Counter(as_pieces(word, lattice.drawn_cut(ends, theta, rng)) for _ in range(draws))
    weights = {pieces: math.exp(theta * score) for pieces, score in all_cuts(word)}
    for pieces, weight in weights.items():
        p = weight / sum(weights.values())
        assert abs(seen[pieces] / draws - p) < 5 * math.sqrt(p * (1 - p) / draws) + 1e-3


def test_equal_cuts_end_with_the_longest_piece():
    tied = Unigram([(UNKNOWN, 0.0), ("a", -2.0), ("b", -2.0), ("ab", -3.0), ("ba", -3.0)], split="none")
    assert tied.encode("aba") == [1, 4]  # a ba, not ab a
    assert [ids for ids, _ in tied.best("aba", 2)] == [[1, 4], [3, 1]]


def test_best_of_a_text_joins_the_best_of_its_words():
    both = Unigram([(UNKNOWN, 0.0), *SCORES.items(), (" ", -9.0), (" a", -8.0)], split="space")
    whole = sorted((s for _, s in all_cuts("abc a", {p: s for p, s in both.pieces if p != UNKNOWN})), reverse=True)
    assert [score for _, score in both.best("abc a", 5)] == pytest.approx(whole[:5])
    assert both.best("abc a", 1)[0][0] == both.encode("abc a") and both.best("", 3) == [([], 0.0)]


# Bytes, blanks, unknown characters.


def with_bytes(extra=(), **options):
    return Unigram([*((b, 0.0) for b in BYTES), *SCORES.items(), (" ", -4.0), *extra], **options)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30), st.sampled_from(["qwen2", "gpt2", "space", "none"]), st.booleans())
def test_any_text_comes_back(text, split, prefix):
    tokenizer = with_bytes(split=split, prefix=prefix)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and all(0 <= i < len(tokenizer.pieces) for i in ids)
    assert tokenizer.decode(tokenizer.sample(text, 0.5, random.Random(0))) == text


def test_unknown_characters():
    assert [with_bytes().pieces[i][0] for i in with_bytes().encode("a鸠b")] == ["a", "<0xE9>", "<0xB8>", "<0xA0>", "b"]
    assert model().encode("a鸠鸠b鸠") == [1, 0, 2, 0] and model().decode([1, 0]) == "a<unk>"
    assert model().unknown == min(SCORES.values()) - 10
    alone = Unigram([(UNKNOWN, 0.0), ("a", -1.0), ("ab", -10.0), ("bb", -14.5)], split="none")  # b is no piece: it costs 24.5
    assert alone.encode("ab") == [2] and alone.encode("abb") == [1, 3] and alone.encode("b") == [0]


def test_names_of_control_pieces_are_text_where_text_spells_them():
    spelled = with_bytes([(c, -20.0) for c in "<0x41>"], split="none")
    assert spelled.decode(spelled.encode("<0x41>a")) == "<0x41>a" and len(spelled.encode("<0x41>")) == 6
    assert model().encode(UNKNOWN) == [0] and model().encode("<unk>a<unk>") == [0, 1, 0]  # letters that are no pieces


def test_sentencepiece_s_spelling_of_blanks():
    tokenizer = with_bytes([("▁", -3.0), ("▁a", -4.0), ("▁ab", -5.0)], split="space", space="▁", prefix=True)
    show = lambda text: [tokenizer.pieces[i][0] for i in tokenizer.encode(text)]
    assert show("ab  a") == ["▁ab", "▁", "▁a"] and tokenizer.decode(tokenizer.encode("ab  a")) == "ab  a"
    assert tokenizer.decode(tokenizer.encode("a▁a")) == "a a"  # the price of that spelling
    assert tokenizer.decode(tokenizer.encode(" a")) == " a" and tokenizer.encode("") == [] and tokenizer.decode([]) == ""


def test_ids_begin_where_they_are_told():
    assert Unigram(PIECES, first_id=7).encode("ab") == [11] and Unigram(PIECES, first_id=7).decode([11]) == "ab"


# Many words at once.


def batch(words, scores):
    """The arrays of lattice_batch for these words and pieces, edges found by looking."""
    words = sorted(words, key=len, reverse=True)
    text, names = "".join(words), list(scores)
    longest = max(map(len, names))
    length = np.array([len(w) for w in words])
    start = np.cumsum(length) - length
    edge = np.full((len(text), longest), NONE, np.int32)
    for begin, n in zip(start, length, strict=True):
        for i in range(begin, begin + n):
            for size in range(1, min(longest, begin + n - i) + 1):
                if text[i : i + size] in scores:
                    edge[i, size - 1] = names.index(text[i : i + size])
    return words, Words.of(start, length, edge), np.append([scores[name] for name in names], -np.inf)


def test_batched_passes_equal_the_lattice():
    words, many, score = batch(WORDS, SCORES)
    weight = np.arange(1.0, len(words) + 1)
    counts, likelihood = lattice_batch.expected_counts(many, weight, score)
    expected, total = np.zeros(len(SCORES)), 0.0
    for word, n in zip(words, weight, strict=True):
        ends = model().lattice(word)
        total += n * lattice.log_sums(ends)[-1]
        for piece, count in lattice.expected_counts(ends).items():
            expected[piece - 1] += n * count
    assert counts == pytest.approx(expected) and likelihood == pytest.approx(total)
    scores, word_of, piece = lattice_batch.best_cuts(many, score)
    for w, word in enumerate(words):
        best = lattice.best_cut(model().lattice(word))
        assert scores[w] == pytest.approx(sum(SCORES[word[b:e]] for b, e, _ in best))
        assert piece[word_of == w][::-1].tolist() == [p - 1 for _, _, p in best]


def test_a_word_that_may_not_be_itself_is_cut_otherwise_or_not_at_all():
    words, many, score = batch(["abc", "ab", "中国", "a", "ca"], SCORES)
    apart = Words(many.start, many.length, many.first, many.edge, whole=False)
    for w, word in enumerate(words):
        others = [s for pieces, s in all_cuts(word) if len(pieces) > 1]
        assert lattice_batch.best_cuts(apart, score)[0][w] == pytest.approx(max(others, default=-np.inf))


def test_words_must_come_longest_first():
    with pytest.raises(ValueError, match="longest first"):
        Words.of(np.array([0, 1]), np.array([1, 2]), np.zeros((3, 1), np.int32))


# Training.


def counted():
    return Counter(word for text in TEXTS for word in words_of(text, "qwen2", " ", False))


def seeded(longest=6, seed_size=10**6):
    words = counted()
    return unigram_seed.seed(words, unigram_seed.alphabet_of(words, 1.0), longest, seed_size), words


def named(state: State):
    return [state.piece(i) for i in range(len(state.score))]


def loop_seed(words, longest):
    """Substrings by slicing: count, and whether one more character behind it is always the same."""
    counts, behind = Counter(), {}
    for word, n in words.items():
        for i in range(len(word)):
            for j in range(i + 1, min(len(word), i + longest) + 1):
                counts[word[i:j]] += n
                behind.setdefault(word[i:j], set()).add(word[j : j + 1])
    kept = {s: n for s, n in counts.items() if len(s) == 1 or (n > 1 and (len(behind[s]) > 1 or behind[s] == {""}))}
    return {s: n * len(s) for s, n in kept.items()}


def test_seed_pieces_are_the_repeated_substrings():
    state, words = seeded()
    expected = loop_seed(words, 6)
    assert dict(zip(named(state), np.exp(state.score), strict=True)) == pytest.approx(
        {s: value / sum(expected.values()) for s, value in expected.items()}
    )
    best = sorted((s for s in expected if len(s) > 1), key=lambda s: -expected[s])
    few = [piece for piece in named(seeded(seed_size=20)[0]) if len(piece) > 1]
    assert len(few) == 20 and min(expected[s] for s in few) >= expected[best[20]]
    assert {len(piece) for piece in few} & {3, 4, 5, 6}


def edges_are_right(state):
    pieces = {piece: i for i, piece in enumerate(named(state))}
    for begin, size in zip(state.start, state.size, strict=True):
        word = state.text[begin : begin + size]
        for i in range(size):
            for n in range(1, state.edge.shape[1] + 1):
                want = pieces.get(word[i : i + n], NONE) if i + n <= size else NONE
                assert state.edge[begin + i, n - 1] == want


def test_edges_lead_to_their_pieces_before_and_after_pruning():
    state, _ = seeded()
    edges_are_right(state)
    unigram_train.em_step(state)
    unigram_train.prune(state, 60)
    edges_are_right(state)


def test_em_step_by_hand():
    """Expected counts by lattice.py, digamma by its slope: the derivative of math.lgamma."""
    state, words = seeded()
    names, scores = named(state), dict(zip(named(state), state.score, strict=True))
    plain = Unigram([(UNKNOWN, 0.0), *scores.items()], split="none")
    counts = Counter()
    for word, n in words.items():
        for piece, count in lattice.expected_counts(plain.lattice(word)).items():
            counts[names[piece - 1]] += n * count
    stay = {name for name in names if counts[name] >= 0.5 or len(name) == 1}
    slope = lambda x: (math.lgamma(x + 1e-5) - math.lgamma(x - 1e-5)) / 2e-5
    total = sum(counts[name] for name in stay)
    unigram_train.em_step(state)
    expected = {name: slope(max(counts[name], 0.5)) - slope(total) for name in stay}
    assert dict(zip(named(state), state.score, strict=True)) == pytest.approx(expected, abs=1e-5)
    assert len(stay) < len(names)


def test_plain_em_never_lowers_the_likelihood(monkeypatch):
    monkeypatch.setattr(unigram_train, "digamma", np.log)
    monkeypatch.setattr(unigram_train, "MIN_COUNT", 1e-30)
    state, _ = seeded()
    seen = [unigram_train.em_step(state) for _ in range(8)]
    assert all(b >= a - 1e-9 for a, b in zip(seen, seen[1:], strict=False)) and seen[-1] > seen[0] + 1


def loop_losses(state, words):
    names = named(state)
    scores = dict(zip(names, state.score, strict=True))
    plain = Unigram([(UNKNOWN, 0.0), *scores.items()], split="none")
    freq = Counter()
    for word, n in words.items():
        for begin, end, _ in lattice.best_cut(plain.lattice(word)):
            freq[word[begin:end]] += n
    total, out = freq.total(), {}
    for name in names:
        others = [(s, cut) for s, cut in lattice.best_cuts(plain.lattice(name), 2) if len(cut) > 1]
        if not others:
            out[name] = math.inf
        elif not freq[name]:
            out[name] = -math.inf
        else:
            other = [name[b:e] for b, e, _ in others[0][1]]
            f, after = freq[name], total + freq[name] * (len(other) - 1)
            out[name] = f * (math.log(f / total) - sum(math.log((freq[o] + f) / after) for o in other))
    return out


def test_losses_by_hand():
    state, words = seeded()
    unigram_train.em_step(state)
    expected = loop_losses(state, words)
    assert dict(zip(named(state), unigram_train.losses(state), strict=True)) == pytest.approx(expected, abs=1e-6)
    finite = sorted((x for x in expected.values() if math.isfinite(x)), reverse=True)
    assert len(finite) > 20 and -math.inf in expected.values()
    unigram_train.prune(state, state.n_chars + 12)
    left = {name for name in named(state) if len(name) > 1}
    assert len(left) == 12 and min(expected[name] for name in left) >= finite[12] - 1e-9


@pytest.mark.parametrize("x", [0.5, 0.75, 1.0, 3.3, 6.99, 7.0, 250.0, 1e6])
def test_digamma_is_the_slope_of_log_gamma(x):
    h = 1e-4 * max(1.0, x / 10)
    assert unigram_train.digamma(x) == pytest.approx((math.lgamma(x + h) - math.lgamma(x - h)) / (2 * h), rel=1e-6)


def test_digamma_takes_half_an_occurrence_off():
    assert np.exp(unigram_train.digamma(np.array([2.0, 10.0, 1000.0]))) == pytest.approx([1.5, 9.5, 999.5], abs=0.03)


def test_a_trained_vocabulary():
    pieces = train_unigram(TEXTS, 360)
    names, scores = [p for p, _ in pieces], [s for _, s in pieces]
    assert len(pieces) == 360 and tuple(names[:256]) == BYTES and scores[256:] == sorted(scores[256:], reverse=True)
    assert {"。窈窕淑女", " the", "able"} <= set(names) and set("窈窕<|0xF>_d") <= set(names)
    tokenizer = Unigram(pieces)
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in TEXTS)
    assert pieces == train_unigram(TEXTS, 360) and len(set(names)) == 360
    smaller = train_unigram(TEXTS, 90, byte_fallback=False)
    assert smaller[0] == (UNKNOWN, 0.0) and len(smaller) == 90


def test_order_of_texts_does_not_matter():
    assert train_unigram(TEXTS, 360) == train_unigram(TEXTS[::-1], 360)


def test_rare_characters_are_left_to_bytes():
    pieces = dict(train_unigram([*TEXTS * 20, "龘"], 400, coverage=0.999))
    assert "龘" not in pieces and "窈" in pieces
    assert "龘" in dict(train_unigram([*TEXTS * 20, "龘"], 400, coverage=1.0))


def test_a_piece_never_bears_the_name_of_a_control_piece():
    texts = ["<0x41>a", "<0x41>b", "<0x41>", "<unk>a", "<unk>b", "<unk>"] * 9
    state = unigram_seed.seed(Counter(texts), set("".join(texts)), 16, 1000)
    assert not {"<0x41>", UNKNOWN} & set(named(state)) and {"0x41>", "unk>"} <= set(named(state))
    edges_are_right(state)
    pieces = [p for p, _ in train_unigram(texts, 400, split="none")]
    assert len(set(pieces)) == len(pieces) and UNKNOWN not in pieces
    assert [p for p, _ in train_unigram(texts, 60, split="none", byte_fallback=False)].count(UNKNOWN) == 1


def test_long_words_are_cut_for_training_only(monkeypatch):
    monkeypatch.setattr(unigram_seed, "LONG_WORD", 7)
    pieces = train_unigram(["".join(TEXTS)], 400, split="none")
    assert Unigram(pieces, split="none").decode(Unigram(pieces, split="none").encode(TEXTS[1])) == TEXTS[1]


@pytest.mark.parametrize(
    "call,match",
    [
        (lambda: train_unigram(TEXTS, 280), "cannot hold 256 control pieces and .* characters"),
        (lambda: train_unigram(TEXTS, 400, coverage=0.0), "coverage = 0.0"),
        (lambda: train_unigram(TEXTS, 400, split="words"), "split rule 'words' is unknown; there are: gpt2"),
        (lambda: Unigram([("a", -1.0)]), "neither <unk> nor all of <0x00>"),
        (lambda: Unigram([*PIECES, ("a", -1.0)]), "'a' twice"),
        (lambda: Unigram(PIECES, first_id=1).to_library(), "0 control tokens are given"),
        (lambda: Unigram(PIECES, first_id=1).to_library(["<|x|>"]), "'<'.* occurs in a piece or control token"),
    ],
)
def test_mistakes_are_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_empty_texts():
    assert [p for p, _ in train_unigram([""], 300, names=[])][256:] == sorted(" <0x123456789ABCDEF>")
