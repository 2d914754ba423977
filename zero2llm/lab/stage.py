"""Run one recipe: from files on disk to a checkpoint. Any stage, started, resumed or overwritten."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.markdown import Markdown
from torch import Tensor

from zero2llm.adapters.adalora import after_step
from zero2llm.adapters.table import lines
from zero2llm.adapters.wrap import unwrap
from zero2llm.core.config import to_dict
from zero2llm.core.device import pick_device
from zero2llm.core.files import make_folder, read_json, write_atomic
from zero2llm.core.log import console
from zero2llm.core.seeds import seed_all
from zero2llm.engine.engine import Engine
from zero2llm.engine.sampling import Sampling
from zero2llm.lab.distill import Known, find_teacher, taught
from zero2llm.lab.objectives import Referred, scores
from zero2llm.lab.online import answered, critic, make_optim, online, train
from zero2llm.lab.preference import referred, score_only
from zero2llm.lab.recipe import Recipe
from zero2llm.lab.sets import Sets, build_sets, build_tokenizer, keep_tokenizer
from zero2llm.model.lm import LM
from zero2llm.parallel.plan import init_world
from zero2llm.tokenizers.shipped import with_template
from zero2llm.tokenizers.tokenizer import Tokenizer
from zero2llm.train.adapted import AdapterRun, dress, weights_hash, with_penalty
from zero2llm.train.checkpoint import Checkpoint, latest
from zero2llm.train.evaluate import evaluate
from zero2llm.train.fit import FitState
from zero2llm.train.hooks import Save, Validate
from zero2llm.train.loss import Objective
from zero2llm.train.objectives.reward import calibration
from zero2llm.train.telemetry import Telemetry


@dataclass
class Result:
    """What a stage leaves behind."""

    run: Path
    checkpoint: Path
    valid: dict[str, float]
    model: LM
    tokenizer: Tokenizer


def open_run(recipe: Recipe, resume: bool, overwrite: bool) -> Path:
    """Claim the output folder. Raises ValueError if it holds something and neither flag is given, or another recipe."""
    run = Path(recipe.out)
    resolved = to_dict(recipe)
    if run.is_dir() and any(run.iterdir()):
        if overwrite:
            shutil.rmtree(run)
        elif (run / "recipe.json").is_file() and not (run / "metrics.jsonl").exists() and not (run / "checkpoints").exists():
            for made in run.glob("tokenizer*"):  # of a start that failed before training: token files know what they were made from
                shutil.rmtree(made)
        elif not resume:
            raise ValueError(f"{run} is not empty; pass --resume to continue that run or --overwrite to replace it")
        elif (run / "recipe.json").is_file():
            old = read_json(run / "recipe.json")
            for key in resolved:
                if old.get(key) != resolved[key] and key not in ("log", "save", "device"):
                    raise ValueError(
                        f"{run}: cannot resume, the recipe's {key!r} was {json.dumps(old.get(key))[:200]} and is now "
                        f"{json.dumps(resolved[key])[:200]}; restore it or pass --overwrite"
                    )
    make_folder(run)
    write_atomic(run / "recipe.json", json.dumps(resolved, indent=1, ensure_ascii=False))
    return run


def start_model(recipe: Recipe, run: Path) -> tuple[LM, Tokenizer, Path, str | None]:
    """Model, tokenizer, the tokenizer's folder, and the parent checkpoint's path."""
    model, tokenizer, folder, parent = _model_and_tokenizer(recipe, run)
    if recipe.chat_template is not None:
        folder = run / "tokenizer-chat"
        keep_tokenizer(with_template(tokenizer, recipe.chat_template), folder)
        tokenizer = Tokenizer.load(folder)
    return model, tokenizer, folder, parent


def _model_and_tokenizer(recipe: Recipe, run: Path) -> tuple[LM, Tokenizer, Path, str | None]:
    if recipe.init is not None:
        parent = Checkpoint.open(recipe.init)
        tokenizer = Tokenizer.load(parent.tokenizer_dir)
        model = parent.load_model()
        if recipe.seq_len > model.cfg.max_len:
            raise ValueError(f"seq_len = {recipe.seq_len} is longer than the checkpoint reads: {model.cfg.max_len}")
        if model.mtp is None and recipe.objective_mtp is not None:
            raise ValueError(f"objective.mtp_weight is given, but {recipe.init} was trained without `mtp`")
        if model.mtp is not None:
            model.mtp.requires_grad_(recipe.objective_mtp is not None)
        score_only(model, recipe.objective.kind == "reward")
        critic(model, recipe.objective.kind == "ppo")
        return model, tokenizer, parent.tokenizer_dir, str(parent.path)
    if recipe.teacher is not None:
        folder = Checkpoint.open(recipe.teacher.path, resuming=False).tokenizer_dir
        tokenizer = Tokenizer.load(folder)
    else:
        tokenizer, folder = build_tokenizer(recipe.tokenizer, recipe.data, run)
    if tokenizer.vocab_size != recipe.model.vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} has {tokenizer.vocab_size} tokens, model.vocab_size is {recipe.model.vocab_size}; make them equal"
        )
    return LM(recipe.model), tokenizer, folder, None


def run_stage(recipe: Recipe, *, resume: bool = False, overwrite: bool = False, quiet: bool = False) -> Result:
    """Train as ``recipe`` says. Under torchrun every rank calls this.

    Raises ValueError for any fault in recipe or data, before training; NonFiniteError if the numbers break.
    """
    world, device = init_world(), pick_device(recipe.device)
    run = open_run(recipe, resume, overwrite) if world.rank == 0 else Path(recipe.out)
    world.barrier()
    seed_all(recipe.seed)
    model, tokenizer, tokenizer_dir, parent = start_model(recipe, run)
    teacher = find_teacher(recipe, model, tokenizer, device)
    adapter = start_adapter(recipe, model, parent, quiet or world.rank > 0)
    sets = build_sets(recipe, tokenizer, run, world)
    optim = make_optim(recipe, model.to(device))
    objective, sets = _objective(recipe, model, tokenizer, sets, parent, run, teacher)
    seed_all(recipe.seed + world.rank)
    state, steps = FitState(), recipe.fit.steps
    if resume and (found := latest(run)):
        state = found.restore(model, optim, sets.train)
        console().print(f"resuming {run} at step {state.step} of {steps}", markup=False)
    if recipe.adapter is not None and recipe.adapter.kind == "adalora":
        optim.after = lambda: after_step(model, state.step + 1, steps)
    telemetry = Telemetry(run, recipe.objective.kind, steps, start_step=state.step, tensorboard=recipe.log.tensorboard, quiet=quiet) if world.rank == 0 else None  # fmt: skip
    countable = recipe.form in ("documents", "conversations") and tokenizer.nature.form != "text"  # bits per byte need bytes
    lengths = torch.tensor(tokenizer.byte_lengths()) if countable else None
    validate = Validate(lambda: _measure(model, objective, sets, recipe, lengths), recipe.eval.every, steps, telemetry)
    what = {"model": model, "tokenizer_dir": tokenizer_dir, "optim": optim, "batches": sets.train, "parent": parent, "adapter": adapter}
    save = Save(run, recipe.save.every_s, recipe.save.keep, steps, validate, **what)
    hooks = (
        [telemetry, validate, _sampler(model, tokenizer, recipe, telemetry), save] if telemetry else [validate, save]
    )
    try:
        if recipe.init is not None and state.step == 0:
            validate.now(state)  # what it was before, so that one sees what training brought
        train(recipe, model, objective, sets.train, optim, state, hooks)
    finally:
        if telemetry:
            telemetry.close()
    final = latest(run)
    return Result(run, final.path, final.manifest["metrics"], unwrap(model).eval(), tokenizer)


def start_adapter(recipe: Recipe, model: LM, parent: str | None, quiet: bool) -> AdapterRun | None:
    """Put the recipe's adapter on the model and say what it costs; None if it trains all weights.

    Raises ValueError for a target that matches nothing, or an ``init`` that is an adapter itself.
    """
    if recipe.adapter is None:
        return None
    if recipe.adapter.kind == "adalora":
        recipe.adapter.check(recipe.fit.steps)
    base = Checkpoint.open(parent, resuming=False)
    if base.adapter() is not None:
        raise ValueError(f"{parent} is an adapter itself; merge it first: zero2llm merge {recipe.init} --out FOLDER")
    run = AdapterRun(config=recipe.adapter, base=str(base.path.resolve()), base_weights=weights_hash(base.manifest), quantize=recipe.quantize, score=scores(recipe.objective))
    dress(model, run)
    if not quiet:
        console().print(Markdown("\n".join(lines(model))))
    return run


def _objective(recipe: Recipe, model: LM, tokenizer: Tokenizer, sets: Sets, parent: str | None, run: Path, teacher: Known | None) -> tuple[Objective, Sets]:
    """What is trained, and the batches as it wants them."""
    if teacher is not None:
        made, sets = taught(recipe, model, tokenizer, sets, run, teacher)
    elif recipe.rollout is not None:
        made, sets = online(recipe, model, tokenizer, sets)
    elif isinstance(recipe.objective, Referred):
        made, sets = referred(recipe, model, sets, parent, run / "data")
    else:
        made = recipe.objective.build()
    return made if recipe.adapter is None else with_penalty(made, recipe.adapter), sets


def _measure(model: LM, objective, sets: Sets, recipe: Recipe, lengths: Tensor | None) -> dict[str, float]:
    if recipe.form == "prompts":
        return answered(model, objective, sets, recipe)
    found = evaluate(model, objective, sets.valid(), micro_rows=recipe.fit.micro_rows, byte_lengths=lengths)
    return calibration(found) if recipe.objective.kind == "reward" else found


def _sampler(model: LM, tokenizer: Tokenizer, recipe: Recipe, telemetry: Telemetry):
    """Samples from the model as it stands, at each validation: what the numbers look like as text."""

    def hook(state: FitState) -> None:
        if not recipe.eval.prompts or (state.step % recipe.eval.every and state.step != recipe.fit.steps):
            return
        for prompt, text in zip(recipe.eval.prompts, sample(model, tokenizer, recipe), strict=True):
            telemetry.log("sample", state.step, {"prompt": prompt, "text": text})
            telemetry.say(f"    {prompt!r} -> {text!r}")

    return hook


def sample(model: LM, tokenizer: Tokenizer, recipe: Recipe) -> list[str]:
    """One completion of each of the recipe's prompts: continued in pretraining, answered as a chat afterwards."""
    if recipe.form == "documents":
        prompts = [[*tokenizer.start_ids, *tokenizer.encode(p)] for p in recipe.eval.prompts]
        sampling = Sampling(max_tokens=recipe.eval.sample_tokens, temperature=0.8, top_p=0.95, seed=recipe.seed)
    else:
        prompts = [
            tokenizer.render([{"role": "user", "content": p}], add_generation_prompt=True)[0]
            for p in recipe.eval.prompts
        ]
        sampling = Sampling(max_tokens=recipe.eval.sample_tokens, temperature=0)
    done = Engine(model, tokenizer).generate(prompts, sampling)
    model.train()
    return [completion.text for completion in done]
