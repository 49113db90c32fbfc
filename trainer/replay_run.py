"""`millstream replay` behind its options: what is checked before the work begins, and what is written after it."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from pydantic import ValidationError
from rich.console import Console

from models.counters import CountersConfig
from models.encoder import EncoderConfig, find_model
from models.errors import EncoderError, ReplayError
from models.joiner import JoinerConfig
from models.surfaces import RecommenderConfig
from models.user_events import UserStateConfig
from trainer.progress import LINE_SECONDS, Show, progress
from trainer.replay import ReplayResult, find_parts, replay
from trainer.replay_html import as_html
from trainer.replay_plot import draw, require_matplotlib
from trainer.replay_report import as_json, costs, lines, sentence, slate_lines, table
from trainer.replay_settings import ReplayConfig, duration_seconds
from trainer.space_learning import PREFIX

Say = Callable[[str], None]
UNITS: Final = {
    "training": "steps",
    "encoding texts": "texts",
    "encoding texts again": "texts",
    "encoding": "texts",
    "frozen layers": "texts",
    "histories": "steps",
    "towers": "steps",
    "measuring": "modes",
}
"""What each step counts; all others count events."""


@dataclass(frozen=True, slots=True)
class ReplayOptions:
    """What was asked for, as it was typed."""

    kind: str
    paths: Sequence[Path]
    score: Path | None
    delays: Sequence[str]
    retrain_every: str
    modes: str
    unclicked_weight: float
    slates: int
    seed: int
    jobs: int | None
    """None: one for each core and delay."""
    texts: bool
    histories: bool
    train_encoder: bool
    cache: Path | None
    json_file: Path | None
    plot_file: Path | None
    report_file: Path | None


@dataclass(frozen=True, slots=True)
class CoreSettings:
    """What of the worker's settings the replay runs with."""

    user_state: UserStateConfig
    counters: CountersConfig
    joiner: JoinerConfig
    recommender: RecommenderConfig
    encoder: EncoderConfig


def run(options: ReplayOptions, core: CoreSettings, say: Say) -> ReplayResult:
    """Replay, tell the figures, write the files. Raises ReplayError for options that cannot be, before any work."""
    if options.train_encoder and not (options.texts and options.histories):
        raise ReplayError("--train-encoder learns from texts and histories: leave out --no-texts and --no-histories")
    config = config_of(options, core)
    for file in (options.json_file, options.plot_file, options.report_file):
        if file is not None and not file.resolve().parent.is_dir():
            raise ReplayError(f"{file} cannot be written: there is no folder {file.parent}; make it first")
    if options.plot_file or options.report_file:
        require_matplotlib()
    source = find_parts(options.kind, options.paths, options.score)
    jobs = options.jobs or min(_cores(), len(set(config.delays_seconds)))
    with told(sys.stderr) as show:
        result = replay(
            source,
            config,
            encoder=_encoder(core.encoder, say) if options.texts else None,
            cache=options.cache,
            jobs=jobs,
            show=show,
        )
    tell(result, say)
    write(result, options, say)
    return result


def config_of(options: ReplayOptions, core: CoreSettings) -> ReplayConfig:
    """Return the settings of a replay. Raises ReplayError that names what is wrong."""
    try:
        return ReplayConfig(
            delays_seconds=tuple(duration_seconds(text, "--feedback-delay") for text in options.delays),
            modes=tuple(name.strip() for name in options.modes.split(",")),
            retrain_every_seconds=duration_seconds(options.retrain_every, "--retrain-every"),
            unclicked_weight=options.unclicked_weight,
            histories="top" if options.train_encoder else "frozen" if options.histories else "off",
            slates=options.slates,
            seed=options.seed,
            user_state=core.user_state,
            counters=core.counters,
            joiner=core.joiner,
            recommender=core.recommender,
        )
    except ValidationError as error:
        first = error.errors()[0]
        name = "--" + str(first["loc"][0]).replace("_seconds", "").replace("_", "-") if first["loc"] else "the options"
        raise ReplayError(f"{name}: {first['msg']}, not {first['input']!r}") from None


@contextmanager
def told(stream: IO[str], clock: Callable[[], float] = time.monotonic) -> Iterator[Show]:
    """Give a function that shows steps on ``stream``: bars on a terminal, elsewhere a sentence now and then.

    One in ``LINE_SECONDS`` at most, of whatever is done then: delays run side by side. ``clock``: seconds.
    """
    if stream.isatty():
        with progress(stream) as show:
            yield show
        return
    due = clock()

    def write_line(step: str, done: int, total: int | None) -> None:
        nonlocal due
        if clock() < due:
            return
        due = clock() + LINE_SECONDS
        of = f" of {total:,}" if total is not None else ""
        units = UNITS.get(step.rpartition(": ")[2], "events")
        unit = units.removesuffix("s") if (done if total is None else total) == 1 else units
        print(f"{step}, {done:,}{of} {unit}", file=stream, flush=True)

    yield write_line


def tell(result: ReplayResult, say: Say) -> None:
    """Say what was found: a table on a terminal, lines elsewhere."""
    if sys.stdout.isatty():
        Console().print(table(result))
    else:
        for line in lines(result):
            say(line)
    for line in [*slate_lines(result), *costs(result)]:
        say(line)
    if any(space.startswith(PREFIX) for space in result.spaces.values()):
        say("items lie in a space learned from the histories that had arrived when the scored part began")
    say(f"{sentence(result)} ({result.seconds:,.0f} s)")


def write(result: ReplayResult, options: ReplayOptions, say: Say) -> None:
    """Write the files that were asked for. Raises ReplayError where one cannot be written; others are kept."""
    picture = draw(result) if options.plot_file or options.report_file else b""
    files: list[tuple[Path, bytes]] = []
    if options.json_file:
        files.append((options.json_file, (json.dumps(as_json(result), indent=2) + "\n").encode()))
    if options.plot_file:
        files.append((options.plot_file, picture))
    if options.report_file:
        files.append((options.report_file, as_html(result, picture).encode()))
    for file, content in files:
        try:
            file.write_bytes(content)
        except OSError as error:
            raise ReplayError(f"{file} cannot be written: {error}; name another file") from None
        say(f"wrote {file}")


def _encoder(config: EncoderConfig, say: Say) -> EncoderConfig | None:
    """Return the encoder where it is at hand; without one a replay goes on without texts, and says so."""
    try:
        find_model(config.model)
    except EncoderError as error:
        say(f"items have no vectors in this replay: {error}")
        return None
    return config


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
