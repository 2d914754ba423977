"""Gopher, repetition, C4 and FineWeb rules against datatrove's filters: same decision, same reason, same text left.

datatrove cuts words with spaCy; here both sides get ours. Where we differ on purpose, the text or the setting avoids it: a
bare full stop ends a line (``closing: ""``), and texts are so long that a word group that stands once is no "repetition".
"""

import logging
import random
from collections import Counter
from dataclasses import replace

import pytest

from tests.golden.test_quality_steps import embedded
from zero2llm.data.document import Document, Removed
from zero2llm.data.steps import fineweb, gopher, repetition
from zero2llm.data.steps.c4 import C4Config
from zero2llm.data.steps.words import sentences, words

filters = pytest.importorskip("datatrove.pipeline.filters", reason="datatrove is not installed")


class OurWords:
    def word_tokenize(self, text):
        return words(text)

    def span_tokenize(self, text):
        ends, at = [], 0
        for sentence in sentences(text):
            at = text.index(sentence, at) + len(sentence)
            ends.append((0, at))
        return ends


@pytest.fixture(autouse=True)
def _words(monkeypatch):
    from datatrove.utils import text, word_tokenizers

    logging.disable(logging.INFO)
    monkeypatch.setattr(word_tokenizers, "load_word_tokenizer", lambda language: OurWords())
    text.split_into_parts.cache_clear()
    yield
    text.split_into_parts.cache_clear()
    logging.disable(logging.NOTSET)


def spoil(text, rng):
    """A text with a fault of the kinds that the rules look for, from harmless to fatal."""
    lines, tokens = text.split("\n"), text.split(" ")
    share, at = rng.choice([0.02, 0.1, 0.3, 0.31, 0.6, 0.95]), rng.randrange(len(tokens))

    def each(parts, change):
        return [change(part) if rng.random() < share else part for part in parts]

    noise = [" {.", " use cookies.", " Lorem ipsum.", " JavaScript!"]
    of_lines = [
        lambda line: f"{rng.choice('•-')} {line}",
        lambda line: line.rstrip(".!?") + rng.choice(["...", "…"]),
        lambda line: line.rstrip(".!?\"'"),
        lambda line: f"{line}\n{line}",
        lambda line: f"{line}\n\n{line}",
        lambda line: line[: rng.randrange(10, 60)] + rng.choice([".", "", '"']),
        lambda line: line + rng.choice(noise),
        lambda line: f"{line}[3] It is so.[edit]",
    ]
    of_words = [
        lambda word: f"#{word}",
        lambda word: rng.choice(["12", "3.5", "--"]),
        lambda word: word[:1],
        lambda word: word * 4,
        lambda word: f"{word}.\n",
    ]
    ways = [
        *(lambda change=change: "\n".join(each(lines, change)) for change in of_lines),
        *(lambda change=change: " ".join(each(tokens, change)) for change in of_words),
        lambda: " ".join(word for word in tokens if word.strip(gopher.MARKS) not in gopher.ENGLISH.stop_words),
        lambda: " ".join(tokens + tokens[at : at + rng.randrange(2, 200)] * rng.randrange(1, 8)),
        lambda: " ".join(tokens[at : at + rng.randrange(40, 60)]),
        lambda: ("\n" * rng.randrange(2, 6)).join(line[:45] + "." for line in lines if line),
    ]
    return rng.choice(ways)().strip()


def english():
    rng = random.Random(1)
    pieces = [text for name in ("en_austen", "en_moby_dick") for text in embedded(name)[:60]]
    pieces = ["\n".join(text.split("\n")[: rng.randrange(1, 20)]) for text in pieces]
    texts = [*pieces, *(spoil(spoil(text, rng), rng) for text in pieces * 4)]
    return [text.strip() for text in texts if len(text.split()) >= 40]


def chinese():
    rng = random.Random(2)
    pieces = [text for name in ("zh_classical_prose", "zh_songci", "zh_poetry_small") for text in embedded(name)[:80]]
    spoiled = []
    for text in pieces:
        lines, at = text.split("\n"), rng.randrange(len(text))
        spoiled.append(
            rng.choice([text + text[at : at + 60] * 2, "\n".join(lines + lines[:: rng.randrange(1, 6)]), text[:50] * 3])
        )
    return [text.strip() for text in pieces + spoiled if len(words(text)) >= 100]


def compare(theirs, ours, reasons, texts, least_reasons):
    """The same verdict on every text, and enough different verdicts for that to mean something."""
    from datatrove.data import Document as Theirs

    seen = Counter()
    for text in texts:
        result = theirs.filter(Theirs(text=text, id=""))
        expected = None if result is True else reasons[result[1]]
        found = ours(text)
        seen[expected] += 1
        assert (found and found.reason) == expected, f"{found} but {result}: {text!r}"
    assert len(seen) >= least_reasons and seen[None] >= 20, seen
    assert len(texts) >= 200


GOPHER = {
    "gopher_short_doc": "too few words",
    "gopher_long_doc": "too many words",
    "gopher_below_avg_threshold": "words too short",
    "gopher_above_avg_threshold": "words too long",
    "gopher_too_many_hashes": "too many #",
    "gopher_too_many_ellipsis": "too many ellipses",
    "gopher_too_many_bullets": "too many bullet lines",
    "gopher_too_many_end_ellipsis": "too many lines end with an ellipsis",
    "gopher_below_alpha_threshold": "too few words with a letter",
    "gopher_enough_stop_words": "too few stop words",
}
REPETITION = {
    "dup_para_frac": "repeated paragraphs",
    "dup_para_char_frac": "characters in repeated paragraphs",
    "dup_line_frac": "repeated lines",
    "dup_line_char_frac": "characters in repeated lines",
    **{f"top_{n}_gram": f"most frequent {n}-gram" for n in range(2, 20)},
    **{f"duplicated_{n}_n_grams": f"repeated {n}-grams" for n in range(5, 20)},
}
FINEWEB = {
    "line_punct_ratio": "too few lines end with punctuation",
    "short_line_ratio": "too many short lines",
    "char_dup_ratio": "characters in repeated lines",
    "list_ratio": "a list",
}


def plain_stop_words(texts, r):
    """Texts in which as many stop words stand without a mark at them: datatrove sees the others only with spaCy."""
    seen = lambda found: min(len(set(r.stop_words).intersection(found)), r.min_stop_words)
    return [text for text in texts if seen(words(text)) == seen(word.strip(gopher.MARKS) for word in words(text))]


def test_gopher():
    texts = plain_stop_words(english(), gopher.ENGLISH)
    compare(filters.GopherQualityFilter(), lambda text: gopher.fault(text, gopher.ENGLISH), GOPHER, texts, 8)


def test_gopher_on_chinese_with_our_numbers():
    r = replace(gopher.CHINESE, bullets=("•", "-"))
    theirs = filters.GopherQualityFilter(
        min_doc_words=r.min_words,
        max_doc_words=r.max_words,
        min_avg_word_length=None,
        max_avg_word_length=r.max_mean_word_length,
        max_symbol_word_ratio=r.max_symbols_per_word,
        stop_words=list(r.stop_words),
    )
    texts = plain_stop_words([text for text in chinese() if "……" not in text], r)
    compare(theirs, lambda text: gopher.fault(text, r), GOPHER, texts, 2)


def test_repetition():
    ours = lambda text: repetition.fault(text, repetition.ENGLISH)
    texts = [text for text in english() if len(text.split()) >= 80]
    compare(filters.GopherRepetitionFilter(), ours, REPETITION, texts, 8)


def test_repetition_on_chinese_with_our_numbers():
    r = replace(repetition.CHINESE, gap=1)  # datatrove counts a blank between characters
    theirs = filters.GopherRepetitionFilter(
        dup_line_frac=r.lines, top_n_grams=r.top_grams, dup_n_grams=r.duplicate_grams
    )
    compare(theirs, lambda text: repetition.fault(text, r), REPETITION, chinese(), 5)


@pytest.mark.parametrize("duplicates", [0.01, 0.1])
def test_fineweb(duplicates):
    r = replace(fineweb.ENGLISH, closing="", max_repeated_characters=duplicates)
    theirs = filters.FineWebQualityFilter(char_duplicates_ratio=duplicates)
    compare(theirs, lambda text: fineweb.fault(text, r), FINEWEB, english(), 5)


def test_fineweb_on_chinese_with_our_numbers():
    r = replace(fineweb.CHINESE, closing="")
    theirs = filters.FineWebQualityFilter(
        line_punct_thr=r.min_punctuated_lines,
        short_line_thr=r.max_short_lines,
        short_line_length=r.short_line,
        char_duplicates_ratio=r.max_repeated_characters,
        new_line_ratio=r.max_line_ends_per_word,
    )
    compare(theirs, lambda text: fineweb.fault(text, r), FINEWEB, chinese(), 3)


@pytest.mark.parametrize("terminal", [True, False])
def test_c4(terminal):
    from datatrove.data import Document as Theirs

    theirs = filters.C4QualityFilter(filter_no_terminal_punct=terminal)
    cfg = C4Config(terminal_punctuation=terminal, languages={"en": {"min_line_words": 3, "min_sentences": 5}})
    step, seen = cfg.build(), Counter()
    for text in english():
        reference = Theirs(text=text, id="")
        result = theirs.filter(reference)
        found = step(Document(text, "", {"language": "en"}))
        reason = found.reason if isinstance(found, Removed) else None
        assert reason == (None if result is True else result[1].replace("_", " ")), text
        seen[reason] += 1
        if reason is None:
            assert [line for line in found.text.split("\n") if line] == [
                line for line in reference.text.split("\n") if line
            ]
    assert len(seen) == 4 and min(seen.values()) >= 5, seen
