"""GGUF's number formats: blocks of 32 weights that share a scale, packed and unpacked without changing a bit.

Every row of a matrix is cut into blocks. ``d`` (scale) and ``m`` (minimum) are halves, all numbers little endian:

    format   bytes of a block of 32 weights                          a weight       bits
    Q8_0     d d | q0 q1 ... q31              (signed bytes)         d * q           8.5
    Q4_0     d d | n0 n1 ... n15                                     d * (q - 8)     4.5
    Q4_1     d d | m m | n0 n1 ... n15                               d * q + m       5.0
    Q5_0     d d | h h h h | n0 n1 ... n15                           d * (q - 16)    5.5
    Q5_1     d d | m m | h h h h | n0 n1 ... n15                     d * q + m       6.0

    byte n_i    7 6 5 4 | 3 2 1 0     high nibble: weight i + 16, low nibble: weight i. Halves of the block, not neighbours
    word h      bit i is the fifth bit of weight i: q = nibble + 16 * ((h >> i) & 1)

F32 and F16 are IEEE numbers; BF16 is the upper half of an F32. The formats with K have blocks of 256: `blocks_k`.
Packing rounds to the nearest step of the block:

    Q8_0         d = max|w| / 127                    q = round(w / d), ties away from zero
    Q4_0, Q5_0   d = w* / -8 (-16), w* the weight of largest size with its sign:  q = trunc(w / d + 8.5) (16.5), at most 15 (31)
    Q4_1, Q5_1   d = (max - min) / 15 (31), m = min                               q = trunc((w - m) / d + 0.5)

Source: ggml, docs/gguf.md and ggml-common.h; proved equal to the package gguf byte by byte. The rounding uses the
float32 d although the file keeps a half. Why the sign: -8 .. 7 has one step more below zero, the largest weight gets it.
Why: a matrix product of one token reads every weight once, so 4.5 bits instead of 16 is up to 3.5 times the speed.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import numpy as np

from zero2llm.interop.gguf import blocks_k


class Kind(NamedTuple):
    number: int  # in the file
    weights: int  # in a block
    nbytes: int  # of a block


KINDS = {name: Kind(*numbers) for name, numbers in {
    "F32": (0, 1, 4), "F16": (1, 1, 2), "Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20), "Q5_0": (6, 32, 22), "Q5_1": (7, 32, 24),
    "Q8_0": (8, 32, 34), "Q2_K": (10, 256, 84), "Q3_K": (11, 256, 110), "Q4_K": (12, 256, 144), "Q5_K": (13, 256, 176),
    "Q6_K": (14, 256, 210), "IQ2_XXS": (16, 256, 66), "IQ2_XS": (17, 256, 74), "IQ3_XXS": (18, 256, 98),
    "IQ1_S": (19, 256, 50), "IQ4_NL": (20, 32, 18), "IQ3_S": (21, 256, 110), "IQ2_S": (22, 256, 82), "IQ4_XS": (23, 256, 136),
    "I8": (24, 1, 1), "I16": (25, 1, 2), "I32": (26, 1, 4), "I64": (27, 1, 8), "F64": (28, 1, 8), "IQ1_M": (29, 256, 56),
    "BF16": (30, 1, 2), "TQ1_0": (34, 256, 54), "TQ2_0": (35, 256, 66), "MXFP4": (39, 32, 17), "NVFP4": (40, 64, 36),
    "Q1_0": (41, 128, 18),
}.items()}  # fmt: skip

LAYOUTS = {
    "F32": np.dtype([("w", "<f4")]),
    "F16": np.dtype([("w", "<f2")]),
    "BF16": np.dtype([("w", "<u2")]),
    "Q8_0": np.dtype([("d", "<f2"), ("q", "i1", 32)]),
    "Q4_0": np.dtype([("d", "<f2"), ("n", "u1", 16)]),
    "Q4_1": np.dtype([("d", "<f2"), ("m", "<f2"), ("n", "u1", 16)]),
    "Q5_0": np.dtype([("d", "<f2"), ("h", "<u4"), ("n", "u1", 16)]),
    "Q5_1": np.dtype([("d", "<f2"), ("m", "<f2"), ("h", "<u4"), ("n", "u1", 16)]),
    **blocks_k.LAYOUTS,
}
STEP = 1 << 17  # weights unpacked at a time: half a megabyte, which stays in the cache


def dequantize(raw: np.ndarray, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """raw : the tensor's bytes, uint8.  Returns float32 of this shape. Raises ValueError if kind or sizes do not fit."""
    if kind not in UNPACK:
        raise ValueError(f"{kind} cannot be read; these can: {', '.join(UNPACK)}")
    if raw.size != (needed := nbytes(shape, kind)):
        raise ValueError(f"{kind} of shape {shape} takes {needed} bytes, but there are {raw.size}")
    stored = np.ascontiguousarray(raw).reshape(-1).view(LAYOUTS[kind])
    weights = np.empty((len(stored), KINDS[kind].weights), np.float32)
    step = STEP // KINDS[kind].weights
    for i in range(0, len(stored), step):
        UNPACK[kind](stored[i : i + step], weights[i : i + step])
    return weights.reshape(shape)


def quantize(values: np.ndarray, kind: str) -> np.ndarray:
    """values : (rows, columns) float32.  Returns (rows, bytes of a row) uint8.

    Raises ValueError for a kind that is not written, columns that are no multiple of the block, or a value that the
    format cannot hold: nan or infinite in blocks, beyond 65,504 in halves.
    """
    if kind not in PACK:
        raise ValueError(f"{kind} cannot be written; these can: {', '.join(PACK)}")
    row = nbytes(values.shape[1:], kind)
    weights = np.ascontiguousarray(values, np.float32).reshape(-1, KINDS[kind].weights)
    if KINDS[kind].weights > 1 and not np.isfinite(weights).all():
        raise ValueError(f"holds a value that is nan or infinite, which {kind} cannot store; repair the weights first")
    stored = np.empty(len(weights), LAYOUTS[kind])
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        PACK[kind](weights, stored)
    halves = [part for part in stored.dtype.names if stored.dtype[part] == np.float16]
    if any((np.isinf(stored[part]) & np.isfinite(weights).all(1)).any() for part in halves):
        largest = np.abs(weights[np.isfinite(weights)]).max()
        raise ValueError(f"its largest value is {largest:.6g}, beyond the halves of {kind}; write BF16 or F32")
    return stored.view(np.uint8).reshape(len(values), row)


def nbytes(shape: tuple[int, ...], kind: str) -> int:
    """Bytes of a tensor. Raises ValueError naming a row length that does not divide into blocks."""
    _, weights, size = KINDS[kind]
    columns = shape[-1] if shape else 1
    if columns % weights:
        raise ValueError(f"rows of {columns} weights do not divide into {kind}'s blocks of {weights}")
    return prod(shape) // weights * size


# Unpacking. b : (n,) blocks, w : (n, weights) float32, filled.


def _single(part: np.ndarray) -> np.ndarray:  # (n,) -> (n, 1) float32
    return part.astype(np.float32)[:, None]


def _nibbles(n: np.ndarray) -> np.ndarray:  # (n, 16) -> (n, 32), low nibbles first
    return ((n[:, None] >> np.array([[0], [4]], np.uint8)) & 15).reshape(len(n), 32)


def _fifth_bits(h: np.ndarray) -> np.ndarray:  # (n,) -> (n, 32) of 0 or 16
    return ((h[:, None] >> np.arange(32, dtype=np.uint32)) & 1).astype(np.uint8) << 4


def _unpack_plain(b, w):
    w[:, 0] = b["w"]


def _unpack_bf16(b, w):
    w.view(np.uint32)[:, 0] = b["w"].astype(np.uint32) << 16


def _unpack_q8_0(b, w):
    w[...] = b["q"]
    w *= _single(b["d"])


def _unpack_q4_0(b, w):
    w[...] = _nibbles(b["n"])
    w -= 8
    w *= _single(b["d"])


def _unpack_q4_1(b, w):
    w[...] = _nibbles(b["n"])
    w *= _single(b["d"])
    w += _single(b["m"])


def _unpack_q5_0(b, w):
    w[...] = _nibbles(b["n"]) | _fifth_bits(b["h"])
    w -= 16
    w *= _single(b["d"])


def _unpack_q5_1(b, w):
    w[...] = _nibbles(b["n"]) | _fifth_bits(b["h"])
    w *= _single(b["d"])
    w += _single(b["m"])


UNPACK = {
    "F32": _unpack_plain, "F16": _unpack_plain, "BF16": _unpack_bf16, "Q8_0": _unpack_q8_0, "Q4_0": _unpack_q4_0,
    "Q4_1": _unpack_q4_1, "Q5_0": _unpack_q5_0, "Q5_1": _unpack_q5_1, **blocks_k.UNPACK,
}  # fmt: skip

# Packing. w : (n, weights) float32, b : (n,) blocks, filled.


def _inverse(d: np.ndarray) -> np.ndarray:
    """1 / d, and 0 for a block of zeros (or of numbers so small that 1 / d overflows: a half holds no such scale)."""
    inverse = 1 / d
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def _join(q: np.ndarray) -> np.ndarray:  # (n, 32) -> (n, 16)
    return (q[:, :16] & 15) | (q[:, 16:] << 4)


def _fifth_word(q: np.ndarray) -> np.ndarray:  # (n, 32) -> (n,) uint32
    return np.packbits(q >> 4, axis=1, bitorder="little").view("<u4")[:, 0]


def _pack_plain(w, b):
    b["w"] = w[:, 0]


def _pack_bf16(w, b):
    bits = w.view(np.uint32)[:, 0]
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to nearest, ties to even
    b["w"] = np.where(np.isnan(w[:, 0]), (bits >> 16) | 0x40, rounded)  # rounding could carry a nan into the sign


def _pack_q8_0(w, b):
    d = np.abs(w).max(1, keepdims=True) / 127
    x = w * _inverse(d)
    whole = np.trunc(x)
    b["q"] = whole + np.trunc(2 * (x - whole))  # x + 0.5 would round 0.49999997 up
    b["d"] = d[:, 0]


def _signed(w, steps):
    """(d, q) with q in 0 .. 2 * steps - 1: the weight of largest size, whatever its sign, becomes 0."""
    d = np.take_along_axis(w, np.abs(w).argmax(1)[:, None], 1) / -steps
    q = (w * _inverse(d) + np.float32(steps + 0.5)).astype(np.uint8)
    return d[:, 0], np.minimum(q, 2 * steps - 1)


def _ranged(w, steps):
    """(d, m, q) with q in 0 .. steps: the smallest weight becomes 0, the largest ``steps``."""
    low = w.min(1, keepdims=True)
    d = (w.max(1, keepdims=True) - low) / steps
    q = ((w - low) * _inverse(d) + np.float32(0.5)).astype(np.uint8)
    return d[:, 0], low[:, 0], np.minimum(q, steps)


def _pack_q4_0(w, b):
    b["d"], q = _signed(w, 8)
    b["n"] = _join(q)


def _pack_q4_1(w, b):
    b["d"], b["m"], q = _ranged(w, 15)
    b["n"] = _join(q)


def _pack_q5_0(w, b):
    b["d"], q = _signed(w, 16)
    b["h"], b["n"] = _fifth_word(q), _join(q)


def _pack_q5_1(w, b):
    b["d"], b["m"], q = _ranged(w, 31)
    b["h"], b["n"] = _fifth_word(q), _join(q)


PACK = {
    "F32": _pack_plain, "F16": _pack_plain, "BF16": _pack_bf16, "Q8_0": _pack_q8_0, "Q4_0": _pack_q4_0,
    "Q4_1": _pack_q4_1, "Q5_0": _pack_q5_0, "Q5_1": _pack_q5_1,
}  # fmt: skip
