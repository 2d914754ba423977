"""Runs recipes, each in a process of its own that may die at a chosen moment.

    python -m tests.contract.online_killer          reads lines of JSON, [recipe, moment or null, resume]

and answers each with how the run ended: 0, or -9 for a kill. The processes are forks of this one, which has computed nothing: the
import is paid for once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path

import zero2llm
from zero2llm.core import files
from zero2llm.engine.engine import Engine
from zero2llm.lab import stage
from zero2llm.optim.adamw import AdamW
from zero2llm.train import checkpoint, hooks
from zero2llm.train.rl import source, trpo

STEP = "step-00000005"  # that is being saved: in the middle of the second rollout
UPDATE = 6


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def in_sampling(which: int) -> None:
    """At the third token of the ``which``-th sampling (from 1) of the second rollout."""
    play, decode, seen = source.play, Engine._decode, {"plays": 0, "on": False, "tokens": 0}

    def counted_play(*args, **kwargs):
        seen["plays"] += args[5] == 1
        seen["on"] = seen["plays"] == which
        try:
            return play(*args, **kwargs)
        finally:
            seen["on"] = False

    def counted_decode(self):
        seen["tokens"] += seen["on"]
        return die() if seen["tokens"] == 3 else decode(self)

    source.play, Engine._decode = counted_play, counted_decode


def in_update() -> None:
    """Half of the weights have made their sixth step."""
    step, update, seen = AdamW.step, AdamW._update, {"steps": 0, "groups": 0}

    def counted_step(self):
        seen.update(steps=seen["steps"] + 1, groups=0)
        step(self)

    def counted_update(self, *args):
        seen["groups"] += 1
        return die() if seen == {"steps": UPDATE, "groups": 2} else update(self, *args)

    AdamW.step, AdamW._update = counted_step, counted_update


def in_trial() -> None:
    """TRPO: the weights are those of a trial of the line search."""
    put, seen = trpo.Policy.put, {"trials": 0}

    def counted(self, weights):
        put(self, weights)
        seen["trials"] += 1
        if seen["trials"] == UPDATE:
            die()

    trpo.Policy.put = counted


def in_scoring() -> None:
    """All answers of the second rollout are there, and not yet rewarded."""
    scored = source.Rollouts.scored
    source.Rollouts.scored = lambda self, episodes: die() if self.number == 1 else scored(self, episodes)


def between_files() -> None:
    """The model of the checkpoint is written, its random states are not."""
    save = checkpoint.save_tensors
    checkpoint.save_tensors = lambda tensors, folder, *name: die() if name == ("rng",) and STEP in str(folder) else save(tensors, folder, *name)


def before_rename() -> None:
    """Everything is written, under the name of a part."""
    replace = os.replace
    files.os.replace = lambda old, new: die() if Path(new).name == STEP else replace(old, new)


def after_rename() -> None:
    """The checkpoint is there; older ones have not gone yet."""
    prune = hooks.prune
    hooks.prune = lambda run, keep, protect=(): die() if (run / "checkpoints" / STEP).is_dir() else prune(run, keep, protect)


def in_the_log() -> None:
    """The step is logged and not saved."""
    log = stage.Telemetry.__call__
    stage.Telemetry.__call__ = lambda self, state: (log(self, state), state.step == 5 and die())


MOMENTS = {
    "sampling": lambda: in_sampling(1), "sampling again": lambda: in_sampling(2), "scoring": in_scoring, "update": in_update, "trial": in_trial,
    "saving": between_files, "renaming": before_rename, "pruning": after_rename, "logging": in_the_log,
}  # fmt: skip


def ended(recipe: dict, moment: str | None, resume: bool) -> int:
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.dup2(2, 1)  # only answers stand in stdout
    try:
        if moment is not None:
            MOMENTS[moment]()
        zero2llm.run(zero2llm.make_recipe(**recipe), resume=resume, quiet=True)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    for line in sys.stdin:
        print(ended(*json.loads(line)), flush=True)
