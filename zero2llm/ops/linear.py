"""y = x W^T + b, with the shapes that decoding has made fast on a CPU.

torch runs a one-row product (a token of one request) on a single thread, and one of a few rows through a kernel that
reads W badly. Both are bound by the time to read W, so for inference with few rows:

    1 row      W cut into halves, a batched product of two parts: both cores read at once (small W: one thread is faster)
    2-32 rows  y^T = W x^T: the same sums, W walked in the order in which it is stored

Measured on 2 cores, W 1,536 x 576: 71 -> 45 us for one row, 183 -> 114 us for four; W 49,152 x 576: 9.4 -> 2.7 ms
(bench/linear_rows.py repeats it).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_ROWS = 32  # from here on the ordinary kernel is as good
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
    if len(rows) > 1:
        y = (weight @ rows.t()).t()
    elif n >= WIDE:
        y = (weight @ torch.cat((rows, torch.zeros_like(rows))).t())[:, :1].t()
    elif n % 2 == 0:
        y = torch.bmm(rows.expand(2, 1, k), weight.view(2, n // 2, k).transpose(1, 2)).view(1, n)
    else:
        return F.linear(x, weight, bias)
    return (y if bias is None else y + bias).reshape(*x.shape[:-1], n)
