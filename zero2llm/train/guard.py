"""When a loss or gradient is not a number: find where it began, say so, and stop before the weights are touched."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zero2llm.core.batch import Batch
from zero2llm.train.loss import Objective


class NonFiniteError(RuntimeError):
    """Training met a NaN or an infinity; the message names module, step and batch rows."""


def find_first_bad(model: nn.Module, objective: Objective, micro: Sequence[Batch], step: int) -> str:
    """Run the micro-batches of a failed step again, watching every module. Returns the report."""
    for i, batch in enumerate(micro):
        found: list[str] = []
        handles = [m.register_forward_hook(_watch(name, found)) for name, m in model.named_modules() if name]
        try:
            model.zero_grad()
            loss = objective(model, batch)
            loss.total.backward()
        finally:
            for handle in handles:
                handle.remove()
        rows = f"step {step}, micro-batch {i} of {len(micro)} ({len(batch)} rows)"
        bad_weights = [n for n, p in model.named_parameters() if not torch.isfinite(p).all()]
        if bad_weights:
            return f"{rows}: the weights themselves are not finite, first {bad_weights[0]}; resume from the last checkpoint"
        if found:
            return f"{rows}: first non-finite output in module {found[0]}; tokens of the first row: {batch.tokens[0][:16].tolist()}"
        if not torch.isfinite(loss.total):
            return f"{rows}: every module's output is finite, the loss is {float(loss.total.detach())}"
        bad_grads = [n for n, p in model.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()]
        if bad_grads:
            return (
                f"{rows}: the loss is finite, the gradient of {bad_grads[-1]} is not; lower the learning rate or clip"
            )
    return f"step {step}: gradients overflowed when summed over {len(micro)} micro-batches; lower the learning rate"


def _watch(name: str, found: list[str]):
    def hook(module: nn.Module, args, output) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        if any(isinstance(o, Tensor) and o.is_floating_point() and not torch.isfinite(o).all() for o in outputs):
            found.append(f"{name} ({type(module).__name__})")

    return hook
