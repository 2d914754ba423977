"""Where our projections lie in a file of transformers: alone, with rows in another order, or several in one matrix.

The rules of a family (interop/families) turn weights. Given column vectors of row numbers instead of weights, they tell
where each row goes; B and a magnitude take the same road, A stays as it is:

    rows of theirs = rows[i] of ours      rotary pairs reordered, q k v below each other, queries and gates head by head
    transposed                            GPT-2's Conv1D: their weight is (in, out), their A and B are as everywhere
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from zero2llm.adapters.targets import projections
from zero2llm.interop.hf_config import FAMILIES, family
from zero2llm.interop.hf_names import Rule
from zero2llm.model.lm import LM
from zero2llm.model.spec import ModelConfig

END = ".weight"


@dataclass(frozen=True)
class Place:
    """One matrix of theirs. ours : paths, below each other; sizes : rows of each; columns : inputs of all."""

    theirs: str
    ours: tuple[str, ...]
    sizes: tuple[int, ...]
    columns: int
    rows: Tensor
    transposed: bool

    def pack(self, parts: list[Tensor]) -> Tensor:
        """Row-wise tensors of ours as one of theirs."""
        return torch.cat(parts)[self.rows]

    def unpack(self, whole: Tensor) -> list[Tensor]:
        ours = torch.empty_like(whole)
        ours[self.rows] = whole
        return [part.contiguous() for part in ours.split(self.sizes)]


def plain(cfg: ModelConfig) -> ModelConfig:
    """A score head is no projection."""
    return replace(cfg, score_head=False)


def rules(model: LM, model_type: str | None) -> list[Rule]:
    cfg = plain(model.cfg)
    return family(cfg, model_type).rules(cfg)


def places(model: LM, model_type: str | None = None) -> dict[str, Place]:
    """By their module's name. Routers are none: transformers keeps them as bare parameters.

    Raises ValueError where the model has no counterpart in transformers.
    """
    found, out = projections(model), {}
    for rule in rules(model, model_type):
        paths = tuple(name.removesuffix(END) for name in rule.ours)
        whole = all(name.endswith(END) for name in (*rule.ours, *rule.theirs))
        if not whole or len(rule.theirs) != 1 or not all(p in found and not p.endswith("router") for p in paths):
            continue
        sizes = tuple(found[path].out_features for path in paths)
        turned = rule.pack([part[:, None] for part in torch.arange(sum(sizes)).split(sizes)])[0]
        theirs, transposed = rule.theirs[0].removesuffix(END), len(turned) == 1 and sum(sizes) > 1
        assert torch.equal(turned.flatten().sort()[0], torch.arange(sum(sizes))), f"{theirs} is no permutation of rows"
        out[theirs] = Place(theirs, paths, sizes, found[paths[0]].in_features, turned.flatten(), transposed)
    return out


def same_function(model: LM) -> list[str]:
    """Every model_type that computes what the model does: Phi-3 without LongRoPE is Mistral, under other names."""
    return [name for name, page in FAMILIES.items() if not page.faults(plain(model.cfg))[1]]
