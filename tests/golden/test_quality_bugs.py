"""Planted bugs in the quality rules: each must be caught, and by which check is part of the claim."""


from tests.golden import test_quality_steps as golden
from tests.golden.planted import bug_tests
from zero2llm.data.document import Removed
from zero2llm.data.steps import c4, fineweb, gopher, repetition

CHECKS = [
    golden.test_gopher_word_count,
    golden.test_gopher_word_length,
    golden.test_gopher_symbols,
    golden.test_gopher_lines,
    golden.test_gopher_letters_and_stop_words,
    golden.test_gopher_chinese,
    golden.test_repeated_lines_and_paragraphs,
    golden.test_top_grams,
    golden.test_duplicate_grams,
    golden.test_shortcuts_change_nothing,
    golden.test_c4_lines,
    golden.test_c4_keeps_paragraphs_and_takes_citations_out,
    golden.test_c4_documents,
    golden.test_c4_chinese,
    golden.test_fineweb_lines,
    golden.test_fineweb_repetition_and_lists,
    golden.test_fineweb_chinese,
]


# Gopher


def limits_themselves_are_out(patch):
    def wrong(reason, n, of, limit):
        return Removed(reason) if limit is not None and of and n / of >= limit else None

    patch.setattr(gopher, "_above", wrong)


def share_of_letters_must_be_passed(patch):
    def wrong(reason, n, of, limit):
        return Removed(reason) if limit is not None and of and n / of <= limit else None

    patch.setattr(gopher, "_below", wrong)


def symbols_per_line(patch):
    right = gopher.symbol_fault
    patch.setattr(gopher, "symbol_fault", lambda text, n, r: right(text, len(text.splitlines()), r))


def blank_split_words(patch):
    patch.setattr(gopher, "words", str.split)


def punctuation_is_a_word(patch):
    import re

    patch.setattr(gopher, "words", re.compile(r"\w+|[^\w\s]").findall)


def stop_words_are_counted_not_told_apart(patch):
    def wrong(found, r):
        n = sum(word in r.stop_words for word in found)
        return Removed("too few stop words") if r.min_stop_words and n < r.min_stop_words else None

    patch.setattr(gopher, "stop_word_fault", wrong)


def ellipses_anywhere_in_the_line(patch):
    right = gopher.line_fault
    patch.setattr(
        gopher, "line_fault", lambda lines, r: right([line + "..." if "..." in line else line for line in lines], r)
    )


def chinese_by_english_numbers(patch):
    patch.setitem(gopher.DEFAULTS, "zh", gopher.ENGLISH)


# Repetition


def all_copies_count(patch):
    def wrong(parts):
        again = [part for part in parts if parts.count(part) > 1]
        return len(again), sum(map(len, again))

    for module in (repetition, fineweb):
        patch.setattr(module, "repeated", wrong)


def each_repeated_part_counts_once(patch):
    def wrong(parts):
        again = {part for part in parts if parts.count(part) > 1}
        return len(again), sum(map(len, again))

    patch.setattr(repetition, "repeated", wrong)


def overlaps_count_twice(patch):
    def wrong(tokens, n):
        grams = list(repetition.grams(tokens, n))
        return sum(len("".join(gram)) for i, gram in enumerate(grams) if gram in grams[:i])

    patch.setattr(repetition, "duplicate_characters", wrong)


def first_occurrences_count(patch):
    right = repetition.duplicate_characters
    patch.setattr(repetition, "duplicate_characters", lambda tokens, n: 2 * right(tokens, n))


def limit_is_out(patch):
    def wrong(reason, characters, size, limit, what=""):
        return Removed(reason) if characters / size >= limit else None

    patch.setattr(repetition, "_over", wrong)


def grams_of_one_word_less(patch):
    right = repetition.grams
    patch.setattr(repetition, "grams", lambda tokens, n: right(tokens, n - 1))


def shortcut_takes_the_largest_limit(patch):
    right = repetition.few_repeat
    patch.setattr(
        repetition,
        "few_repeat",
        lambda tokens, size, limits: right(tokens, size, [(n, 2 * limits[0][1]) for n, _ in limits]),
    )


# C4


def a_line_may_end_anyhow(patch):
    right = c4.line_fault
    patch.setattr(c4, "line_fault", lambda line, text, r, cfg: right(line, text + ".", r, cfg))


def ellipsis_is_a_full_stop(patch):
    right = c4.line_fault
    patch.setattr(c4, "line_fault", lambda line, text, r, cfg: right(line, text.replace("...", "."), r, cfg))


def one_word_more(patch):
    patch.setattr(c4, "words", lambda line: [*line.split(), "x"])


def words_by_blanks(patch):
    patch.setattr(c4, "words", str.split)


def long_word_without_a_look_at_the_script(patch):
    patch.setattr(c4, "has_solo", lambda text: False)


def citations_stay(patch):
    import re

    patch.setattr(c4, "_citation", re.compile("(?!)"))


def every_dot_ends_a_sentence(patch):
    patch.setattr(c4, "sentences", lambda text: [*text])


def lines_are_sentences(patch):
    patch.setattr(c4, "sentences", lambda text: [text])


# FineWeb


def blank_lines_are_lines(patch):
    right = fineweb.fault
    patch.setattr(fineweb, "fault", lambda text, r: right(text.replace("\n\n", "\nx\n"), r))


def short_means_shorter_than(patch):
    right = fineweb.fault
    patch.setattr(fineweb, "fault", lambda text, r: right(text, golden.replace(r, short_line=r.short_line - 1)))


def quotation_marks_hide_the_full_stop(patch):
    right = fineweb.fault
    patch.setattr(fineweb, "fault", lambda text, r: right(text, golden.replace(r, closing="")))


def ends_per_line(patch):
    patch.setattr(fineweb, "words", lambda text: [line for line in text.split("\n") if line] * 2)


def words_by_blanks_in_lists(patch):
    patch.setattr(fineweb, "words", str.split)


def only_latin_full_stops(patch):
    patch.setattr(fineweb, "FULL_STOPS", (".", "!", "?"))


BUGS = {  # bug -> checks that must catch it
    limits_themselves_are_out: {"gopher_symbols", "gopher_lines"},
    share_of_letters_must_be_passed: {"gopher_letters_and_stop_words"},
    symbols_per_line: {"gopher_symbols"},
    blank_split_words: {"gopher_chinese"},
    punctuation_is_a_word: {"gopher_letters_and_stop_words"},
    stop_words_are_counted_not_told_apart: {"gopher_letters_and_stop_words"},
    ellipses_anywhere_in_the_line: {"gopher_lines"},
    chinese_by_english_numbers: {"gopher_chinese"},
    all_copies_count: {"repeated_lines_and_paragraphs", "fineweb_repetition_and_lists"},
    each_repeated_part_counts_once: {"repeated_lines_and_paragraphs"},
    overlaps_count_twice: {"duplicate_grams"},
    first_occurrences_count: {"duplicate_grams"},
    limit_is_out: {"top_grams"},
    grams_of_one_word_less: {"top_grams", "shortcuts_change_nothing"},
    shortcut_takes_the_largest_limit: {"shortcuts_change_nothing"},
    a_line_may_end_anyhow: {"c4_lines", "c4_chinese"},
    ellipsis_is_a_full_stop: {"c4_lines"},
    one_word_more: {"c4_lines"},
    words_by_blanks: {"c4_chinese"},
    long_word_without_a_look_at_the_script: {"c4_chinese"},
    citations_stay: {"c4_keeps_paragraphs_and_takes_citations_out"},
    every_dot_ends_a_sentence: {"c4_documents"},
    lines_are_sentences: {"c4_documents"},
    blank_lines_are_lines: {"fineweb_lines"},
    short_means_shorter_than: {"fineweb_lines"},
    quotation_marks_hide_the_full_stop: {"fineweb_lines", "fineweb_chinese"},
    ends_per_line: {"fineweb_repetition_and_lists"},
    words_by_blanks_in_lists: {"fineweb_chinese"},
    only_latin_full_stops: {"fineweb_chinese"},
}


test_without_a_bug_every_check_holds, test_a_planted_bug_is_caught = bug_tests(BUGS, CHECKS)
