"""Which parameter gets which rule: the groups, and one object that steps them all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated

import torch
from torch import Tensor, nn

from zero2llm.core.config import by_kind
from zero2llm.optim.adamw import AdamW, AdamWConfig
from zero2llm.optim.muon import Muon, MuonConfig
from zero2llm.optim.sign import SignSGD

OptimConfig = Annotated[AdamWConfig | MuonConfig, by_kind]


def split_parameters(model: nn.Module) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Every trainable parameter in exactly one group: `matrix` (weights of Linear layers; 3-D: all experts at once),
    `embedding` (tables and the head; a tied head is the embedding and comes once), `choice` (the bias by which a router
    chooses), `vector` (norms, biases, and all that is no Linear: filters, decays, RWKV-7's low-rank pairs)."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    maps = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    groups: dict[str, list] = {"matrix": [], "embedding": [], "vector": [], "choice": []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            kind = "vector"
            if name.endswith("router_bias"):
                kind = "choice"
            elif id(p) in tables or name.startswith("head."):
                kind = "embedding"
            elif id(p) in maps or (p.ndim == 3 and not name.endswith(".bias")):
                kind = "matrix"
            groups[kind].append((name, p))
    return groups


def choice_rates(model: nn.Module, named: list[tuple[str, nn.Parameter]]) -> dict[nn.Parameter, float]:
    """The step of each choice bias: its own module's ``bias_rate``."""
    return {p: model.get_submodule(name.rpartition(".")[0]).bias_rate for name, p in named}


class OptimizerSet:
    """Optimizers that act as one. Weight decay falls on matrices only. State is keyed by parameter name, so it
    does not depend on the number of ranks or the order of groups.

    matrix_lr : what the learning rate of matrices is multiplied by, and their weight decay divided by, so that a step
    takes away the same share of a weight: an LM's ``width_ratio``, 1 but under muP (2203.03466 table 8).
    rates : by name, what the learning rate of some vectors is multiplied by (an adapter's B under LoRA+).
    after : called at the end of each step, while gradients are still there.
    """

    def __init__(self, model: nn.Module, cfg: AdamWConfig | MuonConfig, matrix_lr: float = 1.0,
                 rates: Mapping[str, float] | None = None):  # fmt: skip
        if isinstance(cfg, MuonConfig) and matrix_lr != 1:
            raise ValueError("init mup scales Adam's learning rates and says nothing about muon: take optim adamw")
        named = split_parameters(model)
        params = {kind: [p for _, p in group] for kind, group in named.items()}
        self.names = {id(p): name for group in named.values() for name, p in group}
        self.after: Callable[[], None] | None = None
        plain = [{"params": params["embedding"], "weight_decay": 0.0}] if params["embedding"] else []
        plain += [{"params": some, "weight_decay": 0.0, **rate} for rate, some in by_rate(named["vector"], cfg, rates or {})]
        if isinstance(cfg, MuonConfig):
            rest = AdamWConfig(lr=cfg.lr if cfg.adamw_lr is None else cfg.adamw_lr, betas=cfg.betas, weight_decay=0.0)
            self.parts: list[torch.optim.Optimizer] = [Muon([{"params": params["matrix"]}], cfg)] if params["matrix"] else []
            self.parts += [AdamW(plain, rest)] if plain else []
        else:
            scaled = {"lr": cfg.lr * matrix_lr, "weight_decay": cfg.weight_decay / matrix_lr}
            matrices = [{"params": params["matrix"], **scaled}] if params["matrix"] else []
            self.parts = [AdamW([*matrices, *plain], cfg)]
        self.groups = [group for part in self.parts for group in part.param_groups]  # those under schedule and clipping
        for group in self.groups:
            group["peak_lr"] = group["lr"]
        if params["choice"]:
            self.parts.append(SignSGD(choice_rates(model, named["choice"])))

    @property
    def params(self) -> list[nn.Parameter]:
        """Those with a true gradient, to be averaged and clipped: all but the choice biases, which count load."""
        return [p for group in self.groups for p in group["params"]]

    def set_lr(self, factor: float) -> float:
        """Learning rates = peak * ``factor``; returns the first group's, for the log."""
        for group in self.groups:
            group["lr"] = group["peak_lr"] * factor
        return self.groups[0]["lr"]

    def step(self) -> None:
        for part in self.parts:
            part.step()
        if self.after is not None:
            self.after()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()

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


def by_rate(named: list[tuple[str, nn.Parameter]], cfg: AdamWConfig | MuonConfig, rates: Mapping[str, float]) -> list[tuple[dict, list]]:
    """Parameters that share a learning rate, with what their group says of it; those at the common one first."""
    lr = cfg.lr if isinstance(cfg, AdamWConfig) or cfg.adamw_lr is None else cfg.adamw_lr
    groups: dict[float, list[nn.Parameter]] = {}
    for name, p in sorted(named, key=lambda pair: rates.get(pair[0], 1.0)):
        groups.setdefault(rates.get(name, 1.0), []).append(p)
    return [({} if rate == 1 else {"lr": lr * rate}, some) for rate, some in groups.items()]


def build_optim(model: nn.Module, cfg: AdamWConfig | MuonConfig, matrix_lr: float = 1.0,
                rates: Mapping[str, float] | None = None) -> OptimizerSet:  # fmt: skip
    return OptimizerSet(model, cfg, matrix_lr, rates)
