"""nanoGPT's ckpt.pt: {"model": state dict, "model_args": its shape, "optimizer", "config" ...}, as GPT-2.

    Linear stores (out, in), GPT-2's Conv1D (in, out):   c_attn, c_proj, c_fc transposed
    bias = False has no biases, GPT-2 always:            zeros, and the logits are the same
    GELU(x) = x Phi(x) (erf) since May 2023              activation_function gelu, not GPT-2's tanh form gelu_new

The head is the embedding (one tensor under two names). The vocabulary is padded to a multiple of 64: rows that no token has.

Source: github.com/karpathy/nanoGPT model.py and train.py: the option ``bias`` since cc5444e1 (2023-01-27), nn.GELU since
594068e7 (2023-05-17). A file does not say which GELU it was trained with, except that without ``bias`` it is the old one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from zero2llm.core.lazy import Lazy
from zero2llm.interop.foreign import Foreign
from zero2llm.interop.read_hf import tokenizer_saver
from zero2llm.interop.torch_files import TorchFile, read_torch
from zero2llm.tokenizers.tokenizer import Tokenizer

GELU = {"erf": "gelu", "tanh": "gelu_new"}
TURNED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
ASSUMED = {
    "erf": "gelu erf assumed, as nanoGPT has it since May 2023; give shape gelu=tanh for a checkpoint from before",
    "tanh": "gelu tanh assumed, as nanoGPT had it when model_args lacked bias; give shape gelu=erf to change",
}
NO_PICKLE = (
    "meta.pkl is a pickle, which can run code when it is read: it is not. Write its characters as a tokenizer.json, "
    "tokenizers.Tokenizer(tokenizers.models.BPE(vocab=meta['stoi'], merges=[])) with decoder Fuse() saved, and "
    '{"eos_token": "\\n"} as tokenizer_config.json beside it; give that folder'
)
WTE, WPE = "transformer.wte.weight", "transformer.wpe.weight"


def read_nanogpt(path: Path, tokenizer: Path | None, shape: Mapping[str, int | float | str] | None = None) -> Foreign:
    """tokenizer : a folder with GPT-2's files (vocab.json and merges.txt, or tokenizer.json).  shape : {"gelu": "erf" or "tanh"}.

    Raises ValueError: what `read_torch` refuses, no model_args, or some that the tensors contradict, no tokenizer, a
    meta.pkl instead of one.
    """
    path, found = Path(path), read_torch(path)
    gelu = _gelu(shape or {}, path)
    sizes = _sizes(found, path)
    own, save = _tokenizer(tokenizer, found, path)
    form = gelu or ("erf" if "bias" in found.rest["model_args"] else "tanh")
    tensors = {name: _turned(t) if name.endswith(TURNED) else t for name, t in found.tensors.items()}
    added = {} if "transformer.h.0.ln_1.bias" in tensors else _zero_biases(tensors)
    config = {
        "model_type": "gpt2", "vocab_size": sizes["vocab_size"], "n_embd": sizes["n_embd"], "n_layer": sizes["n_layer"],
        "n_head": sizes["n_head"], "n_positions": sizes["block_size"], "activation_function": GELU[form],
        "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
    }  # fmt: skip
    notes = [*found.notes, *([] if gelu else [ASSUMED[form]])]
    if added:
        notes.append(f"it has no biases (bias = False), GPT-2 always has: {len(added)} of zeros were added, the logits are the same")
    if (spare := sizes["vocab_size"] - own.vocab_size) > 0:
        notes.append(f"{spare} of {sizes['vocab_size']} rows of the embedding stand for no token: the vocabulary was padded")
    return Foreign(str(path), config, tensors | added, save, notes=tuple(notes))


def _gelu(shape: Mapping[str, int | float | str], path: Path) -> str | None:
    if spare := [key for key in shape if key != "gelu"]:
        raise ValueError(f"shape: {', '.join(spare)}: {path} says its shape itself; only gelu may be given")
    gelu = shape.get("gelu")
    if gelu not in (None, *GELU):
        raise ValueError(f"shape: gelu = {gelu!r}: there are {', '.join(GELU)}")
    return gelu


def is_nanogpt(found: TorchFile) -> bool:
    """Whether a file of torch.save is a checkpoint of nanoGPT, by its content."""
    return "model_args" in found.rest and WTE in found.tensors


def _sizes(found: TorchFile, path: Path) -> dict[str, int]:
    """model_args, compared with the tensors; what is None or absent is theirs."""
    args = found.rest.get("model_args")
    if not isinstance(args, dict) or not {WTE, WPE} <= set(found.tensors):
        raise ValueError(f"{path}: no nanoGPT checkpoint: it needs model_args, {WTE} and {WPE}, as nanoGPT's train.py saves them")
    layers = {name.split(".")[2] for name in found.tensors if name.startswith("transformer.h.")}
    seen = {
        "vocab_size": found.tensors[WTE].shape[0], "n_embd": found.tensors[WTE].shape[-1],
        "block_size": found.tensors[WPE].shape[0], "n_layer": len(layers),
        "bias": "transformer.h.0.ln_1.bias" in found.tensors,
    }  # fmt: skip
    for key, value in seen.items():
        if args.get(key) is not None and args[key] != value:
            raise ValueError(f"{path}: model_args say {key} = {args[key]!r}, its tensors say {value}")
    heads = args.get("n_head")
    if not isinstance(heads, int) or heads < 1 or seen["n_embd"] % heads:
        raise ValueError(f"{path}: model_args say n_head = {heads!r}, which does not divide n_embd = {seen['n_embd']}")
    return seen | {"n_head": heads}


def _turned(t: Lazy) -> Lazy:
    return Lazy(t.shape[::-1], t.dtype, lambda: t.load().t())


def _zero_biases(tensors: dict[str, Lazy]) -> dict[str, Lazy]:
    """One for each norm and each matrix of the blocks, which are turned already."""

    def zeros(like: Lazy) -> Lazy:
        return Lazy(like.shape[-1:], like.dtype, lambda: torch.zeros(like.shape[-1], dtype=like.dtype))

    return {
        name.removesuffix("weight") + "bias": zeros(t)
        for name, t in tensors.items()
        if name.endswith((*TURNED, ".ln_1.weight", ".ln_2.weight", ".ln_f.weight"))
    }


def _tokenizer(given: Path | None, found: TorchFile, path: Path) -> tuple[Tokenizer, Callable[[Path], None]]:
    """Read at once, before anything is written."""
    config = found.rest.get("config")
    name = config.get("dataset") if isinstance(config, dict) else None
    of = f", trained on {name!r}," if name else ""
    if given is None:
        raise ValueError(f"{path}: this checkpoint{of} holds no tokenizer; give the folder of its own: GPT-2's vocab.json and merges.txt, or a tokenizer.json")
    given = Path(given)
    if given.suffix == ".pkl" or ((given / "meta.pkl").is_file() and not (given / "tokenizer.json").is_file()):
        raise ValueError(f"{given}: {NO_PICKLE}")
    own = Tokenizer.load(given)
    return own, tokenizer_saver(given) if given.is_dir() else own.save
