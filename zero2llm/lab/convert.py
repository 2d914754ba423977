"""Hand a checkpoint to other programs."""

from __future__ import annotations

from pathlib import Path

from zero2llm.core.log import console
from zero2llm.interop.hf import export_hf
from zero2llm.lab.talk import find_checkpoint


def export_checkpoint(checkpoint: Path, out: Path, to: str = "hf", overwrite: bool = False) -> Path:
    """Write ``checkpoint`` in the format ``to``. Raises ValueError for an unknown format, or a model without counterpart."""
    if to != "hf":
        raise ValueError(f"--to {to!r} is not available; this version writes: hf")
    source = find_checkpoint(checkpoint)
    model = source.load_model()
    export_hf(model.state_dict(), model.cfg, source.tokenizer_dir, out, overwrite=overwrite)
    console().print(
        f"wrote {out}: open it with transformers.AutoModelForCausalLM.from_pretrained({str(out)!r})", markup=False
    )
    return out
