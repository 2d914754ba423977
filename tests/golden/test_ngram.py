"""Kneser-Ney against a dictionary-and-loops version of the same formula, and against its own axioms."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from zero2llm.data.ngram import KneserNey


def corpus(seed, n_docs, vocab, longest=12):
    """Documents [0] + ids + [0]; tokens are skewed so that counts of 1, 2 and many all occur."""
    rng = np.random.default_rng(seed)
    draw = lambda: np.minimum(rng.geometric(0.3, rng.integers(0, longest)), vocab - 2)  # vocab - 1 never occurs
    return [np.concatenate([[0], draw(), [0]]).astype(np.int64) for _ in range(n_docs)]


class Loops:
    """The formula of the docstring with dictionaries: n-grams are tuples, a document start has no left neighbour."""

    def __init__(self, order, docs, vocab):
        self.vocab, self.order = vocab, order
        self.counts = {n: Counter() for n in range(1, order + 1)}
        left = {n: defaultdict(set) for n in range(1, order)}
        for doc in docs:
            text = doc.tolist()
            for at in range(1, len(text)):
                for n in range(1, order + 1):
                    if at - n + 1 < 0:
                        continue
                    gram = tuple(text[at - n + 1 : at + 1])
                    if n == order or at - n + 1 == 0:
                        self.counts[n][gram] += 1
                    else:
                        left[n][gram].add(text[at - n])
        for n, grams in left.items():
            for gram, tokens in grams.items():
                self.counts[n][gram] += len(tokens)

    def prob(self, history, token):
        p = 1 / self.vocab
        for n in range(1, self.order + 1):
            if len(history) < n - 1:
                break
            context = tuple(history[len(history) - n + 1 :])
            after = {gram[-1]: c for gram, c in self.counts[n].items() if gram[:-1] == context}
            if not after:
                continue
            n1 = sum(c == 1 for c in self.counts[n].values())
            n2 = sum(c == 2 for c in self.counts[n].values())
            d = n1 / (n1 + 2 * n2) if n1 else 0.5
            total = sum(after.values())
            p = max(after.get(token, 0) - d, 0) / total + d * len(after) / total * p
        return p


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_equals_the_loops(order):
    vocab, train, test = 9, corpus(0, 40, 9), corpus(1, 15, 9)
    model, loops = KneserNey(order).fit(train, vocab), Loops(order, train, vocab)
    total, n = 0.0, 0
    for doc in test:
        text = doc.tolist()
        for at in range(1, len(text)):
            total -= math.log(loops.prob(text[max(0, at - order + 1) : at], text[at]))
            n += 1
    nats, targets = model.nats(test)
    assert targets == n == sum(len(doc) - 1 for doc in test)
    assert nats == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_sums_to_one_after_every_history(order):
    vocab = 7
    model, loops = KneserNey(order).fit(corpus(2, 25, vocab), vocab), Loops(order, corpus(2, 25, vocab), vocab)
    histories = [()] if order == 1 else [(a,) for a in range(vocab)]  # one token only: a document start
    histories += [(a, b) for a in range(vocab) for b in range(vocab)]
    for history in histories:
        p = model.distribution(history)
        assert p.shape == (vocab,) and p.min() > 0 and p.sum() == pytest.approx(1, abs=1e-12)
        by_hand = [loops.prob(history[max(0, len(history) - order + 1) :], w) for w in range(vocab)]
        np.testing.assert_allclose(p, by_hand, rtol=1e-12)


def test_bigram_worked_by_hand():
    # 0 1 1 2 0 and 0 1 0: bigrams 01 x2, 11, 12, 20, 10; unigram types: 0 after {2,1}, 1 after {0,1}, 2 after {1}
    model = KneserNey(2).fit([np.array([0, 1, 1, 2, 0]), np.array([0, 1, 0])], 4)
    d1, d2 = 1 / (1 + 2 * 2), 4 / (4 + 2 * 1)
    unigram = np.maximum(np.array([2, 2, 1, 0]) - d1, 0) / 5 + d1 * 3 / 5 / 4
    after_1 = np.maximum(np.array([1, 1, 1, 0]) - d2, 0) / 3 + d2 * 3 / 3 * unigram
    np.testing.assert_allclose(model.distribution([1]), after_1, rtol=1e-12)
    np.testing.assert_allclose(model.distribution([3]), unigram, rtol=1e-12)


def test_continuation_counts_beat_frequency():
    """5 is frequent but follows one token (as "Francisco" follows "San"); 6 is rarer and follows many."""
    docs = [np.array([0, 4, 5, 0])] * 20 + [np.array([0, w, 6, 0]) for w in (1, 2, 3, 7)]
    p = KneserNey(2).fit(docs, 10).distribution([9])
    assert p[6] > 2 * p[5]


def test_unseen_tokens_and_lone_documents():
    assert KneserNey(3).fit(corpus(3, 5, 50), 60).nats([np.array([0, 59, 58, 57, 0])])[0] < 4 * math.log(60) * 3
    lone = KneserNey(3).fit([np.array([0, 0]), np.array([0, 0])], 4)  # no trigram exists at all
    assert lone.distribution([0]).sum() == pytest.approx(1)
    nats, n = lone.nats([np.array([0, 2, 1, 0])])
    assert n == 3 and math.isfinite(nats)


def test_documents_do_not_touch():
    docs = corpus(4, 30, 9)
    forward, backward = (KneserNey(3).fit(d, 9) for d in (docs, docs[::-1]))
    assert forward.nats(docs)[0] == pytest.approx(backward.nats(docs)[0], rel=1e-12)
    assert sum(forward.nats([doc])[0] for doc in docs) == pytest.approx(forward.nats(docs)[0], rel=1e-12)


def test_longer_context_helps_where_there_is_structure():
    rng = np.random.default_rng(5)
    words = [[1, 2, 3], [4, 2, 5], [6, 7]]  # after 2, only the token before it says what follows
    docs = [np.array([0, *(t for i in rng.integers(0, 3, 30) for t in words[i])]) for _ in range(60)]
    loss = [KneserNey(order).fit(docs[:50], 8).nats(docs[50:])[0] for order in (1, 2, 3)]
    assert loss[1] < 0.75 * loss[0] and loss[2] < 0.75 * loss[1]


@pytest.mark.parametrize(
    ("order", "docs", "vocab"),
    [
        (3, [np.array([0, 9])], 9),
        (3, [np.array([0, -1])], 9),
        (3, [], 9),
        (3, [np.array([], dtype=int)], 9),
        (4, [np.array([0])], 2**16),
    ],
)
def test_refuses_what_it_cannot_count(order, docs, vocab):
    with pytest.raises(ValueError):
        KneserNey(order).fit(docs, vocab)


def test_refuses_order_zero():
    with pytest.raises(ValueError, match="order = 0"):
        KneserNey(0)
