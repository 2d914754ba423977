"""What an adapter costs, before training: parameters that learn, and memory for weights, gradients and Adam.

    gradients = learning * bytes of one,   Adam = 2 * gradients (m and v)              activations are not in it
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from zero2llm.adapters.adapted import working
from zero2llm.adapters.projection import Packed
from zero2llm.adapters.targets import stacked

MB = 2**20


@dataclass(frozen=True)
class Row:
    """group : last name of the projections.  trainable, parameters : values.  MB of 2^20 bytes."""

    group: str
    modules: int
    trainable: int
    parameters: int
    weights_mb: float
    gradients_mb: float
    adam_mb: float


def _row(group: str, modules: int, parts: list[nn.Module]) -> Row:
    learning = [p for part in parts for p in part.parameters() if p.requires_grad]
    values, size = sum(p.numel() for p in learning), sum(p.nbytes for p in learning) / MB
    own = sum(t.nbytes for part in parts for t in (*part.parameters(), *part.buffers()))
    return Row(group, modules, values, values, own / MB, size, 2 * size)


def table(model: nn.Module) -> list[Row]:
    """A row for each name of projection that has the active adapter, one for what else learns, and the total.

    The total's ``parameters`` are all of the model's: a packed weight counts the values that it stands for.
    """
    groups: dict[str, list[nn.Module]] = {}
    for path, adapter in working(model):
        groups.setdefault(path.split(".adapters.")[0].rpartition(".")[2], []).append(adapter)
    rows = [_row(group, len(parts), parts) for group, parts in groups.items()]
    total = replace(_row("total", sum(row.modules for row in rows), [model]), parameters=_values(model))
    if others := total.trainable - sum(row.trainable for row in rows):
        size = total.gradients_mb - sum(row.gradients_mb for row in rows)
        rows.append(Row("not adapters", 0, others, others, size, size, 2 * size))
    return [*rows, total]


def _values(model: nn.Module) -> int:
    count = sum(p.numel() for p in model.parameters())
    for m in model.modules():
        if isinstance(m, Packed):
            count += m.in_features * m.out_features - sum(p.numel() for p in m.parameters() if p is not m.bias)
    return count


def lines(model: nn.Module) -> list[str]:
    """The table in Markdown, with a note of what no adapter takes."""
    rows = table(model)
    out = ["| group | modules | trainable | share | weights MB | gradients MB | Adam MB |", "|---|" + "---:|" * 6]
    for row in rows:
        out.append(
            f"| {row.group} | {row.modules} | {row.trainable:,} | {row.trainable / rows[-1].parameters:.2%} "
            f"| {row.weights_mb:,.1f} | {row.gradients_mb:,.1f} | {row.adam_mb:,.1f} |"
        )
    if experts := stacked(model):
        out.append(f"not adapted: {len(experts)} weights with all experts in one tensor, such as {next(iter(experts))}")
    return out
