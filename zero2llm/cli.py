"""The command line: verbs, nothing else. Each verb imports what it needs, so `--help` does not wait for torch."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from zero2llm.cli_data import data
from zero2llm.cli_models import VERBS
from zero2llm.cli_tokenizer import tokenizer

HELP = {"context_settings": {"help_option_names": ["-h", "--help"], "show_default": True}}
PATH = click.Path(path_type=Path)


def options(*some):
    """Several options as one decorator, in the order in which --help shows them."""

    def add(command):
        for option in reversed(some):
            command = option(command)
        return command

    return add


def sampling_options(temperature: float):
    return options(
        click.option("--max-tokens", default=128, help="Longest answer, in tokens."),
        click.option("--temperature", default=temperature, help="0 = always the likeliest token."),
        click.option("--top-k", default=0, help="Sample from the k likeliest tokens; 0 = all."),
        click.option("--top-p", default=0.95, help="Sample from the likeliest tokens that reach this probability together."),
        click.option("--min-p", default=0.0, help="Sample from tokens at least this likely, relative to the likeliest."),
        click.option("--repetition-penalty", default=1.0, help="Above 1: tokens already used become less likely."),
        click.option("--seed", type=int, help="Same seed, same answer."),
        click.option("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps."),
    )  # fmt: skip


overrides = click.argument("overrides", nargs=-1, metavar="[KEY.SUB=VALUE]...")
resume = click.option("--resume", is_flag=True, help="Continue the run in the output folder.")
overwrite = click.option("--overwrite", is_flag=True, help="Replace what the output folder holds.")
fast_dev_run = click.option("--fast-dev-run", is_flag=True, help="The same path with a few steps, to see that it works.")


@click.group(**HELP)
def app() -> None:
    """Build a language model from nothing and keep it."""


@app.command(**HELP)
@click.option("--out", type=PATH, default=Path("quickstart"), help="Output folder.")
@fast_dev_run
@overwrite
def quickstart(out: Path, fast_dev_run: bool, overwrite: bool) -> None:
    """From text to a model that you can talk to: tokenizer, pretraining, SFT, DPO, evaluation, export, report."""
    from zero2llm.lab.lifecycle import run_lifecycle

    if not run_lifecycle(out, fast=fast_dev_run, overwrite=overwrite):
        sys.exit(1)


@app.command(**HELP)
@click.argument("recipe", type=PATH)
@overrides
@options(resume, overwrite, fast_dev_run)
@click.option("--skip-bad-records", is_flag=True, help="Count and list bad records instead of stopping.")
@click.option("--quiet", is_flag=True, help="No progress display; metrics.jsonl is still written.")
def train(recipe: Path, overrides: tuple[str, ...], resume: bool, overwrite: bool, fast_dev_run: bool,
          skip_bad_records: bool, quiet: bool) -> None:  # fmt: skip
    """Train one stage as RECIPE says, a YAML file or a built-in name: pretraining, fine-tuning, preferences, RL, distillation."""
    from zero2llm.lab.recipe import load_recipe
    from zero2llm.lab.stage import run_stage

    if resume and overwrite:
        raise ValueError("--resume and --overwrite contradict each other; give one")
    changes = [*overrides] + (["data.skip_bad_records=true"] if skip_bad_records else [])
    if fast_dev_run:
        changes += ["fit.steps=3", "eval.every=2"]
    result = run_stage(load_recipe(recipe, changes), resume=resume, overwrite=overwrite, quiet=quiet)
    click.echo(f"checkpoint: {result.checkpoint}")
    if result.model.cfg.score_head == "reward":
        click.echo(f"let it judge: reward=[{{kind: model, path: {result.run}}}]; for other programs: zero2llm export {result.run} --to hf --out FOLDER")
    else:
        click.echo(f"talk to it: zero2llm chat {result.run}")


@app.command("inspect-batch", **HELP)
@click.argument("recipe", type=PATH)
@overrides
@click.option("--rows", default=2, help="Rows to show.")
@click.option("--html", type=PATH, help="Also write a page to this file.")
def inspect_batch(recipe: Path, overrides: tuple[str, ...], rows: int, html: Path | None) -> None:
    """Show the first batch of RECIPE as the model sees it: tokens, loss mask, labels, documents."""
    from zero2llm.lab.look import inspect_recipe

    inspect_recipe(recipe, list(overrides), rows, html)


@app.command(**HELP)
@click.argument("checkpoint", type=PATH)
@click.option("--prompt", multiple=True, required=True, help="Text to continue; may be repeated for a batch.")
@click.option("--chat", is_flag=True, help="Ask it as a user's message instead of continuing the text.")
@click.option("--stop", multiple=True, help="End the answer before this text; may be repeated.")
@sampling_options(temperature=0.7)
def generate(checkpoint: Path, prompt: tuple[str, ...], chat: bool, stop: tuple[str, ...], device: str, **sampling) -> None:
    """Continue one or several prompts with the model in CHECKPOINT (a checkpoint or a run folder)."""
    from zero2llm.engine.sampling import Sampling

    wanted = Sampling(stop=stop, **sampling)  # a wrong value is refused before torch is loaded
    from zero2llm.lab.talk import generate_texts

    generate_texts(checkpoint, list(prompt), wanted, chat=chat, device=device)


@app.command(**HELP)
@click.argument("checkpoint", type=PATH)
@click.option("--system", help="A system message.")
@sampling_options(temperature=0.0)
def chat(checkpoint: Path, system: str | None, device: str, **sampling) -> None:
    """Talk to the model in CHECKPOINT. Ctrl-C stops the answer; /new starts afresh, /quit or Ctrl-D leaves."""
    from zero2llm.engine.sampling import Sampling

    wanted = Sampling(**sampling)
    from zero2llm.lab.talk import chat_loop

    chat_loop(checkpoint, wanted, system=system, device=device)


@app.command(**HELP)
@click.argument("recipe", type=PATH, required=False)
@overrides
@click.option("--swap", default="mixer=mha,gqa,mqa,window,retnet",
              help="PART=NAME,NAME ...: mixer, ffn, norm, position or wiring; a+b = a hybrid; all = every name.")  # fmt: skip
@click.option("--seeds", default=3, help="Runs of each variant.")
@click.option("--jobs", default=1, help="Runs at a time, on as many parts of the cores.")
@click.option("--task-steps", default=200, help="Training steps for recall and copying; 0 = leave them out.")
@click.option("--overwrite", is_flag=True, help="Do again what is there; without it, only what is missing.")
def compare(recipe: Path | None, overrides: tuple[str, ...], swap: str, seeds: int, jobs: int, task_steps: int,
            overwrite: bool) -> None:  # fmt: skip
    """Which mechanism is better? Same tokens, same parameters, several seeds. RECIPE: the model to vary, if not the built-in one."""
    from zero2llm.lab.arena import compare as run
    from zero2llm.lab.recipe import BUILT_IN, load_recipe

    if recipe is not None and "=" in str(recipe):  # no recipe, only changes to the built-in one
        recipe, overrides = None, (str(recipe), *overrides)
    results = run(found := load_recipe(recipe or BUILT_IN / "compare.yaml", list(overrides)), swap, seeds, jobs, task_steps, overwrite)
    click.echo((Path(found.out) / "results.md").read_text(encoding="utf-8"))
    click.echo(f"charts: {Path(found.out) / 'report.html'}")
    if not results:
        sys.exit(1)


@app.command(**HELP)
@click.argument("parts", nargs=-1, metavar="[mixer|ffn|norm|position|wiring]...")
@click.option("--out", type=PATH, help="Also write the table to this Markdown file.")
@click.option("--compile", "compiling", is_flag=True, help="Fill the column of torch.compile (slow).")
@click.option("--oracles/--no-oracles", default=True, help="Fill the oracle columns: run a checkout's parity tests.")
def conformance(parts: tuple[str, ...], out: Path | None, compiling: bool, oracles: bool) -> None:
    """Run every mechanism through what all must do, and show the measured errors."""
    from zero2llm.lab.conformance import conformance as run

    run(out, list(parts), compiling, oracles)


@app.command(**HELP)
@click.argument("name", required=False)
def presets(name: str | None) -> None:
    """List the built-in architectures with parameters, FLOPs and memory, from nano to their real sizes."""
    from zero2llm.lab.shelf import show_presets

    show_presets(name)


@app.command(**HELP)
@click.option("--data", "of_data", is_flag=True, help="Of data recipes (`zero2llm data run`) instead of training recipes.")
@click.option("--out", type=PATH, help="File to write; default: print.")
def schema(of_data: bool, out: Path | None) -> None:
    """The JSON schema of recipes, for editors that complete and check YAML."""
    from zero2llm.core.config import json_schema
    from zero2llm.core.files import write_atomic
    from zero2llm.data.pipeline.recipe import DataRecipe
    from zero2llm.lab.recipe import recipe_schema

    text = json_schema(DataRecipe) if of_data else recipe_schema()
    if out is None:
        click.echo(text)
    else:
        write_atomic(out, text + "\n")
        click.echo(f"wrote {out}")


for verb in (data, tokenizer, *VERBS):
    app.add_command(verb)


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit code 2."""
    # OpenMP threads that spin while they wait make training five times slower as soon as another program wants a core; those that
    # sleep at once are a fifth slower when none does. Some tens of microseconds of spinning (GNU's OpenMP) are nearly as good in both.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    try:
        app(standalone_mode=False, prog_name="zero2llm")
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, OSError) as error:
        if type(error).__name__ != "NonFiniteError" and not isinstance(error, OSError):
            raise
        sys.exit(print(f"error: {error}", file=sys.stderr) or (2 if isinstance(error, OSError) else 3))
    except (KeyboardInterrupt, click.Abort):
        print("stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
