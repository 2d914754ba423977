"""GGUF's K formats: super-blocks of 256 weights whose sub-blocks have small integer scales (and minima) of their own.

    w = d * scale_s * q - dmin * min_s          Q2_K, Q4_K, Q5_K    (q from 0 up)
    w = d * scale_s * (q - offset)              Q3_K (4), Q6_K (32)

    format   bytes of 256 weights, in order                                          sub-block   bits
    Q2_K     16 scales | 64 q | d d | dmin dmin                                          16     2.625
    Q3_K     32 high   | 64 q | 12 scales | d d                                          16     3.4375
    Q4_K     d d | dmin dmin | 12 scales | 128 q                                         32     4.5
    Q5_K     d d | dmin dmin | 12 scales | 32 high | 128 q                               32     5.5
    Q6_K     128 q | 64 high | 16 scales (signed bytes) | d d                            16     6.5625

    2-bit q and high (64 bytes, 2 halves of 32): byte l of half h     7 6 | 5 4 | 3 2 | 1 0
        holds weights                             128 h +            96+l  64+l  32+l    l
    4-bit q of Q4_K, Q5_K (4 groups of 32 bytes): byte l of group g    7 6 5 4 | 3 2 1 0
        holds weights                              64 g +                32+l       l
    4-bit q of Q6_K (2 halves of 64 bytes): byte l of half h           7 6 5 4 | 3 2 1 0
        holds weights                             128 h +                64+l       l
    1-bit high (32 bytes): bit s of byte l belongs to weight 32 s + l; Q5_K adds 16 if it is set, Q3_K takes 4 off if not

    scales of Q2_K: byte s    7 6 5 4 = min of sub-block s, 3 2 1 0 = its scale
    12 scales of Q4_K, Q5_K, eight pairs of 6 bits, s = 0 .. 3:        7 6 | 5 4 3 2 1 0
        byte s          upper 2 bits of scale s+4, scale s
        byte s + 4      upper 2 bits of min s+4,   min s
        byte s + 8      min s+4 (its lower 4 bits in 7 6 5 4),  scale s+4 (its lower 4 bits in 3 2 1 0)
    12 scales of Q3_K, sixteen of 6 bits less 32, s = 0 .. 7:
        byte s          7 6 5 4 = lower 4 bits of scale s+8,  3 2 1 0 = lower 4 bits of scale s
        byte 8 + s % 4  upper 2 bits of scales s%4 + 12, + 8, + 4, + 0 in bits 7 6 | 5 4 | 3 2 | 1 0

Source: ggml, k-quants (llama.cpp PR 1684) and ggml-common.h; proved equal to the package gguf bit by bit. Reading only:
finding good scales is a search of its own. Why: a scale costs 6 bits and not 16, so that 16 or 32 weights can have one.
"""

from __future__ import annotations

import numpy as np

LAYOUTS = {
    "Q2_K": np.dtype([("s", "u1", 16), ("q", "u1", (2, 1, 32)), ("d", "<f2"), ("dmin", "<f2")]),
    "Q3_K": np.dtype([("h", "u1", 32), ("q", "u1", (2, 1, 32)), ("s", "u1", 12), ("d", "<f2")]),
    "Q4_K": np.dtype([("d", "<f2"), ("dmin", "<f2"), ("s", "u1", 12), ("q", "u1", (4, 1, 32))]),
    "Q5_K": np.dtype([("d", "<f2"), ("dmin", "<f2"), ("s", "u1", 12), ("h", "u1", 32), ("q", "u1", (4, 1, 32))]),
    "Q6_K": np.dtype([("q", "u1", (2, 1, 64)), ("h", "u1", (2, 1, 32)), ("s", "i1", 16), ("d", "<f2")]),
}


def _spread(packed: np.ndarray, bits: int) -> np.ndarray:
    """(n, groups, 1, bytes) -> (n, 256): the lowest ``bits`` of all bytes of a group, then the next."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return ((packed >> shifts) & ((1 << bits) - 1)).reshape(len(packed), -1)


def _scaled(d: np.ndarray, scales: np.ndarray) -> np.ndarray:  # (n,), (n, S) -> (n, S, 1) float32
    return (d.astype(np.float32)[:, None] * scales.astype(np.float32))[:, :, None]


def _six_bits(s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, 12) -> scales and minima of eight sub-blocks, (n, 8) each."""
    first, second, low = s[:, :4], s[:, 4:8], s[:, 8:]
    scales = np.concatenate([first & 63, (low & 15) | (first >> 6 << 4)], 1)
    minima = np.concatenate([second & 63, (low >> 4) | (second >> 6 << 4)], 1)
    return scales, minima


def _unpack_q2_k(b, w):
    w[...] = _spread(b["q"], 2)
    subs = w.reshape(len(w), 16, 16)
    subs *= _scaled(b["d"], b["s"] & 15)
    subs -= _scaled(b["dmin"], b["s"] >> 4)


def _unpack_q3_k(b, w):
    w[...] = _spread(b["q"], 2) | _spread(b["h"][:, None, None], 1) << 2
    w -= 4
    low = _spread(b["s"][:, None, None, :8], 4)
    high = _spread(b["s"][:, None, None, 8:], 2)
    subs = w.reshape(len(w), 16, 16)
    subs *= _scaled(b["d"], (low | high << 4).astype(np.int8) - 32)


def _unpack_q4_k(b, w):
    w[...] = _spread(b["q"], 4)
    _with_minima(b, w)


def _unpack_q5_k(b, w):
    w[...] = _spread(b["q"], 4) | _spread(b["h"][:, None, None], 1) << 4
    _with_minima(b, w)


def _with_minima(b, w):
    scales, minima = _six_bits(b["s"])
    subs = w.reshape(len(w), 8, 32)
    subs *= _scaled(b["d"], scales)
    subs -= _scaled(b["dmin"], minima)


def _unpack_q6_k(b, w):
    w[...] = _spread(b["q"], 4) | _spread(b["h"], 2) << 4
    w -= 32
    subs = w.reshape(len(w), 16, 16)
    subs *= _scaled(b["d"], b["s"])


UNPACK = {"Q2_K": _unpack_q2_k, "Q3_K": _unpack_q3_k, "Q4_K": _unpack_q4_k, "Q5_K": _unpack_q5_k, "Q6_K": _unpack_q6_k}
