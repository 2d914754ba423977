"""A recipe: one YAML file that says everything about one training stage. Every key is used or refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from zero2llm.adapters.config import AdapterConfig
from zero2llm.core.config import config, json_schema, parse, read_yaml, to_dict
from zero2llm.lab.data_config import DataConfig
from zero2llm.lab.objectives import (
    BATCH_TOKENS,
    Form,
    ObjectiveConfig,
    TeacherConfig,
    check_objective,
    check_rollout,
    check_teacher,
    form_of,
    makes_batches,
)
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
    teacher: TeacherConfig | None = None  # of distillation; `model` then has its tokenizer
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
        check_teacher(self.objective, self.teacher)
        if (self.init is None) == (self.model is None):
            raise ValueError("give either init (a checkpoint to continue from) or model (to start from nothing)")
        if self.init is not None and self.tokenizer is not None:
            raise ValueError("with init the tokenizer is the checkpoint's own; remove the key tokenizer")
        if self.teacher is not None and self.tokenizer is not None:
            raise ValueError("with a teacher the tokenizer is the teacher's own; remove the key tokenizer")
        if self.init is None and self.tokenizer is None and self.teacher is None:
            raise ValueError("key 'tokenizer' is required where the model starts from nothing")
        if self.adapter is not None and self.init is None:
            raise ValueError(f"adapter {self.adapter.kind} needs init: the checkpoint whose weights stay as they are")
        if self.quantize is not None and self.adapter is None:
            raise ValueError(f"quantize: {self.quantize} is for adapters: weights in four bits cannot be trained; add the key adapter")
        if self.form != "documents" and (self.data.mixture or self.data.packing != "concat"):
            raise ValueError(f"data.mixture and data.packing are for documents; objective {self.objective.kind} reads whole samples")
        check_rollout(self.objective, self.rollout, self.reward, self.batch_tokens)
        check_objective(self.objective, self.init, bool(self.eval.prompts))
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
        if self.seq_len < 2 or (self.batch_tokens % self.seq_len and not makes_batches(self.objective)):
            raise ValueError(f"batch_tokens = {self.batch_tokens} must be a multiple of seq_len = {self.seq_len}")
        if self.model is not None and self.seq_len > self.model.max_len:
            raise ValueError(f"seq_len = {self.seq_len} is longer than the model reads: max_len = {self.model.max_len}")

    @property
    def form(self) -> Form:
        """What kind of records the data is read as."""
        return form_of(self.objective, self.data.reads)

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
