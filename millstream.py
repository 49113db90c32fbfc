"""Command line: the one file that knows ``streams`` and ``trainer``. Every command imports what it needs itself."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from models.errors import MillstreamError

app = typer.Typer(
    name="millstream",
    help="Clicks in, fresh slates out: a streaming recommender for teams that have Kafka.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
kafka_app = typer.Typer(help="The local Apache Kafka: start, stop, status.", no_args_is_help=True)
topics_app = typer.Typer(help="Create and check the topics.", no_args_is_help=True)
dlq_app = typer.Typer(help="Dead letters: list and replay.", no_args_is_help=True)
app.add_typer(kafka_app, name="kafka")
app.add_typer(topics_app, name="topics")
app.add_typer(dlq_app, name="dlq")

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", help="TOML file; default: $MILLSTREAM_CONFIG, else ./millstream.toml if there is one."),
]


@app.command()
def config(config: ConfigOption = None) -> None:
    """Print the settings in force, as TOML, secrets masked."""
    from streams.settings import load, render_toml

    typer.echo(render_toml(load(config)))


def main() -> None:
    """Run the command line; errors of ours are one message and exit status 1, not a traceback."""
    try:
        app()
    except MillstreamError as error:
        print(f"millstream: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
