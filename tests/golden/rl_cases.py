"""Rows that every method of the family is tested on: ragged, both signs of advantage, ratios beyond both clips."""

from __future__ import annotations

import torch

from zero2llm.core.batch import IGNORE, Batch
from zero2llm.core.seq import Seq
from zero2llm.train.rl.bapo import BAPOConfig
from zero2llm.train.rl.cispo import CISPOConfig
from zero2llm.train.rl.dapo import DAPOConfig
from zero2llm.train.rl.dr_grpo import DrGRPOConfig
from zero2llm.train.rl.gmpo import GMPOConfig
from zero2llm.train.rl.grpo import GRPOConfig
from zero2llm.train.rl.gspo import GSPOConfig
from zero2llm.train.rl.policy import Played
from zero2llm.train.rl.ppo import PPOConfig
from zero2llm.train.rl.reinforce import REINFORCEConfig
from zero2llm.train.rl.reinforce_pp import REINFORCEPPConfig
from zero2llm.train.rl.rloo import RLOOConfig
from zero2llm.train.rl.sapo import SAPOConfig
from zero2llm.train.rl.trpo import TRPOConfig

LENGTHS, T = (6, 3, 4, 5), 6
ADV = (1.2, -0.7, 0.3, -0.8)
EXACT = dict(atol=1e-10, rtol=0)
CONFIGS = {
    "grpo": GRPOConfig(),
    "dr_grpo": DrGRPOConfig(length=9),
    "dapo": DAPOConfig(),
    "gspo": GSPOConfig(clip_low=0.05, clip_high=0.08),  # the paper's bounds would clip all four answers
    "gspo_token": GSPOConfig(clip_low=0.05, clip_high=0.08, form="token"),
    "gmpo": GMPOConfig(clip_low=0.2, clip_high=0.3),
    "cispo": CISPOConfig(cap=1.3),
    "sapo": SAPOConfig(),
    "bapo": BAPOConfig(dual=1.5),
    "reinforce": REINFORCEConfig(),
    "rloo": RLOOConfig(),
    "reinforce_pp": REINFORCEPPConfig(),
    "ppo": PPOConfig(dual=1.5),
    "trpo": TRPOConfig(),
}


def mask_of(lengths=LENGTHS, width=T):
    return torch.arange(width)[None] < torch.tensor(lengths)[:, None]


def rows(seed=0, width=T, noise=0.4):
    """logp (a leaf), old, adv (B, 1), mask; fp64."""
    g = torch.Generator().manual_seed(seed)
    mask = mask_of(width=width)
    old = torch.zeros(4, width, dtype=torch.double)
    logp = torch.zeros(4, width, dtype=torch.double)
    old[:, :T] = (-torch.rand(4, T, generator=g, dtype=torch.double) - 0.5) * mask[:, :T]
    logp[:, :T] = (old[:, :T] + noise * torch.randn(4, T, generator=g, dtype=torch.double)) * mask[:, :T]
    return logp.requires_grad_(), old, torch.tensor(ADV, dtype=torch.double)[:, None], mask


def extra(old, adv, low=0.75, high=1.4):
    bounds = {"low": torch.full((len(old),), low, dtype=old.dtype), "high": torch.full((len(old),), high, dtype=old.dtype)}
    return {"old": old, "adv": adv} | bounds


def loss_of(method, logp, old, adv, mask):
    """The loop's number: sum over count."""
    made = method.surrogate(logp, old, adv, mask, extra(old, adv))
    return made.total / made.count, made


def played(lengths=(3, 2, 1, 4, 2, 3), width=5, samples=3, seed=0, ok=None):
    """Two prompts of three answers."""
    g = torch.Generator().manual_seed(seed)
    n, mask = len(lengths), mask_of(lengths, width)
    tokens = torch.randint(0, 9, (n, width), generator=g)
    ok = torch.ones(n, dtype=torch.bool) if ok is None else torch.tensor(ok)
    mask = mask & ok[:, None]
    batch = Batch(tokens, torch.where(mask, tokens, IGNORE), Seq.ragged(torch.tensor(lengths), width))
    draw = lambda: torch.randn(n, width, generator=g, dtype=torch.double) * mask
    reward = torch.randn(n, generator=g, dtype=torch.double) * ok
    return Played(batch, draw() - 1, reward, ok, samples, ref=draw() - 1, values=draw() - 1)
