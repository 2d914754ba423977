"""The projection that every mechanism uses: nn.Linear (same parameters, same state dict) over `ops.linear`."""

from __future__ import annotations

from torch import Tensor, nn

from zero2llm.ops.linear import linear


class Linear(nn.Linear):
    """y = x W^T + b. (..., K) -> (..., N)."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
