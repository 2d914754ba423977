"""Which position mechanisms there are: those that turn queries and keys, and those added to the embedding."""

from __future__ import annotations

from typing import Annotated

from zero2llm.core.config import by_kind
from zero2llm.layers.positions.alibi import ALiBiConfig
from zero2llm.layers.positions.learned import LearnedConfig
from zero2llm.layers.positions.mrope import MRoPEConfig
from zero2llm.layers.positions.none import NoPositionConfig
from zero2llm.layers.positions.rope import RoPEConfig
from zero2llm.layers.positions.sinusoidal import SinusoidalConfig

RotaryConfig = Annotated[NoPositionConfig | RoPEConfig, by_kind]  # turns queries and keys
AttentionPositionConfig = Annotated[
    NoPositionConfig | RoPEConfig | MRoPEConfig | ALiBiConfig, by_kind
]  # or bias scores
AddedConfig = Annotated[LearnedConfig | SinusoidalConfig, by_kind]
