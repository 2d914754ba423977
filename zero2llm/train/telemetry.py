"""What a run says about itself: JSONL always, the console while somebody looks, TensorBoard on request."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import psutil
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from zero2llm.core.log import console
from zero2llm.train.fit import FitState
from zero2llm.train.rl.policy import MEANING as RL_MEANING

MEANING = {
    "loss": "training loss of this step, nats per target token (preferences: per pair; KTO: per answer)",
    "mtp": "multi-token prediction: nats per token behind the next one, mean over its depths",
    "valid_mtp": "the same on held-out data",
    "valid_loss": "loss on held-out data, nats per target token",
    "valid_ppl": "perplexity on held-out data: exp of valid_loss",
    "valid_bpb": "bits per byte of held-out text: comparable between tokenizers",
    "lr": "learning rate of this step",
    "grad_norm": "length of the gradient before clipping; a jump warns of instability",
    "tokens_per_s": "real tokens trained per second, all ranks",
    "step_s": "seconds this step took",
    "memory_mb": "memory of this process now, MiB (CUDA: peak of the device)",
    "skipped": "1 where the step changed nothing: fp16 overflow, or no target in the batch",
    "margin": "how far the objective finds chosen ahead of rejected, in its own unit (DPO: beta times how much further chosen "
    "rose against the reference; CPO, SimPO: beta times log-probabilities; IPO: log-ratios; ORPO: log odds; reward: scores)",
    "moved_right": "share of pairs with a margin above 0 (KTO: of answers that rose if good, sank if bad)",
    "win_rate": "share of pairs in which the model finds the chosen answer likelier than the rejected",
    "logp_chosen": "log-probability of chosen (KTO: good) answers; it may fall, but less than the rejected",
    "logp_rejected": "log-probability of rejected (KTO: bad) answers",
    "z": "KTO: mean log-ratio of mismatched answers, at least 0: how far the model has left its reference altogether",
    "reward_chosen": "KTO: beta times the log-ratio of good answers",
    "reward_rejected": "KTO: beta times the log-ratio of bad answers",
    "accuracy": "reward: share of pairs whose chosen answer scores higher",
    "reward": "mean of the scored answers (objective reward: mean score, which has no meaning of its own and should not drift far; "
    "minillm: mean of log p - log q, at most 0 on average)",
    "divergence": "distillation: how far the student's next token is from the teacher's, nats (KL or JSD, as the objective says), without T^2",
    "agree": "distillation: share of tokens where student and teacher find the same one likeliest",
    "hidden": "hidden states: distance from the teacher's, summed over the pairs of blocks; 1 a pair where the student says nothing",
    "own": "share of the step's answers that the student wrote itself",
    "weight": "MiniLLM: q / p~ of what was sampled; 1 without mixing, mean near 1 with it",
    "longer_chosen": "reward: share of pairs of unequal length whose longer answer is the chosen one: what a ruler would get",
    "accuracy_shorter": "reward: accuracy where the chosen answer is the shorter one: what a ruler gets wrong",
    "calibration": "reward: expected calibration error in ten bins of confidence; 0 = score differences mean what they say",
} | {name: text for name, text in RL_MEANING.items() if name != "reward"} | {"valid_reward": "mean reward of greedy answers to held-out prompts"}


def memory_mb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return psutil.Process().memory_info().rss / 2**20


class Telemetry:
    """Writes ``run/metrics.jsonl`` (one object a line: kind train | valid | sample, step, values) and shows progress.

    On resume, lines beyond ``start_step`` are cut off: they will be written again.
    """

    def __init__(
        self, run: Path, name: str, steps: int, *, start_step: int = 0, tensorboard: bool = False, quiet: bool = False
    ):
        self.path, self.name, self.steps = run / "metrics.jsonl", name, steps
        _cut(self.path, start_step)
        self.file = open(self.path, "a", encoding="utf-8")
        self.board = _tensorboard(run) if tensorboard else None
        columns = "{task.fields[line]}"
        self.progress = Progress(
            TextColumn("[bold]{task.description}"), BarColumn(bar_width=20), TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(), TimeRemainingColumn(), TextColumn(columns), console=console(), disable=quiet,
        )  # fmt: skip
        self.task = self.progress.add_task(name, total=steps, completed=start_step, line="")
        self.plain_at = 0.0
        self.progress.start()

    def __call__(self, state: FitState) -> None:
        """The hook of the loop: one line per step."""
        values = {**state.metrics, "tokens": state.tokens, "memory_mb": round(memory_mb(), 1)}
        self.log("train", state.step, values)
        m = state.metrics
        reward = f"reward {m['reward']:.3f}  " if "reward" in m else ""  # of reinforcement learning, whose loss says little
        line = (
            f"loss {m['loss']:.3f}  {reward}lr {m['lr']:.1e}  |g| {m['grad_norm']:.2f}  "
            f"{m['tokens_per_s']:,.0f} tok/s  {values['memory_mb']:,.0f} MB"
        )
        self.progress.update(self.task, completed=state.step, line=line)
        if not console().is_terminal and not self.progress.disable and time.monotonic() - self.plain_at > 10:
            self.plain_at = time.monotonic()
            console().print(f"{self.name} {state.step}/{self.steps}  {line}", markup=False)

    def log(self, kind: str, step: int, values: dict) -> None:
        self.file.write(json.dumps({"kind": kind, "step": step, **values}, ensure_ascii=False) + "\n")
        self.file.flush()
        if self.board is not None:
            for key, value in values.items():
                if isinstance(value, int | float):
                    self.board.add_scalar(f"{kind}/{key}", value, step)
                elif isinstance(value, str):
                    self.board.add_text(f"{kind}/{key}", value, step)

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        if not self.progress.disable:
            self.progress.console.print(text, markup=False)

    def close(self) -> None:
        self.progress.stop()
        self.file.close()
        if self.board is not None:
            self.board.close()


def read_metrics(path: Path, kind: str | None = None) -> list[dict]:
    """Records of a metrics file, in order; a line cut off by a crash is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if kind is None or record["kind"] == kind:
            records.append(record)
    return records


def _cut(path: Path, step: int) -> None:
    kept = [record for record in read_metrics(path) if step and record["step"] <= step]  # from 0 on all is made again
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in kept), encoding="utf-8")
    os.replace(part, path)


def _tensorboard(run: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("log.tensorboard needs the extra: pip install 'zero2llm[tensorboard]'") from error
    return SummaryWriter(str(run / "tensorboard"))
