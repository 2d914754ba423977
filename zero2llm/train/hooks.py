"""What happens between steps: validation and saving. Hooks read the training state and never write it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

from zero2llm.core.files import new_folder
from zero2llm.parallel.plan import World
from zero2llm.train.checkpoint import best, generation_of, prune, save_checkpoint
from zero2llm.train.fit import FitState
from zero2llm.train.telemetry import Telemetry


class Validate:
    """Every ``every`` steps and after the last one: ``measure()`` -> values, logged with the prefix ``valid_``."""

    def __init__(self, measure: Callable[[], dict[str, float]], every: int, steps: int, telemetry: Telemetry | None):
        self.measure, self.every, self.steps, self.telemetry = measure, every, steps, telemetry
        self.latest: dict[str, float] = {}

    def __call__(self, state: FitState) -> None:
        if state.step % self.every == 0 or state.step == self.steps:
            self.now(state)

    def now(self, state: FitState) -> None:
        self.latest = {f"valid_{name}": value for name, value in self.measure().items()}
        if self.telemetry:
            self.telemetry.log("valid", state.step, {**self.latest, "tokens": state.tokens, "seconds": state.seconds})
            shown = "  ".join(f"{name} {value:.4f}" for name, value in self.latest.items())
            self.telemetry.say(f"  step {state.step}: {shown}")


class Save:
    """A checkpoint every ``every_s`` seconds and after the last step; the newest ``keep`` and the best one stay.

    What comes from the parent beside its weights is kept from the start: the parent's own run may prune it meanwhile.
    """

    def __init__(self, run: Path, every_s: float, keep: int, steps: int, validate: Validate, **what):
        self.run, self.every_s, self.keep, self.steps, self.validate, self.what = (
            run,
            every_s,
            keep,
            steps,
            validate,
            what,
        )
        self.generation = generation_of(what["parent"])
        if World.current().rank == 0:
            self.what["tokenizer_dir"] = own_copy(what["tokenizer_dir"], run)
        self.saved_at = time.monotonic()

    def __call__(self, state: FitState) -> None:
        due = time.monotonic() - self.saved_at >= self.every_s
        if World.current().size > 1:  # ranks have clocks of their own: all follow rank 0
            import torch

            flag = torch.tensor(float(due and World.current().rank == 0))
            due = bool(World.current().sum(flag))
        if not due and state.step != self.steps:
            return
        if World.current().rank == 0:
            save_checkpoint(self.run, state=state, metrics=dict(self.validate.latest), generation=self.generation, **self.what)
            prune(self.run, self.keep, protect=[best(self.run)])
        World.current().barrier()
        self.saved_at = time.monotonic()


def own_copy(tokenizer_dir: Path, run: Path) -> Path:
    """The tokenizer in the run's own folder."""
    if run in tokenizer_dir.parents:
        return tokenizer_dir
    folder = run / "tokenizer"
    if not folder.is_dir():
        with new_folder(folder) as part:
            shutil.copytree(tokenizer_dir, part, dirs_exist_ok=True)
    return folder
