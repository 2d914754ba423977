"""The verbs that bring models in and hand them out: import, export, merge, verify-export."""

from __future__ import annotations

import sys
from pathlib import Path

import click

HELP = {"context_settings": {"help_option_names": ["-h", "--help"], "show_default": True}}
PATH = click.Path(path_type=Path)
overwrite = click.option("--overwrite", is_flag=True, help="Replace what is there.")


@click.command("import", **HELP)
@click.argument("source")
@click.option("--out", type=PATH, required=True, help="Folder of the checkpoint.")
@click.option("--tokenizer", type=PATH, help="The tokenizer's folder, for .pth and .pt files, which have none.")
@click.option("--shape", multiple=True, metavar="KEY=VALUE", help="What a .pth file does not show, such as n_heads=8; may be repeated.")
@click.option("--base", type=PATH, help="Checkpoint that an adapter in peft's format belongs to; the two are merged.")
@click.option("--endpoint", help="A mirror of the hub, such as https://hf-mirror.com.")
@overwrite
def import_(source: str, out: Path, tokenizer: Path | None, shape: tuple[str, ...], base: Path | None, endpoint: str | None,
            overwrite: bool) -> None:  # fmt: skip
    """Make somebody else's model a checkpoint: a folder of Hugging Face, a .gguf, minimind's .pth, nanoGPT's ckpt.pt, or OWNER/NAME on a hub."""
    from zero2llm.lab.bring import import_adapter, import_checkpoint, read_shape

    if base is not None:
        import_adapter(Path(source), base, out, overwrite)
    else:
        import_checkpoint(source, out, tokenizer, read_shape(shape), endpoint, overwrite)


@click.command(**HELP)
@click.argument("checkpoint", type=PATH)
@click.option("--out", type=PATH, required=True, help="Folder to write; for gguf a file.")
@click.option("--to", default="hf", help="hf (transformers, vLLM), gguf (llama.cpp, Ollama), peft (an adapter) or onnx.")
@click.option("--type", "kind", help="How a GGUF stores weights: f32, f16 (default), bf16, q8_0 or q4_0.")
@click.option("--base", help="Of an adapter: where its base lies; with --to peft what peft loads it onto.")
@click.option("--model-type", help="The family to write, where several compute the same.")
@overwrite
def export(checkpoint: Path, out: Path, to: str, kind: str | None, base: str | None, model_type: str | None, overwrite: bool) -> None:
    """Write the model in CHECKPOINT in a format that other programs open."""
    from zero2llm.lab.convert import export_checkpoint

    export_checkpoint(checkpoint, out, to, kind=kind, base=base, model_type=model_type, overwrite=overwrite)


@click.command(**HELP)
@click.argument("checkpoint", type=PATH)
@click.option("--out", type=PATH, required=True, help="Folder of the whole checkpoint.")
@click.option("--base", help="Where the base lies, if not where it was trained.")
@overwrite
def merge(checkpoint: Path, out: Path, base: str | None, overwrite: bool) -> None:
    """Make an adapter and its base one whole checkpoint."""
    from zero2llm.lab.convert import merge_checkpoint

    merge_checkpoint(checkpoint, out, base, overwrite)


@click.command("verify-export", **HELP)
@click.argument("exported", type=PATH)
@click.option("--from", "checkpoint", type=PATH, required=True, help="The checkpoint that it was made from.")
@click.option("--base", type=PATH, help="Of an adapter: where its base lies; for peft's format the folder that it is loaded onto.")
@click.option("--prompts", type=PATH, help="A text file, one prompt a line; fewer than eight are filled up with built-in ones.")
@click.option("--tokens", type=click.IntRange(1), default=64, help="Greedy tokens that must agree.")
def verify_export(exported: Path, checkpoint: Path, base: Path | None, prompts: Path | None, tokens: int) -> None:
    """Open an export with the program that it is for, and compare ids, chat, logits and answers with CHECKPOINT's."""
    from zero2llm.lab.verify import verify_export as run

    lines = None if prompts is None else [line for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not run(exported, checkpoint, lines, tokens, base):
        sys.exit(1)


VERBS = (import_, export, merge, verify_export)
