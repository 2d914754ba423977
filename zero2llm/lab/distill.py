"""What distillation needs of a stage: a teacher or what was kept of it, projections, answers that the student writes itself."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from rich.progress import Progress

from zero2llm.core.device import give_back_memory, pick_dtype
from zero2llm.core.log import console, err_console
from zero2llm.data.mixture import MixtureRows
from zero2llm.data.rows import Rows
from zero2llm.lab.recipe import Recipe
from zero2llm.lab.sets import Sets, loaders
from zero2llm.model.lm import LM
from zero2llm.parallel.plan import World
from zero2llm.tokenizers.tokenizer import Tokenizer
from zero2llm.train.distill.answers import AnswerPrompts, OwnAnswers
from zero2llm.train.distill.cache import CachedRows, write_cache
from zero2llm.train.distill.hidden import (
    HiddenConfig,
    HiddenMatch,
    check_width,
    fit_projections,
    load_projections,
    save_projections,
)
from zero2llm.train.distill.logits import DistillConfig
from zero2llm.train.distill.minillm import MiniLLMConfig
from zero2llm.train.distill.teacher import Teacher, load_teacher
from zero2llm.train.loss import Objective

LOOKED_AT = 256  # rows that projections are fitted on


Known = tuple[Teacher, str]  # a teacher, and the hash of its weights


def find_teacher(recipe: Recipe, model: LM, tokenizer: Tokenizer, device: torch.device) -> Known | None:
    """The recipe's teacher, if it has one. Raises ValueError, before any data is read, for one that cannot teach this student."""
    if recipe.teacher is None:
        return None
    teacher, weights = load_teacher(recipe.teacher.path, tokenizer, device)
    if recipe.seq_len > teacher.model.cfg.max_len:
        raise ValueError(f"seq_len = {recipe.seq_len} is longer than the teacher {recipe.teacher.path} reads: {teacher.model.cfg.max_len}")
    if isinstance(recipe.objective, HiddenConfig):
        recipe.objective.between(len(model.blocks), len(teacher.model.blocks))
        check_width(teacher.model, model.cfg.d_model)
    if isinstance(recipe.objective, MiniLLMConfig):
        recipe.objective.sampler(model, teacher, recipe.rollout.temperature)
    return teacher, weights


def taught(recipe: Recipe, model: LM, tokenizer: Tokenizer, sets: Sets, run: Path, known: Known) -> tuple[Objective, Sets]:
    """The objective, and the batches as it wants them."""
    teacher, weights = known
    if isinstance(recipe.objective, DistillConfig):
        if recipe.teacher.cache is None:
            return recipe.objective.build(teacher), sets
        return cached(recipe, recipe.objective, teacher, weights, sets)
    if isinstance(recipe.objective, HiddenConfig):
        return matching(recipe, recipe.objective, model, teacher, weights, sets, run), sets
    return recipe.objective.build(teacher), on_policy(recipe, model, teacher, tokenizer, sets)


def cached(recipe: Recipe, cfg: DistillConfig, teacher: Teacher, weights: str, sets: Sets) -> tuple[Objective, Sets]:
    """Training and held-out rows with what the teacher says of them, and nothing of the teacher itself in memory."""
    device = teacher.model.embed.weight.device
    how = {"k": cfg.top_k, "temperature": cfg.temperature, "micro_rows": recipe.fit.micro_rows, "device": device}
    how["dtype"], found = pick_dtype(recipe.fit.dtype, device), []
    with Progress(console=err_console(), transient=True, disable=World.current().rank > 0) as bar:

        def kept(rows: Rows, name: str) -> CachedRows:
            task = bar.add_task(f"the teacher reads {name} rows", total=len(rows))
            tell = lambda done, total: bar.update(task, completed=done, total=total)
            return write_cache(teacher, weights, rows, Path(recipe.teacher.cache), tell=tell, **how)

        for name, rows in zip(("training", "held-out"), sets.rows, strict=True):
            mixed = isinstance(rows, MixtureRows)
            found.append(rows.over([kept(source, name) for source in rows.sources]) if mixed else kept(rows, name))
    parts = found[0].sources if isinstance(found[0], MixtureRows) else found[:1]
    for part in parts if World.current().rank == 0 else ():
        about = part.summary()
        console().print(
            f"teacher kept in {part.folder}: top {cfg.top_k} of {about['tokens']:,} tokens, {about['bytes'] / 1e6:,.1f} MB; "
            f"all others together have probability {about['tail']:.2g}", markup=False, soft_wrap=True,
        )  # fmt: skip
    teacher.model.to("meta")  # whoever still holds it holds no weights
    give_back_memory()
    return cfg.build(parts[0].teacher), loaders(recipe, *found, World.current())


def matching(
    recipe: Recipe, cfg: HiddenConfig, model: LM, teacher: Teacher, weights: str, sets: Sets, run: Path
) -> HiddenMatch:
    """Projections are fitted once, on the first rows of training, and kept in the run."""
    cfg, device = cfg.between(len(model.blocks), len(teacher.model.blocks)), model.embed.weight.device
    rows, wanted = sets.rows[0], sorted({j for _, j in cfg.layers})
    about = [weights, wanted, model.cfg.d_model, rows.identity, recipe.seed]
    folder = run / "data" / f"projections-{hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]}"
    if World.current().rank == 0 and not folder.is_dir():
        numbers = [(0, i) for i in range(min(len(rows), LOOKED_AT))]
        parts = [numbers[i : i + recipe.fit.micro_rows] for i in range(0, len(numbers), recipe.fit.micro_rows)]
        look = lambda some: rows.batch(some).to(device)
        save_projections(fit_projections(teacher.model, map(look, parts), wanted, model.cfg.d_model), folder)
    World.current().barrier()
    found = {j: projection.to(device) for j, projection in load_projections(folder).items()}
    if World.current().rank == 0:
        kept = ", ".join(f"{i} <- {j}: {float(found[j].kept):.0%}" for i, j in cfg.layers)
        console().print(f"student's blocks and the teacher's, with the share of its energy that fits in: {kept}", markup=False, soft_wrap=True)
    return cfg.build(teacher, found)


def on_policy(recipe: Recipe, model: LM, teacher: Teacher, tokenizer: Tokenizer, sets: Sets) -> Sets:
    """Answers that the student writes, or it and its teacher, to the questions of the data; some steps take the data's own."""
    cfg, writer, share = recipe.objective, model, 1.0
    if isinstance(cfg, MiniLLMConfig):
        writer = cfg.sampler(model, teacher, recipe.rollout.temperature)
    else:
        share = cfg.share
    prompts = AnswerPrompts(sets.rows[0].shards, recipe.seed)
    reach = min(model.cfg.max_len, teacher.model.cfg.max_len)
    if prompts.longest + recipe.rollout.max_tokens > reach:
        raise ValueError(
            f"rollout.max_tokens = {recipe.rollout.max_tokens} after the longest question of {prompts.longest} tokens is more than "
            f"student and teacher read: {reach}; lower it, or seq_len"
        )
    source = OwnAnswers(
        writer, tokenizer, prompts, recipe.rollout, seed=recipe.seed, world=World.current(), share=share,
        data=sets.train if share < 1 else None,
    )  # fmt: skip
    return Sets(source, sets.valid, sets.rows)
