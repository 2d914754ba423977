"""The command line: verbs, nothing else. Each verb imports what it needs, so `--help` does not wait for torch."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
                  help="Build a language model from nothing and keep it.")  # fmt: skip
tokenizer_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Train a tokenizer, or see what one does to a text."
)
app.add_typer(tokenizer_app, name="tokenizer")

Overrides = Annotated[list[str] | None, typer.Argument(help="Changes to the recipe: key.sub=value ...")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in the output folder.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what the output folder holds.")]
FastDevRun = Annotated[
    bool, typer.Option("--fast-dev-run", help="The same path with a few steps, to see that it works.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
MaxTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(help="0 = always the likeliest token.")]
TopK = Annotated[int, typer.Option(help="Sample from the k likeliest tokens; 0 = all.")]
TopP = Annotated[float, typer.Option(help="Sample from the likeliest tokens that reach this probability together.")]
MinP = Annotated[float, typer.Option(help="Sample from tokens at least this likely, relative to the likeliest.")]
Penalty = Annotated[
    float, typer.Option("--repetition-penalty", help="Above 1: tokens already used become less likely.")
]
Stop = Annotated[list[str] | None, typer.Option(help="End the answer before this text; may be repeated.")]
Seed = Annotated[int | None, typer.Option(help="Same seed, same answer.")]


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("quickstart"),
    fast_dev_run: FastDevRun = False,
    overwrite: Overwrite = False,
) -> None:
    """From text to a model that you can talk to: tokenizer, pretraining, SFT, DPO, evaluation, export, report."""
    from zero2llm.lab.lifecycle import run_lifecycle

    if not run_lifecycle(out, fast=fast_dev_run, overwrite=overwrite):
        raise typer.Exit(1)


@app.command()
def train(
    recipe: Path,
    overrides: Overrides = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    fast_dev_run: FastDevRun = False,
    skip_bad_records: Annotated[
        bool, typer.Option("--skip-bad-records", help="Count and list bad records instead of stopping.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="No progress display; metrics.jsonl is still written.")
    ] = False,
) -> None:
    """Train one stage as RECIPE (a YAML file) says: pretraining, SFT or DPO."""
    from zero2llm.lab.recipe import load_recipe
    from zero2llm.lab.stage import run_stage

    if resume and overwrite:
        raise ValueError("--resume and --overwrite contradict each other; give one")
    changes = list(overrides or []) + (["data.skip_bad_records=true"] if skip_bad_records else [])
    if fast_dev_run:
        changes += ["fit.steps=3", "eval.every=2"]
    result = run_stage(load_recipe(recipe, changes), resume=resume, overwrite=overwrite, quiet=quiet)
    typer.echo(f"checkpoint: {result.checkpoint}")
    typer.echo(f"talk to it: zero2llm chat {result.run}")


@app.command("inspect-batch")
def inspect_batch(
    recipe: Path,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(help="Rows to show.")] = 2,
    html: Annotated[Path | None, typer.Option(help="Also write a page to this file.")] = None,
) -> None:
    """Show the first batch of RECIPE as the model sees it: tokens, loss mask, labels, documents."""
    from zero2llm.lab.look import inspect_recipe

    inspect_recipe(recipe, list(overrides or []), rows, html)


@app.command()
def generate(
    checkpoint: Path,
    prompt: Annotated[list[str], typer.Option(help="Text to continue; may be repeated for a batch.")],
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask it as a user's message instead of continuing the text.")
    ] = False,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.7,
    top_k: TopK = 0,
    top_p: TopP = 0.95,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    stop: Stop = None,
    seed: Seed = None,
    device: Device = "auto",
) -> None:
    """Continue one or several prompts with the model in CHECKPOINT (a checkpoint or a run folder)."""
    from zero2llm.engine.sampling import Sampling
    from zero2llm.lab.talk import generate_texts

    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
                        repetition_penalty=repetition_penalty, stop=tuple(stop or ()), seed=seed)  # fmt: skip
    generate_texts(checkpoint, prompt, sampling, chat=chat, device=device)


@app.command()
def chat(
    checkpoint: Path,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 0.95,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    device: Device = "auto",
) -> None:
    """Talk to the model in CHECKPOINT. Ctrl-C stops the answer; /new starts afresh, /quit or Ctrl-D leaves."""
    from zero2llm.engine.sampling import Sampling
    from zero2llm.lab.talk import chat_loop

    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
                        repetition_penalty=repetition_penalty, seed=seed)  # fmt: skip
    chat_loop(checkpoint, sampling, system=system, device=device)


@app.command()
def export(
    checkpoint: Path,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    to: Annotated[str, typer.Option(help="Format: hf (a folder that transformers and vLLM open).")] = "hf",
    overwrite: Overwrite = False,
) -> None:
    """Write the model in CHECKPOINT in a format that other programs open."""
    from zero2llm.lab.convert import export_checkpoint

    export_checkpoint(checkpoint, out, to, overwrite)


@app.command()
def compare(
    recipe: Annotated[Path | None, typer.Argument(help="Recipe of the model to vary; default: the built-in one.")] = None,
    overrides: Overrides = None,
    swap: Annotated[str, typer.Option(help="PART=NAME,NAME ...: mixer, ffn, norm, position or wiring; a+b = hybrid; all.")] = "mixer=mha,gqa,mqa,window,retnet",
    seeds: Annotated[int, typer.Option(help="Runs of each variant.")] = 3,
    jobs: Annotated[int, typer.Option(help="Runs at a time; the cores are shared among them.")] = 1,
    task_steps: Annotated[int, typer.Option(help="Training steps for recall and copying; 0 = leave them out.")] = 300,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Do again what is there; default: only what is missing.")] = False,
) -> None:  # fmt: skip
    """Which mechanism is better? Same tokens, same parameters, several seeds: table, charts, one page. Resumable."""
    from zero2llm.lab.arena import compare as run
    from zero2llm.lab.recipe import BUILT_IN, load_recipe

    changes = list(overrides or [])
    if recipe is not None and "=" in str(recipe):  # no recipe, only changes to the built-in one
        recipe, changes = None, [str(recipe), *changes]
    found = load_recipe(recipe or BUILT_IN / "compare.yaml", changes)
    results = run(found, swap, seeds, jobs, task_steps, overwrite)
    typer.echo((Path(found.out) / "results.md").read_text(encoding="utf-8"))
    typer.echo(f"charts: {Path(found.out) / 'report.html'}")
    if not results:
        raise typer.Exit(1)


@app.command()
def conformance(
    parts: Annotated[list[str] | None, typer.Argument(help="mixer, ffn, norm, position, wiring; default: all.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the table to this Markdown file.")] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Fill the column of torch.compile (slow).")] = False,
    oracles: Annotated[bool, typer.Option(help="Run the parity tests of the source checkout for the oracle columns.")] = True,
) -> None:  # fmt: skip
    """Run every mechanism through what all must do, and show the measured errors."""
    from zero2llm.lab.conformance import conformance as run

    run(out, list(parts or []), compile, oracles)


@app.command()
def presets(name: Annotated[str | None, typer.Argument(help="One preset, in detail.")] = None) -> None:
    """List the built-in architectures with parameters, FLOPs and memory, from nano to their real sizes."""
    from zero2llm.lab.look import show_presets

    show_presets(name)


@app.command()
def schema(out: Annotated[Path | None, typer.Option(help="File to write; default: print.")] = None) -> None:
    """The JSON schema of recipes, for editors that complete and check YAML."""
    from zero2llm.core.files import write_atomic
    from zero2llm.lab.recipe import recipe_schema

    if out is None:
        typer.echo(recipe_schema())
    else:
        write_atomic(out, recipe_schema() + "\n")
        typer.echo(f"wrote {out}")


@tokenizer_app.command("train")
def tokenizer_train(
    files: Annotated[list[str], typer.Argument(help="Text files, folders, globs, or 'embedded'.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    vocab_size: Annotated[int, typer.Option(help="Entries, special tokens included.")] = 4096,
    split: Annotated[str, typer.Option(help="How text is cut before merging: qwen2, llama3 or gpt2.")] = "qwen2",
    engine: Annotated[
        str, typer.Option(help="handwritten (pure Python) or library (tokenizers, for large text).")
    ] = "handwritten",
    field: Annotated[str, typer.Option(help="Field of JSON records that holds the text.")] = "text",
    overwrite: Overwrite = False,
) -> None:
    """Train a byte-level BPE tokenizer."""
    from zero2llm.lab.look import train_tokenizer

    train_tokenizer(files, out, vocab_size, split, engine, field, overwrite)


@tokenizer_app.command("encode")
def tokenizer_encode(tokenizer: Path, text: str) -> None:
    """Show the tokens of TEXT: id, readable form, bytes. TOKENIZER is a folder or a checkpoint."""
    from zero2llm.lab.look import show_tokens

    show_tokens(tokenizer, text)


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit code 2."""
    # OpenMP threads that spin while they wait make training five times slower as soon as another program wants a core
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app(standalone_mode=True)
    except ValueError as error:
        faults = error.errors() if type(error).__name__ == "ValidationError" else []  # pydantic's, of an option's value
        text = "; ".join(fault["msg"].removeprefix("Value error, ") for fault in faults) or str(error)
        print(f"error: {text}", file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, OSError) as error:
        if type(error).__name__ != "NonFiniteError" and not isinstance(error, OSError):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, OSError) else 3)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
