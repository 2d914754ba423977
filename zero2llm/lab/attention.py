"""Where each head of a trained model looks: its attention probabilities on one text, as numbers and as pictures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zero2llm.core.seq import Seq
from zero2llm.lab import charts
from zero2llm.layers.mixers.gqa import GQA
from zero2llm.model.lm import LM

MAX_LAYERS, MAX_HEADS, MAX_TOKENS = 6, 8, 24  # that a page shows: it is no atlas


@torch.no_grad()
def attention_maps(model: LM, tokens: list[int]) -> list[tuple[int, Tensor]]:
    """(layer, (H, T, T) float32 on the CPU) for each layer that computes softmax attention; other mixers are left out.

    Row i holds how token i divides its attention over tokens 0 .. i. Raises ValueError for an empty text or one
    longer than the model reads.
    """
    if not 0 < len(tokens) <= model.cfg.max_len:
        raise ValueError(f"attention maps need 1 to {model.cfg.max_len} tokens, not {len(tokens)}")
    maps: list[tuple[int, Tensor]] = []
    hooks = []
    for layer, block in enumerate(model.blocks):
        if isinstance(block.mixer, GQA):

            def look(mixer: GQA, inputs: tuple, layer: int = layer) -> None:
                maps.append((layer, mixer.weights(inputs[0], inputs[1])[0].float().cpu()))  # inputs: x, seq, state

            hooks.append(block.mixer.register_forward_pre_hook(look))
    device = model.embed.weight.device
    try:
        model(torch.tensor([tokens], device=device), Seq.rows(1, len(tokens), device=device))
    finally:
        for hook in hooks:
            hook.remove()
    return maps


def attention_view(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Some layers and heads of ``{"tokens": [str], "layers": [{"layer", "heads": [T x T]}]}``, drawn, for the report."""
    tokens, out = (result.get("tokens") or [])[:MAX_TOKENS], []
    for layer in _spread(result.get("layers") or [], MAX_LAYERS) if tokens else []:
        heads = []
        for i, whole in _spread(list(enumerate(layer["heads"])), MAX_HEADS):
            weights = [row[: len(tokens)] for row in whole[: len(tokens)]]
            label = f"Attention of layer {layer['layer']}, head {i}, over {len(tokens)} tokens"
            svg = charts.attention_map(weights, tokens, label=label)
            heads.append({"head": i, "svg": svg, "habits": habits(weights)})
        out.append({"layer": layer["layer"], "heads": heads, "of": len(layer["heads"])})
    return out


def habits(weights: list[list[float]]) -> list[tuple[str, float]]:
    """Mean attention to the token itself, the previous and the first one, over tokens 2 and later (0-based)."""
    rows = range(2, len(weights))
    mean = lambda column: sum(weights[i][column(i)] for i in rows) / len(rows)
    looks = {"itself": lambda i: i, "previous": lambda i: i - 1, "first": lambda i: 0}
    return [(name, mean(column)) for name, column in looks.items()] if rows else []


def _spread(items: list, most: int) -> list:
    """At most ``most`` items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
