"""y = x W^T + b, with the shapes that decoding has made fast on a CPU.

torch runs a one-row product (a token of one request) on a single thread, and one of a few rows through a kernel that
reads W badly. Both are bound by the time to read W, so for inference with few rows:

    1 row      W cut into halves, a batched product of two parts: both cores read at once (small W: one thread is faster)
    2-4 rows   y^T = W x^T: the same sums, W walked in the order in which it is stored (a wide W: up to 8 rows)
    5-48 rows  W cut into four, a batched product
    49-192     y^T = W x^T again

Measured on 2 cores, milliseconds of F.linear and of this: W 1,536 x 576, 1 row 0.27 -> 0.19, 4 rows 0.45 -> 0.22;
2,048 x 2,048, 8 rows 1.8 -> 1.1; 49,152 x 576, 1 row 9.4 -> 3.5, 16 rows 21 -> 13; 64 rows are a tenth to a fifth faster (bench/linear_rows.py repeats it).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SPLIT_ROWS = 48  # up to which the batched product is the better one
MAX_ROWS = 192  # from here on the ordinary kernel is as good
SMALL = 250_000  # weights up to which waking a second thread costs more than it brings
WIDE = 8192  # output rows from which a second, empty column beats the split


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K), weight (N, K), bias (N) -> (..., N); equal to F.linear up to the order of summation."""
    if (
        torch.is_grad_enabled()
        or x.device.type != "cpu"
        or x.dtype != torch.float32
        or x.numel() > MAX_ROWS * x.shape[-1]
    ):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    n, k = weight.shape
    if len(rows) == 1 and n * k < SMALL:
        return F.linear(x, weight, bias)
    if 1 < len(rows) <= (8 if n >= WIDE else 4) or len(rows) > SPLIT_ROWS:
        y = (weight @ rows.t()).t()
    elif len(rows) == 1 and n >= WIDE:
        y = (weight @ torch.cat((rows, torch.zeros_like(rows))).t())[:, :1].t()
    else:
        parts = 2 if len(rows) == 1 else 4
        if n % parts:
            return F.linear(x, weight, bias)
        y = torch.bmm(rows.expand(parts, -1, k), weight.view(parts, n // parts, k).mT)  # (parts, rows, n / parts)
        y = y.transpose(0, 1).reshape(-1, n)
    return (y if bias is None else y + bias).reshape(*x.shape[:-1], n)
