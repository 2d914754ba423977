"""The one table from a `kind` of reinforcement learning in YAML to its configuration, and what it needs around it.

    needs          answers a prompt   reference          beside that
    reinforce      1                  with reward_kl     -
    reinforce_pp   1                  unless null        -
    rloo           2 or more          unless null        -
    ppo            1                  unless null        score_head: true
    grpo, dr_grpo, dapo, gspo, gmpo, cispo, sapo, bapo   2 or more, reference with kl; bapo: one more pass over each step's rows
    trpo           2 or more          -                  its own loop (trpo.py)
    online_dpo     2 or more          DPO's own          -
    rft            1                  -                  -
"""

from __future__ import annotations

from typing import Annotated

from zero2llm.core.config import by_kind
from zero2llm.train.loss import Objective
from zero2llm.train.objectives.reference import Reference
from zero2llm.train.rl.bapo import BAPOConfig
from zero2llm.train.rl.cispo import CISPOConfig
from zero2llm.train.rl.dapo import DAPOConfig
from zero2llm.train.rl.dr_grpo import DrGRPOConfig
from zero2llm.train.rl.gmpo import GMPOConfig
from zero2llm.train.rl.gradient import PolicyGradient
from zero2llm.train.rl.grpo import GRPOConfig
from zero2llm.train.rl.gspo import GSPOConfig
from zero2llm.train.rl.online_dpo import OnlineDPOConfig
from zero2llm.train.rl.policy import PolicyLoss
from zero2llm.train.rl.ppo import PPOConfig
from zero2llm.train.rl.reinforce import REINFORCEConfig
from zero2llm.train.rl.reinforce_pp import REINFORCEPPConfig
from zero2llm.train.rl.rft import RFTConfig
from zero2llm.train.rl.rloo import RLOOConfig
from zero2llm.train.rl.sapo import SAPOConfig
from zero2llm.train.rl.source import Shape
from zero2llm.train.rl.trpo import TRPOConfig

GradientConfig = (
    REINFORCEConfig | REINFORCEPPConfig | RLOOConfig | PPOConfig | TRPOConfig | GRPOConfig | DrGRPOConfig | DAPOConfig | GSPOConfig
    | GMPOConfig | CISPOConfig | SAPOConfig | BAPOConfig
)  # fmt: skip
OnlineConfig = GradientConfig | OnlineDPOConfig | RFTConfig
MethodConfig = Annotated[OnlineConfig, by_kind]


def assemble(
    cfg: GradientConfig | OnlineDPOConfig | RFTConfig, temperature: float, vocab: int | None = None, reference: Reference | None = None
) -> tuple[Shape, Objective]:
    """What `Rollouts` makes rows with, and what `fit` trains on them; of trpo only the shape is used, by `fit_trpo`.

    ``vocab`` is the tokenizer's size.  ``reference`` is that of online DPO (objectives/reference.py); the others' log-probs come from `Rollouts`.
    """
    if isinstance(cfg, OnlineDPOConfig):
        if reference is None:
            raise ValueError("online_dpo needs a reference; `nothing` for the form without")
        return cfg.build(), cfg.objective(reference)
    if isinstance(cfg, RFTConfig):
        return cfg.build(), cfg.objective()
    method = cfg.build()
    return PolicyGradient(method), PolicyLoss(method, temperature, vocab)
