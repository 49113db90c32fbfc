"""The rules of DESIGN.md that imports can break."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("models", "streams", "trainer")
KAFKA_AND_HTTP = {"faust", "aiokafka", "mode", "aiohttp", "prometheus_client", "typer", "rich"}


def _modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module


def _roots(path: Path) -> set[str]:
    return {name.split(".")[0] for name in _imports(path)}


@pytest.mark.parametrize("path", _modules("models"), ids=str)
def test_models_imports_neither_streams_nor_trainer_nor_a_transport(path: Path) -> None:
    assert not _roots(path) & {"streams", "trainer", "millstream", *KAFKA_AND_HTTP}


@pytest.mark.parametrize("path", _modules("streams"), ids=str)
def test_streams_never_imports_trainer(path: Path) -> None:
    assert not _roots(path) & {"trainer", "millstream"}


@pytest.mark.parametrize("path", _modules("trainer"), ids=str)
def test_trainer_never_imports_streams(path: Path) -> None:
    assert not _roots(path) & {"streams", "millstream"}


@pytest.mark.parametrize("path", _modules("models"), ids=str)
def test_models_reads_neither_the_environment_nor_the_wall_clock(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    used = {
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    assert not used & {"time.time", "time.time_ns", "os.environ", "os.getenv", "datetime.now", "datetime.utcnow"}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_file_is_longer_than_600_lines(package: str) -> None:
    long = {str(p.relative_to(ROOT)): n for p in _modules(package) if (n := len(p.read_text().splitlines())) > 600}
    assert not long


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_function_and_class_says_what_it_is_for(package: str) -> None:
    silent = []
    for path in _modules(package):
        tree = ast.parse(path.read_text("utf-8"))
        for node in tree.body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            # An overload is a signature of the function that follows, which has the docstring.
            overload = any(isinstance(d, ast.Name) and d.id == "overload" for d in node.decorator_list)
            if not node.name.startswith("_") and not overload and ast.get_docstring(node) is None:
                silent.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert not silent


def test_sources_carry_no_promises() -> None:
    words = ("TO" + "DO", "FIX" + "ME", "XX" + "X")
    found = [
        f"{path.relative_to(ROOT)}:{token.start[0]}"
        for package in PACKAGES
        for path in _modules(package)
        for token in tokenize.generate_tokens(io.StringIO(path.read_text("utf-8")).readline)
        if token.type == tokenize.COMMENT and any(word in token.string for word in words)
    ]
    assert not found
