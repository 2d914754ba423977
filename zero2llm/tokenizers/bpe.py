"""Byte-level byte-pair encoding, by hand: learn merges, apply merges.

    start from single bytes; again and again join the most frequent neighbouring pair into a new token

Source: BPE 1508.07909 algorithm 1; on bytes, GPT-2. Ties go to the pair with the lowest ids, as in the tokenizers
library. `train_simple` is the whole idea (spelled out in ladder.py); `train_bpe` gives the same merges without counting
everything again.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from functools import lru_cache

from zero2llm.tokenizers.bytes import alphabet, splitter
from zero2llm.tokenizers.ladder import Pair, SmallBPE, join, single_bytes


def train_simple(texts: Iterable[str], n_merges: int, split: str = "qwen2") -> list[Pair]:
    """The textbook form: count all pairs, join the best, repeat. O(text) per merge; the reference of `train_bpe`."""
    return SmallBPE.train(texts, n_merges, split).merges


def count_pieces(texts: Iterable[str], split: str) -> Counter[str]:
    """How often each piece of text occurs: merges are learned on different pieces once."""
    counts: Counter[str] = Counter()
    find = splitter(split).findall
    for text in texts:
        counts.update(find(text))
    return counts


def train_bpe(
    texts: Iterable[str], n_merges: int, split: str = "qwen2", progress: Callable[[int, int], None] | None = None
) -> list[Pair]:
    """Learn up to ``n_merges`` merges. Fewer only if no pair is left.

    Incremental: a merge changes only the pieces that hold its pair, so an index from pairs to pieces and a heap of
    counts replace the recount. Pairs are packed into one integer (a << 20 | b). Heap entries may be stale; a popped
    one whose count has fallen goes back with the true count.
    """
    ids = {token[0]: i for i, token in enumerate(alphabet())}
    pieces = count_pieces(texts, split).items()
    words, freqs, where, counts = index_pairs(([ids[b] for b in piece.encode()], n) for piece, n in pieces)
    tokens = list(alphabet())
    heap = [(-n, pair) for pair, n in counts.items()]
    heapq.heapify(heap)
    merges: list[Pair] = []
    while heap and len(merges) < n_merges:
        n, pair = heapq.heappop(heap)
        if -n != (now := counts[pair]):
            if now > 0:
                heapq.heappush(heap, (-now, pair))
            continue
        if now <= 0:
            break
        a, b = pair >> 20, pair & 0xFFFFF
        merges.append((tokens[a], tokens[b]))
        tokens.append(tokens[a] + tokens[b])
        for changed in merge_pair(a, b, len(tokens) - 1, words, freqs, where, counts):
            heapq.heappush(heap, (-counts[changed], changed))
        if progress:
            progress(len(merges), n_merges)
    return merges


Index = tuple[list[list[int]], list[int], dict[int, list[int]], dict[int, int]]


def index_pairs(pieces: Iterable[tuple[list[int], int]]) -> Index:
    """Pieces of more than one token, how often each occurs, which pieces hold a pair, and how often that occurs."""
    words: list[list[int]] = []
    freqs: list[int] = []
    where: defaultdict[int, list[int]] = defaultdict(list)
    counts: defaultdict[int, int] = defaultdict(int)
    for word, n in pieces:
        pairs = [a << 20 | b for a, b in zip(word, word[1:], strict=False)]
        for pair in pairs:
            counts[pair] += n
        for pair in set(pairs):
            where[pair].append(len(words))
        if pairs:
            words.append(word)
            freqs.append(n)
    return words, freqs, where, counts


def merge_pair(a: int, b: int, new: int, words: list, freqs: list, where: dict, counts: dict) -> set[int]:
    """Join a, b in every piece that holds them; returns the pairs whose counts grew."""
    pair, grown = a << 20 | b, set()
    for index in where.pop(pair):
        word, n = words[index], freqs[index]
        i, last, out = 0, len(word) - 1, []
        while i <= last:
            token = word[i]
            if token == a and i < last and word[i + 1] == b:
                if out:
                    left = out[-1]
                    counts[left << 20 | a] -= n
                    key = left << 20 | new
                    counts[key] += n
                    if key not in grown or where[key][-1] != index:
                        grown.add(key)
                        where[key].append(index)
                if i + 1 < last:
                    right = word[i + 2]
                    counts[b << 20 | right] -= n
                    key = new << 20 | right
                    counts[key] += n
                    if key not in grown or where[key][-1] != index:
                        grown.add(key)
                        where[key].append(index)
                out.append(new)
                i += 2
            else:
                out.append(token)
                i += 1
        words[index] = out
    counts[pair] = 0
    return grown


class BPE:
    """Apply merges: inside each piece, the pair that was learned first is joined first, until none is left."""

    def __init__(self, merges: list[Pair], split: str, first_id: int = 0):
        self.ranks = {pair: i for i, pair in enumerate(merges)}
        self.pattern = splitter(split)
        tokens = list(dict.fromkeys([*alphabet(), *(a + b for a, b in merges)]))
        self.tokens = {first_id + i: token for i, token in enumerate(tokens)}
        self.ids = {token: i for i, token in self.tokens.items()}
        self.encode_piece = lru_cache(maxsize=100_000)(self._encode_piece)

    def _encode_piece(self, piece: str) -> tuple[int, ...]:
        word = single_bytes(piece)
        while len(word) > 1:
            best = min(zip(word, word[1:], strict=False), key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if best not in self.ranks:
                break
            word = join(word, *best)
        return tuple(self.ids[token] for token in word)

    def encode(self, text: str) -> list[int]:
        return [i for piece in self.pattern.findall(text) for i in self.encode_piece(piece)]

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(self.tokens[i] for i in ids).decode("utf-8", errors="replace")
