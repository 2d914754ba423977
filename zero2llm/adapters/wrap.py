"""Put adapters on a model, take them off, and say which one works.

    wrap -> switch | merge, unmerge | disabled -> unwrap

Load the base's weights first: PiSSA and DoRA begin from them. An optimizer made after `wrap` holds the active adapter's
parameters and nothing else. They are no Linear's weights, so OptimizerSet puts them under AdamW without decay, also with
`muon`: its orthogonal step gives every direction of a matrix the same length, and of two thin factors that says nothing
about their product.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from zero2llm.adapters.adapted import Adapted, adapted_modules, bare, working
from zero2llm.adapters.config import AdapterConfig
from zero2llm.adapters.projection import dense, shape_of
from zero2llm.adapters.targets import chosen, left_out, projections
from zero2llm.core.log import log_once
from zero2llm.layers.linear import Linear


def wrap(model: nn.Module, cfg: AdapterConfig, name: str = "default") -> list[str]:
    """Freeze the model and put a new adapter, which becomes the active one, on every projection that cfg.targets names.

    Returns their paths. What the targets mean but no adapter takes (stacked experts) is said on the console and by
    `left_out`. Raises ValueError, with nothing changed, for a name in use or a pattern that matches nothing.
    """
    paths = chosen(model, cfg.targets)
    if skipped := left_out(model, cfg.targets):
        log_once(f"adapter {name!r}: not on {', '.join(skipped)} (all experts in one tensor); those stay as they are")
    attach(model, dict.fromkeys(paths, cfg), name)
    return paths


def attach(model: nn.Module, cfgs: Mapping[str, AdapterConfig], name: str) -> None:
    """`wrap` for projections that may differ in configuration (those of a loaded file in their rank)."""
    if not name or "." in name:
        raise ValueError(f"adapter name {name!r}: letters, digits, - and _, no dot")
    if name in names(model):
        raise ValueError(f"adapter {name!r} exists already; there are: {', '.join(names(model))}")
    _check_unmerged(model)
    found = projections(model)
    base = {path: bare(found[path]) for path in cfgs}
    made = {path: _build(path, cfg, base[path]) for path, cfg in cfgs.items()}
    model.requires_grad_(False)
    for path, adapter in made.items():
        if not isinstance(found[path], Adapted):
            found[path] = Adapted(base[path]).train(base[path].training)
            model.set_submodule(path, found[path])
        found[path].adapters[name] = adapter.train(base[path].training)
    switch(model, name)


def _build(path: str, cfg: AdapterConfig, base: nn.Module) -> nn.Module:
    try:
        return cfg.build(dense(base) if cfg.kind in ("dora", "pissa") else shape_of(base))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def names(model: nn.Module) -> list[str]:
    """Adapters that the model carries."""
    return list(dict.fromkeys(name for m in adapted_modules(model).values() for name in m.adapters))


def switch(model: nn.Module, name: str | None) -> None:
    """Make ``name`` the adapter that works and learns; None = the base alone. Raises ValueError for one that is not there."""
    if name is not None and name not in names(model):
        raise ValueError(f"no adapter is called {name!r}; there are: {', '.join(names(model)) or 'none'}")
    _check_unmerged(model)
    for module in adapted_modules(model).values():
        module.active = name
        for key, adapter in module.adapters.items():
            adapter.requires_grad_(key == name)


def _check_unmerged(model: nn.Module) -> None:
    if any(m.merged is not None for m in adapted_modules(model).values()):
        raise ValueError("the active adapter is merged: unmerge(model) first")


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The base alone inside, merged or not: the reference model of DPO, without its memory."""
    modules = list(adapted_modules(model).values())
    before = [m.off for m in modules]
    try:
        for m in modules:
            m.off = True
        yield
    finally:
        for m, off in zip(modules, before, strict=True):
            m.off = off


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """One product per projection instead of three, for inference; costs a copy of the adapted weights until `unmerge`."""
    for m in adapted_modules(model).values():
        if m.merged is None and m.current() is not None:
            m.merged = m.weight


def unmerge(model: nn.Module) -> None:
    """Back to base and adapter, to the bit: the base was never touched."""
    for m in adapted_modules(model).values():
        m.merged = None


@torch.no_grad()
def unwrap(model: nn.Module) -> nn.Module:
    """The active adapter becomes part of the weights, the others are dropped: a plain model again, as it was built.

    A packed base becomes an ordinary Linear. Weights stay frozen: requires_grad_(True) to train on. Returns ``model``.
    """
    for path, m in adapted_modules(model).items():
        weight, plain = m.weight, m.base
        if not isinstance(plain, nn.Linear):
            plain = Linear(m.in_features, m.out_features, bias=m.bias is not None, device="meta").train(m.training)
            if m.bias is not None:
                plain.bias = nn.Parameter(m.bias.detach().clone(), requires_grad=False)
        plain.weight = nn.Parameter(weight.detach(), requires_grad=False)
        model.set_submodule(path, plain)
    return model


def lr_multipliers(model: nn.Module) -> dict[str, float]:
    """LoRA+: for every parameter of the active adapter, by its name in the model, what its learning rate is multiplied by."""
    return {f"{path}.{key}": rate for path, adapter in working(model) for key, rate in adapter.rates().items()}


def adapter_state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The tensors of one adapter alone, as they are called in the model's state dict."""
    mark = f".adapters.{name}."
    return {key: value for key, value in model.state_dict().items() if mark in key}


@torch.no_grad()
def load_adapter_state(model: nn.Module, tensors: Mapping[str, Tensor], name: str) -> None:
    """The inverse, on a model wrapped alike. Raises ValueError listing what is missing, too many or mis-shaped."""
    there = adapter_state(model, name)
    faults = [f"{key} is missing" for key in there if key not in tensors]
    faults += [f"{key} has no place" for key in tensors if key not in there]
    faults += [
        f"{key} is {tuple(tensors[key].shape)}, not {tuple(value.shape)}"
        for key, value in there.items() if key in tensors and tensors[key].shape != value.shape
    ]  # fmt: skip
    if faults:
        raise ValueError(f"adapter {name!r} of another model: {'; '.join(faults[:5])} ({len(faults)} in all)")
    for key, value in there.items():
        value.copy_(tensors[key])
