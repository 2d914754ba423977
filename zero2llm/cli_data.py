"""The verbs of `zero2llm data`: single jobs on files of records."""

from __future__ import annotations

import sys
from functools import update_wrapper
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from zero2llm.data.sources import Source

HELP = {"context_settings": {"help_option_names": ["-h", "--help"], "show_default": True}}
PATH = click.Path(path_type=Path)


def files(verb):
    """The argument FILES and the options that say how to read them; the verb gets them as one `Source`."""

    def with_source(files, encoding, text_documents, delimiter, endpoint, **others):
        from zero2llm.data.sources import Source

        return verb(Source(paths=files, encoding=encoding, text_documents=text_documents, delimiter=delimiter, endpoint=endpoint), **others)

    command = update_wrapper(with_source, verb)
    for add in (
        click.option("--endpoint", help="Mirror of a hub (hf://, modelscope://), as a URL."),
        click.option("--delimiter", help="Between columns of .csv and .tsv files, if not the usual one."),
        click.option("--text-documents", type=click.Choice(["file", "line", "paragraph"]), default="file",
                     help="What a document of a .txt or .md file is."),
        click.option("--encoding", help="Of files that are not UTF-8: gb18030, big5, latin-1 ..."),
        click.argument("files", nargs=-1, required=True, metavar="FILES..."),
    ):  # fmt: skip
        command = add(command)
    return command


field = click.option("--field", help="Field that holds the text. Without it: 'text', or what is said in a conversation.")
skip = click.option("--skip-bad-records", is_flag=True, help="Leave bad records out and list them, instead of stopping at the first.")
overwrite = click.option("--overwrite", is_flag=True, help="Replace files that are there.")
seed = click.option("--seed", default=1, help="Same seed, same choice.")


@click.group(**HELP)
def data() -> None:
    """Look at data, check it, convert it, clean it. FILES: files, folders, globs, archives, hf:// or modelscope:// data sets, or 'embedded'."""


@data.command(**HELP)
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY.SUB=VALUE]...")
@click.option("--overwrite", is_flag=True, help="Replace what the output folder holds, and drop work of another recipe.")
@click.option("--rank", type=int, help="With --world: do only this job's share of the parts that are next, on a shared file system.")
@click.option("--world", type=int, help="How many such jobs there are.")
@click.option("--quiet", is_flag=True, help="No progress display.")
@skip
def run(recipe: str, overrides: tuple[str, ...], overwrite: bool, rank: int | None, world: int | None, quiet: bool,
        skip_bad_records: bool) -> None:  # fmt: skip
    """Clean, filter, deduplicate and split as RECIPE says (a YAML file, or a built-in name: embedded), and report what went where.

    Killed half-way, the same command goes on where it was.
    """
    from zero2llm.lab.data_run import run_part, run_recipe

    if (rank is None) != (world is None):
        raise ValueError("--rank and --world go together")
    changes = [*overrides] + (["skip_bad_records=true"] if skip_bad_records else [])
    if rank is None:
        run_recipe(recipe, changes, overwrite, quiet)
    else:
        run_part(recipe, changes, rank, world)


@data.command(**HELP)
@field
@click.option("--tokenizer", type=PATH, help="Also count tokens: a tokenizer's folder or tokenizer.json.")
@click.option("--languages", is_flag=True, help="Also identify each document's language.")
@click.option("--html", type=PATH, help="Also write a page with charts to this file.")
@skip
@overwrite
@files
def stats(source: Source, field: str | None, tokenizer: Path | None, languages: bool, html: Path | None,
          skip_bad_records: bool, overwrite: bool) -> None:  # fmt: skip
    """Count documents, bytes, tokens, words: a table, and with --html charts of lengths, languages and frequencies."""
    from zero2llm.lab.data_tools import stats_files

    stats_files(source, field, tokenizer, languages, html, skip_bad_records, overwrite)


@data.command(**HELP)
@click.option("--n", default=3, help="Records to show.")
@click.option("--random", "chosen", is_flag=True, help="Choose them at random from all, instead of the first.")
@seed
@click.option("--line", type=int, help="Show only the record that begins on this line (parquet: this row).")
@click.option("--characters", default=600, help="Longest text shown of a field or turn.")
@skip
@files
def inspect(source: Source, n: int, chosen: bool, seed: int, line: int | None, characters: int, skip_bad_records: bool) -> None:
    """Show records readably: schema, fields with their types, text with its blanks as signs, turns by role."""
    from zero2llm.lab.data_look import inspect_files

    inspect_files(source, n, chosen, seed, line, characters, skip_bad_records)


@data.command(**HELP)
@click.option("--schema", help="Require this schema of every record (inspect names a record's).")
@click.option("--report", type=PATH, help="Write every fault to this file: one {file, line, reason} a line.")
@overwrite
@files
def validate(source: Source, schema: str | None, report: Path | None, overwrite: bool) -> None:
    """Check every record: list what is bad with file, line and reason. Exit code 1 if anything is."""
    from zero2llm.lab.data_look import validate_files

    if not validate_files(source, schema, report, overwrite):
        sys.exit(1)


@data.command(**HELP)
@click.option("--out", type=PATH, required=True,
              help="File to write; its name says the format: .jsonl .json .csv .tsv .parquet .txt, also with .gz .zst .xz.")  # fmt: skip
@click.option("--to-schema", help="Change the shape of records: text, messages, conversations, sharegpt, alpaca, prompt-response, "
              "prompt-completion or preference.")  # fmt: skip
@click.option("--drop-fields", default="", show_default=False, metavar="A,B", help="Fields that may be lost.")
@click.option("--field", default="text", help="Field that holds the text, for --to-schema text and .txt.")
@click.option("--separator", help=r"What stands between documents of a .txt file.  [default: \n<|endoftext|>\n]")
@skip
@overwrite
@files
def convert(source: Source, out: Path, to_schema: str | None, drop_fields: str, field: str, separator: str | None,
            skip_bad_records: bool, overwrite: bool) -> None:  # fmt: skip
    """Write all records of FILES into one file of another format or schema. Whatever would be lost is listed and refused."""
    from zero2llm.lab.data_convert import convert_files
    from zero2llm.lab.data_files import BETWEEN

    drop = frozenset(name.strip() for name in drop_fields.split(",") if name.strip())
    between = BETWEEN if separator is None else separator.replace("\\n", "\n").replace("\\t", "\t")
    convert_files(source, out, to_schema, drop, field, between, skip_bad_records, overwrite)


@data.command(**HELP)
@click.option("--out", type=PATH, required=True, help="Folder for train, valid and test.")
@click.option("--valid", default=0.05, help="Share of the validation file; 0 = none.")
@click.option("--test", default=0.0, help="Share of the test file; 0 = none.")
@click.option("--suffix", default=".jsonl", help="Format of the files: .jsonl, .jsonl.gz, .parquet ...")
@field
@seed
@skip
@overwrite
@files
def split(source: Source, out: Path, valid: float, test: float, suffix: str, field: str | None, seed: int,
          skip_bad_records: bool, overwrite: bool) -> None:  # fmt: skip
    """Split by document into train, valid and test: equal texts never part, whatever their order or file.

    Shares are kept on average. Near-duplicates may part: remove them first (a recipe's minhash step).
    """
    from zero2llm.lab.data_tools import split_files

    shares = {name: size for name, size in (("valid", valid), ("test", test)) if size}
    split_files(source, out, shares, suffix, field, seed, skip_bad_records, overwrite)


@data.command(**HELP)
@click.option("--out", type=PATH, required=True, help="File to write; its name says the format.")
@click.option("--n", type=int, help="So many records, any choice equally likely.")
@click.option("--share", type=float, help="Each record with this chance, as 0.01.")
@seed
@skip
@overwrite
@files
def sample(source: Source, out: Path, n: int | None, share: float | None, seed: int, skip_bad_records: bool,
           overwrite: bool) -> None:  # fmt: skip
    """Take records at random from all of FILES, in their order. Memory: the --n records."""
    from zero2llm.lab.data_tools import sample_files

    sample_files(source, out, n, share, seed, skip_bad_records, overwrite)


@data.command(**HELP)
@click.option("--name", required=True, help="What the model shall call itself.")
@click.option("--by", required=True, help="Who made it: a person or a team.")
@click.option("--out", type=PATH, required=True, help="File of conversations to write; the held-out ones go to NAME-valid beside it.")
@click.option("--n", default=240, help="Conversations to train on.")
@click.option("--n-valid", default=40, help="Held-out conversations: other wordings of the same questions.")
@click.option("--lang", "langs", type=click.Choice(["en", "zh"]), multiple=True, default=["en", "zh"], help="May be repeated.")
@click.option("--ordinary", default=0.33, help="Share of questions about other things, so that the model does not say its name to everything.")
@seed
@overwrite
def identity(name: str, by: str, out: Path, n: int, n_valid: int, langs: tuple[str, ...], ordinary: float, seed: int, overwrite: bool) -> None:
    """Write conversations in which the model says who it is: what the recipe sft-identity trains on."""
    from zero2llm.lab.identity import write_identity

    write_identity(out, name, by, n, n_valid, langs, ordinary, seed, overwrite)


@data.command(**HELP)
@click.option("--family", "families", multiple=True, required=True, help="Kind of question, such as recall_hard; may be repeated. A wrong name lists all.")
@click.option("--as", "kind", type=click.Choice(["prompts", "conversations", "preferences"]), default="prompts", help="For RL, for fine-tuning, for preference objectives.")
@click.option("--out", type=PATH, required=True, help="File to write; the held-out questions go to NAME-valid beside it.")
@click.option("--n", default=400, help="Questions to train on.")
@click.option("--n-valid", default=100, help="Held-out questions, with content that training never shows.")
@click.option("--lang", "langs", type=click.Choice(["en", "zh"]), multiple=True, default=["en", "zh"], help="May be repeated.")
@seed
@overwrite
def tasks(families: tuple[str, ...], kind: str, out: Path, n: int, n_valid: int, langs: tuple[str, ...], seed: int, overwrite: bool) -> None:
    """Write generated questions with known answers, for the recipes of reinforcement learning and distillation."""
    from zero2llm.lab.task_files import write_tasks

    write_tasks(out, families, kind, n, n_valid, langs, seed, overwrite)


@data.command(**HELP)
@click.argument("teacher", type=PATH)
@click.argument("files", nargs=-1, required=True, metavar="FILES...")
@click.option("--out", type=PATH, required=True, help="File of conversations to write, .jsonl; a run that was killed goes on in it.")
@click.option("--max-tokens", default=256, help="Longest answer; one that is cut there is left out.")
@click.option("--temperature", default=0.0, help="0 = always the likeliest token.")
@click.option("--top-p", default=1.0, help="Sample from the likeliest tokens that reach this probability together.")
@click.option("--batch", default=64, help="Answers written at a time.")
@click.option("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps.")
@seed
def answers(teacher: Path, files: tuple[str, ...], out: Path, max_tokens: int, temperature: float, top_p: float, batch: int, device: str, seed: int) -> None:
    """Let the model in TEACHER (a checkpoint or a run) answer the questions of FILES: sequence-level distillation.

    FILES hold prompts, or conversations, of which the last answer is written anew. What comes out is for objective sft, of a
    student with any tokenizer.
    """
    from zero2llm.engine.sampling import Sampling

    wanted = Sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    from zero2llm.lab.teach import write_down

    write_down(teacher, files, out, wanted, batch, device)
