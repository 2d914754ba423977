"""A bandit as a language: four tokens, one of them pays. Small enough to train every method on in seconds.

As a program, for ranks: python -m tests.contract.rl_bandit OUT METHOD ... trains each and writes its weights to OUT.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from zero2llm.core.config import parse
from zero2llm.core.files import save_tensors
from zero2llm.model.lm import LM
from zero2llm.model.spec import ModelConfig
from zero2llm.optim.adamw import AdamWConfig
from zero2llm.optim.build import build_optim
from zero2llm.optim.schedule import CosineConfig
from zero2llm.parallel.plan import World, init_world
from zero2llm.train.fit import FitConfig, fit
from zero2llm.train.objectives.reference import Frozen
from zero2llm.train.rl.methods import MethodConfig, assemble
from zero2llm.train.rl.rewards import Mixture
from zero2llm.train.rl.rollout import RolloutConfig
from zero2llm.train.rl.source import Rollouts
from zero2llm.train.rl.trpo import TRPOConfig, fit_trpo

PAD, END, BAD, GOOD = range(4)
KINDS = [
    "reinforce", "reinforce_pp", "rloo", "ppo", "trpo", "grpo", "dr_grpo", "dapo", "gspo", "gmpo", "cispo", "sapo", "bapo", "online_dpo", "rft",
]  # fmt: skip
CHANGES = {"dr_grpo": {"length": 1}, "ppo": {"reward_kl": {"target": 0.5, "gain": 0.5}}, "trpo": {"delta": 0.03}}


class Letters:
    """What the engine asks of a tokenizer."""

    vocab_size, pad_id, stop_ids, special_ids = 4, PAD, frozenset({END}), frozenset({PAD, END})

    def stream(self, begins):
        return self

    def push(self, token):
        return "..xo"[token]

    def flush(self):
        return ""


class Prompts:
    identity = {"prompts": "bandit"}

    def prompt(self, g):
        return [BAD, GOOD][: 1 + g % 2], {"answer": "o", "g": g}


def pay(answer):
    return answer.text.count("o") / max(answer.tokens, 1)


def bandit_model(seed=0, score=False):
    torch.manual_seed(seed)
    block = {"mixer": {"kind": "gqa", "n_heads": 2, "position": {"kind": "rope", "base": 50.0}}, "ffn": {"kind": "glu", "hidden": 16}, "norm": {"kind": "rms"}}
    data = {"vocab_size": 5, "d_model": 8, "max_len": 16, "layers": {"pattern": ["b"]}, "blocks": {"b": block}, "final_norm": {"kind": "rms"}}
    return LM(parse(ModelConfig, data | {"tie_embeddings": False, "score_head": score}))


class Run:
    """Model, source, objective and optimizer of one method; ``vocab`` 5 against 4 letters: the table is padded."""

    def __init__(self, kind, seed=0, reward=pay, world=None, lr=0.02, steps=200, changes=None, prompts=None, **rollout):
        self.cfg = parse(MethodConfig, {"kind": kind} | CHANGES.get(kind, {}) | (changes or {}))
        self.model, self.steps = bandit_model(seed, kind == "ppo"), steps
        reference = LM.clone(self.model).eval().requires_grad_(False)
        self.shape, self.objective = assemble(self.cfg, 1.0, Letters.vocab_size, Frozen(reference))
        rollout = RolloutConfig(**({"prompts": 4, "samples": 4, "max_tokens": 1} | rollout))
        self.source = Rollouts(self.model, Letters(), prompts or Prompts(), Mixture([(1.0, reward)]), self.shape, rollout, seed=seed,
                               world=world or World(), reference=reference if self.shape.reference else None, micro_rows=16)  # fmt: skip
        self.optim = build_optim(self.model, AdamWConfig(lr=lr, weight_decay=0.0))

    def train(self, *hooks, state=None, micro_rows=16):
        if isinstance(self.cfg, TRPOConfig):
            return fit_trpo(self.model, self.objective, self.source, self.cfg, steps=self.steps, micro_rows=micro_rows, state=state, hooks=hooks)
        cfg = FitConfig(steps=self.steps, micro_rows=micro_rows, schedule=CosineConfig(warmup=0.0), dtype="fp32")
        return fit(self.model, self.objective, self.source, self.optim, cfg, state=state, hooks=hooks)


def several(kind, world):
    """Two rollouts, each two epochs of two minibatches, of ragged answers."""
    more = {"truncated": "leave_out"} if kind == "ppo" else {}
    return Run(kind, world=world, steps=8, prompts=None, lr=0.01, max_tokens=5, minibatches=2, epochs=2, samples=4, **more)


if __name__ == "__main__":
    torch.set_num_threads(1)
    world = init_world()
    for kind in sys.argv[2:]:
        run, seen = several(kind, world), []
        run.steps = 4 if kind == "trpo" else 8  # a line search says yes or no: later on, rounding decides
        run.train(lambda state, seen=seen: seen.append([state.metrics[key] for key in ("loss", "grad_norm", "reward")]), micro_rows=3)
        if world.rank == 0:
            save_tensors(run.model.state_dict() | {"seen": torch.tensor(seen)}, Path(sys.argv[1]), kind)
    world.barrier()
