"""The commands `millstream models …`: what an operator does with model versions. Each imports what it needs itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from streams.command_options import ConfigOption, JsonOption

models_app = typer.Typer(help="Model versions: list, promote, roll back, verify, tidy up.", no_args_is_help=True)

WaitOption = Annotated[float, typer.Option("--timeout", min=0.0, help="Seconds to wait for the workers that live.")]
WhyOption = Annotated[str, typer.Option("--why", help="Kept with the decision.")]


@models_app.command("list")
def models_list(as_json: JsonOption = False, config: ConfigOption = None) -> None:
    """List the published versions: when and from what they were made, their roles, how many workers serve each."""
    import asyncio
    import json

    from streams import model_tools
    from streams.settings import load

    rows, found = asyncio.run(model_tools.listing(load(config)))
    told = [json.dumps(row.described()) for row in rows] if as_json else model_tools.lines(rows, found)
    for line in told:
        typer.echo(line)


@models_app.command("show")
def models_show(
    version: Annotated[str, typer.Argument(help="As `millstream models list` names it.")],
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Show one version: its files, the exact window that it learned from, its metrics, what was decided about it."""
    import json

    from streams import model_tools
    from streams.settings import load

    told = model_tools.show(load(config), version)
    for line in [json.dumps(told)] if as_json else model_tools.details(told):
        typer.echo(line)


@models_app.command("promote")
def models_promote(
    version: Annotated[str, typer.Argument(help="A published version; bootstrap-0 is the one without a model.")],
    timeout: WaitOption = 120.0,
    now: Annotated[bool, typer.Option("--now", help="Live at once; each worker switches when it is ready.")] = False,
    why: WhyOption = "by hand",
    config: ConfigOption = None,
) -> None:
    """Make a version live once the workers have prepared it; exit status 1 where they refuse it, what serves stays."""
    import asyncio

    from streams import model_tools
    from streams.settings import load

    asyncio.run(model_tools.promote(load(config), version, timeout_seconds=timeout, now=now, why=why, say=typer.echo))


@models_app.command("rollback")
def models_rollback(timeout: WaitOption = 120.0, why: WhyOption = "by hand", config: ConfigOption = None) -> None:
    """Make the previous version live again; workers hold it ready."""
    import asyncio

    from streams import model_tools
    from streams.settings import load

    asyncio.run(model_tools.rollback(load(config), timeout_seconds=timeout, why=why, say=typer.echo))


@models_app.command("verify")
def models_verify(
    what: Annotated[str | None, typer.Argument(help="A version or a bundle's folder; default: every version.")] = None,
    config: ConfigOption = None,
) -> None:
    """Fetch and check bundles as a worker does: hashes, signature, contents, canary; exit status 1 where one fails."""
    from streams import model_tools
    from streams.settings import load

    results = model_tools.verify(load(config), what)
    for version, result in results:
        typer.echo(f"{version}: {f'refused: {result}' if isinstance(result, Exception) else 'sound'}")
    if not results:
        typer.echo("nothing is published")
    if any(isinstance(result, Exception) for _, result in results):
        raise typer.Exit(1)


@models_app.command("gc")
def models_gc(
    keep: Annotated[int, typer.Option(min=1, help="How many of the newest versions stay in any case.")] = 10,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and remove nothing.")] = False,
    config: ConfigOption = None,
) -> None:
    """Remove old versions; those with a role, those that a worker serves and the parents of both stay."""
    import asyncio

    from streams import model_tools
    from streams.settings import load

    result = asyncio.run(model_tools.collect(load(config), keep=keep, dry_run=dry_run))
    for version in result.removed:
        typer.echo(f"{'would remove' if dry_run else 'removed'} {version}")
    for name in result.leftovers:
        typer.echo(f"removed what a broken-off upload left: {name}")
    typer.echo(f"{len(result.removed)} versions {'would go' if dry_run else 'removed'}, {len(result.kept)} kept")


@models_app.command("keygen")
def models_keygen(
    file: Annotated[Path, typer.Argument(help="Where the private key is written; never over another file.")],
) -> None:
    """Make a key pair: the private key for the trainer and operators, the public one for everybody's settings."""
    from models.signing import PrivateKey

    key = PrivateKey.generate()
    key.write(file)
    typer.echo(f"# the trainer and operators: models.private_key_file = {str(file)!r}; it signs, keep it secret")
    typer.echo("# workers, the trainer and operators, in [models]:")
    typer.echo(f'public_key = "{key.public.text}"')
