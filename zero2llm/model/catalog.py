"""The one table from a `kind` in YAML to a mechanism: explicit imports, nothing registers itself."""

from __future__ import annotations

from typing import Annotated

from zero2llm.core.config import by_kind
from zero2llm.layers.ffns.expert_choice import ExpertChoiceConfig
from zero2llm.layers.ffns.glu import GLUConfig
from zero2llm.layers.ffns.mlp import MLPConfig
from zero2llm.layers.ffns.moe import MoEConfig
from zero2llm.layers.ffns.token_shift import RWKVChannelConfig
from zero2llm.layers.mixers.deltanet import DeltaNetConfig
from zero2llm.layers.mixers.dsa import DSAConfig
from zero2llm.layers.mixers.gated_delta import GatedDeltaConfig
from zero2llm.layers.mixers.gau_flash import GAUFlashConfig
from zero2llm.layers.mixers.gla import GLAConfig
from zero2llm.layers.mixers.gqa import GQAConfig
from zero2llm.layers.mixers.kda import KDAConfig
from zero2llm.layers.mixers.lightning import LightningConfig
from zero2llm.layers.mixers.linear import LinearConfig
from zero2llm.layers.mixers.log_linear import LogLinearConfig
from zero2llm.layers.mixers.mamba1 import Mamba1Config
from zero2llm.layers.mixers.mamba2 import Mamba2Config
from zero2llm.layers.mixers.mla import MLAConfig
from zero2llm.layers.mixers.moba import MoBAConfig
from zero2llm.layers.mixers.nsa import NSAConfig
from zero2llm.layers.mixers.performer import PerformerConfig
from zero2llm.layers.mixers.retnet import RetNetConfig
from zero2llm.layers.mixers.rwkv7 import RWKV7Config
from zero2llm.layers.norms.batch import BatchNormConfig
from zero2llm.layers.norms.dyt import DyTConfig
from zero2llm.layers.norms.layer import LayerNormConfig
from zero2llm.layers.norms.rms import RMSNormConfig

MixerConfig = Annotated[
    GQAConfig
    | MLAConfig
    | MoBAConfig
    | NSAConfig
    | DSAConfig
    | RetNetConfig
    | GLAConfig
    | LightningConfig
    | LinearConfig
    | Mamba2Config
    | DeltaNetConfig
    | GatedDeltaConfig
    | KDAConfig
    | RWKV7Config
    | Mamba1Config
    | PerformerConfig
    | GAUFlashConfig
    | LogLinearConfig,
    by_kind,
]
FfnConfig = Annotated[GLUConfig | MLPConfig | MoEConfig | ExpertChoiceConfig | RWKVChannelConfig, by_kind]
NormConfig = Annotated[RMSNormConfig | LayerNormConfig | DyTConfig | BatchNormConfig, by_kind]
