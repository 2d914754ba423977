"""A text as the hashes of its n-grams: what MinHash and SimHash compare instead of the text itself.

    unit      a run of letters and digits in lower case; one character in scripts that write no spaces between words
    hash      U = mix(sum_j c_j B^j)             c_j: 64 random-looking bits for the unit's j-th letter, mod 2^64
    shingle   S_i = mix(sum_j U_(i+j) C^(n-1-j)) j = 0 .. n-1: n units in a row; a text of fewer units has one shingle

Source: polynomial rolling hashes, Karp & Rabin 1987; mix is the 64-bit finalizer of MurmurHash3 (Appleby, public
domain).
Why: with single characters as units where there are no spaces, one rule serves English, Chinese and texts that mix
them, and needs to be told no language: five Chinese characters are about three words. White space, punctuation and
case do not count, as a copy differs in them first. All sums wrap at 2^64, where B is odd and has an inverse: the hash
of any stretch is one difference of prefix sums, and numpy does thousands of texts at once. About 30 bytes per
character of a block, and 24 per unit of the texts given at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
import regex

BLOCK = 1 << 16  # characters hashed at once, so that tables and buffers stay in the processor's cache
CODES = 0x40000  # planes 0 to 3 hold every letter that Unicode has assigned
LETTER, ALONE = 1, 2
LETTERS = regex.compile(r"[\p{L}\p{M}\p{N}]+")
SPACELESS = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]+")
BASE = 0x9E3779B97F4A7C15
STEP = np.uint64(0xD1342543DE82EF95)
CUTS = " \n,.，。"  # where a long text is cut into blocks: no unit crosses one of these


def mix(x: np.ndarray) -> np.ndarray:
    """Each bit of the result depends on each bit of x, and no two x give the same."""
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> np.uint64(33))


def random_bits(n: int, seed: int) -> np.ndarray:
    """(n,) uint64: the same on every machine and with every release of numpy (splitmix64)."""
    return mix((np.arange(1, n + 1, dtype=np.uint64) + np.uint64(seed << 32)) * np.uint64(BASE))


@cache
def tables() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(CODES,) what each character is, (CODES,) its bits in lower case, (BLOCK,) powers of B and of its inverse."""
    every = "".join(" " if 0xD800 <= c < 0xE000 else chr(c) for c in range(CODES))
    kind = np.zeros(CODES, dtype=np.uint8)
    for run in LETTERS.finditer(every):
        kind[run.start() : run.end()] = LETTER
    for run in SPACELESS.finditer(every):
        kind[run.start() : run.end()] *= ALONE  # punctuation of these scripts stays what it is
    lower = every.replace("\u0130", "i").lower()  # the one letter whose lower case is two characters
    bits = random_bits(CODES, 0)[np.frombuffer(lower.encode("utf-32-le"), dtype="<u4")]
    powers = np.full((2, BLOCK), BASE, dtype=np.uint64)
    powers[1] = pow(BASE, -1, 1 << 64)
    powers[:, 0] = 1
    return kind, bits, *np.cumprod(powers, axis=1, dtype=np.uint64)


def pieces(texts: Sequence[str]) -> Iterator[tuple[int, str]]:
    """(number of the text, up to BLOCK - 1 characters of it). Cut through a unit only if BLOCK - 1 of them are one."""
    for number, text in enumerate(texts):
        start = 0
        while len(text) - start >= BLOCK:
            end = start + BLOCK - 1
            cut = 1 + max(text.rfind(mark, start, end) for mark in CUTS)
            cut = cut if cut > start else end
            yield number, text[start:cut]
            start = cut
        yield number, text[start:]


def blocks(texts: Sequence[str]) -> Iterator[tuple[list[int], list[str]]]:
    """Pieces together, as many as make up to BLOCK characters."""
    numbers, together, size = [], [], 0
    for number, piece in pieces(texts):
        if size + len(piece) + 1 > BLOCK:
            yield numbers, together
            numbers, together, size = [], [], 0
        numbers.append(number)
        together.append(piece)
        size += len(piece) + 1
    if together:
        yield numbers, together


def hash_block(together: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(U,) hash of each unit, (len(together),) how many units each piece has."""
    kind, bits, powers, inverse = tables()
    codes = np.frombuffer("\n".join(together).encode("utf-32-le", "surrogatepass"), dtype="<u4")
    codes = np.minimum(codes, CODES - 1)
    kinds = kind[codes]
    real = kinds > 0
    begins = real.copy()
    begins[1:] &= (kinds[1:] == ALONE) | (kinds[:-1] != LETTER)
    letters = bits[codes[real]]
    starts = np.flatnonzero(begins[real])
    ends = np.append(starts, len(letters))[1:]
    sums = np.zeros(len(letters) + 1, dtype=np.uint64)
    np.cumsum(letters * powers[: len(letters)], out=sums[1:])
    hashes = mix((sums[ends] - sums[starts]) * inverse[starts])
    first = np.cumsum([0, *(len(piece) + 1 for piece in together)])
    return hashes, np.diff(np.searchsorted(np.flatnonzero(begins), first))


def hash_units(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(U,) uint64 hash of each unit of all texts in turn, (len(texts),) int64 how many each text has."""
    found, counts = [np.empty(0, dtype=np.uint64)], np.zeros(len(texts), dtype=np.int64)
    for numbers, together in blocks(texts):
        hashes, n = hash_block(together)
        found.append(hashes)
        np.add.at(counts, numbers, n)
    return np.concatenate(found), counts


def shingles(texts: Sequence[str], n: int) -> tuple[np.ndarray, np.ndarray]:
    """(S,) uint64 hash of each shingle of all texts in turn, (len(texts) + 1,) int64 where each text's begin.

    Repeated shingles are repeated. A text without letters and digits has none.
    """
    units, counts = hash_units(texts)
    slots = np.where(counts > 0, np.maximum(counts, n), 0)
    if (slots != counts).any():  # a text of fewer than n units is filled up with zeros
        shift = (np.cumsum(slots) - slots) - (np.cumsum(counts) - counts)
        padded = np.zeros(slots.sum(), dtype=np.uint64)
        padded[np.arange(len(units)) + np.repeat(shift, counts)] = units
        units = padded
    last = max(len(units) - n + 1, 0)
    hashes = np.zeros(last, dtype=np.uint64)
    for j in range(n):
        hashes = hashes * STEP + units[j : j + last]
    inside = np.ones(len(units), dtype=bool)
    for j in range(1, n):  # shingles that would begin in one text and end in the next
        inside[np.cumsum(slots)[slots > 0] - j] = False
    number = np.maximum(slots - n + 1, 0)
    return mix(hashes[inside[:last]]), np.concatenate([[0], np.cumsum(number)])
