"""Which position mechanisms there are: those that turn queries and keys, and those added to the embedding."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from zero2llm.layers.positions.learned import LearnedConfig
from zero2llm.layers.positions.none import NoPositionConfig
from zero2llm.layers.positions.rope import RoPEConfig
from zero2llm.layers.positions.sinusoidal import SinusoidalConfig

RotaryConfig = Annotated[NoPositionConfig | RoPEConfig, Field(discriminator="kind")]
AddedConfig = Annotated[LearnedConfig | SinusoidalConfig, Field(discriminator="kind")]
