"""Randomness: one seed for everything, and the full generator state as tensors for exact resume."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor


def seed_all(seed: int) -> None:
    """Seed Python, NumPy and torch (every device)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> dict[str, Tensor]:
    """torch's generator states (CPU, and each CUDA device) as uint8 tensors.

    Python's and NumPy's generators are not used after start-up: everything random in training draws from torch
    or from a generator seeded by (seed, epoch, row), which needs no state.
    """
    state = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state |= {f"cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return state


def restore_rng(state: dict[str, Tensor]) -> None:
    """Undo to what `rng_state` saw; devices that are absent now are left alone."""
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"cuda.{i}" in state:
                torch.cuda.set_rng_state(state[f"cuda.{i}"].cpu(), i)
