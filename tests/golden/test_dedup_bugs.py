"""Planted bugs in deduplication: each must be caught, and by whom is part of the claim.

A wrong permutation still finds exact copies, a wrong band still finds most near ones: only the law of the estimate and
the S curve tell. What search and groups do wrong is seen by brute force.
"""

import numpy as np
import pytest

from tests.golden import test_dedup as golden
from tests.golden.planted import bug_tests
from zero2llm.data import shingles as sh
from zero2llm.data import union
from zero2llm.data.document import Verdict
from zero2llm.data.steps import lines, minhash, simhash
from zero2llm.data.steps.minhash import MinHash, MinHashConfig, Permutations

# The checks. Each raises AssertionError.


def shingles_by_loop():
    golden.test_shingles_equal_the_loop(5)


def signature_by_loop():
    golden.test_signature_equals_the_loop()
    golden.test_signature_of_many_blocks_is_the_least_of_each()


def unbiased():
    golden.check_unbiased(Permutations(126, 0), 126, 300, 0.6)


def s_curve():
    for similarity in (0.5, 0.8):
        golden.check_curve(Permutations(126, 0), similarity)


def groups_by_hand():
    golden.test_decide_by_hand()


def groups_by_brute_force():
    golden.test_decide_leaves_no_alike_pair_of_a_bucket()


def union_by_loop():
    golden.test_join_equals_the_loop()


def planted():
    golden.check_planted(MinHashConfig().build(), "zh", 500, 100)


def fingerprint_by_hand():
    golden.test_fingerprint_by_hand()


def search_by_brute_force():
    golden.check_search(160, 3)


def search_with_more_blocks():
    with pytest.MonkeyPatch.context() as patch:
        golden.test_search_with_more_blocks_equals_brute_force(1, patch)


def lines_by_hand():
    golden.test_lines_keep_the_first_occurrence(golden.NOTICE, golden.OWN)
    golden.test_lines_keep_the_first_occurrence(golden.HINWEIS, golden.EIGEN)


def lines_count_documents():
    golden.test_lines_count_documents()


CHECKS = [
    shingles_by_loop, signature_by_loop, unbiased, s_curve, groups_by_hand, groups_by_brute_force, union_by_loop, planted,
    fingerprint_by_hand, search_by_brute_force, search_with_more_blocks, lines_by_hand, lines_count_documents,
]  # fmt: skip


# Bugs of shingles


def shingles_run_into_the_next_document(patch):
    right = sh.hash_units

    def wrong(texts, n):
        units, counts = right(texts)
        hashes = sum(units[j : len(units) - n + 1 + j] * sh.STEP ** np.uint64(n - 1 - j) for j in range(n))
        at = np.minimum(np.concatenate([[0], np.cumsum(counts)]), len(hashes))
        return sh.mix(hashes), at

    patch.setattr(golden.sh, "shingles", wrong)


def order_of_units_is_lost(patch):
    patch.setattr(sh, "STEP", np.uint64(1))


def order_of_letters_is_lost(patch):
    kind, bits, powers, inverse = sh.tables()
    patch.setattr(sh, "tables", lambda: (kind, bits, np.ones_like(powers), np.ones_like(inverse)))


# Bugs of MinHash


def multipliers_may_be_even(patch):
    right = Permutations.__init__

    def wrong(self, slots, seed):
        right(self, slots, seed)
        self.a = self.a & ~np.uint32(1)

    patch.setattr(Permutations, "__init__", wrong)


def every_slot_has_the_same_permutation(patch):
    right = Permutations.__init__

    def wrong(self, slots, seed):
        right(self, slots, seed)
        self.a[:], self.b[:] = self.a[0], self.b[0]

    patch.setattr(Permutations, "__init__", wrong)


def permutations_only_add(patch):
    right = Permutations.__init__

    def wrong(self, slots, seed):
        right(self, slots, seed)
        self.a[:] = 1

    patch.setattr(Permutations, "__init__", wrong)


def last_block_wins(patch):
    right = Permutations.minima
    patch.setattr(
        Permutations, "minima", lambda self, x: right(self, x[(len(x) - 1) // minhash.SHINGLES * minhash.SHINGLES :])
    )


def smallest_shingle_is_permuted(patch):
    right = Permutations.minima
    patch.setattr(Permutations, "minima", lambda self, x: right(self, x.min(keepdims=True)))


def bands_of_one_slot(patch):
    right = minhash.band_keys
    patch.setattr(minhash, "band_keys", lambda rows, start, end: right(rows, start, start + 1))


def every_band_is_the_first(patch):
    right = minhash.band_keys
    patch.setattr(minhash, "band_keys", lambda rows, start, end: right(rows, 0, end - start))


def a_band_is_a_sum(patch):
    patch.setattr(minhash, "band_keys", lambda rows, start, end: rows[:, start:end].sum(axis=1, dtype=np.uint64))


def buckets_are_shared_by_all_bands(patch):
    """Keys of different bands in one table: slots of band 0 meet those of band 1."""
    right = MinHash.decide

    def wrong(self, rows, owner):
        n, per_band = len(rows), self.cfg.rows
        keys = [minhash.band_keys(rows, b * per_band, (b + 1) * per_band) for b in range(self.cfg.bands)]
        first = union.first_of_equal(np.concatenate(keys)) % n
        group = right(self, rows, owner).group
        union.join(group, np.tile(np.arange(n), self.cfg.bands), first)
        return Verdict(group == np.arange(n), group)

    patch.setattr(MinHash, "decide", wrong)


def candidates_are_believed(patch):
    right = minhash.agreement
    patch.setattr(minhash, "agreement", lambda rows, a, b, slots: np.ones_like(right(rows, a, b, slots)))


def the_length_counts_as_a_slot(patch):
    right = minhash.agreement
    patch.setattr(minhash, "agreement", lambda rows, a, b, slots: right(rows, a, b, slots + 1))


def only_the_first_leader_is_asked(patch):
    patch.setattr(minhash, "LEADERS", 1)


def the_last_of_a_group_stays(patch):
    patch.setattr(
        minhash, "first_or_longest", lambda group, lengths, keep: ~np.isin(np.arange(len(group)), group) | (group == 0)
    )


def the_last_of_the_longest_stays(patch):
    right = minhash.first_or_longest

    def wrong(group, lengths, keep):
        back = len(group) - 1 - np.arange(len(group))
        return right(group, lengths, keep) if keep == "first" else right(group[back], lengths[back], keep)[back]

    patch.setattr(minhash, "first_or_longest", wrong)


def groups_are_not_followed(patch):
    def wrong(parent, a, b):
        np.minimum.at(parent, np.maximum(a, b), np.minimum(a, b))

    patch.setattr(minhash, "join", wrong)
    patch.setattr(golden, "join", wrong)


# Bugs of SimHash


def a_tie_is_one(patch):
    right = simhash.fingerprint

    def wrong(hashes):
        return right(np.append(hashes, np.uint64((1 << 64) - 1)))  # one more vote for every bit

    patch.setattr(golden, "fingerprint", wrong)


def a_shingle_has_one_vote(patch):
    right = simhash.fingerprint
    patch.setattr(golden, "fingerprint", lambda hashes: right(np.unique(hashes)))


def as_many_blocks_as_bits_may_differ(patch):
    right = simhash.masks
    patch.setattr(simhash, "masks", lambda b, k: right(k, k - 1))


def neighbours_in_the_sort_alone(patch):
    def wrong(prints, k):
        for mask in simhash.masks(simhash.blocks_for(len(prints), k), k):
            order = np.argsort(prints & mask, kind="stable")
            near = simhash.distance(prints[order[1:]], prints[order[:-1]]) <= k
            yield order[:-1][near], order[1:][near]

    patch.setattr(simhash, "near_pairs", wrong)


def fewer_bits_than_the_distance(patch):
    right = simhash.distance
    patch.setattr(simhash, "distance", lambda x, y: right(x, y) + np.uint64(1))


def blocks_next_to_each_other_only(patch):
    def wrong(b, k):
        edges = [64 * i // b for i in range(b + 1)]
        for i in range(k + 1):
            yield np.uint64((1 << edges[i + b - k]) - (1 << edges[i]))

    patch.setattr(simhash, "masks", wrong)


# Bugs of lines


def occurrences_are_counted(patch):
    right = lines.Lines.decide
    patch.setattr(lines.Lines, "decide", lambda self, rows, owner: right(self, rows, np.arange(len(rows))))


def short_lines_take_a_verdict(patch):
    right = lines.Lines.apply

    def wrong(self, doc, keep):
        verdicts = iter([*keep.tolist(), *[True] * 9])
        left = [piece for piece in lines.pieces(doc.text, "line") if next(verdicts)]
        result = right(self, doc, keep)
        if result is doc:
            doc.text = "".join(left).strip()
        return result

    patch.setattr(lines.Lines, "apply", wrong)


def the_first_document_loses_them_too(patch):
    right = lines.Lines.decide

    def wrong(self, rows, owner):
        verdict = right(self, rows, owner)
        twice = np.bincount(verdict.group, minlength=len(rows))[verdict.group] > 1
        return Verdict(verdict.keep & ~twice, verdict.group)

    patch.setattr(lines.Lines, "decide", wrong)


BUGS = {  # bug -> checks that must catch it
    shingles_run_into_the_next_document: {"shingles_by_loop"},
    order_of_units_is_lost: {"shingles_by_loop"},
    order_of_letters_is_lost: {"shingles_by_loop"},
    multipliers_may_be_even: {"signature_by_loop"},
    every_slot_has_the_same_permutation: {"signature_by_loop", "unbiased", "s_curve", "planted"},
    permutations_only_add: {"signature_by_loop"},
    last_block_wins: {"signature_by_loop", "unbiased"},
    smallest_shingle_is_permuted: {"signature_by_loop", "unbiased", "s_curve", "planted"},
    bands_of_one_slot: {"s_curve", "groups_by_hand"},
    every_band_is_the_first: {"s_curve", "groups_by_hand", "groups_by_brute_force", "planted"},
    a_band_is_a_sum: {"groups_by_hand"},
    buckets_are_shared_by_all_bands: {"groups_by_hand", "groups_by_brute_force", "planted"},
    candidates_are_believed: {"groups_by_hand", "groups_by_brute_force", "planted"},
    the_length_counts_as_a_slot: {"groups_by_hand", "groups_by_brute_force"},
    only_the_first_leader_is_asked: {"groups_by_brute_force"},
    the_last_of_a_group_stays: {"s_curve", "groups_by_hand", "groups_by_brute_force", "planted"},
    the_last_of_the_longest_stays: {"groups_by_hand"},
    groups_are_not_followed: {"union_by_loop", "groups_by_hand"},
    a_tie_is_one: {"fingerprint_by_hand"},
    a_shingle_has_one_vote: {"fingerprint_by_hand"},
    as_many_blocks_as_bits_may_differ: {"search_by_brute_force", "search_with_more_blocks"},
    neighbours_in_the_sort_alone: {"search_by_brute_force", "search_with_more_blocks"},
    fewer_bits_than_the_distance: {"search_by_brute_force", "search_with_more_blocks"},
    blocks_next_to_each_other_only: {"search_with_more_blocks"},
    occurrences_are_counted: {"lines_count_documents"},
    short_lines_take_a_verdict: {"lines_by_hand"},
    the_first_document_loses_them_too: {"lines_by_hand", "lines_count_documents"},
}


test_without_a_bug_every_check_holds, test_a_planted_bug_is_caught = bug_tests(BUGS, CHECKS)
