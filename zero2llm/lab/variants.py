"""What can be swapped in a comparison: each name as the configuration of one part, sized for a width and head count.

rope_yarn and rope_llama3 stretch from 256 tokens whatever the recipe trains on, which is not known here: take a .yaml
file for another length.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable
from pathlib import Path

from zero2llm.core.config import parse, read_yaml
from zero2llm.model.cost import parameters
from zero2llm.model.spec import ModelConfig

ROPE = {"kind": "rope"}


def _gqa(**more) -> Callable[[int, int], dict]:
    return lambda d, h: {"kind": "gqa", "n_heads": h, "position": ROPE} | more


def _mla(d: int, h: int) -> dict:
    return {"kind": "mla", "n_heads": h, "kv_rank": d // 2, "nope_dim": d // h, "rope_dim": d // h // 2, "v_dim": d // h}


MIXERS: dict[str, Callable[[int, int], dict]] = {
    "mha": _gqa(),
    "gqa": lambda d, h: {"kind": "gqa", "n_heads": h, "n_kv_heads": max(h // 2, 1), "position": ROPE},
    "mqa": _gqa(n_kv_heads=1),
    "window": _gqa(window=64),
    "qk_norm": _gqa(qk_norm=True),
    "sink": _gqa(sink=True),
    "softcap": _gqa(softcap=30.0),
    "gated_attention": _gqa(gate=True),
    "nope": _gqa(position={"kind": "none"}),
    "mla": lambda d, h: _mla(d, h),
    "moba": lambda d, h: {"kind": "moba", "n_heads": h, "block": 32, "top_k": 3, "position": ROPE},
    "nsa": lambda d, h: {"kind": "nsa", "n_heads": h, "n_kv_heads": max(h // 2, 1), "span": 8, "stride": 4, "block": 16,
                         "top_k": 4, "window": 64, "position": ROPE},
    "dsa": lambda d, h: {"kind": "dsa", "mla": _mla(d, h), "index_heads": 8, "index_dim": d // h, "top_k": 64},
    "linear": lambda d, h: {"kind": "linear", "n_heads": h},
    "performer": lambda d, h: {"kind": "performer", "n_heads": h, "n_features": 2 * d // h},
    "gau_flash": lambda d, h: {"kind": "gau_flash", "key_dim": d // 2, "chunk": 64, "position": ROPE},
    "lightning": lambda d, h: {"kind": "lightning", "n_heads": h},
    "retnet": lambda d, h: {"kind": "retnet", "n_heads": h},
    "log_linear": lambda d, h: {"kind": "log_linear", "n_heads": h},
    "gla": lambda d, h: {"kind": "gla", "n_heads": max(h // 2, 1)},
    "deltanet": lambda d, h: {"kind": "deltanet", "n_heads": h},
    "gated_delta": lambda d, h: {"kind": "gated_delta", "n_v_heads": h},
    "kda": lambda d, h: {"kind": "kda", "n_heads": h},
    "mamba1": lambda d, h: {"kind": "mamba1"},
    "mamba2": lambda d, h: {"kind": "mamba2", "head_dim": d // h, "state_dim": 64},
    "rwkv7": lambda d, h: {"kind": "rwkv7", "n_heads": h},
}  # fmt: skip
FFNS: dict[str, Callable[[int, int], dict]] = {
    "swiglu": lambda d, h: {"kind": "glu", "hidden": 3 * d},
    "geglu": lambda d, h: {"kind": "glu", "hidden": 3 * d, "act": "gelu"},
    "gelu": lambda d, h: {"kind": "mlp", "hidden": 4 * d, "act": "gelu"},
    "relu2": lambda d, h: {"kind": "mlp", "hidden": 4 * d, "act": "relu2", "bias": False},
    "moe": lambda d, h: {"kind": "moe", "n_experts": 8, "top_k": 2, "hidden": d // 2},
    "moe_shared": lambda d, h: {"kind": "moe", "n_experts": 16, "top_k": 3, "hidden": d // 4, "n_shared": 1,
                                "router": "sigmoid", "bias_rate": 0.001, "balance_weight": 0.0},
    "expert_choice": lambda d, h: {"kind": "expert_choice", "n_experts": 8, "hidden": d // 2},  # not causal: training only
    "rwkv_channel": lambda d, h: {"kind": "rwkv_channel", "hidden": 4 * d},
}  # fmt: skip
NORMS: dict[str, Callable[[int, int], dict]] = {
    "rms": lambda d, h: {"kind": "rms"},
    "rms_plus_one": lambda d, h: {"kind": "rms", "plus_one": True},
    "layer": lambda d, h: {"kind": "layer"},
    "dyt": lambda d, h: {"kind": "dyt"},
    "batch": lambda d, h: {"kind": "batch"},  # sees other documents and the future while it trains: a contrast
}
POSITIONS: dict[str, Callable[[int, int], dict]] = {
    "none": lambda d, h: {"kind": "none"},
    "rope": lambda d, h: ROPE,
    "rope_interleaved": lambda d, h: {"kind": "rope", "layout": "interleaved"},
    "rope_half": lambda d, h: ROPE | {"rotary_dim": d // h // 2},
    "rope_linear": lambda d, h: ROPE | {"scaling": {"kind": "linear", "factor": 2.0}},
    "rope_ntk": lambda d, h: ROPE | {"scaling": {"kind": "ntk", "factor": 2.0}},
    "rope_yarn": lambda d, h: ROPE | {"scaling": {"kind": "yarn", "factor": 2.0, "original_max_len": 256}},
    "rope_llama3": lambda d, h: ROPE | {"scaling": {"kind": "llama3", "factor": 2.0, "original_max_len": 256}},
    "mrope": lambda d, h: {"kind": "mrope", "sections": (d // h // 2 - 2 * (d // h // 6), d // h // 6, d // h // 6)},
    "alibi": lambda d, h: {"kind": "alibi"},
    "learned": lambda d, h: {"kind": "learned"},  # added to the embedding
    "sinusoidal": lambda d, h: {"kind": "sinusoidal"},
}
ADDED = ("learned", "sinusoidal")  # kinds that stand behind the embedding, once for all layers
WIRINGS = {name: (lambda d, h, name=name: name) for name in ("pre", "post", "sandwich", "branch", "parallel", "deepnorm")}
PARTS = {"mixer": MIXERS, "ffn": FFNS, "norm": NORMS, "position": POSITIONS, "wiring": WIRINGS}


def parse_swap(text: str) -> tuple[str, list[str]]:
    """``mixer=gqa,mla`` -> ("mixer", ["gqa", "mla"]). ``kda+kda+mla`` is a hybrid; a name ending in .yaml is a file.

    Raises ValueError naming the nearest part or name that exists.
    """
    part, equals, names = text.partition("=")
    if not equals or part not in PARTS:
        near = difflib.get_close_matches(part, PARTS, n=1)
        raise ValueError(f"--swap {text}: write PART=NAME,NAME with PART one of {', '.join(PARTS)}" + (f"; did you mean {near[0]!r}?" if near else ""))  # fmt: skip
    found = list(PARTS[part]) if names == "all" else [name for name in names.split(",") if name]
    for name in (one for joined in found for one in joined.split("+")):
        if name not in PARTS[part] and not name.endswith((".yaml", ".yml")):
            near = difflib.get_close_matches(name, PARTS[part], n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(PARTS[part])}"
            raise ValueError(f"--swap {text}: no {part} is called {name!r}; {hint}")
    if not found:
        raise ValueError(f"--swap {text}: names nothing to compare")
    return part, list(dict.fromkeys(found))


def swapped(model: dict, part: str, name: str) -> dict:
    """The model's plain data with ``part`` of every block replaced; a hybrid ``a+b`` fills the layers in turn.

    The final norm takes the first name of a hybrid. Another mixer keeps a position that the model adds to its embedding.
    Raises ValueError for a hybrid of positions of which one is added to the embedding: it would serve every layer.
    """
    model = copy.deepcopy(model)
    order = model["layers"]["pattern"] * model["layers"]["repeat"]
    names = name.split("+")
    added = [one for one in names if part == "position" and _is_added(model, one)]
    if added and len(names) > 1:
        raise ValueError(
            f"--swap position={name}: {added[0]!r} is added to the embedding, for all layers at once, "
            "and cannot be in a hybrid"
        )
    blocks, pattern = {}, []
    for i, old in enumerate(order):
        new = names[i % len(names)]
        label = old if len(names) == 1 else f"{old}_{Path(new).stem}"
        blocks[label] = _with(model, model["blocks"][old], part, new)
        pattern.append(label)
    model["blocks"], model["layers"] = blocks, {"pattern": pattern, "repeat": 1}
    if part == "norm":
        model["final_norm"] = _piece(model, {}, part, names[0])
    if part == "position":
        model["position"] = _piece(model, {}, part, names[0]) if added else None
    return model


def _piece(model: dict, block: dict, part: str, name: str) -> dict | str:
    if name.endswith((".yaml", ".yml")):
        return read_yaml(name)[0]
    heads = block.get("mixer", {}).get("n_heads") or max(model["d_model"] // 32, 1)
    return PARTS[part][name](model["d_model"], heads)


def _is_added(model: dict, name: str) -> bool:
    return _piece(model, {}, "position", name)["kind"] in ADDED


def _with(model: dict, block: dict, part: str, name: str) -> dict:
    if part == "position":
        if block["mixer"]["kind"] != "gqa":
            raise ValueError(f"--swap position: mixer {block['mixer']['kind']!r} has a position of its own; use a gqa model")
        inside = {"kind": "none"} if _is_added(model, name) else _piece(model, block, part, name)
        return block | {"mixer": block["mixer"] | {"position": inside}}
    return block | {part: _piece(model, block, part, name)}


def _hidden(ffn: dict | None, d_model: int) -> int | None:
    """The feed-forward width; where null stands for the published one, that."""
    if ffn and ffn["kind"] == "rwkv_channel" and ffn.get("hidden") is None:
        return FFNS["rwkv_channel"](d_model, 1)["hidden"]
    return ffn.get("hidden") if ffn else None


def matched(model: dict, target: int, tolerance: float = 0.03) -> ModelConfig:
    """The model with its feed-forward widths scaled until it has ``target`` parameters.

    Raises ValueError where no width comes within ``tolerance``: the mixer alone is too large, or there is none to scale.
    """
    widths = {name: _hidden(block.get("ffn"), model["d_model"]) for name, block in model["blocks"].items()}
    own = {name: width for name, width in widths.items() if width}

    def scaled(factor: float) -> ModelConfig:
        blocks = {
            name: block | {"ffn": block["ffn"] | {"hidden": max(1, round(own[name] * factor))}} if name in own else block
            for name, block in model["blocks"].items()
        }
        return parse(ModelConfig, model | {"blocks": blocks}, source="compare")

    low, high = 0.0, 16.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if parameters(scaled(middle))["total"] < target else (low, middle)
    cfg = scaled(high)
    count = parameters(cfg)["total"]
    if abs(count / target - 1) > tolerance:
        raise ValueError(
            f"{count:,} parameters cannot be brought within {tolerance:.0%} of {target:,} by the feed-forward's width; "
            "take a larger d_model in the recipe, or another size of this mixer (a .yaml file)"
        )
    return cfg
