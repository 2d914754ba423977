"""Rotary settings as config.json keys, both as transformers 5 reads them (rope_parameters) and as version 4 does
(rope_theta, rope_scaling), and back."""

from __future__ import annotations

import dataclasses
import math

from zero2llm.layers.positions.catalog import AttentionPositionConfig
from zero2llm.layers.positions.interpolation import (
    LinearScalingConfig,
    Llama3ScalingConfig,
    LongRoPEConfig,
    ScalingConfig,
    YaRNConfig,
)
from zero2llm.layers.positions.rope import RoPEConfig

LENGTH = "original_max_position_embeddings"
KEYS = {  # rope_type -> our class and our field for each of their keys; equal names are left out
    "linear": (LinearScalingConfig, {}),
    "llama3": (Llama3ScalingConfig, {LENGTH: "original_max_len"}),
    "yarn": (YaRNConfig, {LENGTH: "original_max_len"}),
    "longrope": (LongRoPEConfig, {LENGTH: "original_max_len"}),
}
OWN = {"kind", "max_len"}  # fields of ours that are no key of theirs


def rope_parameters(position: AttentionPositionConfig, head_dim: int | None = None) -> dict:
    """rope_type, rope_theta, factors. With ``head_dim`` also partial_rotary_factor, which not every family reads.

    Raises ValueError for another position, or a scaling without counterpart.
    """
    if not isinstance(position, RoPEConfig):
        raise ValueError(f"mixer.position: {position.kind} (rope is needed)")
    out = {"rope_type": "default", "rope_theta": position.base}
    if head_dim is not None:
        out["partial_rotary_factor"] = (position.rotary_dim or head_dim) / head_dim
    if position.scaling is None:
        return out
    if position.scaling.kind not in KEYS:
        raise ValueError(f"mixer.position.scaling: {position.scaling.kind} ({', '.join(KEYS)} are known there)")
    renamed = {ours: theirs for theirs, ours in KEYS[position.scaling.kind][1].items()}
    data = {k: v for k, v in dataclasses.asdict(position.scaling).items() if v is not None and k not in OWN}
    plain = {renamed.get(k, k): list(v) if isinstance(v, tuple) else v for k, v in data.items()}
    return out | {"rope_type": position.scaling.kind} | plain


def rope_keys(position: AttentionPositionConfig, head_dim: int | None = None) -> dict:
    """The top-level keys for a model with one kind of rotation."""
    new = rope_parameters(position, head_dim)
    old = {k: v for k, v in new.items() if k not in ("rope_theta", "partial_rotary_factor")}
    scaling = {"rope_scaling": old} if position.scaling else {}
    part = {"partial_rotary_factor": new["partial_rotary_factor"]} if head_dim is not None else {}
    return {"rope_theta": position.base, "rope_parameters": new} | scaling | part


def half_split(position: AttentionPositionConfig) -> None:
    """Where rows of queries lie among others they are not reordered."""
    if getattr(position, "layout", "half_split") != "half_split":
        raise ValueError(f"mixer.position.layout: {position.layout} (half_split is needed)")


def read_rope(
    data: dict, base: float = 10_000.0, head_dim: int | None = None, layer_type: str | None = None
) -> RoPEConfig:
    """From a whole config.json. base : the family's default.  head_dim : the family may turn part of a head.
    layer_type : the entry of rope_parameters to read, where layers differ."""
    rope = data.get("rope_parameters") or {}
    if layer_type is not None:
        rope = rope.get(layer_type) or {}
    if layer_type != "sliding_attention":  # the older key, where it stands, is the one that transformers obeys
        rope = rope | (data.get("rope_scaling") or {})
    base = rope.get("rope_theta", data.get("rope_theta", base))
    part = rope.get("partial_rotary_factor", data.get("partial_rotary_factor"))
    if part not in (None, 1.0) and head_dim is None:
        raise ValueError(f"config.json: partial_rotary_factor = {part!r} is not supported for this model_type")
    turned = None if part in (None, 1.0) else int(head_dim * part)
    return RoPEConfig(base=float(base), rotary_dim=turned, scaling=_read_scaling(rope, data))


def _read_scaling(rope: dict, data: dict) -> ScalingConfig | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    kind = {"su": "longrope"}.get(kind, kind)
    if kind == "default":
        return None
    if kind not in KEYS:
        raise ValueError(f"config.json: rope_parameters = {rope}: only {', '.join(KEYS)} scaling is supported")
    make, renamed = KEYS[kind]
    rope = {LENGTH: data.get(LENGTH) or data.get("max_position_embeddings")} | rope
    known = {f.name for f in dataclasses.fields(make)} - OWN
    given = {renamed.get(k, k): v for k, v in rope.items() if v is not None}
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if k in known}
    needed = [f.name for f in dataclasses.fields(make) if f.name in known and f.default is dataclasses.MISSING]
    if kind == "llama3":  # required by their reader; ours has the published values as defaults
        needed = ["factor", "low_freq_factor", "high_freq_factor"]
    if missing := [name for name in needed if name not in given]:
        raise ValueError(f"config.json: rope_parameters = {rope}: {kind} scaling needs {', '.join(missing)}")
    if kind == "longrope":
        given["max_len"] = data["max_position_embeddings"]
        if "factor" in rope and "attention_factor" not in given:
            grown = math.log(max(rope["factor"], 1.0)) / math.log(given["original_max_len"])
            given["attention_factor"] = math.sqrt(1 + grown)
    return make(**given)
