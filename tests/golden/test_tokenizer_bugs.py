"""Planted bugs in BPE, WordPiece and Unigram: each must be caught, and by whom is part of the claim.

A bug is one line of the page, written otherwise. A cut that is merely not the best, or a trainer that merely learns something
else, still gives the text back, so round trips see little: the enumeration of all cuts and the trainer in loops do.
"""

import inspect
import textwrap

import pytest

from tests.golden import test_ladder as steps
from tests.golden import test_unigram as uni
from tests.golden import test_wordpiece as wp
from tests.golden.planted import caught_by, must_catch
from zero2llm.tokenizers import (
    bert_words,
    bpe,
    ladder,
    lattice,
    lattice_batch,
    unigram,
    unigram_seed,
    unigram_train,
    wordpiece,
)
from zero2llm.tokenizers.bytes import SPLITS


def change(patch, owner, name, right, wrong, also=()):
    """Plant ``wrong`` for ``right`` in the source of ``owner.name``; the same object under that name in ``also``."""
    source = textwrap.dedent(inspect.getsource(getattr(owner, name)))
    assert source.count(right) == 1, f"{name} no longer holds {right!r} once"
    space = vars(inspect.getmodule(getattr(owner, name))).copy()
    exec(compile("from __future__ import annotations\n" + source.replace(right, wrong), name, "exec"), space)
    for place in (owner, *also):
        patch.setattr(place, name, space[name])


# The checks. Each raises AssertionError.


def rungs():
    for split in SPLITS:
        steps.test_the_small_bpe_is_the_fast_one(split)
    for text in ("aaaaa abab", "cabcabab bcc", "中中国 中国中"):
        steps.test_rungs_agree_on_any_text.hypothesis.inner_test([text, "abc ab ca", "国中 aab"], text * 2)


def merges_by_hand():
    steps.test_merges_by_hand()


def single_bytes():
    steps.test_a_bpe_without_merges_is_the_byte_tokenizer()


def counting_again():
    for score in wordpiece.SCORES:
        for min_count in (1, 2):
            wp.test_training_equals_counting_everything_again(score, min_count)


def likelihood_of_the_corpus():
    for a, b in [("h", "##u"), ("t", "##h")]:
        wp.test_likelihood_score_is_what_the_corpus_gains(a, b)


def first_merges():
    wp.test_first_merges_by_hand()


def longest_first():
    wp.test_the_longest_piece_wins_even_where_a_shorter_one_would_cover_the_word()
    wp.test_long_words_are_unknown()


def words_and_text():
    wp.test_words()
    wp.test_decoding_joins_words_and_cannot_give_the_text_back()


def alphabet():
    wp.test_alphabet_limit_leaves_out_words_that_would_be_unknown()


def all_cuts():
    for word in uni.WORDS:
        uni.test_viterbi_finds_the_best_of_all_cuts(word)
        uni.test_forward_sums_all_cuts(word, 0.4)
        uni.test_expected_counts_are_averages_over_all_cuts(word)


def any_pieces():
    uni.test_viterbi_with_any_pieces()


def draws():
    uni.test_cuts_are_drawn_with_their_probability(0.3)


def ties():
    uni.test_equal_cuts_end_with_the_longest_piece()


def round_trip():
    for split in ("qwen2", "space", "none"):
        uni.test_any_text_comes_back.hypothesis.inner_test("the 中国鸠 a\n\n ab", split, True)


def unknown():
    uni.test_unknown_characters()
    uni.test_names_of_control_pieces_are_text_where_text_spells_them()


def batched():
    uni.test_batched_passes_equal_the_lattice()
    uni.test_a_word_that_may_not_be_itself_is_cut_otherwise_or_not_at_all()


def seeds():
    uni.test_seed_pieces_are_the_repeated_substrings()


def edges():
    uni.test_edges_lead_to_their_pieces_before_and_after_pruning()


def em_by_hand():
    uni.test_em_step_by_hand()


def losses_by_hand():
    uni.test_losses_by_hand()


BPE = [rungs, merges_by_hand, single_bytes]
WORDPIECE = [counting_again, likelihood_of_the_corpus, first_merges, longest_first, words_and_text, alphabet]
UNIGRAM = [all_cuts, any_pieces, draws, ties, round_trip, unknown, batched, seeds, edges, em_by_hand, losses_by_hand]


CHECKS, ERRORS = [*BPE, *WORDPIECE, *UNIGRAM], (IndexError, KeyError, ValueError)


BPE_BUGS = {  # name -> (checks that must catch it, where, function, the line as it is, the line with the bug)
    "a stale count is believed": ("rungs", bpe, "train_bpe", "-n != (now := counts[pair])", "(now := counts[pair]) < 0", steps),
    "of equal pairs the one with the highest ids": ("rungs", ladder.SmallBPE, "train", "-rank[pair[0]], -rank[pair[1]]", "rank[pair[0]], rank[pair[1]]"),
    "merges cross the borders of pieces": ("rungs", bpe, "count_pieces", "splitter(split).findall", "lambda text: [text]"),
    "pieces weigh the same however often they occur": ("rungs", bpe, "index_pairs", "counts[pair] += n", "counts[pair] += 1"),
    "the pair on the left of a merge stays": ("rungs", bpe, "merge_pair", "counts[left << 20 | a] -= n", "pass"),
    "the pair on the right of a merge stays": ("rungs", bpe, "merge_pair", "counts[b << 20 | right] -= n", "pass"),
    "pairs that a merge made are not indexed": ("rungs", bpe, "merge_pair", "key = left << 20 | new\n", "key = left << 20 | a\n"),
    "the first pair of a piece is joined, not the first merge": ("rungs", bpe.BPE, "_encode_piece", "key=lambda pair: self.ranks.get(pair, len(self.ranks))", "key=lambda pair: pair not in self.ranks"),
    "ids begin one late": ("rungs", bpe.BPE, "__init__", "first_id + i: token", "first_id + i + 1: token"),
    "the rarest pair first": ("rungs merges_by_hand", ladder.SmallBPE, "train", "(counts[pair], -rank", "(-counts[pair], -rank"),
    "a joined token is joined again at once": ("merges_by_hand", ladder, "join", "i += 2", "i += 1", bpe),
    "merges in another order than learned": ("rungs merges_by_hand", ladder.SmallBPE, "encode", "in self.merges", "in self.merges[::-1]"),
    "bytes by their value, not in the order of files": ("single_bytes", ladder.ByteTokenizer, "encode", "self.ids[bytes([b])]", "b"),
}  # fmt: skip
W, P = wordpiece.WordPiece, wordpiece
BUGS = {  # name -> (checks that must catch it, where, function, the line as it is, the line with the bug)
    "the shortest piece first": ("longest_first", W, "_encode_word", "range(min(len(word), begin + self.longest), begin, -1)", "range(begin + 1, min(len(word), begin + self.longest) + 1)"),
    "a piece inside a word without its mark": ("longest_first", W, "_encode_word", "INSIDE if begin else", '"" if begin else'),
    "what was found before the unknown rest stays": ("longest_first", W, "_encode_word", "(self.ids[UNKNOWN],)", "(*ids, self.ids[UNKNOWN])"),
    "the longest word is already too long": ("longest_first", W, "_encode_word", "len(word) <= self.max_word", "len(word) < self.max_word"),
    "the mark stays in a merged piece": ("counting_again first_merges", P, "train_wordpiece", "vocab[b].removeprefix(INSIDE)", "vocab[b]", wp),
    "a merge leaves its parts as frequent as they were": ("counting_again", P, "best_pairs", "unit[a] -= joined", "pass"),
    "a merge leaves the corpus as long as it was": ("counting_again", P, "best_pairs", "total -= joined", "pass"),
    "a word that holds the pair twice counts once": ("counting_again", P, "best_pairs", "sum(words[i].count(new) * freqs[i] for i in touched)", "sum(freqs[i] for i in touched)"),
    "pairs that became better are forgotten": ("counting_again", P, "best_pairs", "changed |= near.pop(a, set()) | near.pop(b, set())", "pass"),
    "a stale promise is believed": ("counting_again", P, "_pop", "-promised <= (now := value(pair))", "(now := value(pair)) > -1e9"),
    "rare pairs are joined too": ("counting_again", P, "best_pairs", "lambda p: counts[p] >= min_count", "lambda p: counts[p] > 0"),
    "the gain without the shorter corpus": ("likelihood_of_the_corpus", P, "likelihood_gain", "- f(total - n) + f(total)", ""),
    "rare characters stay in training": ("alphabet", P, "train_wordpiece", "for word, n in words.items() if chars.issuperset(word)}", "for word, n in words.items()}", wp),
    "Chinese words are not taken apart": ("words_and_text", bert_words, "_clean", 'f" {char} " if is_chinese(char) else char', "char"),
    "only Unicode's punctuation": ("words_and_text", bert_words, "is_punctuation", ' or char in "$+<=>^`|~"', ""),
    "accents stay in lower case": ("words_and_text", bert_words.BertWords, "normalise", "self.lower if self.strip_accents is None else self.strip_accents", "self.strip_accents"),
}  # fmt: skip
U, S, T, L, B = unigram.Unigram, unigram_seed, unigram_train, lattice, lattice_batch
MORE_BUGS = {
    "of equal cuts the last": ("ties", L, "best_cut", "best[b] + s > score", "best[b] + s >= score", unigram),
    "scores of the last step only": ("any_pieces", L, "best_cut", "score, begin, piece = best[b] + s, b, p", "score, begin, piece = s, b, p", unigram),
    "the temperature is forgotten": ("all_cuts draws", L, "log_sums", "theta * score", "score"),
    "counts of all cuts, not of the average cut": ("all_cuts em_by_hand", L, "expected_counts", " - before[-1])", ")"),
    "a draw looks only at the last piece": ("draws", L, "drawn_cut", "exp(sums[begin] + theta * score - sums[end])", "exp(theta * score)", unigram),
    "an unknown character costs no more than the worst piece": ("unknown", U, "__init__", "default=0.0) - PENALTY", "default=0.0)"),
    "control pieces are found in text": ("unknown", U, "__init__", "if piece not in control}", "}"),
    "bytes in the wrong order": ("round_trip unknown", U, "to_ids", "word[begin:end].encode()", "word[begin:end].encode()[::-1]"),
    "the blank put in front comes back": ("round_trip", U, "decode", 'text.removeprefix(" ") if self.prefix else text', "text"),
    "the last piece of a word does not count": ("batched em_by_hand losses_by_hand", B, "backward", "t + sizes <= words.length[:n, None]", "t + sizes < words.length[:n, None]"),
    "words weigh the same however often they occur": ("batched em_by_hand", B, "expected_counts", "* weight[w]", "", T),
    "a piece may stand for itself": ("losses_by_hand", T, "losses", "whole=False", "whole=True"),
    "the sum of counts stays when a piece goes": ("losses_by_hand", T, "losses", "np.log(total + freq * (n_other - 1))", "np.log(total)"),
    "a piece's uses do not go to its parts": ("losses_by_hand", T, "losses", "np.log(freq[other] + freq[of])", "np.log(freq[other] + 1e-9)"),
    "the least missed pieces stay": ("losses_by_hand", T, "prune", "np.argsort(-loss,", "np.argsort(loss,"),
    "pieces keep their old numbers in the lattice": ("edges losses_by_hand", S.State, "keep", "number[self.edge]", "self.edge"),
    "counts of different words, not of all": ("seeds", S, "seed", "np.repeat(weight, size)", "np.ones(len(text))"),
    "long repeats leave all their parts": ("seeds", S, "substrings", "range(1, longest + 2)", "range(1, longest + 1)"),
    "seeds that a longer one always contains": ("seeds", S, "seed", "& ~covered ", ""),
    "seeds reach into the next word": ("seeds edges", S, "substrings", "& (left[here] > size)", "& (here + size < len(text))"),
    "maximum likelihood instead of digamma": ("em_by_hand", T, "em_step", "digamma(np.maximum(counts, MIN_COUNT)) - digamma(", "np.log(np.maximum(counts, MIN_COUNT)) - np.log("),
    "rare characters vanish": ("em_by_hand", T, "em_step", "stay[: state.n_chars] = True", "pass"),
}  # fmt: skip


def test_without_a_bug_every_check_holds():
    assert caught_by(CHECKS, also=ERRORS) == set()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bug", [*BPE_BUGS, *BUGS, *MORE_BUGS])
def test_a_planted_bug_is_caught(bug, monkeypatch):
    by, where, name, right, wrong, *also = (BPE_BUGS | BUGS | MORE_BUGS)[bug]
    change(monkeypatch, where, name, right, wrong, also)
    must_catch(set(by.split()), CHECKS, also=ERRORS)
