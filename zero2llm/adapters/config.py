"""The one table from a `kind` of adapter in YAML to its configuration."""

from __future__ import annotations

from typing import Annotated

from zero2llm.adapters.adalora import AdaLoRAConfig
from zero2llm.adapters.dora import DoRAConfig
from zero2llm.adapters.lora import LoRAConfig
from zero2llm.adapters.pissa import PiSSAConfig
from zero2llm.core.config import by_kind

AdapterConfig = Annotated[LoRAConfig | DoRAConfig | PiSSAConfig | AdaLoRAConfig, by_kind]
