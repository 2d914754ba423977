"""What a model is, as data: a pattern of named blocks, repeated."""

from __future__ import annotations

from typing import Literal

import torch

from zero2llm.core.config import config
from zero2llm.layers.norms.rms import RMSNormConfig
from zero2llm.layers.positions.catalog import AddedConfig
from zero2llm.model.catalog import FfnConfig, MixerConfig, NormConfig
from zero2llm.model.init import GPT2InitConfig, InitConfig, check_init

Wiring = Literal["pre", "post", "sandwich", "parallel", "branch", "deepnorm"]


@config
class LayerSpec:
    """One block: which mixer, which feed-forward, which norm, and how the residual stream runs through them."""

    mixer: MixerConfig
    ffn: FfnConfig | None = None  # None: the mixer is the whole block, as in Mamba
    norm: NormConfig = RMSNormConfig()
    wiring: Wiring = "pre"


@config
class LayerPattern:
    """Names of blocks in order, repeated: [kda, kda, kda, mla] x 6 is 24 layers."""

    pattern: list[str]
    repeat: int = 1


@config
class MTPConfig:
    """Multi-token prediction (model/heads.py): how many tokens beyond the next, and the block of each depth."""

    depth: int = 1
    block: LayerSpec | None = None  # None = as the last layer


@config
class ModelConfig:
    """A whole language model. `family` names the published architecture that it equals, if any."""

    vocab_size: int
    d_model: int
    max_len: int
    layers: LayerPattern
    blocks: dict[str, LayerSpec]
    position: AddedConfig | None = None  # added to the embedding; rotary positions stand in the mixer
    embed_scale: float | None = None  # embeddings times this: sqrt(d_model) in Gemma
    embed_norm: NormConfig | None = None  # behind the embedding: RWKV
    final_norm: NormConfig | None = RMSNormConfig()
    tie_embeddings: bool = True
    logit_softcap: float | None = None  # logits z become c tanh(z / c): Gemma 2
    init: InitConfig = GPT2InitConfig()
    mtp: MTPConfig | None = None
    score_head: bool | Literal["reward"] = False  # one number per token. reward: what the model is for; true: a critic, left from training

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "max_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be positive")
        if self.layers.repeat < 1 or not self.layers.pattern:
            raise ValueError("layers needs a non-empty pattern and repeat >= 1")
        for name in self.layers.pattern:
            if name not in self.blocks:
                raise ValueError(f"layers.pattern names block {name!r}, but blocks defines: {', '.join(self.blocks)}")
        for name in self.blocks:
            if name not in self.layers.pattern:
                raise ValueError(f"blocks.{name} is defined but layers.pattern never uses it")
        if self.mtp is not None and self.mtp.depth < 1:
            raise ValueError(f"mtp.depth = {self.mtp.depth} must be at least 1")
        for name in ("embed_scale", "logit_softcap"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} = {getattr(self, name)} must be positive, or null")
        self._build_once()
        ahead = [self.mtp.block] if self.mtp and self.mtp.block else []
        check_init(self.init, self.specs() + ahead, self.d_model)

    def _build_once(self) -> None:
        """Every part without memory, so that what cannot be built is refused here, where file and line are known."""
        with torch.device("meta"):
            for name, spec in self.blocks.items():
                try:
                    spec.mixer.build(self.d_model)
                    spec.norm.build(self.d_model)
                    if spec.ffn is not None:
                        spec.ffn.build(self.d_model)
                except ValueError as error:
                    raise ValueError(f"blocks.{name}: {error}") from None
            for norm in (self.final_norm, self.embed_norm):
                if norm is not None:
                    norm.build(self.d_model)
            if self.position is not None:
                self.position.build(self.d_model, self.max_len)

    @property
    def decodes(self) -> bool:
        """Whether it can generate: expert choice needs the whole text to decide anything."""
        return all(spec.ffn is None or spec.ffn.kind != "expert_choice" for spec in self.specs())

    def specs(self) -> list[LayerSpec]:
        """The layers in order, pattern unrolled."""
        return [self.blocks[name] for name in self.layers.pattern * self.layers.repeat]
