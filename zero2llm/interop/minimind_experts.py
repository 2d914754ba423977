"""Experts of minimind v1 and v2 as transformers' families have them.

    theirs      y = sum_chosen w_e f_e(x) + sum_j f_j(x)                     w: softmax, chosen ones sum to 1; j: shared
    Qwen2-MoE   y = sum_chosen w_e f_e(x) + sigmoid(w_g . x) f(x)            f: one shared expert

Shared experts side by side are one as wide as all of them; w_g = 0 and a doubled down_proj give sigmoid(0) 2 f(x) = f(x),
exactly, for a factor of two moves only the exponent. Without shared experts they are Mixtral's, under other names.

Source: github.com/jingyaogong/minimind, MOEFeedForward in model/model.py and model/model_minimind.py (2024-08 to 2026-01);
Qwen2-MoE 2407.10671 section 2.2.2.  Why: the imported model runs in transformers too, and costs one dot product a token more.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from zero2llm.core.lazy import Lazy

SHARED = re.compile(r"(model\.layers\.\d+\.mlp\.)shared_experts\.(?:\d+\.)?(gate|up|down)_proj\.weight")
MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2", ".mlp.": ".block_sparse_moe."}


def one_shared(tensors: dict[str, Lazy]) -> dict[str, Lazy]:
    out: dict[str, Lazy] = {}
    parts: dict[tuple[str, str], list[Lazy]] = {}
    for name, t in tensors.items():
        if match := SHARED.fullmatch(name):
            parts.setdefault((match[1], match[2]), []).append(t)
        else:
            out[name] = t
    for (mlp, which), some in parts.items():
        out[f"{mlp}shared_expert.{which}_proj.weight"] = joined(some, int(which == "down"))
        if which == "gate":
            out[mlp + "shared_expert_gate.weight"] = zeros((1, some[0].shape[1]), some[0].dtype)
    return out


def joined(parts: Sequence[Lazy], dim: int) -> Lazy:
    """One below the other, or with ``dim`` 1 side by side and doubled."""
    shape = list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)

    def load() -> Tensor:
        whole = torch.cat([part.load() for part in parts], dim)
        if dim and not (whole := whole * 2).isfinite().all():
            raise ValueError(f"a shared expert's down_proj holds values that cannot be doubled in {whole.dtype}")
        return whole

    return Lazy(tuple(shape), parts[0].dtype, load)


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Lazy:
    return Lazy(shape, dtype, lambda: torch.zeros(shape, dtype=dtype))


def mixtral_names(tensors: dict[str, Lazy]) -> dict[str, Lazy]:
    def rename(name: str) -> str:
        for theirs, new in MIXTRAL.items() if ".mlp." in name else ():
            name = name.replace(theirs, new)
        return name

    return {rename(name): t for name, t in tensors.items()}
