"""Chunking by hand, as laws (nothing lost, nothing too long), and with planted bugs."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zero2llm.data.document import Document
from zero2llm.data.steps import chunk
from zero2llm.data.steps.chunk import Characters, ChunkConfig, Tokens
from zero2llm.tokenizers.tokenizer import Tokenizer

NOVEL = (
    'Mr. Darcy met J. R. Smith at 3.30 p.m. on No. 5 Elm St. by the sea. "Are you well?" he asked. "No!" She left... Then it rained. '
    "Dr. Lee, e.g., said no. Then he went home.\n\nA second paragraph (short.) Here! And here?! The end."
)
STORY = "“你好吗？”他问。“很好！”她说……然后走了。我……我不知道……，真的。版本3.14发布了!太好了。\n第二段没有空行。\n\n　　第三段在空行之后；还没完"


def cut(text: str, **options) -> list[str]:
    return [d.text for d in ChunkConfig(**options).build()(Document(text, "here"))]


def spans(text: str, found) -> list[str]:
    return [text[a:b] for a, b in found]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    Tokenizer.train([NOVEL * 3, STORY * 3], vocab_size=420).save(folder)
    return str(folder)


def check_english():
    assert spans(NOVEL, chunk.sentences(NOVEL, (0, len(NOVEL)))) == [
        "Mr. Darcy met J. R. Smith at 3.30 p.m. on No. 5 Elm St. by the sea. ",
        '"Are you well?" he asked. ',
        '"No!" ',
        "She left... ",
        "Then it rained. ",
        "Dr. Lee, e.g., said no. ",
        "Then he went home.\n\n",
        "A second paragraph (short.) ",
        "Here! ",
        "And here?! ",
        "The end.",
    ]


def check_chinese():
    assert spans(STORY, chunk.sentences(STORY, (0, len(STORY)))) == [
        "“你好吗？”",
        "他问。",
        "“很好！”",
        "她说……",
        "然后走了。",
        "我……",
        "我不知道……，真的。",
        "版本3.14发布了!",
        "太好了。\n",
        "第二段没有空行。\n\n　　",
        "第三段在空行之后；还没完",
    ]


def check_paragraphs():
    assert spans(STORY, chunk.paragraphs(STORY, (0, len(STORY)))) == [
        STORY[: STORY.index("　　")],
        STORY[STORY.index("　　") :],
    ]
    assert spans("a\nb\n\n", chunk.paragraphs("a\nb\n\n", (0, 5))) == ["a\nb\n\n"]
    assert spans("甲\n乙\n丙", chunk.paragraphs("甲\n乙\n丙", (0, 5))) == ["甲\n", "乙\n", "丙"]


def check_fixed():
    assert spans("abcdefghij", chunk.fixed(Characters(10), (0, 10), 4, 1)) == ["abcd", "defg", "ghij"]
    assert spans("abcdefghij", chunk.fixed(Characters(10), (0, 10), 4, 0)) == ["abcd", "efgh", "ij"]
    assert spans("abcdefgh", chunk.fixed(Characters(8), (0, 8), 4, 0)) == ["abcd", "efgh"]
    assert chunk.fixed(Characters(0), (0, 0), 4, 0) == []


def check_pack():
    units = [(0, 3), (3, 6), (6, 8), (8, 20), (20, 21)]
    assert chunk.pack(units, Characters(21), 6, 0) == [(0, 6), (6, 8), (8, 20), (20, 21)]
    assert chunk.pack(units, Characters(21), 8, 2) == [(0, 8), (8, 20), (20, 21)]
    assert chunk.pack([(0, 3), (3, 5), (5, 8), (8, 10), (10, 13)], Characters(13), 8, 2) == [(0, 8), (8, 13)]
    assert chunk.pack([(0, 3), (3, 5), (5, 8), (8, 10)], Characters(10), 5, 2) == [(0, 5), (3, 8), (8, 10)]
    assert chunk.pack([], Characters(0), 5, 0) == []


def check_recursive():
    text = "One two. Three four five six.\n\n" + "x" * 25 + "\n\nEnd."
    assert cut(text, strategy="recursive", size=12) == [
        "One two. ",
        "Three four f",
        "ive six.\n\n",
        "x" * 12,
        "x" * 12,
        "x\n\nEnd.",
    ]
    assert cut(text, strategy="paragraph", size=12) == ["One two. Three four five six.\n\n", "x" * 25 + "\n\n", "End."]
    assert cut(text, strategy="sentence", size=12) == [
        "One two. ",
        "Three four five six.\n\n",
        "x" * 25 + "\n\n",
        "End.",
    ]


def check_documents():
    doc = Document("一二三四五", "file, line 3", {"source": "x"})
    doc.notes["e-mail"] = 2
    first, second, third = ChunkConfig(strategy="fixed", size=2).build()(doc)
    assert (first.where, second.where, third.where) == ("file, line 3#1", "file, line 3#2", "file, line 3#3")
    assert (first.meta, third.meta) == ({"source": "x", "chunk": 1}, {"source": "x", "chunk": 3})
    assert first.notes["e-mail"] == 2 and not second.notes and not third.notes
    assert ChunkConfig(strategy="none").build()(doc) is doc


CHECKS = [check_english, check_chinese, check_paragraphs, check_fixed, check_pack, check_recursive, check_documents]


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_by_hand(check):
    check()


PIECES = st.sampled_from(
    [*"ab 。！？….!?”\"') \n中文，3A", "\n\n", "Mr. ", "e.g. ", "👨‍👩‍👧", "é", "\u3000\u3000", "the sea ", "海上生明月"]
)
TEXTS = st.lists(PIECES, max_size=40).map("".join)
WAYS = st.sampled_from(["fixed", "paragraph", "sentence", "recursive"])


@settings(max_examples=400, deadline=None)
@given(TEXTS, WAYS, st.integers(1, 30))
def test_nothing_is_lost(text, strategy, size):
    pieces = cut(text, strategy=strategy, size=size)
    assert "".join(pieces) == text and all(pieces)
    if strategy in ("fixed", "recursive"):
        assert all(len(p) <= size for p in pieces)


@settings(max_examples=300, deadline=None)
@given(TEXTS, WAYS, st.integers(2, 30), st.data())
def test_overlap_repeats_and_loses_nothing(text, strategy, size, data):
    overlap = data.draw(st.integers(0, size - 1))
    ruler = Characters(len(text))
    config = ChunkConfig(strategy=strategy, size=size, overlap=overlap)
    found = chunk.fixed(ruler, (0, len(text)), size, overlap) if strategy == "fixed" else config.cut(text, ruler)
    assert (
        "".join(text[max(a, end) : b] for (a, b), end in zip(found, [0, *(b for _, b in found)], strict=False)) == text
    )
    for (a, b), (c, d) in zip(found, found[1:], strict=False):
        assert a < c <= b < d and b - c <= overlap
    if strategy in ("fixed", "recursive"):
        assert all(b - a <= size for a, b in found)


@settings(max_examples=60, deadline=None)
@given(TEXTS, WAYS, st.integers(1, 12), st.integers(0, 3))
def test_tokens(tokenizer, text, strategy, size, overlap):
    overlap = min(overlap, size - 1)
    library, ruler = Tokenizer.load(tokenizer), Tokens(text, Tokenizer.load(tokenizer))
    assert ruler.size((0, len(text))) == len(library.encode(text))
    pieces = cut(text, strategy=strategy, size=size, overlap=overlap, unit="tokens", tokenizer=tokenizer)
    assert all(pieces)
    if not overlap:
        assert "".join(pieces) == text
    if strategy == "fixed" and text.isascii() and not overlap:
        assert [ruler.size((0, len(text))) - i for i in range(0, len(library.encode(text)), size)] == [
            ruler.size((sum(map(len, pieces[:k])), len(text))) for k in range(len(pieces))
        ]


def test_mistakes_are_refused(tmp_path):
    for options, message in (
        ({"size": 0}, "size = 0"),
        ({"size": 5, "overlap": 5}, "overlap = 5"),
        ({"unit": "tokens"}, "tokens need a tokenizer"),
        ({"tokenizer": "x"}, "tokens need a tokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            ChunkConfig(**options)
    with pytest.raises(ValueError, match="cannot be read as a tokenizer"):
        ChunkConfig(unit="tokens", tokenizer=str(tmp_path)).build()


def fixed_bug(ruler, span, size, overlap):
    return [(a, min(a + size, span[1])) for a in range(span[0], span[1], size)]  # forgets the overlap


def pack_bug(units, ruler, size, overlap):
    out = []
    for unit in units:
        if out and ruler.size(out[-1]) + ruler.size(unit) < size:  # one that just fits is not taken
            out[-1] = (out[-1][0], unit[1])
        else:
            out.append(unit)
    return out


BUGS = {
    "overlap forgotten": ("fixed", fixed_bug),
    "last window twice": ("fixed", lambda r, s, n, o: [(a, min(a + n, s[1])) for a in range(s[0], s[1], n - o)]),
    "a piece may not be full": ("pack", pack_bug),
    "abbreviations end sentences": ("ABBREVIATIONS", frozenset()),
    "numbers' abbreviations always": ("ABBREVIATIONS", chunk.ABBREVIATIONS | chunk.BEFORE_NUMBERS),
    "initials end sentences": (
        "_is_short",
        lambda before, following: before.split()[-1].lower() in chunk.ABBREVIATIONS,
    ),
    "quotes open the next sentence": ("SENTENCE", chunk.re.compile("[。！？….!?]+")),
    "every line is a paragraph": ("EMPTY_LINE", chunk.re.compile(r"\n")),
    "indents belong to the paragraph before": ("EMPTY_LINE", chunk.re.compile(r"\n[ \t\u3000]*\n\s*")),
    "ASCII signs need a blank in Chinese": ("_is_wide", lambda character: False),
    "too long stays": ("smaller", lambda units, ruler, size, cut: list(units)),
    "notes in every piece": (
        "piece",
        lambda doc, n, s: Document(doc.text[slice(*s)], f"{doc.where}#{n}", {**doc.meta, "chunk": n}, doc.notes),
    ),
    "pieces share their meta": (
        "piece",
        lambda doc, n, s: (doc.meta.update(chunk=n), Document(doc.text[slice(*s)], f"{doc.where}#{n}", doc.meta))[1],
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(bug, monkeypatch):
    name, wrong = BUGS[bug]
    monkeypatch.setattr(chunk, name, wrong)
    with pytest.raises(AssertionError):
        for check in CHECKS:
            check()


def test_time_is_linear():
    for unit in ("a", ".", "。", "\n", " ", "\n ", "A. ", '."', "…", "? "):
        text = (unit * 60_000)[:60_000]
        for strategy in ("fixed", "paragraph", "sentence", "recursive"):
            start = time.process_time()
            assert "".join(cut(text, strategy=strategy, size=100)) == text
            assert time.process_time() - start < 3
