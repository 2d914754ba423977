"""What preference objectives need of a stage: the reference, its stored sums, KTO's reference point, a score head."""

from __future__ import annotations

from pathlib import Path

from zero2llm.core.device import pick_dtype
from zero2llm.core.log import console
from zero2llm.data.judged_rows import JudgedRows
from zero2llm.lab.recipe import Recipe
from zero2llm.lab.sets import Sets
from zero2llm.model.heads import add_score
from zero2llm.model.lm import LM
from zero2llm.parallel.plan import World
from zero2llm.train.adapted import Undressed, weights_hash
from zero2llm.train.checkpoint import Checkpoint
from zero2llm.train.loss import Objective
from zero2llm.train.objectives.kto import KTOConfig, WithReferencePoint
from zero2llm.train.objectives.reference import Frozen, Reference, nothing, precompute, stored

HEALTHY = (1.0, 4 / 3)  # n_D lambda_D / (n_U lambda_U), by KTO's authors


def score_only(model: LM, wanted: bool) -> None:
    """A reward model is trained through a score head, which begins at 0, and its vocabulary's head has nothing to learn;
    any other objective leaves a score head alone, and then the model is no reward model any more."""
    if wanted or model.score is not None:
        add_score(model, "reward" if wanted else True)
        model.score.requires_grad_(wanted)
    if wanted and model.head is not None:
        model.head.requires_grad_(False)


def referred(recipe: Recipe, model: LM, sets: Sets, parent: str, folder: Path) -> tuple[Objective, Sets]:
    """An objective that compares with the model as it begins, and the batches as it wants them.

    Call it before a checkpoint is restored: the reference is made from ``model``. Under torchrun every rank calls.
    """
    reference = _reference(recipe, model, sets, parent, folder)
    objective = recipe.objective.build(reference)
    if not isinstance(recipe.objective, KTOConfig):
        return objective, sets
    _tell_balance(recipe.objective, sets.rows[0])
    how = {"micro_rows": recipe.fit.micro_rows, "dtype": _dtype(recipe, model)}
    train = WithReferencePoint(sets.train, model, reference, world=World.current(), **how)
    valid = lambda: WithReferencePoint(sets.valid(), model, reference, world=World(), **how)  # every rank reads all of it
    return objective, Sets(train, valid, sets.rows)


def _dtype(recipe: Recipe, model: LM):
    return pick_dtype(recipe.fit.dtype, model.embed.weight.device)


def _reference(recipe: Recipe, model: LM, sets: Sets, parent: str, folder: Path) -> Reference:
    """The base under an adapter, otherwise a copy of the model; or its sums, and then nothing of it stays in memory."""
    if recipe.objective.reference == "none":
        return nothing
    if recipe.objective.reference == "model":
        return Frozen(LM.clone(model) if recipe.adapter is None else Undressed(model))
    weights = f"{weights_hash(Checkpoint.open(parent, resuming=False).manifest)} {recipe.quantize}"
    if recipe.adapter is not None:
        start: Reference = Frozen(Undressed(model))
    else:
        start = Frozen(LM.clone(model))
    how = {"micro_rows": recipe.fit.micro_rows, "device": model.embed.weight.device, "dtype": _dtype(recipe, model)}
    made = {precompute(start, rows, folder, weights, **how) for rows in sets.rows}
    if World.current().rank == 0:
        for old in set(folder.glob("reference-*.safetensors")) - made:
            old.unlink()
    return stored


def _tell_balance(cfg: KTOConfig, rows: JudgedRows) -> None:
    good = sum(map(bool, rows.labels))
    found = cfg.balance(good, len(rows) - good)
    if World.current().rank == 0 and not HEALTHY[0] - 1e-9 <= found <= HEALTHY[1] + 1e-9:
        console().print(
            f"note: {good} good and {len(rows) - good} bad answers: n_D lambda_D / (n_U lambda_U) = {found:.2f} lies outside "
            "1 to 4/3; change objective.desirable_weight or objective.undesirable_weight",
            style="yellow", markup=False,
        )  # fmt: skip
