"""Where training starts from: five ways to draw the first weights; biases 0, norms keep their own ones and zeros.

    gpt2      W ~ N(0, std^2);  o_proj, down_proj: std / sqrt(2 L)     L layers add 2 L branches to the stream's variance
    xavier    W ~ N(0, 2 / (in + out))                   as much variance forward as backward, for linear layers
    kaiming   W ~ N(0, 2 / in)                           as much variance behind a ReLU as before it
    deepnorm  xavier; v_proj, o_proj and the feed-forward times (8 L)^(-1/4), so that the first updates stay bounded
    mup       gpt2 at d_model = base_width; m = d_model / base_width times as wide:
              matrices in blocks   std / sqrt(m)         Adam's learning rate / m, weight decay * m
              final hidden state   times 1 / m           so logits do not grow with the sum over channels
              attention scores     sqrt(base_head_dim) / head_dim instead of 1 / sqrt(head_dim)
              everything else      as at the base        embeddings, norms, biases, head

Source: gpt2: GPT-2 report section 2.3; xavier: Glorot and Bengio 2010 eq. 12; kaiming 1502.01852 eq. 10; deepnorm
2203.00555 section 3 (decoder: beta = (8 N)^(-1/4)); mup 2203.03466 table 8, whose multipliers we state relative to the base
model, as its package does. Embeddings always have ``std``, and so has an untied head under gpt2 and mup.
Why mup: every width then learns at the pace of the base, so the learning rate found on a small model serves the large
one; with standard scales the best one falls about as 1 / width. It is a rule for Adam: it says nothing about Muon.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from zero2llm.core.config import by_kind_or, config
from zero2llm.layers.ffns.experts import ExpertLinear

RESIDUAL_WRITERS = ("o_proj", "down_proj")


@config
class GPT2InitConfig:
    kind: Literal["gpt2"] = "gpt2"
    std: float = 0.02
    scale_residual: bool = True

    def spread(self, name: str, weight: Tensor, n_layers: int, d_model: int) -> float:
        """Standard deviation of the projection ``name``, whose weight is (..., out, in)."""
        return self.std / (2 * n_layers) ** 0.5 if self.scale_residual and name.endswith(RESIDUAL_WRITERS) else self.std


@config
class XavierInitConfig:
    kind: Literal["xavier"] = "xavier"
    std: float = 0.02  # of embeddings

    def spread(self, name: str, weight: Tensor, n_layers: int, d_model: int) -> float:
        return (2 / sum(weight.shape[-2:])) ** 0.5


@config
class KaimingInitConfig:
    kind: Literal["kaiming"] = "kaiming"
    std: float = 0.02  # of embeddings

    def spread(self, name: str, weight: Tensor, n_layers: int, d_model: int) -> float:
        return (2 / weight.shape[-1]) ** 0.5


@config
class DeepNormInitConfig:
    """The other half of wiring deepnorm: neither holds 1,000 layers alone."""

    kind: Literal["deepnorm"] = "deepnorm"
    std: float = 0.02  # of embeddings

    def spread(self, name: str, weight: Tensor, n_layers: int, d_model: int) -> float:
        beta = (8 * n_layers) ** -0.25 if name.endswith(("v_proj", "o_proj")) or ".ffn." in name else 1.0
        return beta * (2 / sum(weight.shape[-2:])) ** 0.5


@config
class MuPInitConfig:
    kind: Literal["mup"] = "mup"
    base_width: int  # d_model of the model that the learning rate was found on
    base_head_dim: int
    std: float = 0.02
    scale_residual: bool = True

    def spread(self, name: str, weight: Tensor, n_layers: int, d_model: int) -> float:
        base = GPT2InitConfig(std=self.std, scale_residual=self.scale_residual).spread(name, weight, n_layers, d_model)
        return base if name == "head" else base * (self.base_width / d_model) ** 0.5


InitConfig = Annotated[
    GPT2InitConfig | XavierInitConfig | KaimingInitConfig | DeepNormInitConfig | MuPInitConfig, by_kind_or("gpt2")
]


def width_ratio(cfg: InitConfig, d_model: int) -> float:
    """muP's 1 / m: of the final hidden state, and of the learning rate of matrices inside blocks. Otherwise 1."""
    return cfg.base_width / d_model if isinstance(cfg, MuPInitConfig) else 1.0


def check_init(cfg: InitConfig, specs: list, d_model: int) -> None:
    """Raises ValueError where the rest of the model (its `LayerSpec`s) does not go with the initialisation."""
    if cfg.std <= 0:
        raise ValueError(f"init.std = {cfg.std} must be positive")
    if isinstance(cfg, DeepNormInitConfig) and (other := {s.wiring for s in specs} - {"deepnorm"}):
        raise ValueError(f"init deepnorm goes with wiring deepnorm, not {', '.join(sorted(other))}")
    if not isinstance(cfg, MuPInitConfig):
        return
    if cfg.base_width < 1 or cfg.base_head_dim < 1:
        raise ValueError(f"mup needs base_width = {cfg.base_width} and base_head_dim = {cfg.base_head_dim} >= 1")
    for spec in specs:
        ffn = spec.ffn.kind if spec.ffn else "glu"
        if spec.mixer.kind != "gqa" or ffn not in ("glu", "mlp"):
            raise ValueError(f"mup is worked out for gqa with glu or mlp, not for {spec.mixer.kind} with {ffn}")
        width = spec.mixer.head_dim or d_model // spec.mixer.n_heads
        scale, wanted = spec.mixer.scale or width**-0.5, cfg.base_head_dim**0.5 / width
        if abs(scale / wanted - 1) > 1e-3:
            raise ValueError(
                f"mup with base_head_dim = {cfg.base_head_dim} needs heads of that width or, at head_dim = {width}, "
                f"scale: {wanted:.6g} in the mixer (it is {scale:.6g})"
            )


@torch.no_grad()
def init_weights(model: nn.Module, cfg: InitConfig) -> None:
    """Initialise every projection and Embedding of ``model`` (an LM) in place."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding | ExpertLinear):
            spread = cfg.std
            if not isinstance(module, nn.Embedding):
                spread = cfg.spread(name, module.weight, len(model.blocks), model.cfg.d_model)
            module.weight.normal_(0.0, spread)
            if getattr(module, "bias", None) is not None:
                module.bias.zero_()
