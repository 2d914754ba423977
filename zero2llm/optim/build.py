"""Which parameter gets which rule: the groups, and one object that steps them all."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn

from zero2llm.core.config import by_kind
from zero2llm.optim.adamw import AdamW, AdamWConfig
from zero2llm.optim.muon import Muon, MuonConfig

OptimConfig = Annotated[AdamWConfig | MuonConfig, by_kind]


def split_parameters(model: nn.Module) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Every trainable parameter in exactly one group: `matrix` (2-D, inside a block), `vector` (norms, biases),
    `embedding` (tables and the head; a tied head is the embedding and comes once)."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    groups: dict[str, list] = {"matrix": [], "embedding": [], "vector": []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            kind = "vector" if p.ndim < 2 else "embedding" if id(p) in tables or name.startswith("head.") else "matrix"
            groups[kind].append((name, p))
    return groups


class OptimizerSet:
    """Optimizers that act as one. Weight decay falls on matrices only. State is keyed by parameter name, so it
    does not depend on the number of ranks or the order of groups."""

    def __init__(self, model: nn.Module, cfg: AdamWConfig | MuonConfig):
        named = split_parameters(model)
        params = {kind: [p for _, p in group] for kind, group in named.items()}
        self.names = {id(p): name for group in named.values() for name, p in group}
        plain = [{"params": params[kind], "weight_decay": 0.0} for kind in ("embedding", "vector") if params[kind]]
        if isinstance(cfg, MuonConfig):
            rest = AdamWConfig(lr=cfg.adamw_lr or cfg.lr, betas=cfg.betas, weight_decay=0.0)
            self.parts: list[torch.optim.Optimizer] = [Muon([{"params": params["matrix"]}], cfg), AdamW(plain, rest)]
        else:
            self.parts = [AdamW([{"params": params["matrix"]}, *plain], cfg)]
        self.groups = [group for part in self.parts for group in part.param_groups]
        for group in self.groups:
            group["peak_lr"] = group["lr"]

    @property
    def params(self) -> list[nn.Parameter]:
        return [p for group in self.groups for p in group["params"]]

    def set_lr(self, factor: float) -> float:
        """Learning rates = peak * ``factor``; returns the first group's, for the log."""
        for group in self.groups:
            group["lr"] = group["peak_lr"] * factor
        return self.groups[0]["lr"]

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        for p in self.params:
            p.grad = None

    def state_tensors(self) -> dict[str, Tensor]:
        """Flat ``parameter/key`` -> tensor, ready for safetensors."""
        return {
            f"{self.names[id(p)]}/{key}": value
            for part in self.parts
            for p, state in part.state.items()
            for key, value in state.items()
        }

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Exact inverse of `state_tensors`. Raises ValueError if a tensor is for no parameter of this optimizer."""
        owner = {self.names[id(p)]: (part, p) for part in self.parts for g in part.param_groups for p in g["params"]}
        for name, value in tensors.items():
            param, _, key = name.rpartition("/")
            if param not in owner:
                raise ValueError(f"optimizer state {name!r} belongs to no parameter of this model")
            part, p = owner[param]
            part.state[p][key] = value.to(p.device) if key != "step" else value.clone()


def build_optim(model: nn.Module, cfg: AdamWConfig | MuonConfig) -> OptimizerSet:
    return OptimizerSet(model, cfg)
