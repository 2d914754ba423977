"""A model configuration as transformers' config.json, and back; what has no counterpart is refused by name."""

from __future__ import annotations

from dataclasses import replace

from zero2llm.interop.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from zero2llm.interop.families.family import Family
from zero2llm.interop.families.gemma import GEMMA, GEMMA2, GEMMA3
from zero2llm.interop.families.gpt2 import GPT2
from zero2llm.interop.families.gpt_oss import GPT_OSS
from zero2llm.interop.families.jamba import JAMBA
from zero2llm.interop.families.kimi_linear import KIMI_LINEAR
from zero2llm.interop.families.llama import LLAMA, MISTRAL, QWEN2, QWEN3, SMOLLM3
from zero2llm.interop.families.mamba import MAMBA, MAMBA2
from zero2llm.interop.families.moe import MIXTRAL, QWEN2_MOE, QWEN3_MOE
from zero2llm.interop.families.olmo2 import OLMO2
from zero2llm.interop.families.phi3 import PHI3
from zero2llm.interop.families.qwen3_next import QWEN3_NEXT
from zero2llm.interop.hf_names import Rule
from zero2llm.interop.score import head_rule, is_classifier, score_keys, trunk
from zero2llm.model.spec import ModelConfig

# The first that computes the same function is taken: plain ones stand before those that add options.
PAGES = (
    GPT2, LLAMA, QWEN2, QWEN3, MISTRAL, SMOLLM3, OLMO2, PHI3, GEMMA, GEMMA2, GEMMA3,
    MIXTRAL, QWEN2_MOE, QWEN3_MOE, GPT_OSS, DEEPSEEK_V2, DEEPSEEK_V3,
    MAMBA, MAMBA2, JAMBA, QWEN3_NEXT, KIMI_LINEAR,
)  # fmt: skip
FAMILIES = {page.model_type: page for page in PAGES}


def family(cfg: ModelConfig, model_type: str | None = None) -> Family:
    """Which of their architectures computes the same function; or the one asked for, if it does.

    Raises ValueError listing each part that the nearest one has no counterpart of.
    """
    nearest, best = [], None
    for page in FAMILIES.values() if model_type is None else [by_model_type(model_type)]:
        foreign, faults = page.faults(cfg)
        if not faults:
            return page
        if best is None or (foreign, len(faults)) < best:
            nearest, best = [page.model_type, faults], (foreign, len(faults))
    raise ValueError(
        f"no Hugging Face export: nearest is {nearest[0]}, which has no counterpart of {'; '.join(nearest[1])}"
    )


def page_of(cfg: ModelConfig, model_type: str | None = None) -> Family:
    """`family`, of a reward model that of its trunk."""
    return family(trunk(cfg) if cfg.score_head == "reward" else cfg, model_type)


def rules_of(cfg: ModelConfig, model_type: str | None = None) -> list[Rule]:
    """Which tensor is which, a reward model's head among them."""
    page = page_of(cfg, model_type)
    return [*page.rules(trunk(cfg)), head_rule()] if cfg.score_head == "reward" else page.rules(cfg)


def by_model_type(name: str | None) -> Family:
    if name not in FAMILIES:
        raise ValueError(f"config.json: model_type {name!r} is not supported; there are: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def family_of(cfg: ModelConfig) -> str:
    """The model_type of `family`."""
    return family(cfg).model_type


def to_hf_config(cfg: ModelConfig, *, bos: int | None = None, eos: list[int] | None = None, pad: int | None = None,
                 dtype: str = "float32", model_type: str | None = None) -> dict:  # fmt: skip
    """Content of config.json. dtype and rope stand there twice: as transformers 5 reads them and as version 4 does."""
    page = page_of(cfg, model_type)
    scoring = cfg.score_head == "reward"
    return {
        "architectures": [page.architecture], "dtype": dtype, "torch_dtype": dtype, "initializer_range": cfg.init.std,
        "use_cache": True, "bos_token_id": bos, "eos_token_id": eos[0] if eos and len(eos) == 1 else eos,
        "pad_token_id": pad, **page.keys(trunk(cfg) if scoring else cfg),
        **(score_keys(page.model_type, page.architecture) if scoring else {}),
    }  # fmt: skip


def from_hf_config(data: dict) -> ModelConfig:
    """The same model as ours; absent keys mean transformers' defaults. A classifier's is a reward model.

    Raises ValueError naming the setting that is not supported.
    """
    page = by_model_type(data.get("model_type"))
    if data.get("quantization_config"):
        raise ValueError("config.json: quantization_config: load the unquantised weights")
    try:
        cfg = page.read(data)
    except KeyError as error:
        raise ValueError(f"config.json: key {error} is required for model_type {page.model_type!r}") from None
    return replace(cfg, score_head="reward", tie_embeddings=True) if is_classifier(data) else cfg
