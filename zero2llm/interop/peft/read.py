"""A folder that peft wrote, as an adapter of ours; what it asks for and we cannot do is refused by name.

AdaLoRA's folder becomes a LoRA with the singular values in A (its allocation is over). PiSSA's is read where peft itself
can make its residual again, from an exact SVD of the base. A matrix that is several of ours gives each the whole A. A head of one
label that was saved whole (modules_to_save, as peft does for classifiers) makes the model a reward model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from zero2llm.adapters.adapted import adapted_modules
from zero2llm.adapters.config import AdapterConfig
from zero2llm.adapters.dora import DoRAConfig
from zero2llm.adapters.lora import LoRAConfig
from zero2llm.adapters.pissa import PiSSAConfig
from zero2llm.adapters.wrap import attach
from zero2llm.core.files import read_json
from zero2llm.core.lazy import open_safetensors
from zero2llm.interop.peft.places import Place, places, same_function
from zero2llm.interop.peft.write import PREFIX
from zero2llm.interop.score import HEAD
from zero2llm.model.heads import add_score
from zero2llm.model.lm import LM

ENDINGS = {"lora_A": "a", "lora_B": "b", "lora_E": "e", "lora_magnitude_vector": "m"}
STARTS = (True, False, "true", "gaussian", "eva", "orthogonal", "pissa")  # those that leave the base as it was, and pissa
READ = {  # keys that we act on, and those that only say where the adapter came from or how it was to be trained
    "peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora",
    "init_lora_weights", "bias", "init_r", "layers_to_transform", "layers_pattern", "exclude_modules", "fan_in_fan_out",
    "task_type", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "auto_mapping", "megatron_core",
    "qalora_group_size", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step",
    "eva_config", "runtime_config", "modules_to_save",
}  # fmt: skip
EMPTY = (None, False, {}, [], "", 0)
HEADS = {"score", "classifier"}  # what peft saves whole of a classifier: whichever of these there is


@torch.no_grad()
def load_peft(model: LM, folder: Path, name: str = "default", model_type: str | None = None) -> list[str]:
    """Put the adapter of ``folder`` on the model, as `wrap` does, and make it the active one. Returns the adapted paths.

    model_type : the family whose names the file uses; None = whichever fits. Raises ValueError, with nothing changed: a
    file that is missing or damaged, a feature that we lack, an adapter for another base (the first mismatches).
    """
    folder = Path(folder)
    data = _read_config(folder)
    modules, head = _read_tensors(folder)
    if head is not None and head.shape != (1, model.cfg.d_model):
        raise ValueError(f"{folder}: {HEAD} is {tuple(head.shape)}; a reward model's head is (1, {model.cfg.d_model}): one label")
    where = _places(model, modules, model_type)
    if faults := _faults(modules, where, data):
        more = f" (and {len(faults) - 5} more)" if len(faults) > 5 else ""
        raise ValueError(f"{folder}: this adapter is for another base, or incomplete: {'; '.join(faults[:5])}{more}")
    parts = {}
    for module, tensors in modules.items():
        if len(tensors["a"]):  # AdaLoRA may leave a projection no rank at all
            parts |= _ours(where[module], module, tensors, data)
    if not parts:
        raise ValueError(f"{folder}: the adapter has rank 0 everywhere")
    attach(model, {path: cfg for path, (cfg, _) in parts.items()}, name)
    found = adapted_modules(model)
    for path, (_, tensors) in parts.items():
        for key, value in tensors.items():
            found[path].adapters[name].get_parameter(key).copy_(value)
    if head is not None:
        add_score(model, "reward")
        model.score.weight.copy_(head[0])
        model.score.bias.zero_()
    return [path for path in found if path in parts]


def _read_config(folder: Path) -> dict:
    data = read_json(folder / "adapter_config.json")
    if (kind := data.get("peft_type")) not in ("LORA", "ADALORA"):
        raise ValueError(f"{folder}/adapter_config.json: peft_type {kind!r} is not supported, only LORA and ADALORA")
    unknown = {key: value for key, value in data.items() if key not in READ and value not in EMPTY}
    if unknown:
        listed = ", ".join(f"{key} = {value!r}"[:80] for key, value in sorted(unknown.items()))
        raise ValueError(f"{folder}/adapter_config.json: {listed}: not supported")
    if data.get("bias", "none") != "none":
        raise ValueError(f"{folder}/adapter_config.json: bias = {data['bias']!r}: biases that learn are not supported")
    if beyond := sorted(set(data.get("modules_to_save") or ()) - HEADS):
        raise ValueError(f"{folder}/adapter_config.json: modules_to_save = {beyond}: not supported, but for the score head of a classifier")
    start = data.get("init_lora_weights", True)
    if start not in STARTS or (start == "pissa" and data.get("use_dora")):
        raise ValueError(
            f"{folder}/adapter_config.json: init_lora_weights = {start!r} changes the base's weights in a way that cannot be "
            "made again from it; convert the adapter to a plain LoRA with peft's path_initial_model_for_weight_conversion"
        )
    for key in ("r", "lora_alpha"):
        if not isinstance(data.get(key, 8), int | float) or data.get(key, 8) <= 0:
            raise ValueError(f"{folder}/adapter_config.json: {key} = {data[key]!r} must be a positive number")
    return data


def _read_tensors(folder: Path) -> tuple[dict[str, dict[str, Tensor]], Tensor | None]:
    """Their module -> a, b and perhaps e and m; and the head that was saved whole, if there is one."""
    file = folder / "adapter_model.safetensors"
    if not file.is_file() and (folder / "adapter_model.bin").is_file():
        raise ValueError(
            f"{folder}/adapter_model.bin: a pickle can run code and is not read; save the adapter as safetensors with peft"
        )
    modules: dict[str, dict[str, Tensor]] = {}
    tensors = open_safetensors(file)
    head = tensors.pop(PREFIX + HEAD, None)
    for key, tensor in tensors.items():
        module, _, ending = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if not key.startswith(PREFIX) or ending not in ENDINGS:
            raise ValueError(f"{file}: {key} belongs to no LoRA (embeddings and modules_to_save are not supported, but for score.weight)")
        modules.setdefault(module, {})[ENDINGS[ending]] = tensor.load()
    if not modules:
        raise ValueError(f"{file}: holds no tensors")
    return modules, None if head is None else head.load()


def _places(model: LM, modules: dict, model_type: str | None) -> dict[str, Place]:
    """Of the family whose names the file uses."""
    kinds = [model_type] if model_type else same_function(model) or [None]
    candidates = [places(model, kind) for kind in kinds]
    return max(candidates, key=lambda where: sum(module in where for module in modules))


def _faults(modules: dict, where: dict[str, Place], data: dict) -> list[str]:
    keys = {"a", "b"} | ({"e"} if data["peft_type"] == "ADALORA" else set()) | ({"m"} if data.get("use_dora") else set())
    faults = []
    order = {module: i for i, module in enumerate(where)}
    for module, tensors in sorted(modules.items(), key=lambda item: order.get(item[0], -1)):
        place = where.get(module)
        if place is None:
            faults.append(f"the model has no {module}")
        elif set(tensors) != keys:
            faults.append(f"{module} has {_called(tensors)}, not {_called(keys)}")
        else:
            faults += _misshaped(module, tensors, place, data)
    targets = data.get("target_modules")
    fewer = any(data.get(key) for key in ("layers_to_transform", "layers_pattern", "exclude_modules"))
    if isinstance(targets, list) and not fewer:
        matched = lambda module: any(module == t or module.endswith("." + t) for t in targets)
        faults += [f"{module} has tensors, but is none of target_modules" for module in modules if not matched(module)]
        faults += [f"{module} has no tensors" for module in where if module not in modules and matched(module)]
    return faults


def _called(keys: Iterable[str]) -> str:
    return ", ".join(theirs for theirs, key in ENDINGS.items() if key in keys)


def _misshaped(module: str, tensors: dict[str, Tensor], place: Place, data: dict) -> list[str]:
    n, r = sum(place.sizes), len(tensors["a"])
    right = {"a": (r, place.columns), "b": (n, r), "e": (r, 1), "m": (n,)}
    faults = [
        f"{module}: {_called(key)} is {tuple(t.shape)}, here {right[key]}"
        for key, t in tensors.items() if tuple(t.shape) != right[key]
    ]  # fmt: skip
    if data["peft_type"] == "LORA" and r != (said := _of(module, data.get("rank_pattern"), data.get("r", 8))):
        faults.append(f"{module}: rank {r}, but adapter_config.json says {said}")
    return faults


def _of(module: str, pattern: dict | None, default: float) -> float:
    """rank_pattern and alpha_pattern: a key is the end of a module's name, or an expression for it."""
    for key, value in (pattern or {}).items():
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        except re.error as error:
            raise ValueError(f"adapter_config.json: pattern {key!r} is no regular expression ({error})") from None
    return default


def _ours(place: Place, module: str, tensors: dict[str, Tensor], data: dict) -> dict[str, tuple[AdapterConfig, dict]]:
    """Path -> configuration and parameters."""
    a, alpha = tensors["a"], _of(module, data.get("alpha_pattern"), data.get("lora_alpha", 8))
    if data["peft_type"] == "ADALORA":
        init_r = data.get("init_r", 12)
        a, alpha = a * tensors["e"], alpha * len(a) / (init_r + 1e-5)
    pissa = data.get("init_lora_weights") == "pissa"
    if pissa and len(place.ours) > 1:
        raise ValueError(
            f"{module}: pissa of a matrix that is {', '.join(place.ours)} here has no counterpart; convert it to a plain LoRA"
        )
    kind = DoRAConfig if data.get("use_dora") else PiSSAConfig if pissa else LoRAConfig
    dropout, stabilized = data.get("lora_dropout", 0.0), data.get("use_rslora", False)
    cfg = kind(r=len(a), alpha=alpha, dropout=dropout, targets=place.ours, rank_stabilized=stabilized)
    split = {key: place.unpack(tensors[key]) for key in ("b", "m") if key in tensors}
    return {
        path: (cfg, {"a": a} | {key: values[i] for key, values in split.items()}) for i, path in enumerate(place.ours)
    }
