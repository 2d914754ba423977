"""A projection that every expert has its own of: one parameter for all.

    y_m = W_e x_m + b_e,  e = the expert of row m          weight (E, out, in), bias (E, out)

Shapes: x (M, in) sorted by expert -> (M, out). `ops.route.Plan` says which rows are whose.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zero2llm.ops.route import Plan, grouped_linear


class ExpertLinear(nn.Module):
    def __init__(self, n_experts: int, d_in: int, d_out: int, bias: bool = False):
        super().__init__()
        bound = d_in**-0.5  # as torch's own Linear begins
        self.weight = nn.Parameter(torch.empty(n_experts, d_out, d_in).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(n_experts, d_out).uniform_(-bound, bound)) if bias else None

    def forward(self, x: Tensor, plan: Plan) -> Tensor:
        y = grouped_linear(x, self.weight, plan.sizes)
        if self.bias is None:
            return y
        return y + F.embedding(plan.groups, self.bias).to(y.dtype)  # a lookup whose gradient is summed in parallel
