"""A random order of n things that needs no list of them: a permutation that is computed, one place at a time.

    x = (L, R), two halves of b bits;  four rounds of  L, R <- R, L xor F(R, key_r)        always invertible, whatever F
    a result >= n goes through again (the cycle leads back below n)                        2^2b < 4 n: 4 rounds at most on average

Source: Feistel networks, Luby and Rackoff 1988 (four rounds); cycle walking, Black and Rogaway 2002.
Why: a shuffled index of 10^10 rows would take 80 GB; this takes 32 bytes, and any place of it is found at once, so that
resuming is exact without having walked there.
"""

from __future__ import annotations

import numpy as np

ROUNDS = 4
MIX = np.uint64(0x9E3779B97F4A7C15)  # odd: multiplication by it is invertible and spreads low bits upwards (Knuth)


class Permutation:
    """``self[i]`` for i in 0 .. n - 1, each once; depends on n, seed and epoch only."""

    def __init__(self, n: int, seed: int, epoch: int = 0):
        self.n = n
        self.half = np.uint64(max((n - 1).bit_length() + 1, 2) // 2)
        self.mask = np.uint64((1 << int(self.half)) - 1)
        self.keys = np.random.Generator(np.random.PCG64([seed, epoch])).integers(2**63, size=ROUNDS).astype(np.uint64)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int | np.ndarray) -> np.ndarray:
        """Where place ``i`` (an int or an array of them) leads: int64 of the same shape."""
        place = np.asarray(i)
        if place.size and (place.min() < 0 or place.max() >= self.n):
            raise IndexError(f"place outside 0 .. {self.n - 1}")
        x = self.once(place.astype(np.uint64))
        while (outside := x >= self.n).any():
            x = np.where(outside, self.once(x), x)
        return x.astype(np.int64)

    def once(self, x: np.ndarray) -> np.ndarray:
        left, right = x >> self.half, x & self.mask
        for key in self.keys:
            left, right = right, left ^ (self.scramble(right, key) & self.mask)
        return (left << self.half) | right

    @staticmethod
    def scramble(x: np.ndarray, key: np.uint64) -> np.ndarray:
        with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
            x = (x + key) * MIX
            x = (x ^ (x >> np.uint64(32))) * MIX
            return x ^ (x >> np.uint64(29))
