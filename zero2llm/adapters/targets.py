"""Which projections an adapter goes to: patterns over the paths of modules.

    all-linear            every projection inside the blocks' mixers and feed-forwards, but routers
    q_proj, mlp.q_proj    the end of a path, whole names
    blocks.3.*, *.mixer.* with * ? [ ]: the whole path

Heads and routers are taken only where their name is written out: one moves every logit, the other who answers.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from zero2llm.adapters.adapted import Adapted
from zero2llm.adapters.lora import ALL_LINEAR
from zero2llm.adapters.projection import is_projection
from zero2llm.layers.ffns.experts import ExpertLinear

IN_BLOCKS = re.compile(r"blocks\.\d+\.(mixer|ffn)(\.|$)")
SENSITIVE = ("head", "router")


def projections(model: nn.Module) -> dict[str, nn.Module]:
    """Everything that could be adapted, by path; what is adapted already counts once."""
    inside = tuple(path + "." for path, m in model.named_modules() if isinstance(m, Adapted))
    found = {path: m for path, m in model.named_modules() if is_projection(m) or isinstance(m, Adapted)}
    return {path: m for path, m in found.items() if not path.startswith(inside)}


def stacked(model: nn.Module) -> dict[str, ExpertLinear]:
    """Projections of all experts in one tensor, which no adapter takes."""
    return {path: m for path, m in model.named_modules() if isinstance(m, ExpertLinear)}


def matches(path: str, pattern: str) -> bool:
    name = path.rpartition(".")[2]
    if pattern == ALL_LINEAR:
        return bool(IN_BLOCKS.match(path)) and name not in SENSITIVE
    if any(sign in pattern for sign in "*?["):
        return name not in SENSITIVE and fnmatchcase(path, pattern)
    return path == pattern or path.endswith("." + pattern)


def chosen(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """Paths in the model's order. Raises ValueError for a pattern that matches nothing, listing what there is."""
    there, experts = list(projections(model)), list(stacked(model))
    for pattern in targets:
        if any(matches(path, pattern) for path in there):
            continue
        if pattern == "head":
            raise ValueError("targets: the head is tied to the embedding and has no weight of its own to adapt; untie it")
        if at := [path for path in experts if matches(path, pattern)]:
            raise ValueError(
                f"targets: {pattern!r} is only {at[0]} and the like, all experts in one tensor, which adapters do not take"
            )
        names = list(dict.fromkeys(path.rpartition(".")[2] for path in there))
        near = difflib.get_close_matches(pattern.rpartition(".")[2], names, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        listed = f"{', '.join(names)}, as in {there[0]}" if there else "none in this model"
        raise ValueError(f"targets: {pattern!r} matches no projection; {hint}there are: {listed}")
    return [path for path in there if any(matches(path, pattern) for pattern in targets)]


def left_out(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """Stacked experts that the patterns would have meant."""
    return [path for path in stacked(model) if any(matches(path, pattern) for pattern in targets)]
