"""Unigram, by hand: every piece has a probability, and a text is cut so that the product is largest.

    p(cut) = prod_i p(piece_i);   score = log p;   encode: the cut with the highest sum of scores

Source: Kudo, Subword Regularization, 1804.10959; SentencePiece 1808.06226, after which a character that no piece
covers costs 10 nats more than the worst piece. Viterbi and the other passes over all cuts: lattice.py; training:
unigram_train.py.
Why: unlike merges, the cut is a global optimum, and other cuts can be drawn with their probability (`sample`): training on
varying cuts of the same text makes models robust. Costs at most `longest` lookups per character.
A blank is a blank here. SentencePiece writes it as U+2581 (its files are tables with blanks between columns): give
``space="▁"`` for pieces in that spelling; a U+2581 in the text itself then comes back as a blank. Bytes (on if the
pieces hold <0x00> to <0xFF>): a character without a piece becomes its UTF-8 bytes, so any text comes back; off: <unk>.
"""

from __future__ import annotations

import heapq
import random
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache, lru_cache
from itertools import groupby
from typing import TYPE_CHECKING

from zero2llm.tokenizers.bytes import SPLITS, splitter
from zero2llm.tokenizers.lattice import Lattice, Step, best_cut, best_cuts, drawn_cut

if TYPE_CHECKING:
    from tokenizers import Tokenizer

UNKNOWN = "<unk>"
BYTES = tuple(f"<0x{b:02X}>" for b in range(256))
PENALTY = 10.0  # nats that an unknown character costs beyond the worst piece
WORDS = r"\n+| [^ \n]*|[^ \n]+"  # the rule "space", SentencePiece's: a blank begins a word, and lines are apart


@cache
def cutter(split: str) -> Callable[[str], list[str]]:
    """How text is cut before anything else: a split rule's name, "space", or "none"."""
    if split == "none":
        return lambda text: [text] if text else []
    if split not in (*SPLITS, "space"):
        raise ValueError(f"split rule {split!r} is unknown; there are: {', '.join(SPLITS)}, space, none")
    return re.compile(WORDS).findall if split == "space" else splitter(split).findall


def words_of(text: str, split: str, space: str, prefix: bool) -> list[str]:
    text = " " + text if prefix and text else text
    words = cutter(split)(text)
    return words if space == " " else [word.replace(" ", space) for word in words]


class Unigram:
    """Apply pieces and their scores. Ids are places in ``pieces``, from ``first_id`` on."""

    def __init__(
        self,
        pieces: Sequence[tuple[str, float]],
        *,
        split: str = "qwen2",
        space: str = " ",
        prefix: bool = False,
        first_id: int = 0,
    ):
        """``prefix``: a blank is put before the text, so that its first word is cut like any other (SentencePiece does).

        Raises ValueError if neither all 256 bytes nor <unk> is among the pieces, or one is there twice.
        """
        self.pieces, self.split, self.space, self.prefix, self.first_id = list(pieces), split, space, prefix, first_id
        cutter(split)  # refuses an unknown name
        index = {piece: i for i, (piece, _) in enumerate(pieces)}
        if len(index) != len(self.pieces):
            double = next(piece for i, (piece, _) in enumerate(pieces) if index[piece] != i)
            raise ValueError(f"the pieces hold {double!r} twice")
        self.byte_ids = [index[b] for b in BYTES] if all(b in index for b in BYTES) else []
        if not self.byte_ids and UNKNOWN not in index:
            raise ValueError(f"the pieces hold neither {UNKNOWN} nor all of <0x00> to <0xFF>, for unknown characters")
        self.unknown_id = index.get(UNKNOWN, -1)
        self.byte_of = {i: bytes([b]) for b, i in enumerate(self.byte_ids)}
        control = {UNKNOWN, *(BYTES if self.byte_ids else ())}  # never found in text, even where it spells them
        self.index = {piece: i for piece, i in index.items() if piece not in control}
        self.scores = [score for _, score in pieces]
        self.unknown = min((self.scores[i] for i in self.index.values()), default=0.0) - PENALTY
        self.longest = max(map(len, self.index), default=1)
        self.encode_word = lru_cache(maxsize=100_000)(lambda word: self.to_ids(word, best_cut(self.lattice(word))))

    def words(self, text: str) -> list[str]:
        """What is cut on its own, blanks in the pieces' spelling."""
        return words_of(text, self.split, self.space, self.prefix)

    def lattice(self, word: str) -> Lattice:
        """Where each piece occurs in the word, and an unknown one (-1) for a character that is no piece."""
        ends: Lattice = [[] for _ in range(len(word) + 1)]
        for begin in range(len(word)):
            for end in range(begin + 1, min(begin + self.longest, len(word)) + 1):
                piece = self.index.get(word[begin:end])
                if piece is not None:
                    ends[end].append((begin, piece, self.scores[piece]))
            if word[begin] not in self.index:
                ends[begin + 1].append((begin, -1, self.unknown))
        return ends

    def to_ids(self, word: str, cut: Iterable[Step]) -> tuple[int, ...]:
        """Ids of a cut: unknown characters as bytes, or neighbouring ones as one <unk>."""
        ids: list[int] = []
        for unknown, steps in groupby(cut, key=lambda step: step[2] < 0):
            if not unknown:
                ids += [piece for _, _, piece in steps]
            elif not self.byte_ids:
                ids.append(self.unknown_id)
            else:
                ids += [self.byte_ids[b] for begin, end, _ in steps for b in word[begin:end].encode()]
        return tuple(self.first_id + i for i in ids)

    def encode(self, text: str) -> list[int]:
        return [i for word in self.words(text) for i in self.encode_word(word)]

    def sample(self, text: str, theta: float, rng: random.Random) -> list[int]:
        """Ids of a cut drawn with probability proportional to p(cut) ** theta: 1 the model's own, 0 all cuts alike."""
        return [i for word in self.words(text) for i in self.to_ids(word, drawn_cut(self.lattice(word), theta, rng))]

    def best(self, text: str, n: int) -> list[tuple[list[int], float]]:
        """The ``n`` best cuts and their scores, best first."""
        found: list[tuple[float, list[int]]] = [(0.0, [])]
        for word in self.words(text):
            cuts = [(score, self.to_ids(word, cut)) for score, cut in best_cuts(self.lattice(word), n)]
            joined = ((a + b, [*ids, *more]) for a, ids in found for b, more in cuts)
            found = heapq.nlargest(n, joined, key=lambda pair: pair[0])
        return [(ids, score) for score, ids in found]

    def piece_bytes(self, token: int) -> bytes:
        """The bytes that an id stands for in the text."""
        i = token - self.first_id
        return self.byte_of[i] if i in self.byte_of else self.pieces[i][0].replace(self.space, " ").encode()

    def decode(self, ids: Iterable[int]) -> str:
        """The text; bytes that form no character become U+FFFD, <unk> stays as it is."""
        text = b"".join(map(self.piece_bytes, ids)).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self.prefix else text

    def to_library(self, specials: Sequence[str] = ()) -> Tokenizer:
        """The same tokenizer for tokenizer.json: ``specials``, as many as ``first_id`` says, then the pieces.

        The library finds the names of control pieces ("<0x41>") in text too. They get a score below that of any spelling
        by characters; that needs a piece for each character. Raises ValueError where there is none, and for a wrong number.
        """
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

        if len(specials) != self.first_id:
            raise ValueError(f"{len(specials)} control tokens are given, but the pieces' ids begin at {self.first_id}")
        names = [*specials, *(piece for piece, _ in self.pieces if piece not in self.index)]
        missing = sorted({char for text in (*names, *self.index) for char in text} - self.index.keys())
        if missing:
            raise ValueError(f"{', '.join(map(repr, missing))} occurs in a piece or control token, but is no piece itself")
        floor = (self.unknown - PENALTY) * max(map(len, names))
        vocab = [*((name, floor) for name in specials), *((p, s if p in self.index else floor) for p, s in self.pieces)]
        unknown = self.first_id + (self.byte_ids[0] if self.byte_ids else self.unknown_id)
        tokenizer = Tokenizer(models.Unigram(vocab, unk_id=unknown, byte_fallback=bool(self.byte_ids)))
        rule = {**SPLITS, "space": WORDS}.get(self.split)
        blanks = pre_tokenizers.Metaspace(replacement=self.space, prepend_scheme="never", split=False)
        steps = ([pre_tokenizers.Split(Regex(rule), "isolated")] if rule else []) + ([blanks] if self.space != " " else [])
        if self.prefix:
            tokenizer.normalizer = normalizers.Prepend(" ")
        if steps:
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
        back = [decoders.Replace(self.space, " ")] if self.space != " " else []
        strip = [decoders.Strip(" ", 1, 0)] if self.prefix else []
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), *back, decoders.Fuse(), *strip])
        tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
        return tokenizer
