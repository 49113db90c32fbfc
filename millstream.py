"""Command line: the one file that knows ``streams`` and ``trainer``. Every command imports what it needs itself."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from models.errors import MillstreamError

if TYPE_CHECKING:
    from streams.topics import Difference

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


@kafka_app.command("start")
def kafka_start(config: ConfigOption = None) -> None:
    """Start the local Kafka and wait until it is ready; one that runs is left as it is."""
    import asyncio

    from streams import broker
    from streams.settings import load

    settings = load(config)
    found = asyncio.run(broker.status(settings))
    if found.own:
        running = "Kafka runs already; nothing is started"
        typer.echo(running if found.running else "starting Kafka; the first start here fetches its jars")
        found = asyncio.run(broker.start(settings))
    typer.echo(broker.describe(found, settings))
    if not found.ready:
        raise typer.Exit(1)


@kafka_app.command("stop")
def kafka_stop(config: ConfigOption = None) -> None:
    """Stop the local Kafka; its data stays."""
    from streams import broker
    from streams.settings import load

    typer.echo("Kafka is stopped; its data stays" if broker.stop(load(config)) else "no local Kafka was running")


@kafka_app.command("status")
def kafka_status(config: ConfigOption = None) -> None:
    """Say whether Kafka runs and answers; exit status 1 where it does not."""
    import asyncio

    from streams import broker
    from streams.settings import load

    settings = load(config)
    found = asyncio.run(broker.status(settings))
    typer.echo(broker.describe(found, settings))
    if not found.ready:
        raise typer.Exit(1)


@topics_app.command("create")
def topics_create(config: ConfigOption = None) -> None:
    """Create the topics that are missing; one that is there is compared and never altered."""
    import asyncio

    from streams import topics
    from streams.settings import load

    settings = load(config)
    made = asyncio.run(topics.create(settings))
    for name in made:
        typer.echo(f"created {name}")
    typer.echo(f"{len(made)} topics created, {len(topics.shapes(settings)) - len(made)} were there")
    _report_differences(asyncio.run(topics.check(settings)))


@topics_app.command("check")
def topics_check(config: ConfigOption = None) -> None:
    """Name every difference between the cluster and what the worker needs; exit status 1 where it could not start."""
    import asyncio

    from streams import topics
    from streams.settings import load

    _report_differences(asyncio.run(topics.check(load(config))))


def _report_differences(differences: list[Difference]) -> None:
    for difference in differences:
        typer.echo(f"{'wrong' if difference.fatal else 'tuning'}: {difference}")
    if any(difference.fatal for difference in differences):
        typer.echo("a worker refuses to start on these topics; nothing was altered", err=True)
        raise typer.Exit(1)
    if not differences:
        typer.echo("all topics are as they must be")


def main() -> None:
    """Run the command line; errors of ours are one message and exit status 1, not a traceback."""
    try:
        app()
    except MillstreamError as error:
        print(f"millstream: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
