"""The pointwise functions that feed-forward layers choose from."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Activation = Literal["silu", "gelu", "gelu_erf", "relu", "relu2"]
GatedActivation = Literal["silu", "gelu", "gelu_erf", "relu", "relu2", "gptoss"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": partial(F.gelu, approximate="tanh"),
    "gelu_erf": F.gelu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def gated(act: GatedActivation) -> Callable[[Tensor, Tensor], Tensor]:
    """The function of a gated unit: (gate, up) -> act(gate) * up, or gpt-oss's own."""
    if act == "gptoss":
        return clamped_swiglu
    f = ACTIVATIONS[act]
    return lambda gate, up: f(gate) * up


def clamped_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gpt-oss (2508.10925): (u + 1) g sigmoid(1.702 g) with g <= 7 and |u| <= 7; 1.702 makes the sigmoid nearly GELU's."""
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1) * gate * (1.702 * gate).sigmoid()
