"""The loop, for every stage. It knows nothing of what it trains: objective, data and optimizer come from outside.

One optimizer step = one global batch. The loss is a sum; gradients are divided by the global batch's count of units,
so one batch of N, N micro-batches and N ranks make the same step:

    g = (1 / N) sum_ranks sum_micro  d total / d w,     N = sum_ranks sum_micro count
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from zero2llm.core.batch import Batch
from zero2llm.core.config import config
from zero2llm.core.device import keep_memory, pick_dtype
from zero2llm.optim.build import OptimizerSet
from zero2llm.optim.scale import LossScale
from zero2llm.optim.schedule import CosineConfig, ScheduleConfig
from zero2llm.parallel.plan import World, data_parallel, sync_only
from zero2llm.train.guard import NonFiniteError, find_first_bad
from zero2llm.train.loss import Loss, Objective


@config
class FitConfig:
    """How to run the loop. `micro_rows` bounds memory: it changes no step, but for what looks at several rows at once (a
    router's balance loss, expert choice, batch norm)."""

    steps: int
    schedule: ScheduleConfig = CosineConfig()
    clip: float | None = 1.0  # global gradient norm; None = off
    micro_rows: int = 4  # rows per forward pass: small ones stay near the caches of a CPU
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    recompute: bool = False  # activation checkpointing
    keep_memory: bool = True  # on a CPU: keep what a step frees for the next one; false = a little slower, a third less memory
    compile: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1 or self.micro_rows < 1 or (self.clip is not None and self.clip <= 0):
            raise ValueError(
                f"steps = {self.steps} and micro_rows = {self.micro_rows} must be positive, clip > 0 or null"
            )


@dataclass
class FitState:
    """Where training stands: what a hook may look at, and (with model, optimizer, data cursor) all that resuming needs."""

    step: int = 0
    tokens: int = 0  # real (unpadded) tokens seen, over all ranks
    seconds: float = 0.0  # spent training, over all sessions
    scale: float = 65536.0
    clean: int = 0
    metrics: dict[str, float] = field(default_factory=dict)  # of the latest step


Hook = Callable[[FitState], None]  # called after each step; reads, never writes


class StepLoss(nn.Module):
    """The objective as a module, so that data parallelism and compilation wrap the whole computation of the loss."""

    def __init__(self, model: nn.Module, objective: Objective):
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, dict]:
        loss: Loss = self.objective(self.model, batch)
        return loss.total, loss.count, loss.metrics


def fit(
    model: nn.Module,
    objective: Objective,
    batches: Iterable[Batch],
    optim: OptimizerSet,
    cfg: FitConfig,
    *,
    state: FitState | None = None,
    hooks: Sequence[Hook] = (),
) -> FitState:
    """Train until ``cfg.steps`` optimizer steps are done. Each item of ``batches`` is this rank's part of one step.

    Continues from ``state`` (the caller restores model, optimizer and data cursor). Raises NonFiniteError, before the
    weights are touched, naming the first bad module; ValueError if the data ends early.
    """
    world, device = World.current(), next(model.parameters()).device
    dtype = pick_dtype(cfg.dtype, device)
    state = state or FitState()
    scaler = LossScale(dtype == torch.float16, state.scale, state.clean)
    step_loss: nn.Module = StepLoss(model, objective)
    model.recompute = cfg.recompute
    if device.type == "cpu":
        keep_memory(cfg.keep_memory)
    if cfg.compile:
        # layers remember masks in Seq.memo, also inside a recomputed block: there is nothing to undo when that runs again
        torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
        step_loss.compile(dynamic=False)
    step_loss = data_parallel(step_loss, world, device)
    model.train()
    stream = iter(batches)
    while state.step < cfg.steps:
        began = time.perf_counter()
        batch = next(stream, None)
        if batch is None:
            raise ValueError(f"the data ended after {state.step} of {cfg.steps} steps")
        lr = optim.set_lr(cfg.schedule.factor(state.step, cfg.steps))
        micro = [part.to(device) for part in batch.split(cfg.micro_rows)]
        expected = batch.tokens.numel() * world.size  # any constant that all ranks share; keeps fp16 in range
        count, sums = torch.zeros((), device=device), {}
        for i, part in enumerate(micro):
            with sync_only(step_loss, last=i == len(micro) - 1):
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    total, n, metrics = step_loss(part)
                (total * (scaler.scale / expected)).backward()
            count = count + n
            for name, (value, units) in metrics.items():
                old = sums.get(name, (0.0, 0.0))
                sums[name] = (old[0] + value.float(), old[1] + units)
        count = world.sum(count)
        norm, finite = _scale_and_clip(optim.params, expected * world.size / scaler.scale, count, cfg.clip)
        if not finite and not scaler.enabled:
            raise NonFiniteError(find_first_bad(model, objective, micro, state.step))
        if finite and count > 0:
            optim.step()
        optim.zero_grad()
        scaler.update(finite)
        real = torch.tensor(
            float(sum(p.tokens.numel() if p.seq.seg is None else int((p.seq.seg != 0).sum()) for p in micro)),
            device=device,
        )
        state.step += 1
        state.tokens += int(world.sum(real))
        state.scale, state.clean = scaler.scale, scaler.clean
        took = time.perf_counter() - began
        state.seconds += took
        state.metrics = {name: float(world.sum(v) / world.sum(n).clamp(min=1)) for name, (v, n) in sums.items()}
        state.metrics |= {"lr": lr, "grad_norm": norm, "tokens_per_s": float(world.sum(real)) / took, "step_s": took}
        state.metrics |= {"skipped": float(not finite or float(count) == 0)}
        for hook in hooks:
            hook(state)
    return state


@torch.no_grad()
def _scale_and_clip(params: list[nn.Parameter], factor: float, count: Tensor, clip: float | None) -> tuple[float, bool]:
    """Turn accumulated gradients into the global mean and clip their norm, in one pass. Returns (norm, all finite)."""
    grads = [p.grad for p in params if p.grad is not None]
    if not grads or float(count) == 0:
        return 0.0, True
    factor = factor / float(count)
    norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))) * factor
    if clip is not None and norm > clip:
        factor *= clip / (norm + 1e-6)
    torch._foreach_mul_(grads, factor)
    return norm, norm < float("inf")  # NaN compares false
