"""A folder that transformers, or anyone who follows it, has written: config.json, safetensors, tokenizer.

A name like ``OWNER/NAME`` is looked up on Hugging Face, ``modelscope://OWNER/NAME`` on ModelScope; their libraries keep
the files in their usual cache and go on where a download stopped. Only data is fetched: weights, JSON and tokenizer files,
never code.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from zero2llm.core.files import read_json
from zero2llm.core.lazy import Lazy, open_tensors
from zero2llm.interop.foreign import Foreign
from zero2llm.interop.score import is_classifier
from zero2llm.interop.torch_files import open_bin
from zero2llm.tokenizers.tokenizer import Tokenizer

HUB_NAME = re.compile(r"(modelscope://)?([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
WANTED = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json",
          "chat_template*", "vocab.json", "merges.txt", "*.model", "*.tiktoken")  # fmt: skip
OLD = ("pytorch_model*.bin", "pytorch_model.bin.index.json")  # fetched only where there are no safetensors
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def read_hf(folder: Path) -> Foreign:
    """Raises ValueError naming the file that is missing, damaged or cut short."""
    folder = Path(folder)
    config = read_json(folder / "config.json")
    given = folder / "generation_config.json"
    generation = read_json(given) if given.is_file() else {}
    notes = ("a reward model: it scores texts and writes none; the embedding stands where the vocabulary's head would",) if is_classifier(config) else ()
    return Foreign(str(folder), config, _weights(folder), tokenizer_saver(folder), generation, notes)


def _weights(folder: Path) -> dict[str, Lazy]:
    if unfinished := sorted([*folder.glob("*.incomplete"), *folder.glob("*.part"), *folder.glob("*.aria2")]):
        raise ValueError(f"{folder}: {unfinished[0].name} is a download that has not ended; let it end, or remove it")
    if (folder / "model.safetensors").is_file() or (folder / "model.safetensors.index.json").is_file():
        return open_tensors(folder)
    if (folder / "pytorch_model.bin").is_file() or (folder / "pytorch_model.bin.index.json").is_file():
        return open_bin(folder)
    raise ValueError(f"{folder}: holds no weights; model.safetensors (or its index), or pytorch_model.bin is needed")


def tokenizer_saver(folder: Path) -> Callable[[Path], None]:
    """Writes a folder's tokenizer as tokenizer.json, whatever it was; one that is tokenizer.json stays as it is."""

    def save(to: Path) -> None:
        if not (folder / "tokenizer.json").is_file():
            Tokenizer.load(folder).save(to)
            return
        for name in TOKENIZER_FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, to / name)

    return save


def is_hub_name(source: str) -> bool:
    return HUB_NAME.fullmatch(source) is not None


def download(source: str, endpoint: str | None = None) -> Path:
    """``OWNER/NAME[@REVISION]`` or ``modelscope://OWNER/NAME[@REVISION]`` as a local folder.

    endpoint : a mirror's URL; without it the libraries' own variables hold (HF_ENDPOINT, HF_HOME, MODELSCOPE_CACHE).
    Raises ValueError if the library is absent or the download fails.
    """
    scope, name, revision = HUB_NAME.fullmatch(source).groups()
    more = {} if scope else {"endpoint": endpoint}
    try:
        if scope:
            from modelscope import snapshot_download
        else:
            from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(WANTED), **more))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*WANTED, *OLD], **more))
        return folder
    except ImportError:
        raise ValueError(f"{source}: loading from a hub needs pip install 'zero2llm[hub]'") from None
    except Exception as error:  # the network, a gate, no such repository: each layer has its own kinds
        raise ValueError(f"{source}: no such local path, and the hub gave nothing ({type(error).__name__}: {str(error).splitlines()[0]})") from error
