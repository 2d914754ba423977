"""WordPiece, by hand: whole words where the vocabulary has them, else the longest pieces from left to right.

    train    start from characters (inside a word marked "##c"); join the pair with the best score, until the size is reached
             count(ab)                                                   score = "count":      what BPE does
             count(ab) log(N count(ab) / (count(a) count(b))), roughly   score = "likelihood": what the paper asks for
             count(ab) / (count(a) count(b))                             score = "ratio":      what tutorials tell
    encode   take the longest piece that begins the word, go on with "##" and the rest; no such piece: the word is [UNK]

Source: Schuster & Nakajima 2012, section 3 ("increases the likelihood on the training data the most"), which gives no
formula; BERT 1810.04805; the search is Fast WordPiece's baseline, 2012.15524 section 2. Training never was published:
the tokenizers library, and so most vocabularies of today, use the count. "likelihood" is our reading: N tokens, each with
probability count/N; the gain of a merge is exact but for runs of one token (aaa). Per occurrence of the pair that gain is
the logarithm of the ratio; leaving the factor count(ab) out, as tutorials do, prefers pairs of rare characters.
Why: encoding needs no merges, only the list of pieces. A word is at most one lookup for each of its substrings.
Not here: bytes. A character outside the alphabet makes its whole word [UNK], and blanks are lost: decoding returns words
joined by single blanks, not the text. For models that write text, take bpe.py or unigram.py.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from math import log
from typing import TYPE_CHECKING, Literal

from zero2llm.tokenizers.bert_words import BertWords
from zero2llm.tokenizers.bpe import index_pairs, merge_pair

if TYPE_CHECKING:
    from tokenizers import Tokenizer

UNKNOWN = "[UNK]"
INSIDE = "##"
Score = Literal["count", "likelihood", "ratio"]


def count_of(n: int, a: int, b: int, total: int, same: bool) -> float:
    return n


def ratio_of(n: int, a: int, b: int, total: int, same: bool) -> float:
    return n / (a * b)


def likelihood_gain(n: int, a: int, b: int, total: int, same: bool) -> float:
    """What the log-likelihood sum_t c_t log(c_t / N) gains when n pairs become one token each; ``same``: a is b."""
    f = lambda x: x * log(x) if x > 0 else 0.0
    without = f(a - 2 * n) - f(a) if same else f(a - n) - f(a) + f(b - n) - f(b)
    return f(n) + without - f(total - n) + f(total)


SCORES = {"count": count_of, "likelihood": likelihood_gain, "ratio": ratio_of}


def train_wordpiece(
    texts: Iterable[str],
    vocab_size: int,
    *,
    score: Score = "count",
    min_count: int = 2,
    max_alphabet: int | None = None,
    lower: bool = False,
    strip_accents: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """[UNK], the characters, the characters inside words, then one piece per merge: ``vocab_size`` in all.

    Fewer only if no pair is left that occurs ``min_count`` times. ``max_alphabet`` keeps the most frequent characters; a
    word with any other can only be [UNK], so training leaves it out. Raises ValueError if the characters alone are too many.
    """
    if score not in SCORES:
        raise ValueError(f"score = {score!r} is unknown; there are: {', '.join(SCORES)}")
    if min_count < 1:
        raise ValueError(f"min_count = {min_count} must be at least 1")
    cut = BertWords(lower, strip_accents)
    words = Counter(word for text in texts for word in cut(text))
    chars = alphabet_of(words, max_alphabet)
    words = {word: n for word, n in words.items() if chars.issuperset(word)}
    inside = {char for word in words for char in word[1:]}
    vocab = [UNKNOWN, *sorted(chars), *(INSIDE + char for char in sorted(inside))]
    if len(vocab) > vocab_size:
        raise ValueError(
            f"{vocab_size} entries beside control tokens cannot hold the {len(vocab)} that [UNK] and {len(chars)} characters need: "
            f"raise vocab_size by {len(vocab) - vocab_size}, or set train_wordpiece's max_alphabet below {len(chars)}"
        )
    ids = {piece: i for i, piece in enumerate(vocab)}
    pieces = (([ids[c if i == 0 else INSIDE + c] for i, c in enumerate(word)], n) for word, n in words.items())
    for a, b in islice(best_pairs(list(pieces), len(vocab), SCORES[score], min_count), vocab_size - len(vocab)):
        vocab.append(vocab[a] + vocab[b].removeprefix(INSIDE))
        if progress:
            progress(len(vocab), vocab_size)
    return vocab


def alphabet_of(words: Counter[str], limit: int | None) -> set[str]:
    """The ``limit`` most frequent characters (of equally frequent ones the lowest code points), all if None."""
    counts: Counter[str] = Counter()
    for word, n in words.items():
        for char in word:
            counts[char] += n
    return set(sorted(counts, key=lambda char: (-counts[char], char))[:limit])


def best_pairs(pieces: list[tuple[list[int], int]], first_new: int, score: Callable, min_count: int) -> Iterator[tuple[int, int]]:
    """Pairs in the order in which they are joined; the i-th of them becomes token ``first_new`` + i.

    As in `train_bpe`, a heap whose entries may be stale: one that promises too much goes back with its true score. None may
    promise too little, so where a merge has made a and b rarer, all their pairs go on the heap again.
    """
    unit: Counter[int] = Counter()
    for word, n in pieces:
        for token in word:
            unit[token] += n
    words, freqs, where, counts = index_pairs(pieces)
    near: defaultdict[int, set[int]] = defaultdict(set)  # token -> the pairs that it is in
    total = unit.total()
    value = lambda p: score(counts[p], unit[p >> 20], unit[p & 0xFFFFF], total, p >> 20 == p & 0xFFFFF)
    heap: list[tuple[float, int]] = []
    new, changed = first_new, set(counts)
    while True:
        for pair in changed:
            if counts[pair] >= min_count:
                near[pair >> 20].add(pair)
                near[pair & 0xFFFFF].add(pair)
                heapq.heappush(heap, (-value(pair), pair))
        pair = _pop(heap, value, lambda p: counts[p] >= min_count)
        if pair is None:
            return
        a, b = pair >> 20, pair & 0xFFFFF
        yield a, b
        touched = list(where[pair])
        changed = merge_pair(a, b, new, words, freqs, where, counts)
        unit[new] = joined = sum(words[i].count(new) * freqs[i] for i in touched)
        unit[a] -= joined
        unit[b] -= joined
        total -= joined
        new += 1
        if score is not count_of:
            changed |= near.pop(a, set()) | near.pop(b, set())


def _pop(heap: list[tuple[float, int]], value: Callable, alive: Callable) -> int | None:
    """The pair whose true score is the highest, None if none is left."""
    while heap:
        promised, pair = heapq.heappop(heap)
        if not alive(pair):
            continue
        if -promised <= (now := value(pair)):
            return pair
        heapq.heappush(heap, (-now, pair))
    return None


class WordPiece:
    """Apply a vocabulary. Ids are places in ``vocab``, from ``first_id`` on."""

    def __init__(
        self,
        vocab: Sequence[str],
        *,
        lower: bool = False,
        strip_accents: bool | None = None,
        max_word: int = 100,
        first_id: int = 0,
    ):
        """``max_word``: a word of more characters is [UNK]. Raises ValueError for a vocabulary without [UNK] or with a double."""
        self.vocab, self.words, self.max_word, self.first_id = list(vocab), BertWords(lower, strip_accents), max_word, first_id
        self.ids = {piece: first_id + i for i, piece in enumerate(vocab)}
        if UNKNOWN not in self.ids:
            raise ValueError(f"the vocabulary lacks {UNKNOWN}, which stands for words that it cannot spell")
        if len(self.ids) != len(self.vocab):
            double = next(piece for piece, n in Counter(self.vocab).items() if n > 1)
            raise ValueError(f"the vocabulary holds {double!r} twice")
        self.longest = max(map(len, vocab))
        self.encode_word = lru_cache(maxsize=100_000)(self._encode_word)

    def _encode_word(self, word: str) -> tuple[int, ...]:
        """The longest piece, then the longest one that goes on; [UNK] for all of it if there is none somewhere."""
        ids, begin = [], 0
        while begin < len(word) <= self.max_word:
            mark = INSIDE if begin else ""
            ends = range(min(len(word), begin + self.longest), begin, -1)
            end = next((e for e in ends if mark + word[begin:e] in self.ids), None)
            if end is None:
                break
            ids.append(self.ids[mark + word[begin:end]])
            begin = end
        return tuple(ids) if begin == len(word) else (self.ids[UNKNOWN],)

    def encode(self, text: str) -> list[int]:
        return [i for word in self.words(text) for i in self.encode_word(word)]

    def decode(self, ids: Iterable[int]) -> str:
        """Words joined by blanks, [UNK] as such: not the text that was encoded."""
        pieces = [self.vocab[i - self.first_id] for i in ids]
        return "".join(p if k == 0 else p.removeprefix(INSIDE) if p.startswith(INSIDE) else " " + p for k, p in enumerate(pieces))

    def to_library(self, specials: Sequence[str] = ()) -> Tokenizer:
        """The same tokenizer for tokenizer.json: ``specials``, as many as ``first_id`` says, then the vocabulary.

        Raises ValueError if their number is another, or if a text could spell one of them.
        """
        from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

        if len(specials) != self.first_id:
            raise ValueError(f"{len(specials)} control tokens are given, but the vocabulary's ids begin at {self.first_id}")
        for special in specials:
            if special in self.ids or self.words(special) == [special]:
                raise ValueError(f"control token {special!r} is a word that text can spell; give it punctuation, as in <|name|>")
        vocab = {piece: i for i, piece in enumerate([*specials, *self.vocab])}
        model = models.WordPiece(
            vocab, unk_token=UNKNOWN, max_input_chars_per_word=self.max_word, continuing_subword_prefix=INSIDE
        )
        tokenizer = Tokenizer(model)
        tokenizer.normalizer = normalizers.BertNormalizer(
            clean_text=True, handle_chinese_chars=True, strip_accents=self.words.strip_accents, lowercase=self.words.lower
        )
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece(prefix=INSIDE, cleanup=False)
        tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
        return tokenizer
