"""The objectives that a recipe may name, and what each asks of the rest of the recipe."""

from __future__ import annotations

from typing import Annotated

from zero2llm.core.config import by_kind
from zero2llm.train.objectives.clm import CLMConfig
from zero2llm.train.objectives.cpo import CPOConfig
from zero2llm.train.objectives.dpo import DPOConfig
from zero2llm.train.objectives.ipo import IPOConfig
from zero2llm.train.objectives.kto import KTOConfig
from zero2llm.train.objectives.orpo import ORPOConfig
from zero2llm.train.objectives.reward import RewardConfig
from zero2llm.train.objectives.simpo import SimPOConfig

ObjectiveConfig = Annotated[
    CLMConfig | DPOConfig | IPOConfig | KTOConfig | ORPOConfig | SimPOConfig | CPOConfig | RewardConfig, by_kind
]
Referred = DPOConfig | IPOConfig | KTOConfig  # they compare with the model as it begins


def check_objective(objective: ObjectiveConfig, init: str | None, adapted: bool, prompts: bool) -> None:
    """Raises ValueError if a recipe cannot be trained so. adapted, prompts : whether it has an adapter, eval.prompts."""
    if isinstance(objective, Referred) and init is None:
        raise ValueError(f"objective {objective.kind} needs init: the checkpoint is also its reference")
    if not isinstance(objective, RewardConfig):
        return
    if init is None:
        raise ValueError("objective reward needs init: a checkpoint that knows its language, to which it adds a score head")
    if adapted:
        raise ValueError("objective reward trains a score head, which an adapter's checkpoint does not hold: remove the key adapter")
    if prompts:
        raise ValueError("eval.prompts: a reward model scores answers and writes none; remove the prompts")
