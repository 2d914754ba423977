"""What a file is, by its name: "a.JSONL.gz" is .jsonl inside .gz, "b.tgz" is .tar inside .gz."""

from __future__ import annotations

from pathlib import PurePosixPath

TEXT, PAGES = (".txt", ".md"), (".html", ".htm")
LINES, TABLES = (".jsonl", ".ndjson"), (".csv", ".tsv")
SUFFIXES = (*TEXT, *PAGES, *LINES, ".json", *TABLES, ".parquet")
COMPRESSED = (".gz", ".xz", ".bz2", ".zst")
ARCHIVES = (".zip", ".tar")
SHORT = {".tgz": (".tar", ".gz"), ".txz": (".tar", ".xz"), ".tbz2": (".tar", ".bz2"), ".tzst": (".tar", ".zst")}


def kind_of(name: str) -> tuple[str, str]:
    """(kind, compression or empty), both as lower-case suffixes; the kind may be unknown."""
    path = PurePosixPath(name.lower())
    if path.suffix in SHORT:
        return SHORT[path.suffix]
    return (PurePosixPath(path.stem).suffix, path.suffix) if path.suffix in COMPRESSED else (path.suffix, "")


def readable(name: str) -> bool:
    return kind_of(name)[0] in SUFFIXES + ARCHIVES


def hidden(name: str) -> bool:
    """Dot files and what macOS adds to archives: no data that somebody meant."""
    return any(part.startswith(".") and part not in (".", "..") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def known() -> str:
    return f"{', '.join(SUFFIXES)}, also inside {', '.join(COMPRESSED)}, {', '.join(ARCHIVES)}"
