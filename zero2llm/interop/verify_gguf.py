"""A .gguf opened by llama.cpp, through the package xllamacpp: the second opinion on a GGUF export.

llama.cpp's server gives no logits but the log-probabilities of all tokens at the position that comes next, before any
sampling; they are compared as log-softmax, at the last position of every text. Cache in fp32, one thread, no fused
attention. How near its arithmetic can come to ours on the same dequantised weights, in standard deviations of our logits:

    F32          2e-3    GELU and some sums are looked up or kept in 16 bits
    F16, BF16    the activations are rounded to the weights' kind before each product: 2^-11, 2^-9 a product
    Q8_0, Q4_0   the activations are rounded to 8 bits, in blocks of 32, before each product: up to 1/254 of the largest

The last is no small thing: one large activation takes its 31 neighbours' bits away, and of SmolLM2-135M in Q8_0 some
log-probability moves by 0.12 spreads, where the same values as F32 agree to 6e-6. No limit both lets that pass and shows a
wrong export. So a file in blocks is opened twice:

    a copy, every value that the file stores as F32    the limit of F32: settings, values and our reading of both are right
    the file itself                                    0.5 spreads: llama.cpp reads the same values from these blocks

The copy has the file's own metadata and is gone afterwards. What is left to the wide limit are the blocks alone, which
`check_rounding` and the comparison with the package gguf hold too; another order of nibbles or scale is far beyond it.
It runs in a process of its own: where it meets something that it did not expect, llama.cpp ends the process it is in.
Source: ggml-org/llama.cpp, ggml-cpu (vec_dot_type of each kind), tools/server (n_probs).
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from zero2llm.core.files import beside
from zero2llm.interop.checks import Chat, Check
from zero2llm.interop.foreign import some
from zero2llm.interop.gguf.blocks import dequantize, nbytes, quantize
from zero2llm.interop.gguf.file import open_gguf, write_gguf
from zero2llm.interop.gguf.values import Typed
from zero2llm.interop.gguf.vocab_bpe import MERGES
from zero2llm.interop.gguf.vocab_spm import TABLE
from zero2llm.interop.gguf.write import FILE_TYPES, GGUFPlan
from zero2llm.tokenizers.tokenizer import Tokenizer

SCALE = {"F32": 2e-3, "F16": 2e-2, "BF16": 8e-2, "Q8_0": 0.5, "Q4_0": 0.5}
BLOCKS = ("Q8_0", "Q4_0")
LISTS = {MERGES: "string", TABLE: "uint8"}  # whose type does not follow from their values


def kind_of(path: Path) -> str:
    """The kind of the file's coarsest tensors. Raises ValueError for one that we do not write."""
    kinds = {tensor.kind for tensor in open_gguf(path).tensors.values()}
    if strange := sorted(kinds - set(SCALE)):
        raise ValueError(f"{path}: holds {', '.join(strange)}; zero2llm writes {', '.join(SCALE)}, and only such a file can be its export")
    return max(kinds, key=list(SCALE).index)


def check_rounding(planned: GGUFPlan, path: Path) -> Check:
    """The blocks as they should be. An adapter merged elsewhere may differ by a step in a weight or two: hence the 1e-3."""
    found, worst, faults = open_gguf(path).tensors, 0.0, []
    for name, shape, kind, load in planned.tensors:
        values = load().detach().float().numpy()
        rounded = dequantize(quantize(values.reshape(-1, shape[-1] if shape else 1), kind).reshape(-1), kind, tuple(shape))
        stored = found[name].lazy.load().float().numpy() if name in found else np.full(shape, np.inf)
        error = float(np.linalg.norm(stored - rounded) / max(np.linalg.norm(rounded), 1e-30))
        worst = max(worst, error)
        if not error <= 1e-3:
            faults.append(f"{name} ({kind}) {error:.2g}")
    measured = f"max {worst:.2g} of {len(planned.tensors)} tensors" + (f"; too far: {some(faults, 3)}" if faults else "")
    return Check("rounding", measured, "0.001 relative", not faults)


@contextmanager
def in_full(path: Path) -> Iterator[Path]:
    """A copy with the same metadata and every value as F32: beside the file, or where temporary files go; removed at the end.

    Raises ValueError, before it writes, where neither place has room for it.
    """
    file = open_gguf(path)
    size = path.stat().st_size + sum(nbytes(tensor.shape, "F32") for tensor in file.tensors.values())
    copy = beside(_room(path, size) / path.name, "f32")
    meta = {key: value for key, value in file.metadata.items() if not key.startswith("split.")}
    meta |= {key: Typed(kind, meta[key]) for key, kind in LISTS.items() if key in meta} | {"general.file_type": FILE_TYPES["f32"]}
    try:
        write_gguf(copy, meta, [(t.name, t.shape, "F32", t.lazy.load) for t in file.tensors.values()])
        yield copy
    finally:
        copy.unlink(missing_ok=True)


def _room(path: Path, size: int) -> Path:
    """The file's folder first: what lies under the system's is memory on some machines."""
    folders = [path.absolute().parent, Path(tempfile.gettempdir())]
    free = {folder: shutil.disk_usage(folder).free if os.access(folder, os.W_OK) else 0 for folder in folders}
    if fit := [folder for folder in folders if free[folder] >= size]:
        return fit[0]
    has = " and ".join(f"{folder} has {room / 1e6:,.1f} MB" for folder, room in free.items())
    raise ValueError(f"{path}: checking it takes a copy in F32 of {size / 1e6:,.1f} MB for a while, but {has} to write to; make room in one of them")


# Ends when the pipe to it closes, so also with its parent.
SERVER = """
import os, sys
import xllamacpp as lib
p, off = lib.CommonParams(), lib.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
p.model.path, p.n_ctx, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
p.n_batch = p.n_ubatch = p.n_ctx
p.n_parallel, p.use_jinja, p.verbosity, p.flash_attn_type = 1, True, -1, off
p.warmup = p.fit_params = p.ui = False
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = threads
p.cache_type_k = p.cache_type_v = lib.ggml_type.GGML_TYPE_F32
try:
    server = lib.Server(p)
except Exception as error:
    print("refused", " ".join(str(error).split()), flush=True)
    os._exit(1)
print("ready", server.listening_address, flush=True)
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
sys.stdin.read()
os._exit(0)
"""


class LlamaCpp:
    """``room`` : tokens of the longest text with its answer."""

    gives = "log-probs"

    def __init__(self, path: Path, vocab_size: int, room: int):
        self.scale, self.vocab_size, self.name = SCALE[kind_of(path)], vocab_size, "llama.cpp (xllamacpp)"
        if importlib.util.find_spec("xllamacpp") is None:
            raise ValueError("checking a GGUF needs xllamacpp: pip install 'zero2llm[verify]'")
        asked, pipe = [str(path), str(room), str(torch.get_num_threads())], subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, "-c", SERVER, *asked], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
        said = next((line for line in self.process.stdout if line.startswith(("ready ", "refused "))), "")
        if not said.startswith("ready "):
            self.close()
            raise ValueError(f"{path}: llama.cpp cannot open it ({said[8:].strip() or f'it ended with {self.process.returncode}'})")
        self.address = said.split()[1]
        self.open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open  # no proxy leads to this machine

    def close(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()

    def ask(self, path: str, body: dict | None = None) -> dict:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        try:
            with self.open(request, timeout=600) as answer:
                return json.load(answer)
        except OSError as error:
            said = error.read().decode(errors="replace") if isinstance(error, urllib.error.HTTPError) else str(error)
            raise ValueError(f"llama.cpp, asked {path}: {said}") from error

    def encode(self, text: str) -> list[int]:
        return self.ask("/tokenize", {"content": text, "parse_special": False, "add_special": False})["tokens"]

    def encode_chat(self, rendered: str) -> list[int]:
        return self.ask("/tokenize", {"content": rendered, "parse_special": True, "add_special": False})["tokens"]

    def render(self, chat: Chat) -> str:
        body = {"messages": [_spelled(message) for message in chat.messages], "chat_template_kwargs": dict(chat.names)}
        return self.ask("/apply-template", body | ({"tools": chat.tools} if chat.tools else {}))["prompt"]

    def scores(self, ids: list[int]) -> Tensor:
        """What comes next is forced to be a letter: of a token that ends inside a character no probabilities are told."""
        letter = {"logit_bias": [[self.encode("a")[-1], 1000.0]]}
        found = self._complete(ids, 1, self.vocab_size, letter)["completion_probabilities"][0]["top_logprobs"]
        row = torch.full((1, self.vocab_size), -torch.inf)
        row[0, [one["id"] for one in found]] = torch.tensor([one["logprob"] for one in found])
        return row

    def greedy(self, ids: list[int], guess: list[int]) -> list[int]:
        out: list[int] = []
        while len(out) < len(guess):  # it stops at a token that ends an answer: go on behind it
            new = self._complete(ids + out, len(guess) - len(out), 0)["tokens"]
            if not new:
                break
            out += new
        return out

    def _complete(self, ids: list[int], n: int, n_probs: int, more: dict | None = None) -> dict:
        asked = (more or {}) | {"prompt": ids, "n_predict": n, "n_probs": n_probs, "temperature": 0, "samplers": ["temperature"], "repeat_penalty": 1.0}
        return self.ask("/completion", asked | {"cache_prompt": False, "return_tokens": True, "post_sampling_probs": False})

    def check_control(self, ours: Tokenizer) -> Check:
        said = self.ask("/props")
        wanted = {"bos_token": ours.roles.bos, "eos_token": ours.roles.eos}
        faults = [f"{key} {said[key]!r}, ours {value!r}" for key, value in wanted.items() if said[key] != value]
        return Check("control tokens", "; ".join(faults) or ", ".join(f"{k} {v!r}" for k, v in wanted.items()), "equal", not faults)


def _spelled(message: dict) -> dict:
    """As OpenAI's interface has it: the arguments of a call are JSON in a string."""
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        inner = call["function"] | {"arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)}
        calls.append(call | {"function": inner})
    return message | {"tool_calls": calls}
