"""The plain two-layer feed-forward network.

    y = W_down act(W_up x + b_up) + b_down          act: gelu (GPT-2), relu2 = max(0, x)^2 (Primer)

Source: GELU 1606.08415 (GPT-2 uses the tanh form, called `gelu` here; `gelu_erf` is exact); ReLU^2 2109.08668.
Cost: 2 D * hidden parameters, 4 D * hidden FLOPs per token. Shapes: (B, T, D) -> (B, T, D).
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor, nn

from zero2llm.core.config import config
from zero2llm.core.seq import Aux, Seq, State
from zero2llm.layers.activations import ACTIVATIONS, Activation
from zero2llm.layers.contract import Cost
from zero2llm.layers.linear import Linear


@config
class MLPConfig:
    kind: Literal["mlp"] = "mlp"
    hidden: int
    act: Activation = "gelu"
    bias: bool = True

    def build(self, d_model: int) -> MLP:
        if self.hidden < 1:
            raise ValueError(f"hidden = {self.hidden} must be positive")
        return MLP(d_model, self.hidden, self.act, self.bias)

    def cost(self, d_model: int) -> Cost:
        """Saved: the input, up and act(up); relu keeps its result alone."""
        weights = 2 * d_model * self.hidden
        saved = d_model + self.hidden * (1 if self.act == "relu" else 2)
        return Cost(weights + self.bias * (self.hidden + d_model), 2 * weights, saved=saved)


class MLP(nn.Module):
    tp: ClassVar = {"up_proj": "col", "down_proj": "row"}

    def __init__(self, d_model: int, hidden: int, act: Activation, bias: bool):
        super().__init__()
        self.up_proj = Linear(d_model, hidden, bias=bias)
        self.down_proj = Linear(hidden, d_model, bias=bias)
        self.act = ACTIVATIONS[act]

    def forward(self, x: Tensor, seq: Seq, state: State | None = None) -> tuple[Tensor, Aux]:
        return self.down_proj(self.act(self.up_proj(x))), {}
