"""The page of slates, held to the code: its settings load, and it names every source and kind of reason."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from models.candidates import SOURCES
from models.diversity import DiversityConfig
from models.reasons import KINDS
from models.recommender import RecommenderConfig

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "slates.md").read_text("utf-8")
BLOCKS = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_each_block_of_settings_is_accepted_and_changes_something(block: str) -> None:
    config = RecommenderConfig.model_validate(tomllib.loads(block)["recommender"])
    assert config != RecommenderConfig()


def test_all_blocks_together_are_one_file() -> None:
    assert len(BLOCKS) == 8
    config = RecommenderConfig.model_validate(tomllib.loads("\n".join(BLOCKS))["recommender"])
    assert config.surface(None, "diverse").diversity.sameness == 0.3
    assert config.surface(None, "diverse").rules.pinned == ("spring-sale",)


@pytest.mark.parametrize("name", [*SOURCES, *KINDS, *DiversityConfig.model_fields])
def test_the_page_names_every_source_kind_and_strength(name: str) -> None:
    assert f"`{name}`" in PAGE
