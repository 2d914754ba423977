"""All experts' gated units in one operator: each expert's rows go through its three products while they are in the cache.

    h = act(x W_g^T) * (x W_u^T),   y = h W_d^T                       rows of one expert at a time
    dh = dy W_d,   du = dh * act(g),   dg = act'(g) * u * dh,   dx = dg W_g + du W_u
    dW_d = dy^T h,   dW_g = dg^T x,   dW_u = du^T x

Source: the equations of a GLU (2002.05202) and of its gradient; sorting as in route.py.
Why: three grouped products and a pointwise function between them write and read (M, H) nine times through main memory;
here it is g and u once, and h is worked out again for the backward pass. Saved per row: D + 2 H values, not D + 4 H.
Shapes: x (M, D) sorted by expert, gate and up (E, H, D), down (E, D, H), sizes (E) rows of each -> (M, D).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from zero2llm.ops.marks import autocast_dtype
from zero2llm.ops.route import slices

aten = torch.ops.aten
Pointwise = Callable[..., Tensor]
ACTS: dict[str, tuple[Pointwise, Pointwise]] = {  # act(g), and (grad, g) -> grad * act'(g)
    "silu": (F.silu, aten.silu_backward),
    "gelu": (partial(F.gelu, approximate="tanh"), partial(aten.gelu_backward, approximate="tanh")),
    "gelu_erf": (F.gelu, aten.gelu_backward),
    "relu": (F.relu, lambda grad, g: aten.threshold_backward(grad, g, 0)),
    "relu2": (lambda g: F.relu(g).square(), lambda grad, g: grad * F.relu(g).mul_(2)),
}


def expert_glu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, sizes: Tensor, act: str) -> Tensor:
    """(M, D) -> (M, D), row m through the gated unit of its expert; ``act`` is a key of ACTS."""
    dtype = autocast_dtype(x)  # autocast knows no operators but torch's own
    if dtype is not None:
        x, gate, up, down = (t.to(dtype) for t in (x, gate, up, down))
    return glu_forward(x, gate, up, down, sizes, act)[0]


@torch.library.custom_op("zero2llm::expert_glu", mutates_args=())
def glu_forward(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, sizes: Tensor, act: str
) -> tuple[Tensor, Tensor, Tensor]:
    y, g, u = torch.empty_like(x), x.new_empty(len(x), gate.shape[1]), x.new_empty(len(x), gate.shape[1])
    for e, rows in slices(sizes):
        torch.mm(x[rows], gate[e].t(), out=g[rows])
        torch.mm(x[rows], up[e].t(), out=u[rows])
        torch.mm(ACTS[act][0](g[rows]).mul_(u[rows]), down[e].t(), out=y[rows])
    return y, g, u


@torch.library.custom_op("zero2llm::expert_glu_backward", mutates_args=())
def glu_backward(
    dy: Tensor, x: Tensor, g: Tensor, u: Tensor, gate: Tensor, up: Tensor, down: Tensor, sizes: Tensor, act: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    forward, backward = ACTS[act]
    dx, d_gate, d_up, d_down = torch.empty_like(x), torch.empty_like(gate), torch.empty_like(up), torch.empty_like(down)
    for e, n in enumerate(sizes.tolist()):
        if not n:  # nobody chose it
            for product in (d_gate[e], d_up[e], d_down[e]):
                product.zero_()
    for e, rows in slices(sizes):
        a, dh = forward(g[rows]), dy[rows] @ down[e]
        torch.mm(dy[rows].t(), a * u[rows], out=d_down[e])
        dg, du = backward(dh * u[rows], g[rows]), a.mul_(dh)
        torch.mm(dg.t(), x[rows], out=d_gate[e])
        torch.mm(du.t(), x[rows], out=d_up[e])
        torch.mm(dg, gate[e], out=dx[rows]).addmm_(du, up[e])
    return dx, d_gate, d_up, d_down


@glu_forward.register_fake
def _(x, gate, up, down, sizes, act):
    return torch.empty_like(x), x.new_empty(len(x), gate.shape[1]), x.new_empty(len(x), gate.shape[1])


@glu_backward.register_fake
def _(dy, x, g, u, gate, up, down, sizes, act):
    return tuple(map(torch.empty_like, (x, gate, up, down)))


def _save(ctx, inputs, output) -> None:
    x, gate, up, down, sizes, ctx.act = inputs
    ctx.save_for_backward(x, output[1], output[2], gate, up, down, sizes)
    ctx.set_materialize_grads(False)


def _gradients(ctx, dy: Tensor | None, *unused):
    if dy is None:  # nothing was made of y
        return (None,) * 6
    return *glu_backward(dy.contiguous(), *ctx.saved_tensors, ctx.act), None, None


glu_forward.register_autograd(_gradients, setup_context=_save)
