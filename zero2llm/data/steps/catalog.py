"""Every step that a data recipe can name, in the order in which they usually stand."""

from __future__ import annotations

from typing import Annotated

from zero2llm.core.config import by_kind
from zero2llm.data.steps.boilerplate import BoilerplateConfig
from zero2llm.data.steps.c4 import C4Config
from zero2llm.data.steps.chunk import ChunkConfig
from zero2llm.data.steps.decontaminate import DecontaminateConfig
from zero2llm.data.steps.exact import ExactConfig
from zero2llm.data.steps.fineweb import FineWebConfig
from zero2llm.data.steps.gopher import GopherConfig
from zero2llm.data.steps.html import HtmlConfig
from zero2llm.data.steps.language import LanguageConfig
from zero2llm.data.steps.lines import LinesConfig
from zero2llm.data.steps.minhash import MinHashConfig
from zero2llm.data.steps.normalise import NormaliseConfig
from zero2llm.data.steps.perplexity import PerplexityConfig, PerplexityRankConfig
from zero2llm.data.steps.pii import PiiConfig
from zero2llm.data.steps.repetition import RepetitionConfig
from zero2llm.data.steps.sample import SampleConfig
from zero2llm.data.steps.simhash import SimHashConfig

StepConfig = Annotated[
    HtmlConfig
    | NormaliseConfig
    | BoilerplateConfig
    | LanguageConfig
    | GopherConfig
    | RepetitionConfig
    | C4Config
    | FineWebConfig
    | PerplexityConfig
    | PerplexityRankConfig
    | PiiConfig
    | ExactConfig
    | MinHashConfig
    | SimHashConfig
    | LinesConfig
    | DecontaminateConfig
    | ChunkConfig
    | SampleConfig,
    by_kind,
]
