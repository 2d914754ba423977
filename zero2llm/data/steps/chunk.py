"""Cut a document into pieces of a given size; together they are the document, to the letter.

    fixed      every ``size`` characters or tokens
    paragraph  at paragraphs: as many whole ones as fit; one that is longer than size stays whole
    sentence   at sentences: the same
    recursive  paragraphs; one too long is cut into sentences, a sentence too long at size: no piece is longer than size

A paragraph ends at an empty line; in a text without empty lines at each line end. A sentence ends at 。！？… (with the quotes and brackets
that close behind it), or at . ! ? before a blank unless the next word begins small or the word before is an abbreviation or an initial.
With ``overlap`` a piece begins with what the piece before ended with: exactly so much (fixed), or as many whole sentences or paragraphs as
fit in it. Tokens are those of the whole text; a cut never goes through a character.

Source: handwritten; the strategies are those of the usual splitters (recursive: LangChain's RecursiveCharacterTextSplitter).
Why: a document longer than the context is cut anyway; here it is cut where a sentence ends. Costs 20 to 120 MB/s (sentence: 9 to 20) without a tokenizer.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from zero2llm.core.config import config
from zero2llm.data.document import Document, Step

if TYPE_CHECKING:
    from zero2llm.tokenizers.tokenizer import Tokenizer

Span = tuple[int, int]
CLOSERS = "”’」』）】》〉\"')\\]"
EMPTY_LINE = re.compile(r"\n(?:[ \t\u3000]*\n)+")
LINE_END = re.compile(r"\n+")
SENTENCE = re.compile(rf"(?:[。！？…]|(?<![.!?])[.!?])[.!?。！？…]*[{CLOSERS}]*")
WORD_BEFORE = re.compile(r"[A-Za-z.]{1,12}$")
ABBREVIATIONS = frozenset(
    "mr mrs ms dr prof st sr jr rev gen col capt lt hon messrs mme vs etc cf al eg ie e.g i.e a.m p.m u.s "
    "ed eds inc ltd co corp dept est approx jan feb mar apr jun jul aug sep sept oct nov dec".split()
)
BEFORE_NUMBERS = frozenset("no nos vol fig figs eq sec ch pp p".split())  # "No. 5", but "He said no. Then"


@config
class ChunkConfig:
    """``size`` and ``overlap`` in ``unit``; ``tokenizer``: a folder or tokenizer.json, for unit: tokens."""

    kind: Literal["chunk"] = "chunk"
    looks_at: ClassVar[str] = "document"
    strategy: Literal["none", "fixed", "paragraph", "sentence", "recursive"] = "recursive"
    unit: Literal["characters", "tokens"] = "characters"
    tokenizer: str | None = None
    size: int = 4000
    overlap: int = 0

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"size = {self.size} must be at least 1")
        if not 0 <= self.overlap < self.size:
            raise ValueError(f"overlap = {self.overlap} must be from 0 to size - 1 = {self.size - 1}")
        if (self.unit == "tokens") != (self.tokenizer is not None):
            raise ValueError(
                f"unit = {self.unit!r} and tokenizer = {self.tokenizer!r}: tokens need a tokenizer, characters have none"
            )

    def build(self) -> Step:
        """Raises ValueError if the tokenizer cannot be read."""
        tokenizer = load(self.tokenizer) if self.tokenizer else None

        def step(doc: Document) -> Document | list[Document]:
            if self.strategy == "none":
                return doc
            ruler = Tokens(doc.text, tokenizer) if tokenizer else Characters(len(doc.text))
            spans = (
                fixed(ruler, (0, len(doc.text)), self.size, self.overlap)
                if self.strategy == "fixed"
                else self.cut(doc.text, ruler)
            )
            return [piece(doc, i, span) for i, span in enumerate(spans, 1)]

        return step

    def cut(self, text: str, ruler: Ruler) -> list[Span]:
        whole = (0, len(text))
        if self.strategy == "sentence":
            units = [s for p in paragraphs(text, whole) for s in sentences(text, p)]
        else:
            units = paragraphs(text, whole)
        if self.strategy == "recursive":
            units = smaller(units, ruler, self.size, lambda p: sentences(text, p))
            units = smaller(units, ruler, self.size, lambda s: fixed(ruler, s, self.size, 0))
        return pack(units, ruler, self.size, self.overlap)


def load(path: str) -> Tokenizer:
    """Imported here: its library takes a tenth of a second, which cutting by characters does not need."""
    from zero2llm.tokenizers.tokenizer import Tokenizer

    return Tokenizer.load(path)


def piece(doc: Document, number: int, span: Span) -> Document:
    """Where "file, line 3#2". What earlier steps counted goes with the first piece, so that sums stay right."""
    meta = {**doc.meta, "chunk": number}
    part = Document(doc.text[slice(*span)], f"{doc.where}#{number}", meta)
    if number == 1:
        part.notes.update(doc.notes)
    return part


class Characters:
    """Measures a text in characters."""

    def __init__(self, length: int):
        self.length = length

    def size(self, span: Span) -> int:
        return span[1] - span[0]

    def move(self, start: int, n: int) -> int:
        """The position n further on (or back)."""
        return min(max(start + n, 0), self.length)


class Tokens:
    """Measures a text in tokens: ``starts[i]`` is the character in which token i begins."""

    def __init__(self, text: str, tokenizer: Tokenizer):
        self.length, self.starts = len(text), []
        ids, at = tokenizer.encode(text), 0
        character = [i for i, c in enumerate(text) for _ in range(len(c.encode()))]  # of each byte
        for token in ids:
            self.starts.append(character[at] if at < len(character) else len(text))
            at += len(tokenizer.token_bytes(token))
        if at != len(character):
            raise ValueError(f"this tokenizer writes {len(character)} bytes of text as {at}: cut by characters")

    def size(self, span: Span) -> int:
        return bisect_left(self.starts, span[1]) - bisect_left(self.starts, span[0])

    def move(self, start: int, n: int) -> int:
        token = max(bisect_left(self.starts, start) + n, 0)
        return self.starts[token] if token < len(self.starts) else self.length


Ruler = Characters | Tokens


def fixed(ruler: Ruler, span: Span, size: int, overlap: int) -> list[Span]:
    """Windows of ``size``, each beginning ``overlap`` before the end of the last; a character longer than size stays whole."""
    out: list[Span] = []
    start, last = span
    while start < last:
        end = min(max(ruler.move(start, size), start + 1), last)
        out.append((start, end))
        start = max(min(ruler.move(end, -overlap), end), start + 1) if end < last else last  # a token may reach beyond end
    return out


def smaller(units: Sequence[Span], ruler: Ruler, size: int, cut: Callable[[Span], Sequence[Span]]) -> list[Span]:
    """Units that are too large are cut, the others stay."""
    return [part for unit in units for part in (cut(unit) if ruler.size(unit) > size else [unit])]


def pack(units: Sequence[Span], ruler: Ruler, size: int, overlap: int) -> list[Span]:
    """Neighbours together while they fit. A piece begins with units of the last one, while these fit in ``overlap``."""
    out: list[Span] = []
    first = 0
    for i, unit in enumerate(units):
        if i > first and ruler.size((units[first][0], unit[1])) > size:
            out.append((units[first][0], units[i - 1][1]))
            back = i
            while overlap and back - 1 > first and ruler.size((units[back - 1][0], units[i - 1][1])) <= overlap:
                back -= 1
            while back < i and ruler.size((units[back][0], unit[1])) > size:
                back += 1  # the next unit has precedence over what is repeated
            first = back
    return [*out, (units[first][0], units[-1][1])] if units else []


def paragraphs(text: str, span: Span) -> list[Span]:
    ends = [m.end() for m in EMPTY_LINE.finditer(text, *span)] or [m.end() for m in LINE_END.finditer(text, *span)]
    return between(span, ends)


def sentences(text: str, span: Span) -> list[Span]:
    return between(span, sentence_ends(text, span))


def between(span: Span, ends: Sequence[int]) -> list[Span]:
    cuts = [span[0], *(end for end in ends if span[0] < end < span[1]), span[1]]
    return [(a, b) for a, b in zip(cuts, cuts[1:], strict=False) if a < b]


def sentence_ends(text: str, span: Span) -> Iterator[int]:
    """Where the next sentence begins: behind the sign, what closes after it, and blanks."""
    for match in SENTENCE.finditer(text, *span):
        end, stop = match.end(), span[1]
        after = end
        while after < stop and text[after].isspace():
            after += 1
        following = text[after] if after < stop else ""
        if following in "，、；：,;:" or following.islower():
            continue  # "……，" and "What?" he said
        if match[0][0] in "。！？…" or (match[0][0] != "." and _is_wide(following)):
            yield after
        elif after > end and not (
            match[0] == "." and _is_short(text[max(span[0], match.start() - 13) : match.start()], following)
        ):
            yield after


def _is_wide(character: str) -> bool:
    return "\u2e80" <= character <= "\u9fff"


def _is_short(before: str, following: str) -> bool:
    """Whether the word that a full stop ends is an abbreviation or one capital letter."""
    match = WORD_BEFORE.search(before)
    if not match:
        return False
    word = match[0].lower().strip(".")
    initial = match[0][-1].isupper() and len(match[0].split(".")[-1]) == 1
    return initial or word in ABBREVIATIONS or (word in BEFORE_NUMBERS and following.isdigit())
