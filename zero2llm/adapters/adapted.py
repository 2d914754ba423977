"""A projection with its adapters: the base stays as it is, one adapter at a time works beside it.

    y = adapter(base, x)        active: which one; None = the base alone.   off: as None, for a moment
    merged: the weight of both together (N, K), in use instead while it is there; the base is kept, so undoing is exact

`weight` is the effective one, differentiable: for the few that read a weight themselves (MLA while it decodes, routers,
a head in a chunked loss).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from zero2llm.adapters.projection import dense
from zero2llm.ops.linear import linear


class Adapted(nn.Module):
    def __init__(self, base: nn.Module):
        super().__init__()
        self.base, self.adapters = base, nn.ModuleDict()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.active: str | None = None
        self.off = False
        self.register_buffer("merged", None, persistent=False)  # a checkpoint holds base and adapters, merged or not

    def current(self) -> nn.Module | None:
        """The adapter at work, if this projection has it."""
        return None if self.off or self.active not in self.adapters else self.adapters[self.active]

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    @property
    def weight(self) -> Tensor:
        """(N, K) of base and adapter together."""
        adapter = self.current()
        if adapter is None:
            return dense(self.base)
        return adapter.merged(dense(self.base)) if self.merged is None else self.merged

    def forward(self, x: Tensor) -> Tensor:
        adapter = self.current()
        if adapter is None:
            return self.base(x)
        if self.merged is None:
            return adapter(self.base, x)
        if self.training and torch.is_grad_enabled():
            raise ValueError(f"adapter {self.active!r} is merged and would not learn: unmerge(model) before training")
        return linear(x, self.merged, self.bias)

    def extra_repr(self) -> str:
        return f"active={self.active!r}" + (", merged" if self.merged is not None else "")


def bare(module: nn.Module) -> nn.Module:
    """The projection itself, adapted or not."""
    return module.base if isinstance(module, Adapted) else module


def adapted_modules(model: nn.Module) -> dict[str, Adapted]:
    """By path, in the model's order."""
    return {path: m for path, m in model.named_modules() if isinstance(m, Adapted)}


def working(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, adapter) of every active adapter; the path names it in the state dict."""
    for path, module in adapted_modules(model).items():
        if module.active in module.adapters:
            yield f"{path}.adapters.{module.active}", module.adapters[module.active]
