"""A recipe: one YAML file that says everything about one training stage. Every key is used or refused."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from zero2llm.adapters.config import AdapterConfig
from zero2llm.core.config import config, json_schema, parse, read_yaml, to_dict
from zero2llm.lab.objectives import BATCH_TOKENS, ObjectiveConfig, check_objective, check_rollout
from zero2llm.model.presets import PRESETS, preset
from zero2llm.model.spec import ModelConfig
from zero2llm.optim.adamw import AdamWConfig
from zero2llm.optim.build import OptimConfig
from zero2llm.train.fit import FitConfig
from zero2llm.train.objectives.clm import CLMConfig
from zero2llm.train.rl.rewards import RuleConfig
from zero2llm.train.rl.rollout import RolloutConfig

BUILT_IN = Path(__file__).parent.parent / "recipes"


@config
class TokenizerConfig:
    """An existing tokenizer folder (``path``), or one to be trained on the training text."""

    path: str | None = None
    vocab_size: int = 4096
    split: Literal["gpt2", "llama3", "qwen2"] = "qwen2"
    kind: Literal["bpe", "wordpiece", "unigram"] = "bpe"
    engine: Literal["handwritten", "library", "rustbpe"] = "handwritten"
    sample_bytes: int | None = 4_000_000  # text the merges are learned from; null = all of it


@config
class PartConfig:
    """One source of a mixture; weights are relative to each other."""

    name: str
    train: tuple[str, ...]
    weight: float = 1.0


@config
class TurnConfig:
    """A curriculum's turn: from this share of all steps on, sources come with these weights (one not named: 0)."""

    at: float
    weights: dict[str, float]


@config
class DataConfig:
    """Files, folders, globs, ``embedded`` / ``embedded:NAME``, or a folder of token files. The objective decides which
    records are expected. ``mixture`` in place of ``train``: several sources with weights."""

    train: tuple[str, ...] = ()
    mixture: tuple[PartConfig, ...] = ()
    curriculum: tuple[TurnConfig, ...] = ()
    packing: Literal["concat", "best_fit", "stored"] = "concat"  # of documents; rows.py says what each costs
    workers: int | None = None  # processes that encode text; None = one a core
    valid: tuple[str, ...] | None = None  # None = a share of the training documents, chosen by their content
    valid_fraction: float = 0.01
    valid_rows: int | None = None  # at most this many rows are evaluated; None = all
    field: str = "text"
    skip_bad_records: bool = False
    sft_schema: Literal["conversation", "single-turn", "agent"] | None = None  # None = told by each record's own keys
    template_names: dict[str, Any] = dataclasses.field(default_factory=dict)  # what the chat template may read: {keep_thinking: true}
    train_thinking: bool = True  # whether what stands between <think> and </think> is part of the loss
    train_on: Literal["assistant", "last", "all"] = "assistant"  # SFT: every answer, the last alone, or every token
    too_long: Literal["turns", "start", "refuse"] = "turns"  # SFT: what goes of a conversation longer than seq_len (data/fitting.py)
    max_documents: int | None = None

    def __post_init__(self) -> None:
        if bool(self.train) == bool(self.mixture) or any(not part.train for part in self.mixture):
            raise ValueError("data.train is empty: give it, or data.mixture with a list train for each source (not both)")
        names = [part.name for part in self.mixture]
        if len(set(names)) < len(names) or not all(re.fullmatch(r"[\w-]+", name) for name in names):
            raise ValueError(f"data.mixture: names {names} must differ, and be of letters, digits, - and _")
        at = [0.0, *(turn.at for turn in self.curriculum), 1.0]
        if any(a >= b for a, b in zip(at, at[1:], strict=False)) or (self.curriculum and not self.mixture):
            raise ValueError(f"data.curriculum: turns at {at[1:-1]} must rise between 0 and 1, and need data.mixture")
        for turn in self.curriculum:
            if unknown := set(turn.weights) - set(names):
                raise ValueError(f"data.curriculum: {', '.join(sorted(unknown))} is none of the sources {', '.join(names)}")
        if self.train_on == "last" and self.too_long == "turns":
            raise ValueError("data.train_on: last trains the very answer that data.too_long: turns drops; take too_long: start or refuse")
        if self.train_on == "all" and not self.train_thinking:
            raise ValueError("data.train_on: all trains every token, thoughts too; remove train_thinking: false, or take train_on: assistant")
        if self.valid == ():
            raise ValueError("data.valid is empty; leave the key out to hold out a share of data.train")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"data.workers = {self.workers} must be positive")
        if not 0 < self.valid_fraction < 1:
            raise ValueError(f"data.valid_fraction = {self.valid_fraction} must lie between 0 and 1")


@config
class EvalConfig:
    every: int = 100  # steps
    prompts: tuple[str, ...] = ()  # continued (pretraining) or answered (SFT, DPO) at each validation
    sample_tokens: int = 64


@config
class SaveConfig:
    every_s: float = 60.0  # seconds of training that a crash may cost
    keep: int = 2


@config
class LogConfig:
    tensorboard: bool = False


@config
class Recipe:
    """One stage of training. ``batch_tokens`` is the global batch: rows of ``seq_len`` over all ranks and micro-batches."""

    out: str
    init: str | None = None  # checkpoint or run to start from; then `model` and `tokenizer` are its own
    model: ModelConfig | None = None
    tokenizer: TokenizerConfig | None = None
    adapter: AdapterConfig | None = None  # train this beside the frozen weights of init; None = train them all
    quantize: Literal["nf4"] | None = None  # with an adapter: keep the frozen weights in four bits (QLoRA)
    chat_template: str | None = None  # a shipped name (chatml, qwen3 ...) or a .jinja file; None = the tokenizer's own
    data: DataConfig
    objective: ObjectiveConfig = CLMConfig()
    rollout: RolloutConfig | None = None  # of reinforcement learning: what is sampled; its rows take the place of batch_tokens
    reward: tuple[RuleConfig, ...] = ()  # and what an answer is worth: the weighted sum of these
    optim: OptimConfig = AdamWConfig()
    fit: FitConfig
    batch_tokens: int = BATCH_TOKENS
    seq_len: int = 256
    seed: int = 1
    device: str = "auto"
    eval: EvalConfig = EvalConfig()
    save: SaveConfig = SaveConfig()
    log: LogConfig = LogConfig()

    def __post_init__(self) -> None:
        if (self.init is None) == (self.model is None):
            raise ValueError("give either init (a checkpoint to continue from) or model (to start from nothing)")
        if self.init is not None and self.tokenizer is not None:
            raise ValueError("with init the tokenizer is the checkpoint's own; remove the key tokenizer")
        if self.init is None and self.tokenizer is None:
            raise ValueError("key 'tokenizer' is required where the model starts from nothing")
        if self.adapter is not None and self.init is None:
            raise ValueError(f"adapter {self.adapter.kind} needs init: the checkpoint whose weights stay as they are")
        if self.quantize is not None and self.adapter is None:
            raise ValueError(f"quantize: {self.quantize} is for adapters: weights in four bits cannot be trained; add the key adapter")
        if self.objective.kind != "clm" and (self.data.mixture or self.data.packing != "concat"):
            raise ValueError(f"data.mixture and data.packing are for documents; objective {self.objective.kind} reads whole samples")
        check_rollout(self.objective, self.rollout, self.reward, self.batch_tokens)
        check_objective(self.objective, self.init, self.adapter is not None, bool(self.eval.prompts))
        if self.model is not None and self.model.init.kind == "mup" and self.optim.kind == "muon":
            raise ValueError("init mup scales Adam's learning rates and says nothing about muon: take optim adamw")
        if self.model is not None and (self.model.mtp is None) != (self.objective_mtp is None):
            raise ValueError(
                "model.mtp and objective.mtp_weight go together: "
                + ("give the weight, or nothing trains the depths" if self.model.mtp else "the model has no depths")
            )
        if self.model is not None and self.model.score_head:
            raise ValueError("model.score_head: objective reward adds it to the checkpoint that it begins from; leave it out")
        if self.model is not None and self.eval.prompts and not self.model.decodes:
            raise ValueError("eval.prompts: a model with expert_choice cannot generate; remove the prompts, or take ffn moe")
        if self.rollout is not None and self.rollout.max_tokens >= self.seq_len - 1:
            raise ValueError(f"rollout.max_tokens = {self.rollout.max_tokens} leaves no room for a prompt in seq_len = {self.seq_len}")
        if self.seq_len < 2 or self.batch_tokens % self.seq_len:
            raise ValueError(f"batch_tokens = {self.batch_tokens} must be a multiple of seq_len = {self.seq_len}")
        if self.model is not None and self.seq_len > self.model.max_len:
            raise ValueError(f"seq_len = {self.seq_len} is longer than the model reads: max_len = {self.model.max_len}")

    @property
    def objective_mtp(self) -> float | None:
        """The weight of multi-token prediction; only next-token objectives have one."""
        return self.objective.mtp_weight if isinstance(self.objective, CLMConfig) else None

    @property
    def rows(self) -> int:
        """Rows of one global batch."""
        return self.batch_tokens // self.seq_len


def expand_preset(data: dict) -> dict:
    """``model: {preset: NAME, ...}`` as the full model configuration, the other keys laid over it."""
    model = data.get("model")
    if not isinstance(model, dict) or "preset" not in model:
        return data
    rest = {key: value for key, value in model.items() if key != "preset"}
    return {**data, "model": _merge(to_dict(preset(str(model["preset"]))), rest)}


def _another(base: dict, over: dict) -> bool:
    return over.get("kind", base.get("kind")) != base.get("kind")


def _merge(base: Any, over: Any) -> Any:
    if not (isinstance(base, dict) and isinstance(over, dict)) or _another(base, over):
        return over  # another mechanism takes none of the first one's options
    return {
        key: _merge(base[key], over[key]) if key in base and key in over else over.get(key, base.get(key))
        for key in {**base, **over}
    }


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A YAML file, or the name of a built-in recipe. Raises ValueError naming file, line, key and the nearest known key."""
    built_in = BUILT_IN / f"{path}.yaml"
    data, lines = read_yaml(built_in if not Path(path).is_file() and built_in.is_file() else path, overrides)
    try:
        data = expand_preset(data)
    except ValueError as error:
        raise ValueError(f"{lines.get(('model', 'preset'), path)}: {error}") from None
    return parse(Recipe, data, lines, str(path))


def make_recipe(**keys: Any) -> Recipe:
    """A recipe from Python values: ``make_recipe(out=..., model={"preset": "llama-nano"}, data={...}, fit={...})``."""
    return parse(Recipe, expand_preset(keys), source="recipe")


def recipe_schema() -> str:
    """JSON schema of a recipe; ``model`` also accepts ``preset`` and then requires nothing else."""
    schema = json.loads(json_schema(Recipe))
    model = schema["$defs"]["ModelConfig"]
    model["properties"]["preset"] = {
        "enum": list(PRESETS),
        "description": "Start from this architecture; other keys are laid over it.",
    }
    model["anyOf"] = [{"required": ["preset"]}, {"required": model.pop("required")}]
    return json.dumps(schema, indent=2, ensure_ascii=False)
