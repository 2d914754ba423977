"""Speed and ranks applied from outside: recompute, then compile, then data parallel. Mechanisms know none of it."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class World:
    """Who this process is among the ranks that train together."""

    rank: int = 0
    size: int = 1

    @staticmethod
    def current() -> World:
        return (
            World(dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else World()
        )

    def sum(self, value: Tensor) -> Tensor:
        """``value``, of the same shape on all ranks, summed over them."""
        if self.size > 1:
            value = value.clone() if dist.get_backend() == "gloo" else value.to("cuda", copy=True)
            dist.all_reduce(value)
        return value

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def init_world() -> World:
    """Join the process group that torchrun describes (gloo on CPU, nccl on CUDA); alone without torchrun."""
    if "WORLD_SIZE" in os.environ and int(os.environ["WORLD_SIZE"]) > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return World.current()


def data_parallel(step: nn.Module, world: World, device: torch.device) -> nn.Module:
    """``step`` replicated over the ranks. Its gradients become the mean over ranks of each rank's gradient."""
    if world.size == 1:
        return step
    return DistributedDataParallel(step, device_ids=[device.index] if device.type == "cuda" else None)


def sync_only(step: nn.Module, last: bool):
    """Context in which gradients are exchanged only in the ``last`` micro-batch of a step."""
    if last or not isinstance(step, DistributedDataParallel):
        return nullcontext()
    return step.no_sync()
