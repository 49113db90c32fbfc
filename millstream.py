"""Command line: the one file that knows ``streams`` and ``trainer``. Every command imports what it needs itself."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from models.errors import LogFormatError, MillstreamError
from streams.command_options import ConfigOption, JsonOption
from streams.model_commands import models_app

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
app.add_typer(models_app, name="models")
experiments_app = typer.Typer(help="Experiments: what became of each arm.", no_args_is_help=True)
app.add_typer(experiments_app, name="experiments")


@app.command()
def config(config: ConfigOption = None) -> None:
    """Print the settings in force, as TOML, secrets masked."""
    from streams.settings import load, render_section, render_toml
    from trainer import settings as trainer_settings

    typer.echo(render_toml(load(config)))
    typer.echo(render_section(trainer_settings.SECTION, trainer_settings.load(config)))


@app.command()
def worker(config: ConfigOption = None) -> None:
    """Run a worker and its encoder process under a supervisor, until SIGTERM or Ctrl-C."""
    import asyncio

    from streams.settings import load
    from streams.supervisor import supervise

    raise typer.Exit(asyncio.run(supervise(load(config), config)))


@app.command()
def trainer(
    once: Annotated[bool, typer.Option("--once", help="One round, then end; for a scheduler of your own.")] = False,
    config: ConfigOption = None,
) -> None:
    """Learn from what users did with what they were shown, and decide which model version serves."""
    from streams import kafka_clients, logs
    from streams.settings import load
    from streams.topics import TopicNames
    from trainer import settings as trainer_settings
    from trainer.connection import Connection, EventRules, Topics
    from trainer.loop import run

    settings, own = load(config), trainer_settings.load(config)
    logs.configure(own.log_level, own.log_format)
    names = TopicNames.of(settings)
    topics = Topics(names.features, names.labels, names.items, names.events, names.models, names.model_status)
    rules = EventRules(settings.events.clock, settings.user_state)
    connection = Connection(
        kafka_clients.client_options(settings), topics, settings.models.status_interval_seconds, rules
    )
    raise typer.Exit(run(own, settings.models, settings.encoder, connection, once=once, say=typer.echo))


@app.command()
def demo(
    duration: Annotated[float, typer.Option(min=1.0, help="Seconds for which the users act, once they can.")] = 180.0,
    users: Annotated[int, typer.Option(min=2, max=5_000, help="Simulated users; half of them get our slates.")] = 240,
    rate: Annotated[float, typer.Option(min=1.0, max=2_000.0, help="Events a second, about.")] = 80.0,
    items: Annotated[int, typer.Option(min=50, max=5_000, help="Films in the catalogue.")] = 1_200,
    seed: Annotated[int, typer.Option(min=0, help="Of films, tastes and clicks.")] = 7,
    plain: Annotated[bool, typer.Option("--plain", help="Lines instead of the live view.")] = False,
    config: ConfigOption = None,
) -> None:
    """Simulated users on a real Kafka, half with our slates, half with a popularity list; exit 1 without slates."""
    import asyncio

    from streams.demo.run import DemoOptions, run
    from streams.settings import load

    options = DemoOptions(
        duration_seconds=duration, users=users, events_per_second=rate, items=items, seed=seed, plain=plain
    )
    code, lines = asyncio.run(run(load(config), options))
    for line in lines:
        typer.echo(line)
    raise typer.Exit(code)


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


@app.command("import")
def import_log(
    kind: Annotated[str, typer.Argument(help="mind, ebnerd, movielens or jsonl.")],
    path: Annotated[Path, typer.Argument(help="Folder of the unpacked set; for jsonl also one file.")],
    speed: Annotated[float, typer.Option(min=0.0, help="Times real speed; 0: as fast as possible.")] = 0.0,
    requests: Annotated[bool, typer.Option("--requests", help="Ask for a slate right before each impression.")] = False,
    limit: Annotated[int | None, typer.Option(min=0, help="Send at most this many events.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an earlier import of this log ended.")] = False,
    state: Annotated[Path | None, typer.Option(help="State file; default: one per log, beside the worker's.")] = None,
    config: ConfigOption = None,
) -> None:
    """Send a recorded log to the topics: the catalogue first, then its events in event-time order."""
    import asyncio

    from models.logs import open_log
    from streams.importer import Importer, ImportOptions, advice, summary
    from streams.progress import progress
    from streams.settings import load

    settings = load(config)
    options = ImportOptions(speed=speed, requests=requests, limit=limit, resume=resume, state_file=state)
    reader = open_log(kind, path)
    with progress() as show:
        importer = Importer(settings, reader, options, show)
        for line in advice(settings, importer.state_file, resume=resume):
            typer.echo(line, err=True)
        result = asyncio.run(importer.run())
    for line in summary(result):
        typer.echo(line)


@app.command()
def replay(
    kind: Annotated[str, typer.Argument(metavar="FORMAT", help="As for import: ebnerd, mind or jsonl.")],
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Folders of parts, or one above its parts.")],
    score: Annotated[Path | None, typer.Option(help="Part whose impressions count; default: the last one.")] = None,
    feedback_delay: Annotated[
        list[str] | None,
        typer.Option(help="How late events arrive: 0s, 5m, 1h, 1d; may be repeated. Default: 0s, 5m, 1h, 1d."),
    ] = None,
    retrain_every: Annotated[str, typer.Option(help="Time between two trainings of a model; 0: once only.")] = "1d",
    unclicked_weight: Annotated[
        float,
        typer.Option(
            min=1.0,
            max=1_000.0,
            help="Where the scored part kept only some of the unclicked items: each of them counts as this many "
            "impressions, and what is trained on is thinned alike.",
        ),
    ] = 1.0,
    modes: Annotated[str, typer.Option(help="Of frozen, live, retrained, with commas.")] = "frozen,live,retrained",
    slates: Annotated[int, typer.Option(min=0, help="Impressions at which a slate of ours is made; 0: none.")] = 2_000,
    texts: Annotated[bool, typer.Option(help="Encode item texts, where there are any.")] = True,
    histories: Annotated[
        bool, typer.Option(help="Learn where items lie from users' histories, where there are texts and enough.")
    ] = True,
    train_encoder: Annotated[
        bool, typer.Option("--train-encoder", help="Train the text encoder's top layers on the histories too; minutes.")
    ] = False,
    cache: Annotated[Path | None, typer.Option(help="Folder that keeps encodings for the next replay.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; default: a core for each delay.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, draws and intervals.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures there.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the picture there, PNG.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write a report there, one HTML file.")] = None,
    config: ConfigOption = None,
) -> None:
    """What does staleness cost on your log? The code that serves, over a recorded log at feedback delays; no Kafka."""
    from streams.settings import load
    from trainer.replay_run import CoreSettings, ReplayOptions, run

    settings = load(config)
    core = CoreSettings(settings.user_state, settings.counters, settings.joiner, settings.recommender, settings.encoder)
    options = ReplayOptions(
        kind=kind,
        paths=paths,
        score=score,
        delays=feedback_delay or ("0s", "5m", "1h", "1d"),
        retrain_every=retrain_every,
        modes=modes,
        unclicked_weight=unclicked_weight,
        slates=slates,
        seed=seed,
        jobs=jobs,
        texts=texts,
        histories=histories,
        train_encoder=train_encoder,
        cache=cache,
        json_file=json_file,
        plot_file=plot,
        report_file=report,
    )
    run(options, core, typer.echo)


@app.command()
def publish(
    kind: Annotated[str, typer.Argument(help="events, items or users.")],
    file: Annotated[str, typer.Argument(help="JSON lines; - is standard input.")] = "-",
    remove: Annotated[bool, typer.Option("--remove", help="Remove the items or users that the lines name.")] = False,
    config: ConfigOption = None,
) -> None:
    """Send JSON lines as records, each checked first; exit status 1 where a line was refused."""
    import asyncio

    from models.logs.jsonl import RECORD_KINDS
    from models.logs.log import open_bytes
    from streams import hand_tools
    from streams.settings import load

    wanted = _one_of(kind, RECORD_KINDS)
    settings = load(config)
    with _reading(file):
        lines = sys.stdin.buffer if file == "-" else open_bytes(Path(file))
        with lines:
            result = asyncio.run(
                hand_tools.publish(
                    settings,
                    wanted,
                    lines,
                    remove=remove,
                    on_refusal=lambda r: typer.echo(f"line {r.line}: {r.reason}: {r.detail}", err=True),
                )
            )
    typer.echo(f"{result.sent} sent, {result.refused} refused")
    if result.refused:
        raise typer.Exit(1)


@app.command()
def tail(
    topic: Annotated[str, typer.Argument(help="Short name, as recommendations, or a full one.")],
    start: Annotated[str, typer.Option("--from", help="beginning or end.")] = "end",
    user: Annotated[str | None, typer.Option(help="Only records with this key.")] = None,
    limit: Annotated[int | None, typer.Option(min=0, help="Stop after this many records.")] = None,
    follow: Annotated[bool, typer.Option(help="Wait for more; --no-follow ends at what is there now.")] = True,
    config: ConfigOption = None,
) -> None:
    """Print the records of a topic as JSON lines, decoded from JSON or MessagePack."""
    import asyncio
    import contextlib
    import json

    from streams import hand_tools
    from streams.settings import load

    settings = load(config)
    wanted = _one_of(start, hand_tools.STARTS)

    async def run() -> None:
        async for record in hand_tools.tail(settings, topic, start=wanted, user=user, limit=limit, follow=follow):
            print(json.dumps(record, ensure_ascii=False), flush=True)

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(run())


@app.command()
def validate(
    file: Annotated[str, typer.Argument(help="JSON lines, plain or .gz; - is standard input.")],
    kind: Annotated[
        str | None, typer.Option(help="events, items or users; default: told by each line's fields.")
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Report line by line what a log would be refused for, by the worker's own rules; exit status 1 if for anything."""
    import time
    from collections import Counter

    from models.logs.jsonl import RECORD_KINDS, check_lines
    from models.logs.log import open_bytes
    from streams.settings import load

    policy = load(config).events.clock
    wanted = _one_of(kind, RECORD_KINDS) if kind else None
    good, reasons = 0, Counter[str]()
    with _reading(file):
        lines = sys.stdin.buffer if file == "-" else open_bytes(Path(file))
        with lines:
            for refusal in check_lines(lines, wanted, policy, round(time.time() * 1000)):
                if refusal is None:
                    good += 1
                else:
                    reasons[refusal.reason] += 1
                    typer.echo(f"line {refusal.line}: {refusal.reason}: {refusal.detail}")
    refused = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    typer.echo(
        f"{good} lines would be taken, {reasons.total()} refused{f' ({refused})' if refused else ''}; "
        f"event times judged as if sent now, under the policy {policy.policy!r}"
    )
    if reasons:
        raise typer.Exit(1)


@app.command()
def schemas(
    out: Annotated[Path, typer.Option(help="Folder of the schema files.")] = Path("docs/schemas"),
) -> None:
    """Write the JSON Schemas of the public records; refused where a change would break clients."""
    from models.schemas import write

    changed = write(out)
    for path in changed:
        typer.echo(f"wrote {path}")
    if not changed:
        typer.echo(f"the schemas in {out} are up to date")


ReasonOption = Annotated[str | None, typer.Option(help="Only letters with this reason.")]
PartitionOption = Annotated[int | None, typer.Option(min=0, help="Only letters on this dead-letter partition.")]
OffsetOption = Annotated[int | None, typer.Option(min=0, help="Only the letter at this offset of the partition.")]
LimitOption = Annotated[int | None, typer.Option(min=0, help="At most this many letters.")]


@dlq_app.command("list")
def dlq_list(
    reason: ReasonOption = None,
    partition: PartitionOption = None,
    offset: OffsetOption = None,
    limit: LimitOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, with the bytes.")] = False,
    config: ConfigOption = None,
) -> None:
    """List what was refused: its place among the dead letters, reason, where it came from."""
    import asyncio
    import json

    from streams.dead_letters import Selection, letters
    from streams.settings import load

    settings = load(config)
    selection = Selection(reason=reason, partition=partition, offset=offset, limit=limit)

    async def run() -> int:
        count = 0
        async for letter in letters(settings, selection):
            count += 1
            typer.echo(json.dumps(letter.described(), ensure_ascii=False) if as_json else letter.line())
        return count

    count = asyncio.run(run())
    if not as_json:
        typer.echo(f"{count} dead letters", err=True)


@dlq_app.command("replay")
def dlq_replay(
    reason: ReasonOption = None,
    partition: PartitionOption = None,
    offset: OffsetOption = None,
    limit: LimitOption = None,
    config: ConfigOption = None,
) -> None:
    """Send the original bytes again, to the original topic and key; a letter that was cut is kept and named.

    Letters stay where they are: a second replay sends them again. Event ids are kept, so an event that was taken
    already is recognised, as far back as a user's row remembers.
    """
    import asyncio

    from streams.dead_letters import Selection, replay
    from streams.settings import load

    selection = Selection(reason=reason, partition=partition, offset=offset, limit=limit)
    result = asyncio.run(replay(load(config), selection))
    for letter, why in result.kept:
        typer.echo(f"kept {letter.partition}/{letter.offset}: {why}", err=True)
    typer.echo(f"{result.sent} sent again, {len(result.kept)} kept")
    if result.kept:
        raise typer.Exit(1)


@experiments_app.command("report")
def experiments_report(
    name: Annotated[str | None, typer.Argument(help="Experiment; all that the topics still hold without it.")] = None,
    models: Annotated[
        bool,
        typer.Option(
            "--models", help="Read the slates that are still there too: the model versions that ranked each arm's."
        ),
    ] = False,
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Print each arm's click rate, to control, with intervals by user, from the features and labels topics."""
    import asyncio
    import json

    from models.arm_report import lines
    from streams import experiment_report
    from streams.settings import load

    tally, unreadable = asyncio.run(experiment_report.read(load(config), slates=models))
    results = tally.results(name)
    if unreadable:
        typer.echo(f"{unreadable} records could not be read and were passed over", err=True)
    if not results:
        typer.echo("no labelled impression names an arm" + (f" of {name}" if name else ""), err=True)
        raise typer.Exit(1)
    for line in [json.dumps(experiment_report.described(r)) for r in results] if as_json else lines(results):
        typer.echo(line)


Choice = TypeVar("Choice", bound=str)


def _one_of(value: str, choices: Sequence[Choice]) -> Choice:
    for choice in choices:
        if choice == value:
            return choice
    raise typer.BadParameter(f"{value!r} is none of {', '.join(choices)}")


@contextmanager
def _reading(file: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, PermissionError, IsADirectoryError, EOFError) as error:
        raise LogFormatError(f"{file} cannot be read: {error}") from None


def main() -> None:
    """Run the command line; errors of ours are one message and exit status 1, not a traceback."""
    try:
        app()
    except MillstreamError as error:
        print(f"millstream: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
