"""The objectives that a recipe may name, and what each asks of the rest of the recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from zero2llm.core.config import by_kind, config
from zero2llm.train.distill.gkd import GKDConfig
from zero2llm.train.distill.hidden import HiddenConfig
from zero2llm.train.distill.logits import DistillConfig
from zero2llm.train.distill.minillm import MiniLLMConfig
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

OnPolicy = GKDConfig | MiniLLMConfig  # the student writes what it is taught on
Taught = DistillConfig | HiddenConfig | OnPolicy
ObjectiveConfig = Annotated[
    CLMConfig | DPOConfig | IPOConfig | KTOConfig | ORPOConfig | SimPOConfig | CPOConfig | RewardConfig | OnlineConfig | Taught, by_kind
]
BATCH_TOKENS = 8192  # where a recipe says nothing
Referred = DPOConfig | IPOConfig | KTOConfig  # they compare with the model as it begins
Form = Literal["documents", "conversations", "pairs", "judged", "prompts"]


@config
class TeacherConfig:
    """path : a checkpoint or a run, of the student's vocabulary.  cache : a folder that keeps what it says of every label, its
    ``objective.top_k`` tokens; it is run once over the data and then needs no memory. One folder serves any number of runs."""

    path: str
    cache: str | None = None


def form_of(objective: ObjectiveConfig, reads: Form | None) -> Form:
    """What kind of records an objective reads. Raises ValueError if ``data.reads`` is missing, or given where nothing is to choose."""
    if isinstance(objective, DistillConfig | HiddenConfig):
        if reads is None:
            raise ValueError(f"objective {objective.kind} needs data.reads: documents (pretraining) or conversations (fine-tuning)")
        return reads
    if isinstance(objective, CLMConfig):
        form = "documents" if objective.kind == "clm" else "conversations"
    elif isinstance(objective, OnPolicy):
        form = "conversations"
    elif isinstance(objective, OnlineConfig):
        form = "prompts"
    else:
        form = "judged" if isinstance(objective, KTOConfig) else "pairs"
    if reads is not None:
        raise ValueError(f"data.reads is for objectives distill and hidden; {objective.kind} reads {form}: remove it")
    return form


def check_teacher(objective: ObjectiveConfig, teacher: TeacherConfig | None) -> None:
    """Raises ValueError where distillation lacks its teacher, or a cache cannot hold what the objective asks."""
    if not isinstance(objective, Taught):
        if teacher is not None:
            raise ValueError(f"teacher is for distillation (distill, hidden, gkd, minillm); objective {objective.kind} asks none: remove it")
        return
    if teacher is None:
        raise ValueError(f"objective {objective.kind} needs teacher.path: the checkpoint to learn from")
    if teacher.cache is None:
        return
    if not isinstance(objective, DistillConfig):
        raise ValueError(f"teacher.cache: objective {objective.kind} asks the teacher about more than the data's next tokens; remove the key, or take distill")
    if objective.top_k is None:
        raise ValueError("teacher.cache keeps the teacher's likeliest tokens: say how many with objective.top_k (64 is usual)")
    if objective.alpha == 0:
        raise ValueError("teacher.cache: objective.alpha = 0 never asks the teacher; raise it, or take objective sft")


def scores(objective: ObjectiveConfig) -> bool:
    """Whether it trains a score head."""
    return isinstance(objective, RewardConfig | PPOConfig)


def check_objective(objective: ObjectiveConfig, init: str | None, prompts: bool) -> None:
    """Raises ValueError if a recipe cannot be trained so. prompts : whether it has eval.prompts."""
    if isinstance(objective, Referred) and init is None:
        raise ValueError(f"objective {objective.kind} needs init: the checkpoint is also its reference")
    if isinstance(objective, OnlineConfig) and init is None:
        raise ValueError(f"objective {objective.kind} needs init: a checkpoint that already answers now and then as it should")
    if not isinstance(objective, RewardConfig):
        return
    if init is None:
        raise ValueError("objective reward needs init: a checkpoint that knows its language, to which it adds a score head")
    if prompts:
        raise ValueError("eval.prompts: a reward model scores answers and writes none; remove the prompts")


def check_rollout(objective: ObjectiveConfig, rollout: RolloutConfig | None, reward: tuple, batch_tokens: int) -> None:
    """Raises ValueError where reinforcement learning lacks what it needs, or something else is given what it does not read."""
    if isinstance(objective, OnPolicy):
        if rollout is None or reward:
            raise ValueError(f"objective {objective.kind} needs the key rollout, what the student writes, and no reward: the teacher judges it")
        _no_rows(objective, batch_tokens)
        return
    if not isinstance(objective, OnlineConfig):
        if rollout is not None or reward:
            raise ValueError(f"rollout and reward are for reinforcement learning; objective {objective.kind} samples nothing: remove them")
        return
    if rollout is None or not reward:
        raise ValueError(f"objective {objective.kind} needs the keys rollout and reward: what is sampled, and what it is worth")
    _no_rows(objective, batch_tokens)


def makes_batches(objective: ObjectiveConfig) -> bool:
    """Whether all batches are what the model wrote itself."""
    return isinstance(objective, OnlineConfig | MiniLLMConfig) or (isinstance(objective, GKDConfig) and objective.share == 1)


def _no_rows(objective: ObjectiveConfig, batch_tokens: int) -> None:
    if makes_batches(objective) and batch_tokens != BATCH_TOKENS:
        raise ValueError(f"batch_tokens = {batch_tokens}: objective {objective.kind} trains on rollout.prompts x rollout.samples answers; remove the key")
