"""What reinforcement learning needs of a stage: rollouts in place of a loader, a critic, held-out prompts that are answered."""

from __future__ import annotations

from collections.abc import Sequence

from zero2llm.adapters.wrap import lr_multipliers
from zero2llm.engine.engine import Engine
from zero2llm.engine.sampling import Sampling
from zero2llm.lab.recipe import Recipe
from zero2llm.lab.sets import Sets
from zero2llm.model.heads import add_score
from zero2llm.model.lm import LM
from zero2llm.optim.build import OptimizerSet, build_optim
from zero2llm.parallel.plan import World
from zero2llm.tokenizers.tokenizer import Tokenizer
from zero2llm.train.adapted import Undressed
from zero2llm.train.fit import FitState, Hook, fit
from zero2llm.train.loss import Objective
from zero2llm.train.objectives.reference import Frozen, nothing
from zero2llm.train.rl.answer import Answer
from zero2llm.train.rl.methods import assemble
from zero2llm.train.rl.online_dpo import OnlineDPOConfig
from zero2llm.train.rl.rewards import Mixture
from zero2llm.train.rl.rollout import converse
from zero2llm.train.rl.source import Rollouts
from zero2llm.train.rl.tools import Toolbox
from zero2llm.train.rl.trpo import NoState, TRPOConfig, fit_trpo

VALID_PROMPTS = 64  # answered at each validation where data.valid_rows says nothing


def critic(model: LM, wanted: bool) -> None:
    """PPO's values come from a score head on the same trunk, which begins at 0."""
    if wanted:
        add_score(model)
        model.score.requires_grad_(True)


def online(recipe: Recipe, model: LM, tokenizer: Tokenizer, sets: Sets) -> tuple[Objective, Sets]:
    """The objective, and rollouts in place of the prompts. Call it before a checkpoint is restored: the reference is ``model``.

    Raises ValueError for a reward model or a chat template that cannot serve.
    """
    if recipe.rollout.tools:
        Toolbox(tokenizer, recipe.rollout.tools)
    start = lambda: LM.clone(model) if recipe.adapter is None else Undressed(model)
    compared = None
    if isinstance(recipe.objective, OnlineDPOConfig):
        compared = nothing if recipe.objective.dpo.reference == "none" else Frozen(start())
    shape, objective = assemble(recipe.objective, recipe.rollout.temperature, tokenizer.vocab_size, compared)
    source = Rollouts(
        model, tokenizer, sets.rows[0], Mixture.of(recipe.reward, tokenizer, model.embed.weight.device), shape, recipe.rollout, seed=recipe.seed, world=World.current(),
        reference=start() if shape.reference else None, micro_rows=recipe.fit.micro_rows,
    )  # fmt: skip
    return objective, Sets(source, sets.valid, sets.rows)


def answered(model: LM, objective: Objective, sets: Sets, recipe: Recipe) -> dict[str, float]:
    """Mean reward of greedy answers to held-out prompts, and how many could not be scored. The loss is its negative: lower is better."""
    source, was = sets.train, model.training
    n = min(len(sets.rows[1]), recipe.data.valid_rows or VALID_PROMPTS)
    asked = [sets.rows[1].prompt(g) for g in range(n)]
    engine = Engine(model, source.tokenizer, max_batch=recipe.rollout.max_batch)
    greedy = lambda row, turn, left: Sampling(max_tokens=left, temperature=0, stop=recipe.rollout.stop)
    talks = converse(engine, [ids for ids, _ in asked], recipe.rollout, greedy)
    model.train(was)
    done = [talk.episode(record) for talk, (_, record) in zip(talks, asked, strict=True)]
    answers = [Answer(e.text, e.finish, sum(e.trained), e.record, e.ids, e.calls) for e in done]
    values = [value for value in source.reward(answers) if value is not None]
    if not values:  # no reward is not a reward of 0, which might be the best there was
        return {"failed": 1.0}
    reward = sum(values) / len(values)
    return {"reward": reward, "loss": -reward, "failed": 1 - len(values) / n}


def make_optim(recipe: Recipe, model: LM) -> OptimizerSet | NoState:
    if isinstance(recipe.objective, TRPOConfig):
        return NoState()
    return build_optim(model, recipe.optim, model.width_ratio, lr_multipliers(model))


def train(recipe: Recipe, model: LM, objective: Objective, batches, optim: OptimizerSet | NoState, state: FitState, hooks: Sequence[Hook]) -> None:
    """The loop, or TRPO's own."""
    if isinstance(recipe.objective, TRPOConfig):
        fit_trpo(model, objective, batches, recipe.objective, steps=recipe.fit.steps, micro_rows=recipe.fit.micro_rows, state=state, hooks=hooks)
    else:
        fit(model, objective, batches, optim, recipe.fit, state=state, hooks=hooks)
