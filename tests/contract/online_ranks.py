"""A few steps of reinforcement learning as one process and as two gloo ranks, and the gradient of each step.

    python -m tests.contract.online_ranks OUT PORT

writes OUT/KIND-WORLD.safetensors (gradients, weights) and OUT/KIND-WORLD.json (metrics). Ranks are forks of this process.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

import torch

from tests.contract.rl_bandit import Run, pay
from zero2llm.core.files import save_tensors
from zero2llm.parallel.plan import World, init_world
from zero2llm.train.rl.trpo import Policy

STEPS = 4  # one rollout: two epochs of two minibatches


def half_flat(answer):
    """Every second prompt is worth the same whatever is said."""
    return pay(answer) if answer.record["g"] % 2 else 0.5


def sometimes_broken(answer):
    if answer.text.startswith("x"):
        raise ValueError("no word begins so")
    return pay(answer)


RUNS = {
    "ppo": dict(reward=sometimes_broken, changes={"reward_kl": {"target": 0.5, "gain": 0.5}}, truncated="leave_out", max_tokens=3),
    "dapo": dict(reward=half_flat, changes={"rounds": 8}),
    "trpo": dict(minibatches=1, epochs=1),
    "bapo": dict(reward=sometimes_broken),
    "reinforce_pp": dict(),
    "online_dpo": dict(reward=half_flat),
    "rft": dict(reward=lambda answer: float("o" in answer.text)),
}


def build(kind: str, world: World) -> Run:
    steps = 1 if kind == "trpo" else STEPS  # its ten products with H rest on one another's rounding
    return Run(kind, world=world, **{"steps": steps, "lr": 0.01, "max_tokens": 5, "minibatches": 2, "epochs": 2, "samples": 4} | RUNS[kind])


def record(run: Run) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Trains, and keeps the gradient of every step as the optimizer, or TRPO's solver, sees it: the mean of all ranks."""
    found: list[torch.Tensor] = []
    step, gradient = run.optim.step, Policy.gradient

    def seen_step():
        found.append(torch.cat([p.grad.flatten() for p in run.optim.params if p.grad is not None]))
        step()

    def seen_gradient(self):
        total, sums = gradient(self)
        found.append(total)
        return total, sums

    run.optim.step, Policy.gradient = seen_step, seen_gradient
    rows: list[dict[str, float]] = []
    run.train(lambda state: rows.append(dict(state.metrics)), micro_rows=3)
    tensors = {f"grad {i}": g.clone() for i, g in enumerate(found)} | {f"w {k}": v.clone() for k, v in run.model.state_dict().items()}
    return tensors, rows


def work(kinds: list[str], out: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    world = init_world()
    for kind in kinds:
        tensors, rows = record(build(kind, world))
        if world.rank == 0:
            save_tensors(tensors, out, f"{kind}-{world.size}")
            (out / f"{kind}-{world.size}.json").write_text(json.dumps(rows), encoding="utf-8")
    world.barrier()


def forked(*args) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        work(*args)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    out, port, kinds = Path(sys.argv[1]), sys.argv[2], sys.argv[3:] or list(RUNS)
    ranks = [{"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} for r in (0, 1)]
    started = [forked(kinds, out, environment) for environment in ({}, *ranks)]
    ends = [os.waitpid(pid, 0)[1] for pid in started]
    sys.exit(int(any(ends)))
