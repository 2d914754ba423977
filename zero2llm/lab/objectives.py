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
from zero2llm.train.rl.methods import OnlineConfig
from zero2llm.train.rl.ppo import PPOConfig
from zero2llm.train.rl.rollout import RolloutConfig

ObjectiveConfig = Annotated[
    CLMConfig | DPOConfig | IPOConfig | KTOConfig | ORPOConfig | SimPOConfig | CPOConfig | RewardConfig | OnlineConfig, by_kind
]
BATCH_TOKENS = 8192  # where a recipe says nothing
Referred = DPOConfig | IPOConfig | KTOConfig  # they compare with the model as it begins


def check_objective(objective: ObjectiveConfig, init: str | None, adapted: bool, prompts: bool) -> None:
    """Raises ValueError if a recipe cannot be trained so. adapted, prompts : whether it has an adapter, eval.prompts."""
    if isinstance(objective, Referred) and init is None:
        raise ValueError(f"objective {objective.kind} needs init: the checkpoint is also its reference")
    if isinstance(objective, OnlineConfig) and init is None:
        raise ValueError(f"objective {objective.kind} needs init: a checkpoint that already answers now and then as it should")
    if isinstance(objective, PPOConfig) and adapted:
        raise ValueError("objective ppo trains a score head, which an adapter's checkpoint does not hold: remove the key adapter, or take grpo")
    if not isinstance(objective, RewardConfig):
        return
    if init is None:
        raise ValueError("objective reward needs init: a checkpoint that knows its language, to which it adds a score head")
    if adapted:
        raise ValueError("objective reward trains a score head, which an adapter's checkpoint does not hold: remove the key adapter")
    if prompts:
        raise ValueError("eval.prompts: a reward model scores answers and writes none; remove the prompts")


def check_rollout(objective: ObjectiveConfig, rollout: RolloutConfig | None, reward: tuple, batch_tokens: int) -> None:
    """Raises ValueError where reinforcement learning lacks what it needs, or something else is given what it does not read."""
    if not isinstance(objective, OnlineConfig):
        if rollout is not None or reward:
            raise ValueError(f"rollout and reward are for reinforcement learning; objective {objective.kind} samples nothing: remove them")
        return
    if rollout is None or not reward:
        raise ValueError(f"objective {objective.kind} needs the keys rollout and reward: what is sampled, and what it is worth")
    if batch_tokens != BATCH_TOKENS:
        raise ValueError(f"batch_tokens = {batch_tokens}: objective {objective.kind} trains on rollout.prompts x rollout.samples answers; remove the key")
