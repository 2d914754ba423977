"""Data sets of Hugging Face and ModelScope, streamed by their own libraries; each shard of a split is a unit.

    hf://OWNER/NAME[/CONFIG][:SPLIT]      hf:///local/folder[:SPLIT]      modelscope://OWNER/NAME[/SUBSET][:SPLIT]

Without a split: all of them, in the data set's order. Code that a data set brings is never run. ``endpoint`` names a
mirror; without it the libraries' own variables hold (HF_ENDPOINT, MODELSCOPE_DOMAIN).
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from zero2llm.data.readers.record import BadRecords, Record, Source, Unit
from zero2llm.data.readers.values import plain

NAME = re.compile(r"(hf|modelscope)://(?:(/[^:]+)|([^/:]+/[^/:]+)(?:/([^/:]+))?)(?::([^/:]+))?")
EXTRA = {"hf": "datasets", "modelscope": "modelscope"}


def is_hub(path: str) -> bool:
    return path.startswith(("hf://", "modelscope://"))


def parse_name(path: str) -> tuple[str, str, str | None, str | None]:
    """(hub, name or local folder, configuration, split). Raises ValueError if it is written otherwise."""
    found = NAME.fullmatch(path)
    if found is None or found[1] == "modelscope" and found[2]:
        raise ValueError(f"{path}: write hf://OWNER/NAME, hf://OWNER/NAME/CONFIG:SPLIT, hf:///folder or modelscope://OWNER/NAME")
    return found[1], found[2] or found[3], found[4], found[5]


def hub_units(path: str, source: Source) -> list[Unit]:
    """Raises ValueError if the data set cannot be opened."""
    found = []
    for split, data in _splits(path, source.endpoint).items():
        found += [Unit(path, split, i, i + 1, source=source) for i in range(_shards(data))]
    return found


def read_hub(unit: Unit, bad: BadRecords) -> Iterator[Record]:
    """Rows of one shard. What the network breaks off is an error even where bad records are skipped: the rest would be missing."""
    data = _splits(unit.file, unit.source.endpoint)[unit.member]
    n = _shards(data)
    if n > 1:
        data = data.shard(num_shards=n, index=unit.start)
    place = unit.place if n == 1 else f"{unit.place}, shard {unit.start}"
    number = unit.line
    rows = iter(data)
    while True:
        try:
            row = next(rows, None)
        except Exception as error:  # the network, a damaged shard: each layer has its own kinds
            raise _failed(f"{place}, row {number}", error) from error
        if row is None:
            return
        try:
            value = plain(row, bad.noted)
        except ValueError as error:
            bad.reject(f"{place}, row {number}", str(error))
        else:
            yield Record(value, place, number)
        number += 1


def _shards(data: Any) -> int:
    return getattr(data, "num_shards", 1)


@lru_cache(maxsize=4)
def _splits(path: str, endpoint: str | None) -> dict[str, Any]:
    """{split: streaming data set}. Media stay the bytes that they are: no decoder runs."""
    hub, name, config, split = parse_name(path)
    if name.startswith("/") and not os.path.isdir(name):
        raise ValueError(f"{path}: no such folder {name}")
    try:
        data = _hugging_face(name, config, split, endpoint) if hub == "hf" else _model_scope(name, config, split, endpoint)
    except ImportError as error:
        raise ValueError(f"{path}: the library {EXTRA[hub]} is missing: pip install 'zero2llm[hub]' ({error})") from None
    except Exception as error:
        raise _failed(path, error) from error
    found = dict(data) if isinstance(data, dict) else {split or "train": data}
    return {key: value.decode(False) if callable(getattr(value, "decode", None)) else value for key, value in found.items()}


def _failed(place: str, error: Exception) -> ValueError:
    lines = str(error).strip().splitlines()
    about = lines[0][:300] if lines else ""
    return ValueError(
        f"{place}: cannot be read ({type(error).__name__}: {about}); without a connection, name a mirror (endpoint: "
        "https://hf-mirror.com) or give the path of a downloaded folder"
    )


def _hugging_face(name: str, config: str | None, split: str | None, endpoint: str | None) -> Any:
    if endpoint is not None:  # the libraries read it once, when they are imported
        os.environ["HF_ENDPOINT"] = endpoint = endpoint.rstrip("/")
        if "huggingface_hub" in sys.modules:
            import huggingface_hub.constants

            huggingface_hub.constants.ENDPOINT = endpoint
            huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    import datasets

    if endpoint is not None:
        datasets.config.HF_ENDPOINT = endpoint
    return datasets.load_dataset(name, config, split=split, streaming=True)


def _model_scope(name: str, subset: str | None, split: str | None, endpoint: str | None) -> Any:
    if endpoint is not None:
        os.environ["MODELSCOPE_DOMAIN"] = endpoint.rstrip("/").rpartition("://")[2]
    from modelscope.msdatasets import MsDataset

    data = MsDataset.load(name, subset_name=subset, split=split, use_streaming=True, trust_remote_code=False)
    return getattr(data, "ds_instance", data)
