"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", help="TOML file; default: $MILLSTREAM_CONFIG, else ./millstream.toml if there is one."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON instead of text.")]
