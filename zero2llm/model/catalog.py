"""The one table from a `kind` in YAML to a mechanism: explicit imports, nothing registers itself."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from zero2llm.layers.ffns.glu import GLUConfig
from zero2llm.layers.ffns.mlp import MLPConfig
from zero2llm.layers.mixers.gqa import GQAConfig
from zero2llm.layers.norms.layer import LayerNormConfig
from zero2llm.layers.norms.rms import RMSNormConfig

MixerConfig = GQAConfig  # the second mixer makes this an Annotated union like the two below
FfnConfig = Annotated[GLUConfig | MLPConfig, Field(discriminator="kind")]
NormConfig = Annotated[RMSNormConfig | LayerNormConfig, Field(discriminator="kind")]
