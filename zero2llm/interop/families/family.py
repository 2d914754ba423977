"""What a family page says, and how it is decided whether a model of ours is a model of that family.

A page translates a configuration into the keys of config.json and back. A model belongs to the family if nothing is
lost on the way there and back:

    read(write(cfg)) == cfg          apart from names, initialisation, chunk sizes, the layout of rotary pairs

so an option that a page has never heard of cannot be exported by mistake.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from zero2llm.interop.hf_names import Rule
from zero2llm.layers.ffns.moe import MoEConfig
from zero2llm.layers.mixers.gated_delta import GatedDeltaConfig
from zero2llm.layers.mixers.gqa import GQAConfig
from zero2llm.layers.mixers.kda import KDAConfig
from zero2llm.layers.mixers.mamba1 import Mamba1Config
from zero2llm.layers.mixers.mamba2 import Mamba2Config
from zero2llm.model.catalog import MixerConfig
from zero2llm.model.init import width_ratio
from zero2llm.model.spec import LayerSpec, ModelConfig

UNSEEN = ("chunk", "dt_range")  # fields of mixers that change no result: how a sum is cut up, where training starts


@dataclass(frozen=True)
class Family:
    """One architecture of transformers.

    mixers, ffns, norms : the kinds of part that it is made of.
    write : our configuration as their keys; ValueError for what the keys cannot say. What they leave out is found by
        the comparison.  read : the inverse; absent keys mean their defaults.  rules : which tensor is which.
    clean : their tensors in the current naming and without spare ones.
    added : kind of the position that is added to the embedding.
    """

    model_type: str
    architecture: str
    mixers: tuple[str, ...]
    ffns: tuple[str, ...]
    norms: tuple[str, ...]
    write: Callable[[ModelConfig], dict]
    read: Callable[[dict], ModelConfig]
    rules: Callable[[ModelConfig], list[Rule]]
    clean: Callable[[dict[str, Tensor], ModelConfig], dict[str, Tensor]] = lambda tensors, cfg: tensors
    added: str | None = None

    def faults(self, cfg: ModelConfig) -> tuple[bool, list[str]]:
        """(whether some part is of another kind, what has no counterpart here)."""
        if foreign := self._foreign(cfg):
            return True, foreign
        try:
            return False, differences(cfg, self.read(self.keys(cfg)))
        except ValueError as error:
            return False, [str(error).removeprefix("config.json: ")]

    def keys(self, cfg: ModelConfig) -> dict:
        """What config.json says of the function computed."""
        shared = {"vocab_size": cfg.vocab_size, "tie_word_embeddings": cfg.tie_embeddings}
        return {"model_type": self.model_type} | shared | self.write(cfg)

    def _foreign(self, cfg: ModelConfig) -> list[str]:
        position = cfg.position.kind if cfg.position else None
        found = [] if position == self.added else [f"position: {position} ({self.added} is needed)"]
        for spec in cfg.blocks.values():
            parts = ("mixer", spec.mixer, self.mixers), ("ffn", spec.ffn, self.ffns), ("norm", spec.norm, self.norms)
            for name, part, kinds in parts:
                kind = part.kind if part else "none"
                if kind not in kinds:
                    found.append(f"{name}: {kind} ({' or '.join(kinds)} is needed)")
        return list(dict.fromkeys(found))


def differences(ours: ModelConfig, theirs: ModelConfig) -> list[str]:
    """Every setting that changes the function computed, where the two differ: "mixer.window: 8 (there None)"."""
    found = _compare("", _plain(ours), _plain(theirs))
    if width_ratio(ours.init, ours.d_model) != 1:
        found.append(f"init: {ours.init.kind}, which divides the final hidden state by a ratio of widths")
    names = ours.layers.pattern * ours.layers.repeat
    for name, mine, other in zip(names, ours.specs(), theirs.specs(), strict=True):
        prefix = f"{name}." if len(ours.blocks) > 1 else ""
        found += _compare(prefix, _plain_spec(mine, ours.d_model), _plain_spec(other, theirs.d_model))
    return list(dict.fromkeys(found))


def _compare(path: str, a: Any, b: Any) -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict) and a.get("kind") == b.get("kind"):
        dot = path + "." if path and not path.endswith(".") else path
        return [fault for key in a if key in b for fault in _compare(dot + key, a[key], b[key])]
    if isinstance(a, float) and isinstance(b, float | int):  # a square root comes back through its square
        equal = math.isclose(a, b, rel_tol=1e-9)
    else:
        equal = a == b
    show = lambda v: v.get("kind", v) if isinstance(v, dict) else v
    return [] if equal else [f"{path}: {show(a)} (there {show(b)})"]


def _plain(cfg: ModelConfig) -> dict:
    data = dataclasses.asdict(cfg)
    return {key: value for key, value in data.items() if key not in ("layers", "blocks", "init")}


def _plain_spec(spec: LayerSpec, d_model: int) -> dict:
    """The layer as data, implied values filled in, and out with what does not change the result."""
    data = dataclasses.asdict(spec)
    mixer = data["mixer"]
    if isinstance(spec.mixer, GQAConfig):
        mixer["n_kv_heads"] = mixer["n_kv_heads"] or mixer["n_heads"]
        mixer["head_dim"] = mixer["head_dim"] or d_model // mixer["n_heads"]
        mixer["scale"] = float(mixer["head_dim"] ** -0.5 if mixer["scale"] is None else mixer["scale"])
        mixer["position"].pop("layout", None)  # a permutation of weights
        if not mixer["qk_norm"]:
            for key in ("qk_norm_span", "qk_norm_plus_one", "norm_eps"):
                mixer.pop(key)
    for key in UNSEEN:
        mixer.pop(key, None)
    mixer |= _implied(spec.mixer, d_model)
    if isinstance(spec.ffn, MoEConfig):
        ffn = data["ffn"]
        for key in ("n_shared", "shared_hidden", "balance_weight", "z_weight"):  # losses are training's business
            ffn.pop(key)
        ffn |= {"shared_width": spec.ffn.shared_width, "bias_rate": spec.ffn.bias_rate is not None}
    return data


def _implied(mixer: MixerConfig, d_model: int) -> dict:
    """What a recurrent mixer works out from d_model where its configuration says None."""
    if isinstance(mixer, Mamba1Config):
        return {"dt_rank": mixer.rank(d_model), "norm_eps": mixer.norm_eps if mixer.dt_norms else None}
    if isinstance(mixer, Mamba2Config):
        return {"n_heads": mixer.heads(d_model)}
    if isinstance(mixer, GatedDeltaConfig):
        return dict(zip(("n_k_heads", "n_v_heads", "head_dim", "value_dim"), mixer.widths(d_model), strict=True))
    if isinstance(mixer, KDAConfig):
        return dict(zip(("head_dim", "rank"), mixer.widths(d_model), strict=True))
    return {}
