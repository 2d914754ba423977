"""Exports opened by transformers, and adapters by peft: the second opinion on folders of Hugging Face.

fp32 on the CPU. Only safetensors and JSON are read, from the disk alone, and no code of a folder's own is run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from zero2llm.core.files import read_json
from zero2llm.core.seq import Seq
from zero2llm.interop.checks import Chat, Check
from zero2llm.model.lm import LM
from zero2llm.tokenizers.chat import Message
from zero2llm.tokenizers.tokenizer import Tokenizer

LOCAL = {"local_files_only": True, "trust_remote_code": False}


@dataclass(frozen=True)
class Verification:
    """logit_diff : max |ours - theirs| over all prompts and chats.  logit_std : spread of ours, to judge it by.
    ids_equal, chat_equal : both tokenizers give the same ids for every prompt, the same text and ids for every chat.
    """

    logit_diff: float
    logit_std: float
    ids_equal: bool
    chat_equal: bool


def verify_hf(folder: Path, model: LM, tokenizer: Tokenizer, prompts: Sequence[str], chats: Sequence[list[Message]] = ()) -> Verification:  # fmt: skip
    """Open an exported folder with transformers and compare it with ``model``, in fp32 on the CPU.

    Raises ValueError if transformers is not installed.
    """
    library = _transformers()
    theirs = library.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, **LOCAL).eval()
    other = library.AutoTokenizer.from_pretrained(folder, **LOCAL)
    texts, rendered = [tokenizer.encode(p) for p in prompts], [tokenizer.render(c, True)[0] for c in chats]
    same_ids = texts == [other.encode(p, add_special_tokens=False) for p in prompts]
    template = lambda chat: other.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    same_chat = all(
        tokenizer.render_text(chat, True) == template(chat)
        and ids == other.encode(template(chat), add_special_tokens=False)
        for chat, ids in zip(chats, rendered, strict=True)
    )
    ours = LM.clone(model).cpu().float()
    diff, logits = 0.0, []
    with torch.no_grad():
        for row in (torch.tensor([ids]) for ids in texts + rendered):
            logits.append(ours.logits(ours(row, Seq.rows(*row.shape))[0]))
            diff = max(diff, (logits[-1] - theirs(row, use_cache=False).logits).abs().max().item())
    return Verification(diff, torch.cat(logits, 1).std().item(), same_ids, same_chat)


class HFTokenizer:
    """A folder's tokenizer in transformers: what every reader of such a folder needs."""

    def __init__(self, folder: Path):
        self.tokenizer = _transformers().AutoTokenizer.from_pretrained(folder, **LOCAL)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def render(self, chat: Chat) -> str:
        asked = {"tools": chat.tools, "tokenize": False, "add_generation_prompt": True}
        return self.tokenizer.apply_chat_template(chat.messages, **asked, **dict(chat.names))

    def encode_chat(self, rendered: str) -> list[int]:
        return self.tokenizer.encode(rendered, add_special_tokens=False, split_special_tokens=False)

    def check_control(self, ours: Tokenizer, stops: Sequence[int] = (), wanted_stops: Sequence[int] = ()) -> Check:
        """The tokens that end and pad a text, and those that end an answer where the folder has a place for them."""
        theirs = {"eos": self.tokenizer.eos_token_id, "pad": self.tokenizer.pad_token_id, "stops": sorted(stops)}
        wanted = {"eos": ours.eos_id, "pad": ours.pad_id, "stops": sorted(wanted_stops)}
        faults = [f"{key} {theirs[key]}, ours {wanted[key]}" for key in wanted if theirs[key] != wanted[key]]
        return Check("control tokens", "; ".join(faults) or ", ".join(f"{k} {v}" for k, v in theirs.items() if v != []), "equal", not faults)


class Transformers(HFTokenizer):
    """A folder opened by AutoModelForCausalLM, an adapter by PeftModel on its base.

    base : the base's folder, if ``folder`` holds an adapter. ``lost`` : tensors that the model has and the folder lacks, or
    the other way round: transformers draws the former at random and goes on.
    """

    scale, gives = 1e-4, "logits"

    def __init__(self, folder: Path, base: Path | None = None):
        library = _transformers()
        library.utils.logging.disable_progress_bar()
        super().__init__(folder if base is None or (folder / "tokenizer.json").is_file() else base)
        self.name = f"transformers {library.__version__}"
        asked = {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
        model, info = library.AutoModelForCausalLM.from_pretrained(base or folder, **asked, **LOCAL)
        self.lost = _lost(info)
        eos = model.generation_config.eos_token_id
        self.stops = [eos] if isinstance(eos, int) else list(eos or [])
        model.generation_config = library.GenerationConfig()  # the folder's sampling would change greedy answers
        if base is not None:
            peft = _peft()
            self.name += f", peft {peft.__version__}"
            model = peft.PeftModel.from_pretrained(model, folder)
        self.model = model.eval()

    @torch.no_grad()
    def scores(self, ids: list[int]) -> Tensor:
        return self.model(torch.tensor([ids]), use_cache=False).logits[0].float()

    def greedy(self, ids: list[int], guess: list[int]) -> list[int]:
        row, n = torch.tensor([ids]), len(guess)
        asked = {"attention_mask": torch.ones_like(row), "max_new_tokens": n, "min_new_tokens": n, "do_sample": False, "pad_token_id": 0}
        return self.model.generate(input_ids=row, **asked)[0, len(ids) :].tolist()

    def check_names(self) -> Check:
        return _names(self.lost)


class Classifier(HFTokenizer):
    """A folder opened by AutoModelForSequenceClassification. ``lost`` : as of `Transformers`."""

    def __init__(self, folder: Path):
        library = _transformers()
        library.utils.logging.disable_progress_bar()
        super().__init__(folder)
        self.name = f"transformers {library.__version__}"
        asked = {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
        model, info = library.AutoModelForSequenceClassification.from_pretrained(folder, **asked, **LOCAL)
        self.model, self.lost = model.eval(), _lost(info)

    @torch.no_grad()
    def score(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """(B, T) padded on the right -> (B,)."""
        mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
        return self.model(tokens, attention_mask=mask, use_cache=False).logits[:, 0].float()

    def check_names(self) -> Check:
        return _names(self.lost)


def _lost(info: dict) -> list[str]:
    return sorted(f"{key.removesuffix('_keys')} {name}" for key in ("missing_keys", "unexpected_keys") for name in info[key])


def _names(lost: list[str]) -> Check:
    return Check("tensors", "; ".join(lost[:6]) or "none missing, none left over", "none missing", not lost)


def base_of(folder: Path, told: Path | None) -> Path:
    """The folder of an adapter's base. Raises ValueError if it is not on this disk."""
    if not (folder / "adapter_model.safetensors").is_file():
        raise ValueError(f"{folder}: holds no adapter_model.safetensors; a pickle is not read")
    base = told or read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if not base or not (Path(base) / "config.json").is_file():
        raise ValueError(f"{folder} is an adapter of {str(base)!r}, which is no folder here; say where its base lies (--base)")
    return Path(base)


def _transformers():
    try:
        import transformers
    except ImportError as error:
        raise ValueError("checking an export needs transformers: pip install 'zero2llm[verify]'") from error
    return transformers


def _peft():
    try:
        import peft
    except ImportError as error:
        raise ValueError("checking an adapter needs peft: pip install 'zero2llm[verify]'") from error
    return peft
