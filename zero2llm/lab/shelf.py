"""The presets on the shelf: what each is and what it costs."""

from __future__ import annotations

from zero2llm.core.log import console
from zero2llm.model.cost import flops_per_token, parameters, state_bytes
from zero2llm.model.presets import PRESETS, preset


def show_presets(name: str | None) -> None:
    """All presets in a table, or one with its whole configuration."""
    if name is not None:
        console().print(preset(name))
        return
    from rich.table import Table

    table = Table("preset", "parameters", "used by a token", "GFLOP/token (forward, 1,024)", "state, MiB at 4,096 (bf16)")
    for key in PRESETS:
        cfg = preset(key)
        count, flops, kept = parameters(cfg), flops_per_token(cfg, 1024) / 1e9, state_bytes(cfg, 4096, 2) / 2**20
        active = "" if count["active"] == count["total"] else f"{count['active']:,}"
        table.add_row(key, f"{count['total']:,}", active, f"{flops:.3g}", f"{kept:,.1f}")
    console().print(table)
