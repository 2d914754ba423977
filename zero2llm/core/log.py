"""The console: one place that decides how we speak (rich)."""

from __future__ import annotations

from functools import cache

from rich.console import Console


@cache
def console() -> Console:
    """Standard output. Plain text when piped."""
    return Console(highlight=False)


@cache
def err_console() -> Console:
    return Console(stderr=True, highlight=False)


@cache
def log_once(message: str) -> None:
    """A line that matters once: a slower path was taken, and why."""
    err_console().print(f"note: {message}", style="yellow", markup=False)
