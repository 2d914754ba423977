"""The ladder to byte-pair encoding: bytes, then forty lines that train, encode and decode, then the fast form in bpe.py.

    rung 1   text -> UTF-8 -> 256 possible tokens; nothing is unknown, nothing is learned, and every token is one byte
    rung 2   again and again: count all neighbouring pairs, join the most frequent one everywhere
    rung 3   the same merges without counting everything again, and pieces remembered once encoded: bpe.py

Source: BPE 1508.07909 algorithm 1; on bytes, GPT-2.
Why: each rung gives the ids of the next (no merges: rung 1; the same merges: rung 3), so the fast form can be read as an
answer to one question, namely what a merge leaves as it was. Rung 2 costs O(text) per merge in training and O(merges)
per piece in encoding; it is the reference that the fast form is tested and timed against (bench/tokenizer_training.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

from zero2llm.tokenizers.bytes import alphabet, splitter

Pair = tuple[bytes, bytes]


class ByteTokenizer:
    """Rung 1. Ids are bytes, numbered in the order of tokenizer files: printable ones first."""

    def __init__(self):
        self.tokens = list(alphabet())
        self.ids = {token: i for i, token in enumerate(self.tokens)}

    def encode(self, text: str) -> list[int]:
        return [self.ids[bytes([b])] for b in text.encode()]

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(self.tokens[i] for i in ids).decode("utf-8", errors="replace")


class SmallBPE:
    """Rung 2, complete. ``split`` cuts text into pieces that no merge crosses ("dog" never joins "dog.")."""

    def __init__(self, merges: Iterable[Pair], split: str = "qwen2"):
        self.merges, self.pattern = list(merges), splitter(split)
        self.tokens = list(dict.fromkeys([*alphabet(), *(a + b for a, b in self.merges)]))
        self.ids = {token: i for i, token in enumerate(self.tokens)}

    @staticmethod
    def train(texts: Iterable[str], n_merges: int, split: str = "qwen2") -> SmallBPE:
        """Up to ``n_merges`` merges; of equally frequent pairs the one with the lowest ids wins, as in the tokenizers library."""
        words = [single_bytes(piece) for text in texts for piece in splitter(split).findall(text)]
        rank = {token: i for i, token in enumerate(alphabet())}
        merges: list[Pair] = []
        while len(merges) < n_merges:
            counts = Counter(pair for word in words for pair in pairwise(word))
            if not counts:
                break
            a, b = max(counts, key=lambda pair: (counts[pair], -rank[pair[0]], -rank[pair[1]]))
            rank[a + b] = len(rank)
            merges.append((a, b))
            words = [join(word, a, b) for word in words]
        return SmallBPE(merges, split)

    def encode(self, text: str) -> list[int]:
        """Do to the text what training did to its own: every merge, in the order in which they were learned."""
        ids: list[int] = []
        for piece in self.pattern.findall(text):
            word = single_bytes(piece)
            for a, b in self.merges:
                word = join(word, a, b)
            ids += [self.ids[token] for token in word]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(self.tokens[i] for i in ids).decode("utf-8", errors="replace")


def single_bytes(piece: str) -> list[bytes]:
    return [bytes([b]) for b in piece.encode()]


def join(word: list[bytes], a: bytes, b: bytes) -> list[bytes]:
    """Replace each neighbouring a, b by a + b, from left to right."""
    out, i = [], 0
    while i < len(word):
        if word[i] == a and word[i + 1 : i + 2] == [b]:
            out.append(a + b)
            i += 2
        else:
            out.append(word[i])
            i += 1
    return out
