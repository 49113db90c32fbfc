"""docs/models.md is held to the code: every reason of a refusal and every file of a bundle stands on the page."""

from __future__ import annotations

import ast
from pathlib import Path

from models import manifest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "models.md").read_text("utf-8")
SOURCES = (
    *(f"models/{name}.py" for name in ("manifest", "bundle", "registry", "pointer", "signing", "features")),
    "streams/model_watch.py",
    "streams/model_tools.py",
)


def reasons() -> set[str]:
    """Return the first argument of every refusal in the sources."""
    calls = [
        node
        for source in SOURCES
        for node in ast.walk(ast.parse((ROOT / source).read_text("utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("refusal", "BundleError")
    ]
    first = [call.args[0] for call in calls if call.args]
    return {arg.value for arg in first if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}


def test_every_reason_for_which_a_bundle_or_a_pointer_is_refused_is_explained() -> None:
    found = reasons()
    assert len(found) > 25
    assert {reason for reason in found if f"`{reason}`" not in PAGE} == set()


def test_every_file_of_a_bundle_is_explained() -> None:
    names = manifest.REQUIRED | manifest.OPTIONAL | {manifest.MANIFEST, manifest.SIGNATURE}
    assert {name for name in names if f"`{name}`" not in PAGE} == set()
