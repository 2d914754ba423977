"""Rotary settings in GGUF: metadata for most, tensors of factors for two.

    linear    rope.scaling.type, factor
    yarn      the same, original_context_length; another amplitude than 0.1 ln s + 1 as its quotient attn_factor; DeepSeek's
              mscale_all_dim (mscale must be equal) as yarn_log_multiplier = 0.1 m. There are keys for beta_fast and beta_slow,
              but llama.cpp reads them for none of our architectures: others than 32 and 1 are read, and not written
    longrope  rope_factors_short / _long.weight, one number a pair; attn_factor is the amplitude
    llama3    rope_freqs.weight, what each pair's frequency is divided by; the settings behind it are in no file

Source: ggml-org/llama.cpp, conversion/base.py, llama.py, phi.py; src/llama-context.cpp for the amplitudes.
The four numbers of llama3 are worked out from the factors: in u = (L f / 2 pi - low) / (high - low) only L / low and
L / high count, so L is taken from the file or is Meta's 8192 and two pairs on the ramp give the rest; where that does
not reproduce every factor, the factors themselves are kept as longrope, which computes the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from zero2llm.core.lazy import Lazy
from zero2llm.interop.families.rope import LENGTH
from zero2llm.layers.positions.interpolation import Llama3ScalingConfig, plain

FREQS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
FACTORS = (FREQS, LONG, SHORT)
META_LENGTH = 8192  # of Llama 3's training


def shortest(value: float) -> float:
    """The shortest decimal that rounds to the same fp32: 1e-06 instead of 9.999999974752427e-07."""
    return float(str(np.float32(value)))


def write_rope(rope: dict, dim: int, max_len: int, allowed: tuple[str, ...]) -> tuple[dict, dict[str, Tensor]]:
    """Metadata without prefix, and tensors. dim : channels of a head that turn.

    rope : one entry of config.json's rope_parameters. Raises ValueError for a scaling that is not ``allowed``.
    """
    kind, keys = rope["rope_type"], {"rope.freq_base": float(rope["rope_theta"]), "rope.dimension_count": dim}
    if kind == "default":
        return keys, {}
    if kind not in allowed:
        raise ValueError(f"mixer.position.scaling: {kind} ({' or '.join(('none', *allowed))} there)")
    if LENGTH in rope:
        keys["rope.scaling.original_context_length"] = rope[LENGTH]
    if kind == "llama3":
        return keys, {FREQS: _divisors(rope, dim)}
    if kind == "longrope":
        keys |= {"rope.scaling.type": kind, "rope.scaling.attn_factor": rope.get("attention_factor", _grown(rope[LENGTH], max_len))}
        return keys, {LONG: torch.tensor(rope["long_factor"]), SHORT: torch.tensor(rope["short_factor"])}
    keys |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    return keys | (_write_yarn(rope) if kind == "yarn" else {}), {}


def _write_yarn(rope: dict) -> dict:
    keys: dict = {}
    if (amplitude := rope.get("attention_factor")) is not None:
        ratio = amplitude / (0.1 * math.log(rope["factor"]) + 1)
        keys |= {"rope.scaling.attn_factor": ratio, "rope.scaling.yarn_attn_factor": float(amplitude)}
    if rope.get("mscale_all_dim"):
        keys["rope.scaling.yarn_log_multiplier"] = 0.1 * rope["mscale_all_dim"]
    return keys


def read_rope(meta: Mapping, tensors: Mapping[str, Lazy], dim: int, max_len: int, truncate: bool = True) -> dict:
    """rope_parameters. truncate : whether YaRN's ramp ends at whole pairs, which the file does not say."""
    base = meta.get("rope.freq_base", 10_000.0)
    kind, factor = meta.get("rope.scaling.type", "none"), meta.get("rope.scaling.factor", meta.get("rope.scale_linear", 1.0))
    length = meta.get("rope.scaling.original_context_length")
    rope = {"rope_type": "default", "rope_theta": base}
    if LONG in tensors and SHORT in tensors:
        length = length or max_len
        factors = {f"{n}_factor": [shortest(x) for x in tensors[t].load().tolist()] for n, t in (("long", LONG), ("short", SHORT))}
        amplitude = meta.get("rope.scaling.attn_factor", 1.0)
        usual = math.isclose(amplitude, _grown(length, max_len), rel_tol=1e-6)
        return rope | {"rope_type": "longrope", LENGTH: length, **factors} | ({} if usual else {"attention_factor": amplitude})
    if FREQS in tensors:
        return rope | _read_divisors(tensors[FREQS].load(), base, length or META_LENGTH, max_len)
    if kind == "linear" and factor != 1.0:
        return rope | {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return rope | {"rope_type": "yarn", "factor": factor, LENGTH: length or max_len, "truncate": truncate, **_read_yarn(meta, factor)}
    if kind not in ("none", "linear"):
        raise ValueError(f"rope.scaling.type = {kind!r} without its factors is not supported (none, linear, yarn, longrope are)")
    return rope


def _read_yarn(meta: Mapping, factor: float) -> dict:
    keys = {f"beta_{n}": meta.get(f"rope.scaling.yarn_beta_{n}", default) for n, default in (("fast", 32.0), ("slow", 1.0))}
    if (multiplier := meta.get("rope.scaling.yarn_log_multiplier")) is not None:
        keys |= dict.fromkeys(("mscale", "mscale_all_dim"), shortest(multiplier / 0.1))
    if (amplitude := meta.get("rope.scaling.yarn_attn_factor")) is not None:
        return keys | {"attention_factor": amplitude}
    ratio = meta.get("rope.scaling.attn_factor", 1.0)
    return keys if ratio == 1.0 else keys | {"attention_factor": shortest(ratio * (0.1 * math.log(factor) + 1))}


def _grown(length: int, max_len: int) -> float:
    return math.sqrt(1 + math.log(max(max_len / length, 1.0)) / math.log(length))


def _divisors(rope: Mapping, dim: int) -> Tensor:
    """What llama3 divides each pair's frequency by."""
    settings = Llama3ScalingConfig(
        factor=rope["factor"], low_freq_factor=rope["low_freq_factor"], high_freq_factor=rope["high_freq_factor"],
        original_max_len=rope[LENGTH],
    )  # fmt: skip
    return plain(rope["rope_theta"], dim) / settings.frequencies(rope["rope_theta"], dim)


def _read_divisors(found: Tensor, base: float, length: int, max_len: int) -> dict:
    dim, factor = 2 * len(found), shortest(found.max().item())
    for low, high in ((1.0, 4.0), *_solved(found.double(), factor, base, length)):
        rope = {"rope_type": "llama3", "rope_theta": base, "factor": factor, "low_freq_factor": low, "high_freq_factor": high, LENGTH: length}
        if torch.allclose(_divisors(rope, dim), found.float(), rtol=1e-5, atol=0):
            return rope
    factors = [shortest(x) for x in found.tolist()]
    return {"rope_type": "longrope", "long_factor": factors, "short_factor": factors, LENGTH: max(max_len, 2), "attention_factor": 1.0}


def _solved(found: Tensor, factor: float, base: float, length: int) -> list[tuple[float, float]]:
    """(low, high) from the two pairs on the ramp that lie farthest apart: 1 / divisor = u + (1 - u) / factor."""
    dim = 2 * len(found)
    turns = length * base ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim) / (2 * math.pi)
    u = (1 / found - 1 / factor) / (1 - 1 / factor)
    ramp = ((u > 1e-3) & (u < 1 - 1e-3)).nonzero().flatten().tolist()
    if factor <= 1 or len(ramp) < 2:
        return []
    a, b = ramp[0], ramp[-1]
    span = ((turns[a] - turns[b]) / (u[a] - u[b])).item()  # high - low
    low = turns[a].item() - u[a].item() * span
    exact = (low, low + span)
    return [tuple(round(x, digits) for x in exact) for digits in (1, 2, 4)] + [exact]
