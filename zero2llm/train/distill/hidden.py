"""Hidden-state matching: the student's residual stream after some layers should look like the teacher's.

    L = L_logits + weight * sum over pairs (i, j) of  d(h_i, P_j H_j)          h student after block i, H teacher after block j
    mse      |h - P H|^2 / E|P H|^2          1 where h is 0
    cosine   1 - cos(h, P H)

P_j (D_student, D_teacher) is fixed: of one width the identity, else the directions in which H_j has most of its energy (the first
right singular vectors, orthonormal, from one pass over data before training). `kept` says how much of the energy they hold; the
rest the student is not asked for.
Source: 1909.10351 eqs. 7 to 8 (TinyBERT), which learns a map from the student's width to the teacher's along with the student. Here
nothing is learned beside the student: its checkpoints stay plain models, and with the student equal to the teacher L is 0.
Why: a target for every layer and every token, prompts included, where logits only reach the top.
Weighing: a row's mean over its real tokens, times its number of labels, so that `weight` is relative to the loss of one label.
Cost: the teacher's forward pass, which the logits need anyhow, and D_student * D_teacher products a token and pair.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from zero2llm.core.batch import IGNORE, Batch
from zero2llm.core.config import config
from zero2llm.core.files import new_folder, save_tensors
from zero2llm.train.distill.logits import DistillConfig
from zero2llm.train.distill.teacher import Teacher
from zero2llm.train.loss import Loss


@config
class HiddenConfig:
    kind: Literal["hidden"] = "hidden"
    layers: tuple[tuple[int, int], ...] | None = None  # (student's block, teacher's block), from 0; None = evenly over both
    weight: float = 1.0
    match: Literal["mse", "cosine"] = "mse"
    logits: DistillConfig = DistillConfig()  # alpha: 0 = labels and hidden states alone

    def __post_init__(self) -> None:
        if self.layers == () or self.weight <= 0:
            raise ValueError(f"hidden needs layers (null = evenly over both) and weight > 0, not {list(self.layers or ())}, {self.weight}")

    def build(self, teacher: Teacher, projections: dict[int, Projection]) -> HiddenMatch:
        return HiddenMatch(self, teacher, projections)

    def between(self, student_blocks: int, teacher_blocks: int) -> HiddenConfig:
        """With layers named: evenly, the student's block i as far up as the teacher's. Raises ValueError for a layer that there is not."""
        if self.layers is None:
            pairs = tuple((i, max(-(-(i + 1) * teacher_blocks // student_blocks) - 1, 0)) for i in range(student_blocks))
            return dataclasses.replace(self, layers=pairs)
        for i, j in self.layers:
            if not (0 <= i < student_blocks and 0 <= j < teacher_blocks):
                raise ValueError(f"hidden.layers: [{i}, {j}]; the student has {student_blocks} blocks, the teacher {teacher_blocks}, counted from 0")
        return self


@dataclass(frozen=True)
class Projection:
    """matrix : (D_student, D_teacher) or None for the identity.  energy : E|P H|^2.  kept : share of E|H|^2."""

    matrix: Tensor | None
    energy: Tensor
    kept: Tensor

    def __call__(self, h: Tensor) -> Tensor:
        return h if self.matrix is None else F.linear(h, self.matrix.to(h))

    def to(self, device: torch.device | str) -> Projection:
        return Projection(*(None if x is None else x.to(device) for x in (self.matrix, self.energy, self.kept)))


@contextmanager
def tapped(model: nn.Module, blocks: Iterable[int]) -> Iterator[dict[int, Tensor]]:
    """While it lasts, forward passes leave the residual stream after these blocks in the dict that is given."""
    found: dict[int, Tensor] = {}

    def keep(i: int):
        return lambda block, given, made: found.__setitem__(i, made[0])

    handles = [model.blocks[i].register_forward_hook(keep(i)) for i in set(blocks)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def real(batch: Batch) -> Tensor:
    """(B, T) which tokens are no padding."""
    return torch.ones_like(batch.tokens, dtype=torch.bool) if batch.seq.seg is None else batch.seq.seg != 0


def check_width(teacher: nn.Module, width: int) -> int:
    """The teacher's width. Raises ValueError for a student that is wider."""
    own = teacher.cfg.d_model
    if width > own:
        raise ValueError(f"the student is wider ({width}) than its teacher ({own}): hidden states have nothing to match it with; take objective distill")
    return own


@torch.no_grad()
def fit_projections(teacher: nn.Module, batches: Iterable[Batch], blocks: Sequence[int], width: int) -> dict[int, Projection]:
    """Of each of the teacher's ``blocks``, from one pass. Raises ValueError for a student that is wider than its teacher."""
    own = check_width(teacher, width)
    moments, n = {j: torch.zeros(own, own, dtype=torch.float64) for j in blocks}, 0
    for batch in batches:
        with tapped(teacher, blocks) as states:
            teacher(batch.tokens, batch.seq)
        n += int(real(batch).sum())
        for j in moments:
            h = states[j][real(batch)].double().cpu()
            moments[j] += h.T @ h
    return {j: _projection(moment / max(n, 1), width) for j, moment in moments.items()}


def _projection(moment: Tensor, width: int) -> Projection:
    energy = moment.trace()
    if width == len(moment):
        return Projection(None, energy.float(), torch.ones(()))
    values, vectors = torch.linalg.eigh(moment)  # rising
    rows = vectors[:, -width:].T.flip(0)
    sign = rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()  # eigenvectors come with either sign
    held = values[-width:].sum()
    return Projection((rows * sign).float().contiguous(), held.float(), (held / energy).float())


def save_projections(found: dict[int, Projection], folder: Path) -> None:
    with new_folder(folder, overwrite=True) as part:
        named = {f"{j}.{name}": value for j, p in found.items() for name, value in vars(p).items() if value is not None}
        save_tensors(named, part, "projections")


def load_projections(folder: Path) -> dict[int, Projection]:
    t = load_file(folder / "projections.safetensors")
    return {int(k.split(".")[0]): Projection(t.get(k.replace("energy", "matrix")), t[k], t[k.replace("energy", "kept")]) for k in t if k.endswith("energy")}


class HiddenMatch:
    def __init__(self, cfg: HiddenConfig, teacher: Teacher, projections: dict[int, Projection]):
        if cfg.layers is None:
            raise ValueError("hidden.layers: which blocks are compared must be known here; HiddenConfig.between names them")
        self.cfg, self.teacher, self.projections, self.top = cfg, teacher, projections, cfg.logits.build(teacher)

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        keep = batch.labels != IGNORE
        with tapped(model, [i for i, _ in self.cfg.layers]) as ours:
            hidden, aux = model(batch.tokens, batch.seq)
        with tapped(self.teacher.model, [j for _, j in self.cfg.layers]) as theirs:
            said = self.teacher(batch, keep)
        top = self.top.loss(model, hidden, aux, batch, said if self.cfg.logits.alpha else None)
        away = sum(row_means(self.apart(ours[i], theirs[j], j), real(batch)) for i, j in self.cfg.layers)
        weighed = (away * keep.sum(1)).sum()
        return Loss(top.total + self.cfg.weight * weighed, top.count, top.metrics | {"hidden": (weighed.detach(), top.count)})

    def apart(self, ours: Tensor, theirs: Tensor, block: int) -> Tensor:
        """(B, T) distance of the student's state from the teacher's."""
        known = self.projections[block]
        h, goal = ours.to(torch.promote_types(ours.dtype, torch.float32)), known(theirs)
        goal = goal.to(h.dtype)
        if self.cfg.match == "cosine":
            return 1 - F.cosine_similarity(h, goal, dim=-1)
        return (h - goal).square().sum(-1) / known.energy.to(h)


def row_means(x: Tensor, mask: Tensor) -> Tensor:
    """(B,) means of (B, T) over the mask; 0 for a row without any."""
    return (x * mask).sum(1) / mask.sum(1).clamp(min=1)
