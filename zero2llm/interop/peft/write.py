"""An adapter as a folder that peft opens: adapter_config.json and adapter_model.safetensors, under transformers' names.

    base_model.model.MODULE.lora_A.weight (r, in)   .lora_B.weight (out, r)   .lora_magnitude_vector (out)

lora, dora     as they are; rows of B and m in transformers' order
pissa          as the LoRA of rank 2 r that it is relative to the untouched base: [B, -B0] [A; A0]
adalora        as LoRA with the singular values in A, those that are out left away: exact, but no allocation goes on
one matrix there, several projections here (Phi-3, GPT-2)   a block of the sum of ranks: A's below each other, B's on the
               diagonal; of the common rank where all have the same A. Magnitudes belong to rows and are just joined

Reading (read.py) is the inverse, but for blocks: every projection gets the whole A. Source: peft 0.21, the files of
save_pretrained and the fields of LoraConfig.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from zero2llm.adapters.adalora import AdaLoRAConfig
from zero2llm.adapters.adapted import adapted_modules, bare
from zero2llm.adapters.config import AdapterConfig
from zero2llm.adapters.dora import DoRA, DoRAConfig
from zero2llm.adapters.projection import dense
from zero2llm.adapters.targets import stacked
from zero2llm.adapters.wrap import names
from zero2llm.core.files import new_folder, read_json, save_tensors
from zero2llm.interop.hf_config import page_of
from zero2llm.interop.peft.places import END, Place, places, rules
from zero2llm.interop.score import HEAD, class_of, head_rule
from zero2llm.model.lm import LM

PREFIX = "base_model.model."
MISREAD = ("gate_proj", "up_proj", "down_proj", "gate", "w1", "w2", "w3")  # peft's _MOE_TARGET_MODULE_MAPPING


@dataclass(frozen=True)
class Piece:
    """What one matrix of theirs gets: y += scale B A x, and a magnitude for DoRA."""

    a: Tensor
    b: Tensor
    scale: float
    m: Tensor | None = None

    def alpha(self, stabilized: bool) -> float:
        """What peft divides by r, or its root, again."""
        alpha = self.scale * (math.sqrt(len(self.a)) if stabilized else len(self.a))
        return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


@torch.no_grad()
def save_peft(model: LM, folder: Path, base: str, name: str = "default", model_type: str | None = None, overwrite: bool = False) -> Path:
    """Write the adapter ``name``, whole or not at all. Returns ``folder``.

    base : what peft loads it onto, a hub id or a folder. model_type : the family of that model, where several compute the
    same function; None = as the folder's config.json says, else the plainest.
    Raises ValueError before anything is written: a projection without a counterpart, weights that learn beside the
    adapter and would be lost, a non-empty ``folder`` (unless ``overwrite``).
    """
    if name not in names(model):
        raise ValueError(f"no adapter is called {name!r}; there are: {', '.join(names(model)) or 'none'}")
    model_type = model_type or _model_type(base)
    pieces, where = _pieces(model, name, model_type), places(model, model_type)
    cfg = next(m.adapters[name].cfg for m in adapted_modules(model).values() if name in m.adapters)
    scoring = model.cfg.score_head == "reward"
    data = _config(pieces, cfg, base) | (_scoring(model, model_type) if scoring else {}) | {
        "target_modules": _targets(list(pieces), model, model_type),
        "fan_in_fan_out": any(where[module].transposed for module in pieces),
    }
    tensors = {}
    for module, piece in pieces.items():
        tensors |= {f"{PREFIX}{module}.lora_A.weight": piece.a, f"{PREFIX}{module}.lora_B.weight": piece.b}
        if piece.m is not None:
            tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = piece.m
    if scoring:
        tensors[PREFIX + HEAD] = head_rule().pack([model.score.weight.detach()])[0]
    with new_folder(Path(folder), overwrite) as part:
        save_tensors({key: value.contiguous() for key, value in tensors.items()}, part, "adapter_model")
        (part / "adapter_config.json").write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return Path(folder)


def _scoring(model: LM, model_type: str | None) -> dict:
    """The head goes along whole. Raises ValueError where transformers has no class to put it in."""
    page = page_of(model.cfg, model_type)
    class_of(page.model_type, page.architecture)
    return {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}


def _model_type(base: str) -> str | None:
    config = Path(base) / "config.json"
    return read_json(config).get("model_type") if config.is_file() else None


def _pieces(model: LM, name: str, model_type: str | None) -> dict[str, Piece]:
    mine = {path: m for path, m in adapted_modules(model).items() if name in m.adapters}
    goes_along = "score." if model.cfg.score_head == "reward" else ".adapters."
    learning = {key: p for key, p in model.named_parameters() if p.requires_grad and ".adapters." not in key and not key.startswith(goes_along)}
    if learning:
        raise ValueError(
            f"{', '.join(list(learning)[:5])} also learn and would be lost: an adapter's file holds the adapter alone; "
            "export the whole model"
        )
    where = places(model, model_type)
    covered = {path for place in where.values() for path in place.ours}
    if lost := [path for path in mine if path not in covered]:
        raise ValueError(
            f"peft: transformers has no projection of its own for {', '.join(lost[:5])} ({len(lost)} in all); merge the "
            "adapter and export the model"
        )
    touched = {module: place for module, place in where.items() if set(place.ours) & set(mine)}
    told = [module for module in touched if module.rpartition(".")[2] in MISREAD]
    if told and stacked(model):
        raise ValueError(
            f"peft: {', '.join(told[:5])} in a model with experts: peft takes that name for the experts' own weights; "
            "adapt *.mixer.* alone, or merge the adapter and export the model"
        )
    pieces = {module: _piece(place, mine, model, name) for module, place in touched.items()}
    pieces = {module: piece for module, piece in pieces.items() if len(piece.a)}
    if not pieces:
        raise ValueError(f"adapter {name!r} has not learnt anything yet: all its singular values are zero")
    return pieces


def _piece(place: Place, mine: dict, model: LM, name: str) -> Piece:
    adapters = [mine[path].adapters[name] if path in mine else None for path in place.ours]
    there = [adapter for adapter in adapters if adapter is not None]
    scale, magnitudes = there[0].scale, None
    if isinstance(there[0], DoRA):
        rest = lambda path: torch.linalg.vector_norm(dense(bare(model.get_submodule(path))).float(), dim=1)
        found = [rest(path) if x is None else x.m for path, x in zip(place.ours, adapters, strict=True)]
        magnitudes = place.pack(found)
    pairs = [(x.low_rank()[0], x.low_rank()[1] * (x.scale / scale)) for x in there]
    if len(there) == len(adapters) and all(torch.equal(pairs[0][0], a) for a, _ in pairs):
        return Piece(pairs[0][0], place.pack([b for _, b in pairs]), scale, magnitudes)
    left, blocks = iter(pairs), []
    for adapter, size in zip(adapters, place.sizes, strict=True):
        blocks.append(pairs[0][1].new_zeros(size, 0) if adapter is None else next(left)[1])
    return Piece(torch.cat([a for a, _ in pairs]), torch.block_diag(*blocks)[place.rows], scale, magnitudes)


def _config(pieces: dict[str, Piece], cfg: AdapterConfig, base: str) -> dict:
    stabilized = not isinstance(cfg, AdaLoRAConfig) and cfg.rank_stabilized
    ranks = {module: len(piece.a) for module, piece in pieces.items()}
    alphas = {module: piece.alpha(stabilized) for module, piece in pieces.items()}
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": r, "lora_alpha": alpha, "lora_dropout": cfg.dropout, "bias": "none", "init_lora_weights": True,
        "use_rslora": stabilized, "use_dora": isinstance(cfg, DoRAConfig), "modules_to_save": None,
        "rank_pattern": {module: n for module, n in ranks.items() if n != r},
        "alpha_pattern": {module: n for module, n in alphas.items() if n != alpha},
    }  # fmt: skip


def _targets(modules: list[str], model: LM, model_type: str | None) -> list[str]:
    """The last name where every matrix of that name is adapted, the whole name elsewhere."""
    every = [n.removesuffix(END) for rule in rules(model, model_type) for n in rule.theirs if n.endswith(END)]
    last = lambda module: module.rpartition(".")[2]
    missing = {last(module) for module in every if module not in modules}
    return sorted({module if last(module) in missing else last(module) for module in modules})
