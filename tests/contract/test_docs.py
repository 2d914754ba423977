"""The guides say what is there: links lead somewhere, every mechanism is named beside its page, recipes parse."""

from __future__ import annotations

import re
import typing
from pathlib import Path

import pytest
import torch

from zero2llm.data.pipeline.recipe import BUILT_IN, load_data_recipe
from zero2llm.data.schemas import SCHEMAS
from zero2llm.data.sources import Source
from zero2llm.data.steps.catalog import StepConfig
from zero2llm.lab.recipe import load_recipe
from zero2llm.layers.positions.catalog import AddedConfig, AttentionPositionConfig
from zero2llm.layers.positions.interpolation import ScalingConfig
from zero2llm.model.catalog import FfnConfig, MixerConfig, NormConfig
from zero2llm.model.init import InitConfig
from zero2llm.model.lm import LM
from zero2llm.model.spec import Wiring

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("README*.md")])
GUIDES = [ROOT / "docs" / name for name in ("mechanisms.md", "mechanisms.zh-CN.md")]
DATA_GUIDES = [ROOT / "docs" / name for name in ("data.md", "data.zh-CN.md")]
CATALOGS = (MixerConfig, FfnConfig, NormConfig, AttentionPositionConfig, AddedConfig, ScalingConfig, InitConfig)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ARXIV = re.compile(r"\b\d{4}\.\d{5}\b")


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def kinds() -> list[tuple[str, str]]:
    """(kind, page) of every mechanism that a recipe can name."""
    configs = [cls for catalog in CATALOGS for cls in typing.get_args(typing.get_args(catalog)[0])]
    return [(cls.kind, cls.__module__.replace(".", "/") + ".py") for cls in configs]


def recipes(mark: str = "# recipe\n") -> list:
    found = [(page, body) for page in PAGES for tag, body in FENCE.findall(read(page)) if tag == "yaml"]
    marked = [(page, body) for page, body in found if body.startswith(mark)]
    return [pytest.param(body, id=f"{page.stem}-{i}") for i, (page, body) in enumerate(marked)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", read(page)))
    relative = [link.partition("#")[0] for link in links if not re.match(r"[a-z]+:|#", link)]
    assert not [link for link in relative if not (page.parent / link).is_file()]


@pytest.mark.parametrize("guide", GUIDES, ids=lambda page: page.name)
def test_every_mechanism_is_named_beside_its_page(guide):
    text = read(guide)
    assert not [kind for kind, page in kinds() if f"| [`{kind}`](../{page}) |" not in text]
    assert not [name for name in typing.get_args(Wiring) if f"| `{name}` |" not in text]


def test_guides_cite_what_the_pages_cite():
    cited = [set(ARXIV.findall(read(guide))) for guide in GUIDES]
    printed = {number for page in ROOT.glob("zero2llm/**/*.py") for number in ARXIV.findall(read(page))}
    assert cited[0] == cited[1] and cited[0] <= printed


def test_both_guides_have_recipes():
    assert all("```yaml\n# recipe\n" in read(guide) for guide in GUIDES)


@pytest.mark.parametrize("text", recipes())
def test_marked_recipes_parse_and_build(text, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    recipe = load_recipe(file)
    with torch.device("meta"):
        LM(recipe.model)


@pytest.mark.parametrize("guide", DATA_GUIDES, ids=lambda page: page.name)
def test_every_step_schema_and_key_is_in_the_data_guide(guide):
    text = read(guide)
    steps = typing.get_args(typing.get_args(StepConfig)[0])
    pages = [(step.kind, step.__module__.replace(".", "/") + ".py") for step in steps]
    assert not [kind for kind, page in pages if f"| [`{kind}`](../{page}) |" not in text]
    assert not [name for name in SCHEMAS if f"| `{name}` |" not in text]
    assert not [name for name in Source.__dataclass_fields__ if f"`{name}`" not in text]


def test_readme_counts_the_steps():
    n = len(typing.get_args(typing.get_args(StepConfig)[0]))
    assert f"{n} kinds of steps" in read(ROOT / "README.md") and f"{n} 种步骤" in read(ROOT / "README.zh-CN.md")


def test_both_data_guides_say_the_same_in_code():
    """The commands and recipes of a translation are the same but for their comments."""
    code = [[re.sub(r"\s*#.*", "", body) for _, body in FENCE.findall(read(guide))] for guide in DATA_GUIDES]
    assert code[0] == code[1]


@pytest.mark.parametrize("text", recipes("# data recipe\n"))
def test_marked_data_recipes_parse(text, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    load_data_recipe(file)


def test_the_guide_names_the_built_in_data_recipes_and_they_parse():
    for file in BUILT_IN.glob("*.yaml"):
        load_data_recipe(file.stem)
        assert f"[{file.name}](../zero2llm/recipes/data/{file.name})" in read(DATA_GUIDES[0])
