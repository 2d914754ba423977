"""A projection whose weight is stored in four bits and never trained: the base under a QLoRA adapter.

    y = x dequantised(W)^T + b          d L / d x = d L / d y  dequantised(W)

Source: QLoRA 2305.14314 eq. 5, without its adapter (adapters/): storage type NF4 (ops/nf4.py), compute type that of x.
Why: 4.127 bits a weight instead of 32, and no gradient and no Adam moments, which are 12 bytes more for each. The weight
is made twice per step, once for y and once more for the gradient of x, some rows at a time: about 5 % of the time of the
products with 256 tokens on a CPU, and nearly all of it with a single token. To decode, put `dequantized()` into a Linear.
In a state dict: packed, absmax, scale and offset as in ops/nf4.py, and bias. Shapes: (..., in) -> (..., out).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from zero2llm.core.log import log_once
from zero2llm.layers.ffns.experts import ExpertLinear
from zero2llm.ops.marks import autocast_dtype
from zero2llm.ops.nf4 import BLOCK, NESTED, NF4, Kernel, check_kernel, dequantize, quantize, row_pieces

PLACES = ("mixer", "ffn")  # whose projections are quantised where nothing else is asked for


class NF4Linear(nn.Module):
    """Built empty, to be filled by ``load_state_dict``; `of` makes one from a Linear.

    double : whether the scales of the blocks are quantised too. kernel : what dequantises; not part of the state.
    Only x and the bias get gradients.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False, double: bool = True,
                 kernel: Kernel = "handwritten", device=None):  # fmt: skip
        super().__init__()
        check_kernel(kernel)
        self.in_features, self.out_features, self.kernel = in_features, out_features, kernel
        n = in_features * out_features
        blocks = -(-n // BLOCK)
        empty = lambda *shape, dtype=torch.float32: torch.zeros(shape, dtype=dtype, device=device)
        self.register_buffer("packed", empty(-(-n // 2), dtype=torch.uint8))
        self.register_buffer("absmax", empty(blocks, dtype=torch.uint8 if double else torch.float32))
        self.register_buffer("scale", empty(-(-blocks // NESTED)) if double else None)
        self.register_buffer("offset", empty() if double else None)
        self.bias = nn.Parameter(empty(out_features)) if bias else None

    @staticmethod
    def of(linear: nn.Linear, double: bool = True, kernel: Kernel = "handwritten", name: str = "the weight") -> NF4Linear:
        """The same projection with its weight rounded to NF4, on the same device; the bias itself is shared.

        On the meta device the shapes alone. Raises ValueError, with ``name``, for a weight that is not finite.
        """
        made = NF4Linear(linear.in_features, linear.out_features, double=double, kernel=kernel, device="meta")
        made.bias = linear.bias
        if not linear.weight.is_meta:
            q = quantize(linear.weight, double, name)
            made.packed, made.absmax, made.scale, made.offset = q.packed, q.absmax, q.scale, q.offset
        return made.train(linear.training)

    @property
    def quantized(self) -> NF4:
        return NF4(self.packed, self.absmax, self.scale, self.offset, (self.out_features, self.in_features))

    @property
    def weight(self) -> Tensor:
        """What mechanisms that read a projection's weight themselves get (MLA while it decodes)."""
        return self.dequantized()

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(out, in)."""
        return dequantize(self.quantized, dtype, self.kernel)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(autocast_dtype(x) or x.dtype)
        y = _Product.apply(x, self.kernel, (self.out_features, self.in_features), *self.buffers())
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _apply(self, fn, recurse: bool = True):
        """`half()` and its like choose the type that computes: what undoes the quantisation stays in fp32."""
        exact = {name: buffer for name, buffer in self.named_buffers() if buffer.is_floating_point()}
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            if self._buffers[name].dtype != buffer.dtype:
                self._buffers[name] = buffer.to(self._buffers[name].device)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class _Product(torch.autograd.Function):
    """x W^T that remembers W in its four bits, and makes it again for the gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, kernel: Kernel, shape: tuple[int, int], *stored: Tensor) -> Tensor:
        ctx.save_for_backward(*stored)
        ctx.kernel, ctx.shape = kernel, shape
        tokens, y = x.reshape(-1, x.shape[-1]), x.new_empty(*x.shape[:-1], shape[0])
        flat = y.view(-1, shape[0])
        for rows, w in row_pieces(restored(stored, shape), x.dtype, kernel):
            torch.mm(tokens, w.t(), out=flat[:, rows])
        return y  # no view: an adapter may add to it in place

    @staticmethod
    def backward(ctx, grad: Tensor):
        stored = ctx.saved_tensors  # read once: under recomputation a second reading is an error
        g = grad.reshape(-1, grad.shape[-1])
        dx = g.new_zeros(len(g), ctx.shape[1])
        for rows, w in row_pieces(restored(stored, ctx.shape), g.dtype, ctx.kernel):
            dx.addmm_(g[:, rows], w)
        return dx.view(*grad.shape[:-1], -1), None, None, *[None] * len(stored)


def restored(stored: Sequence[Tensor], shape: tuple[int, int]) -> NF4:
    """From the buffers of a layer: two without double quantisation, four with it."""
    packed, absmax, *nested = stored
    return NF4(packed, absmax, *(nested or (None, None)), shape)


@dataclass(frozen=True)
class Weights:
    """Bytes of a model's parameters and buffers, each counted once."""

    nf4: int
    rest: int

    @staticmethod
    def of(model: nn.Module) -> Weights:
        nf4 = sum(b.nbytes for m in model.modules() if isinstance(m, NF4Linear) for b in m.buffers())
        return Weights(nf4, sum(t.nbytes for t in (*model.parameters(), *model.buffers())) - nf4)

    def __str__(self) -> str:
        return f"{(self.nf4 + self.rest) / 1e6:,.1f} MB ({self.nf4 / 1e6:,.1f} in NF4, {self.rest / 1e6:,.1f} as they were)"


def quantize_model(
    model: nn.Module, targets: Sequence[str] | None = None, double: bool = True, kernel: Kernel = "handwritten"
) -> list[str]:
    """Put an `NF4Linear` in the place of each Linear that is meant, one after the other; returns their names.

    targets : names of modules, in full or from any dot on (``q_proj``, ``mixer.q_proj``), with * and ? as wildcards.
    None = every projection (``*_proj``) of mixers and feed-forwards: no embedding, norm, router or head.
    `Weights.of` before and after says what it brings. Memory meanwhile: the model as it was, less what is done; weights
    that are pages of a checkpoint's file count until the end, where what is left is copied and the file let go.
    Raises ValueError, before anything is replaced, for a target that names no Linear or names stacked experts, which
    NF4 does not cover; left to itself (None) it leaves those as they are, and says so.
    """
    check_kernel(kernel)
    found, experts = chosen(model, targets)
    made: dict[nn.Module, NF4Linear] = {}  # a layer that stands in two places stays one
    if experts:
        log_once(f"NF4 covers no stacked experts; in full precision: {shortened(experts)}")
    for name in found:
        place, _, leaf = name.rpartition(".")
        linear = model.get_submodule(name)
        if linear not in made:
            made[linear] = NF4Linear.of(linear, double, kernel, f"{name}.weight")
            linear.weight = None  # `made` keeps the layer, not its weight
        setattr(model.get_submodule(place), leaf, made[linear])
    own_memory(model)
    return found


def own_memory(model: nn.Module) -> None:
    """Copy windows of larger storages, and what was not quantised: it may be pages of a file, and one such tensor holds them all."""
    packed = {id(buffer) for module in model.modules() if isinstance(module, NF4Linear) for buffer in module.buffers()}
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.is_meta and (id(tensor) not in packed or tensor.untyped_storage().nbytes() > tensor.nbytes):
            tensor.data = tensor.data.clone()


def chosen(model: nn.Module, targets: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Names of the Linear layers that are meant, and of the stacked experts that would be."""
    named = dict(model.named_modules(remove_duplicate=False))
    linears = [n for n, m in named.items() if isinstance(m, nn.Linear)]
    experts = [n for n, m in named.items() if isinstance(m, ExpertLinear)]
    if targets is None:
        found = [n for n in linears if n.endswith("_proj") and set(PLACES) & set(n.split("."))]
        if not found:
            raise ValueError(f"the model has no projections in {' or '.join(PLACES)} left to quantise")
        return found, experts
    if meant := [n for n in experts if any(matches(n, t) for t in targets)]:
        raise ValueError(f"NF4 covers no stacked experts, but the targets name {shortened(meant)}; name other layers")
    for target in targets:
        if not any(matches(n, target) for n in linears):
            kinds = ", ".join(dict.fromkeys(n.rpartition(".")[2] for n in linears))
            raise ValueError(f"target {target!r} names no Linear layer; the model has {kinds or 'none'}")
    return [n for n in linears if any(matches(n, t) for t in targets)], []


def matches(name: str, target: str) -> bool:
    return fnmatchcase(name, target) or fnmatchcase(name, f"*.{target}")


def shortened(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
