"""Where each head of a trained model looks: its attention probabilities on one text."""

from __future__ import annotations

import torch
from torch import Tensor

from zero2llm.core.seq import Seq
from zero2llm.layers.mixers.gqa import GQA
from zero2llm.model.lm import LM


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
