from __future__ import annotations

from pathlib import Path

import pytest

from models.encoder import TextEncoder
from tests.trainer.tiny_world import load_bert, write_bert


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny BERT."""
    return write_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def bert(bert_folder: Path) -> TextEncoder:
    """The tiny BERT itself; whoever changes it takes a copy."""
    return load_bert(bert_folder)
