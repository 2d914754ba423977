"""The one table from a `kind` in YAML to a mechanism: explicit imports, nothing registers itself."""

from __future__ import annotations

from typing import Annotated

from zero2llm.core.config import by_kind
from zero2llm.layers.ffns.glu import GLUConfig
from zero2llm.layers.ffns.mlp import MLPConfig
from zero2llm.layers.mixers.gqa import GQAConfig
from zero2llm.layers.mixers.retnet import RetNetConfig
from zero2llm.layers.norms.layer import LayerNormConfig
from zero2llm.layers.norms.rms import RMSNormConfig

MixerConfig = Annotated[GQAConfig | RetNetConfig, by_kind]
FfnConfig = Annotated[GLUConfig | MLPConfig, by_kind]
NormConfig = Annotated[RMSNormConfig | LayerNormConfig, by_kind]
