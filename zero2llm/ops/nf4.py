"""NF4: a weight in four bits, as one of 16 quantiles of the normal distribution times the largest value of its block.

    c_i   = the 16 codes: quantiles of N(0, 1) at 8 + 7 even steps up to 1 - d on either side of an exact 0,
            divided by the largest; d = (1/32 + 1/30) / 2
    a_b   = max |w_j| over the block of 64 weights b            w_j ~ c[q_j] a_b,   q_j = argmin_i |w_j / a_b - c_i|
    a_b   ~ m + s_B e[r_b]     double quantisation: m the mean of all a, s_B = max |a - m| over 256 blocks, e an 8-bit table
    byte  = 16 q_(2k) + q_(2k+1)      along the flattened (out, in); an odd last byte ends with the code of 0

Source: QLoRA 2305.14314 section 3 and appendix E; the table e is the dynamic type of 1511.04561 and 2110.02861: a sign,
an exponent of ten, and as many bits for the fraction as the exponent leaves. Codes and values equal bitsandbytes 0.50 on a
CPU, with its two peculiarities: the quantiles are taken at probabilities rounded to fp32, and (a - m) / s_B is rounded to
one of 65,536 steps before the nearest e is looked up. Its CUDA kernel lacks those steps: one r in 600 is then a neighbour.
Why: 4 + 8 / 64 + 32 / (64 * 256) = 4.127 bits a weight instead of 32; without double quantisation 4.5. Normal weights fill
the 16 codes about evenly, so none is wasted. |error| <= 0.152 a_b (half the widest gap), and what a_b itself lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from statistics import NormalDist
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64  # weights that share an absmax
NESTED = 256  # absmax values that share a scale
PIECE = 2**20  # weights in work at a time; a multiple of BLOCK
GRID = 65536  # steps that an absmax is rounded to before its code is chosen
REACH = 0.9677083  # the outermost probability, 1 - d, as published
TINY = 1e-38  # an absmax is at least this, so that its inverse is finite
Kernel = Literal["handwritten", "bitsandbytes"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def quantile_codes() -> Tensor:
    """(16,) fp32, increasing: -1, seven negative quantiles in all, 0, eight positive up to 1."""
    side = lambda n: [NormalDist().inv_cdf(float(p)) for p in torch.linspace(REACH, 0.5, n + 1, device="cpu")[:-1]]
    values = torch.tensor([*(-q for q in side(7)), 0.0, *reversed(side(8))], device="cpu")
    return values / values.max()


def dynamic_codes() -> Tensor:
    """(256,) fp32, increasing: 0, 1, and +-10^(k - 6) times the middles of 2^k equal parts of [0.1, 1], k = 0 .. 6."""
    found = [torch.tensor([0.0, 1.0], device="cpu")]
    for k in range(7):
        edges = torch.linspace(0.1, 1, 2**k + 1, device="cpu")
        middles = 10 ** (k - 6) * ((edges[:-1] + edges[1:]) / 2)
        found += [middles, -middles]
    return torch.cat(found).sort().values


def pairs_of(codes: Tensor) -> Tensor:
    """(256,) int64, whose bits are the two fp32 codes of each byte: one look-up is four times as fast as two."""
    return torch.stack((codes.repeat_interleave(16), codes.repeat(16)), 1).view(torch.int64).view(-1)


CODES, DYNAMIC = quantile_codes(), dynamic_codes()
PAIRS = pairs_of(CODES)


@dataclass(frozen=True)
class NF4:
    """A quantised tensor of ``shape``, n values in b = ceil(n / 64) blocks.

    packed : (ceil(n / 2),) uint8.  absmax : (b,) uint8, codes of the 8-bit table; without double quantisation fp32.
    scale : (ceil(b / 256),) fp32, offset : () fp32; both None without double quantisation.
    """

    packed: Tensor
    absmax: Tensor
    scale: Tensor | None
    offset: Tensor | None
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.packed, self.absmax, self.scale, self.offset) if t is not None)


@cache
def nearest_dynamic() -> Tensor:
    """(65536,) uint8: the dynamic code nearest to each step of the grid over [-1, 1]."""
    table = DYNAMIC.double()
    steps = torch.arange(GRID, dtype=torch.float64, device="cpu") * (2 / (GRID - 1)) - 1
    return torch.bucketize(steps, (table[:-1] + table[1:]) / 2).to(torch.uint8)


def quantize(weight: Tensor, double: bool = True, name: str = "the weight") -> NF4:
    """``weight`` of any shape and device, fp32, bf16 or fp16. Needs 16 MB beside the result.

    Raises ValueError, with ``name``, for another dtype, no values, NaN or infinity, or values whose mean overflows.
    """
    if weight.dtype not in DTYPES or not weight.numel():
        raise ValueError(f"{name}: NF4 takes fp32, bf16 or fp16 values, this is {weight.dtype} {tuple(weight.shape)}")
    flat = weight.detach().reshape(-1)
    parts = [_quantize_piece(piece) for piece in flat.split(PIECE)]
    packed, absmax = (torch.cat(found) for found in zip(*parts, strict=True))
    if not absmax.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinity; a diverged model cannot be quantised")
    if not double:
        return NF4(packed, absmax, None, None, tuple(weight.shape))
    offset = absmax.mean()
    if not offset.isfinite():
        raise ValueError(f"{name}: values up to {float(absmax.max()):.3g} are too large for the mean of their scales")
    return NF4(packed, *quantize_absmax(absmax - offset), offset, tuple(weight.shape))


def _quantize_piece(flat: Tensor) -> tuple[Tensor, Tensor]:
    """(packed, absmax fp32) of a run of whole blocks, but for the last."""
    n = len(flat)
    rows = F.pad(flat.float(), (0, -n % BLOCK)).view(-1, BLOCK)
    absmax = rows.abs().amax(1)
    q = nearest(rows * absmax.clamp(min=TINY).reciprocal()[:, None])
    return pack(q.view(-1)[: n + n % 2]), absmax


def nearest(x: Tensor) -> Tensor:
    """uint8 index of the code nearest to each value in [-1, 1]; the lower one of two equally near."""
    table = CODES.to(x.device)
    return torch.bucketize(x, (table[:-1] + table[1:]) / 2, out_int32=True).to(torch.uint8)


def pack(q: Tensor) -> Tensor:
    """Two codes a byte, the first in the high half. (2 k,) -> (k,)."""
    return q[::2] << 4 | q[1::2]


def quantize_absmax(centred: Tensor) -> tuple[Tensor, Tensor]:
    """(b,) fp32 -> codes (b,) uint8, scale (ceil(b / 256),) fp32."""
    rows = F.pad(centred, (0, -len(centred) % NESTED)).view(-1, NESTED)
    scale = rows.abs().amax(1)
    x = (rows * scale.reciprocal()[:, None]).nan_to_num(nan=-1.0).clamp(-1, 1)  # 0 / 0: any code, for its scale is 0
    step = ((x + 1) * ((GRID - 1) / 2) + 0.5).long()
    return nearest_dynamic().to(centred.device)[step].view(-1)[: len(centred)].contiguous(), scale


def absmax_of(q: NF4) -> Tensor:
    """(b,) fp32, the double quantisation undone."""
    if q.scale is None:
        return q.absmax
    found = DYNAMIC.to(q.absmax.device)[q.absmax.int()]
    return found.mul_(q.scale.repeat_interleave(NESTED)[: len(found)]).add_(q.offset)


def dequantize(q: NF4, dtype: torch.dtype = torch.float32, kernel: Kernel = "handwritten") -> Tensor:
    """The values, computed in fp32 and rounded to ``dtype`` once."""
    return KERNELS[kernel](q.packed, absmax_of(q), torch.Size(q.shape).numel(), dtype).view(q.shape)


def row_pieces(q: NF4, dtype: torch.dtype, kernel: Kernel = "handwritten", size: int = PIECE * 4) -> Iterator[tuple[slice, Tensor]]:
    """The rows of a matrix as (which, their values), about ``size`` weights at a time: a product needs no more at once."""
    (n, k), absmax, unpack = q.shape, absmax_of(q), KERNELS[kernel]
    step = max(size // (k * BLOCK), 1) * BLOCK  # rows; so many are whole blocks whatever k
    for start in range(0, n, step):
        at = slice(start, min(start + step, n))
        blocks = slice(start * k // BLOCK, -(-at.stop * k // BLOCK))
        data = q.packed[start * k // 2 : -(-at.stop * k // 2)]
        yield at, unpack(data, absmax[blocks], (at.stop - start) * k, dtype).view(-1, k)


def unpack(packed: Tensor, absmax: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """(n,) values of whole blocks (the last may be short) from their bytes and their absmax in fp32."""
    pairs = PAIRS.to(packed.device)
    out = torch.empty(len(packed) * 2, dtype=dtype, device=packed.device)
    for start in range(0, len(out), PIECE):
        index = packed[start // 2 : (start + PIECE) // 2].int()
        values = pairs.index_select(0, index).view(torch.float32)  # both codes of a byte at once
        scale = absmax[start // BLOCK : (start + PIECE) // BLOCK, None]
        whole = len(values) // BLOCK
        values[: whole * BLOCK].view(-1, BLOCK).mul_(scale[:whole])
        values[whole * BLOCK :].mul_(scale[-1])
        out[start : start + PIECE] = values
    return out[:n]


def unpack_bitsandbytes(packed: Tensor, absmax: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """The same values from bitsandbytes' compiled kernel. Handed over flat: given rows of k values, where k is a multiple of
    16 and not of 64, version 0.50 with AVX512 takes the scales of other blocks."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    computed = dtype if dtype in DTYPES else torch.float32
    state = QuantState(absmax, (n,), CODES.to(packed.device), BLOCK, "nf4", computed)
    return dequantize_4bit(packed[:, None], state).reshape(-1).to(dtype)


KERNELS = {"handwritten": unpack, "bitsandbytes": unpack_bitsandbytes}


def check_kernel(kernel: str) -> None:
    """Raises ValueError for a kernel that does not exist, or whose package is not installed."""
    if kernel not in KERNELS:
        raise ValueError(f"kernel {kernel!r} is unknown; use {' or '.join(KERNELS)}")
    if kernel == "bitsandbytes" and find_spec("bitsandbytes") is None:
        raise ValueError('kernel bitsandbytes needs the package: pip install "zero2llm[bitsandbytes]", or use handwritten')
