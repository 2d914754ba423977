"""GGUF's blocks, weight by weight and bit by bit in plain Python, and six planted bugs and more that this must catch."""

import struct

import numpy as np
import pytest

from tests.golden.planted import caught_by
from zero2llm.interop.gguf import blocks, blocks_k
from zero2llm.interop.gguf.blocks import KINDS, PACK, UNPACK, dequantize, quantize

# Reading: one function per format, (bytes of a block, number of the weight) -> value, straight from ggml's description.


def half(block, at):
    return struct.unpack_from("<e", block, at)[0]


def nibble(block, at, i):
    return block[at + i] & 15 if i < 16 else block[at + i - 16] >> 4


def q8_0(block, i):
    return half(block, 0) * struct.unpack_from("b", block, 2 + i)[0]


def q4_0(block, i):
    return half(block, 0) * (nibble(block, 2, i) - 8)


def q4_1(block, i):
    return half(block, 0) * nibble(block, 4, i) + half(block, 2)


def q5_0(block, i):
    high = struct.unpack_from("<I", block, 2)[0] >> i & 1
    return half(block, 0) * (nibble(block, 6, i) + 16 * high - 16)


def q5_1(block, i):
    high = struct.unpack_from("<I", block, 4)[0] >> i & 1
    return half(block, 0) * (nibble(block, 8, i) + 16 * high) + half(block, 2)


def q2_k(block, i):
    group, shift, l = i // 128, i % 128 // 32, i % 32
    q = block[16 + 32 * group + l] >> (2 * shift) & 3
    scale = block[i // 16]
    return half(block, 80) * (scale & 15) * q - half(block, 82) * (scale >> 4)


def q3_k(block, i):
    group, shift, l, s = i // 128, i % 128 // 32, i % 32, i // 16
    q = (block[32 + 32 * group + l] >> (2 * shift) & 3) - (0 if block[l] >> (i // 32) & 1 else 4)
    low = block[96 + s % 8] >> (4 * (s // 8)) & 15
    high = block[104 + s % 4] >> (2 * (s // 4)) & 3
    return half(block, 108) * ((low | high << 4) - 32) * q


def six_bits(block, at, s):
    if s < 4:
        return block[at + s] & 63, block[at + s + 4] & 63
    scale = (block[at + s + 4] & 15) | (block[at + s - 4] >> 6) << 4
    return scale, (block[at + s + 4] >> 4) | (block[at + s] >> 6) << 4


def q4_k(block, i):
    q = block[16 + 32 * (i // 64) + i % 32] >> (4 if i % 64 >= 32 else 0) & 15
    scale, low = six_bits(block, 4, i // 32)
    return half(block, 0) * scale * q - half(block, 2) * low


def q5_k(block, i):
    q = block[48 + 32 * (i // 64) + i % 32] >> (4 if i % 64 >= 32 else 0) & 15
    q += 16 * (block[16 + i % 32] >> (i // 32) & 1)
    scale, low = six_bits(block, 4, i // 32)
    return half(block, 0) * scale * q - half(block, 2) * low


def q6_k(block, i):
    group, part, l = i // 128, i % 128 // 32, i % 32
    q = block[64 * group + 32 * (part % 2) + l] >> (4 * (part // 2)) & 15
    q |= (block[128 + 32 * group + l] >> (2 * part) & 3) << 4
    return half(block, 208) * struct.unpack_from("b", block, 192 + i // 16)[0] * (q - 32)


BY_HAND = {
    "Q8_0": q8_0, "Q4_0": q4_0, "Q4_1": q4_1, "Q5_0": q5_0, "Q5_1": q5_1, "Q2_K": q2_k, "Q3_K": q3_k, "Q4_K": q4_k,
    "Q5_K": q5_k, "Q6_K": q6_k,
}  # fmt: skip


@pytest.mark.parametrize("kind", BY_HAND)
def test_every_bit_lands_where_the_format_says(kind):
    """Scales with few bits, so that float32 and Python's doubles agree to the last digit."""
    _, n, size = KINDS[kind]
    raw = np.random.default_rng(0).integers(0, 256, (3, size), dtype=np.uint8)
    parts = raw.view(blocks.LAYOUTS[kind])
    for part, value in (("d", 0.375), ("m", -1.25), ("dmin", 0.75)):
        if part in parts.dtype.names:
            parts[part] = value
    found = dequantize(raw, kind, (3, n))
    for block, row in zip(raw, found, strict=True):
        assert row.tolist() == [BY_HAND[kind](block.tobytes(), i) for i in range(n)]


def test_plain_numbers():
    assert dequantize(np.frombuffer(struct.pack("<2f", 1.5, -2), np.uint8), "F32", (2,)).tolist() == [1.5, -2]
    assert dequantize(np.frombuffer(struct.pack("<2e", 1.5, -2), np.uint8), "F16", (2, 1)).tolist() == [[1.5], [-2]]
    assert dequantize(np.array([0xC0, 0x3F, 0, 0xC0], np.uint8), "BF16", (2,)).tolist() == [1.5, -2]
    assert dequantize(np.zeros(4, np.uint8), "F32", ()).shape == ()


# Writing: blocks whose right answer can be counted out.


def packed(values, kind):
    row = np.zeros((1, 32), np.float32)
    row[0, : len(values)] = values
    return quantize(row, kind)[0].tobytes()


def test_q8_0_rounds_ties_away_from_zero():
    block = packed([127, 0.5, -0.5, 2.5, -2.5, 0.49999997, 3.49, -127], "Q8_0")
    assert half(block, 0) == 1
    assert struct.unpack_from("8b", block, 2) == (127, 1, -1, 3, -3, 0, 3, -127)


def test_q8_0_rounds_with_the_scale_that_is_not_yet_a_half():
    block = packed([1, 0.0355], "Q8_0")  # 127 * 0.0355 = 4.5085; the half is 0.00787354: 4.5088. And at the tie:
    assert half(block, 0) == float(np.float16(1 / 127)) and block[3] == 5
    value = 4.5 / 127 - 3e-7  # below the tie with 1/127, above it with the half, which is smaller
    assert value / half(block, 0) > 4.5 and packed([1, value], "Q8_0")[3] == 4


@pytest.mark.parametrize(("kind", "steps"), [("Q4_0", 8), ("Q5_0", 16)])
def test_the_largest_weight_becomes_the_end_that_has_one_step_more(kind, steps):
    for sign in (1, -1):
        block = packed([sign * steps, -sign * steps, 0, sign * 2.4, -sign * 2.6], kind)
        assert half(block, 0) == -sign
        values = [BY_HAND[kind](block, i) for i in range(6)]
        assert values == [sign * steps, -sign * (steps - 1), 0, sign * 2, -sign * 3, 0]


@pytest.mark.parametrize(("kind", "steps"), [("Q4_1", 15), ("Q5_1", 31)])
def test_a_range_is_cut_into_even_steps(kind, steps):
    row = np.linspace(-3, steps - 3, 32, dtype=np.float32)
    block = packed(row, kind)
    assert (half(block, 0), half(block, 2)) == (1, -3)
    assert [BY_HAND[kind](block, i) for i in range(32)] == [np.floor(x + 3 + 0.5) - 3 for x in row.tolist()]


def test_bf16_rounds_to_even_and_keeps_nan():
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x7F800001, 0xFFFFFFFF, 0x7F800000], np.uint32)
    found = quantize(bits.view(np.float32)[None], "BF16").view("<u2")[0]
    assert [hex(x) for x in found] == ["0x3f80", "0x3f82", "0x3f81", "0x7fc0", "0xffff", "0x7f80"]


@pytest.mark.parametrize("kind", [kind for kind in PACK if kind.startswith("Q")])
def test_packing_is_off_by_half_a_step_at_most_and_stable(kind):
    """Half a step, but a whole one at the end of Q4_0 and Q5_0 that has one step less; and the scale's own rounding."""
    rows = np.random.default_rng(1).standard_normal((64, 32)).astype(np.float32)
    rows[0], rows[1], rows[2, 1:] = 0, 0.25, 0
    raw = quantize(rows, kind)
    step = np.abs(raw.view(blocks.LAYOUTS[kind])["d"].astype(np.float32))
    found = dequantize(raw, kind, rows.shape)
    assert (np.abs(found - rows) <= step * (1.02 if kind.endswith("0") and kind != "Q8_0" else 0.52) + 2e-3 * np.abs(rows).max(1, keepdims=True)).all()
    assert (found[0] == 0).all() and (found[2, 1:] == 0).all()
    again = dequantize(quantize(found, kind), kind, rows.shape)
    assert np.abs(again - found).max() <= 2e-3 * np.abs(rows).max()


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="rows of 33 weights do not divide into Q8_0's blocks of 32"):
        quantize(np.zeros((2, 33), np.float32), "Q8_0")
    with pytest.raises(ValueError, match="rows of 32 weights do not divide into Q4_K's blocks of 256"):
        dequantize(np.zeros(144, np.uint8), "Q4_K", (8, 32))
    with pytest.raises(ValueError, match="takes 34 bytes, but there are 33"):
        dequantize(np.zeros(33, np.uint8), "Q8_0", (1, 32))
    with pytest.raises(ValueError, match="IQ4_NL cannot be read; these can: F32"):
        dequantize(np.zeros(18, np.uint8), "IQ4_NL", (1, 32))
    with pytest.raises(ValueError, match="Q4_K cannot be written; these can: F32"):
        quantize(np.zeros((1, 256), np.float32), "Q4_K")
    for value in (np.nan, np.inf):
        with pytest.raises(ValueError, match="nan or infinite, which Q4_0 cannot store"):
            quantize(np.full((1, 32), value, np.float32), "Q4_0")
        assert not np.isfinite(dequantize(quantize(np.full((1, 2), value, np.float32), "F16"), "F16", (1, 2))).any()
    with pytest.raises(ValueError, match="largest value is 70000, beyond the halves of F16"):
        quantize(np.array([[1, 7e4], [np.inf, 0]], np.float32), "F16")
    for kind in ("Q4_1", "Q5_1", "Q8_0"):
        with pytest.raises(ValueError, match="beyond the halves"):
            quantize(np.linspace(-3e38, 3e38, 32, dtype=np.float32)[None], kind)


def test_a_block_too_small_for_its_scale_becomes_zero():
    rows = np.array([[1e-45, -1e-40] * 16], np.float32)
    for kind in ("Q8_0", "Q4_0", "Q5_0", "Q4_1", "Q5_1"):
        assert (dequantize(quantize(rows, kind), kind, (1, 32)) == 0).all()


# Planted bugs.


def reading():
    for kind in BY_HAND:
        test_every_bit_lands_where_the_format_says(kind)
    test_plain_numbers()


def writing():
    test_q8_0_rounds_ties_away_from_zero()
    test_q8_0_rounds_with_the_scale_that_is_not_yet_a_half()
    test_bf16_rounds_to_even_and_keeps_nan()
    for kind, steps in (("Q4_0", 8), ("Q5_0", 16)):
        test_the_largest_weight_becomes_the_end_that_has_one_step_more(kind, steps)
    for kind, steps in (("Q4_1", 15), ("Q5_1", 31)):
        test_a_range_is_cut_into_even_steps(kind, steps)


def test_sound():
    assert caught_by([reading, writing]) == set()


def neighbours(n):  # low and high nibble as weights 2i and 2i + 1
    return np.stack([n & 15, n >> 4], 2).reshape(len(n), 32)


def neighbours_joined(q):
    return q[:, ::2] | q[:, 1::2] << 4


def unsigned_scale(w, steps):
    d = np.abs(w).max(1, keepdims=True) / steps
    return d[:, 0], np.clip(np.trunc(w * blocks._inverse(d) + (steps + 0.5)), 0, 2 * steps - 1).astype(np.uint8)


def rounds_to_even(w, b):
    d = np.abs(w).max(1, keepdims=True) / 127
    b["d"], b["q"] = d[:, 0], np.rint(w * blocks._inverse(d))


def adds_a_half(w, b):
    d = np.abs(w).max(1, keepdims=True) / 127
    x = w * blocks._inverse(d)
    b["d"], b["q"] = d[:, 0], np.trunc(x + np.copysign(np.float32(0.5), x))


def half_scale(w, b):
    d = (np.abs(w).max(1, keepdims=True) / 127).astype(np.float16).astype(np.float32)
    b["d"], b["q"] = d[:, 0], np.trunc(w * blocks._inverse(d) + np.copysign(0.5, w))


def offset_seven_and_a_half(b, w):
    w[...] = blocks._nibbles(b["n"])
    w -= 7.5
    w *= blocks._single(b["d"])


def high_bits_backwards(h):
    return ((h[:, None] >> np.arange(31, -1, -1, dtype=np.uint32)) & 1).astype(np.uint8) << 4


def high_bits_of_neighbours(h):  # bits 2i and 2i + 1 for weights i and i + 16
    return (((h[:, None] >> np.arange(32, dtype=np.uint32)) & 1).astype(np.uint8) << 4).reshape(-1, 16, 2).transpose(0, 2, 1).reshape(-1, 32)


def scales_and_minima_swapped(s):
    first, second, low = s[:, :4], s[:, 4:8], s[:, 8:]
    return (
        np.concatenate([first & 63, (low >> 4) | (first >> 6 << 4)], 1),
        np.concatenate([second & 63, (low & 15) | (second >> 6 << 4)], 1),
    )


def scales_with_wrong_upper_bits(s):
    first, second, low = s[:, :4], s[:, 4:8], s[:, 8:]
    return (
        np.concatenate([first & 63, (low & 15) | (second >> 6 << 4)], 1),
        np.concatenate([second & 63, (low >> 4) | (first >> 6 << 4)], 1),
    )


def groups_after_shifts(packed, bits):  # all low bits of the super-block first, then all that are next
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    flat = packed.reshape(len(packed), 1, -1)
    return ((flat >> shifts) & ((1 << bits) - 1)).reshape(len(packed), -1)


def high_bit_takes_away(b, w):  # Q3_K takes 4 off where the bit is not set
    w[...] = blocks_k._spread(b["q"], 2) | (1 - blocks_k._spread(b["h"][:, None, None], 1)) << 2
    w -= 4
    low, high = blocks_k._spread(b["s"][:, None, None, :8], 4), blocks_k._spread(b["s"][:, None, None, 8:], 2)
    subs = w.reshape(len(w), 16, 16)
    subs *= blocks_k._scaled(b["d"], (low | high << 4).astype(np.int8) - 32)


def truncates_bf16(w, b):
    b["w"] = w.view(np.uint32)[:, 0] >> 16


BUGS = [
    ("nibble order, reading", blocks, "_nibbles", neighbours, {"reading"}),
    ("nibble order, writing", blocks, "_join", neighbours_joined, {"writing"}),
    ("scale sign", blocks, "_signed", unsigned_scale, {"writing"}),
    ("rounding: ties to even", PACK, "Q8_0", rounds_to_even, {"writing"}),
    ("rounding: a half added", PACK, "Q8_0", adds_a_half, {"writing"}),
    ("rounding: with the half's scale", PACK, "Q8_0", half_scale, {"writing"}),
    ("offset 8", UNPACK, "Q4_0", offset_seven_and_a_half, {"reading"}),
    ("high-bit position: reversed", blocks, "_fifth_bits", high_bits_backwards, {"reading"}),
    ("high-bit position: neighbours", blocks, "_fifth_bits", high_bits_of_neighbours, {"reading"}),
    ("high bit inverted", UNPACK, "Q3_K", high_bit_takes_away, {"reading"}),
    ("K scales: scale and min swapped", blocks_k, "_six_bits", scales_and_minima_swapped, {"reading"}),
    ("K scales: upper bits of the other", blocks_k, "_six_bits", scales_with_wrong_upper_bits, {"reading"}),
    ("K weights: groups run last", blocks_k, "_spread", groups_after_shifts, {"reading"}),
    ("BF16 cut off", PACK, "BF16", truncates_bf16, {"writing"}),
]


@pytest.mark.parametrize(("where", "name", "wrong", "by"), [b[1:] for b in BUGS], ids=[b[0] for b in BUGS])
def test_planted_bug_is_caught(monkeypatch, where, name, wrong, by):
    if isinstance(where, dict):
        monkeypatch.setitem(where, name, wrong)
    else:
        monkeypatch.setattr(where, name, wrong)
    assert caught_by([reading, writing]) == by
