"""Where training starts from: GPT-2's normal initialisation with scaled residual projections.

    W ~ N(0, std);   W_o, W_down ~ N(0, std / sqrt(2 L));   biases 0, norm scales 1

Source: GPT-2 report section 2.3. Each of the 2 L residual branches adds variance; dividing by sqrt(2 L) keeps the
stream's variance independent of the depth L.
"""

from __future__ import annotations

import torch
from torch import nn

from zero2llm.model.spec import InitConfig

RESIDUAL_WRITERS = ("o_proj", "down_proj")


@torch.no_grad()
def init_weights(model: nn.Module, cfg: InitConfig) -> None:
    """Initialise every Linear and Embedding of ``model`` (an LM) in place; norms keep their own ones and zeros."""
    residual_std = cfg.std / (2 * len(model.blocks)) ** 0.5
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            writes = cfg.scale_residual and name.endswith(RESIDUAL_WRITERS)
            module.weight.normal_(0.0, residual_std if writes else cfg.std)
            if getattr(module, "bias", None) is not None:
                module.bias.zero_()
