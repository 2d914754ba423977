"""Which device, and which number format it computes natively."""

from __future__ import annotations

import ctypes
import sys

import torch
from torch.overrides import TorchFunctionMode

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str = "auto") -> torch.device:
    """``auto`` = cuda, else mps, else cpu; a named device that is absent is an error, never a fallback.

    Raises ValueError where the device does not exist.
    """
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in have.items() if there))
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is not a device name; use auto, cpu, cuda, cuda:N or mps") from error
    if not have.get(device.type, False):
        found = ", ".join(kind for kind, there in have.items() if there)
        raise ValueError(f"device {name!r} was asked for, but this machine (torch {torch.__version__}) has: {found}")
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} was asked for, but there are {torch.cuda.device_count()} CUDA devices")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Compute format. ``auto``: bf16 where the hardware multiplies it natively (Ampere and later), else fp32.

    A CPU gets fp32: without AMX or AVX512-BF16, bf16 products are emulated, about 100 times slower.
    Raises ValueError for an unknown name, or fp16 on a CPU (no loss scaling is worth it there).
    """
    if name == "auto":
        native = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
        return torch.bfloat16 if native else torch.float32
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is unknown; use auto, {', '.join(DTYPES)}")
    if name == "fp16" and device.type == "cpu":
        raise ValueError("dtype fp16 cannot train on a CPU; use fp32 (dtype: auto)")
    return DTYPES[name]


def keep_memory(keep: bool = True) -> None:
    """Ask glibc to keep what a training step frees, for the next step asks for the same again.

    Left alone it hands large blocks back to the system, and every page is cleared anew when it is touched: up to a fifth of
    a step's time on a CPU. But blocks of many sizes leave holes: with ``keep`` false all above 512 KiB go back at once, and a
    step needs no more than what is alive. Does nothing where another allocator is at work (macOS, Windows, musl, or preloaded).
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, size in ((-1, 2**31 - 1 if keep else 2**26), (-2, 2**26), (-3, 2**25 if keep else 2**19)):  # trim threshold, top pad, mmap threshold
            mallopt(option, size)


def give_back_memory() -> None:
    """Hand what is free to the system (glibc): before training, when something large has just been let go."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(0)


class Undrawn(TorchFunctionMode):
    """`with torch.device("meta"), Undrawn():` modules get shapes, and no random numbers are drawn for them.

    On that device there is nothing to draw, but torch asks its compiler how, and importing that takes more than a second.
    """

    INIT = torch.nn.init
    DRAWS = (torch.Tensor.normal_, torch.Tensor.uniform_, INIT.normal_, INIT.uniform_, INIT.trunc_normal_, INIT.kaiming_uniform_)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self.DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
