"""The trainer as a process: one at a time, rounds by time or by examples, ended between steps by SIGTERM."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import structlog
from prometheus_client import start_http_server

from models.encoder import EncoderConfig
from models.errors import MillstreamError, SettingsError
from models.registry import Registry, RegistryConfig
from trainer.announce import Announcer
from trainer.connection import Connection
from trainer.metrics import TrainerMetrics
from trainer.ports import Learner, Names, Ports
from trainer.progress import Show, progress
from trainer.round import Round, RoundResult
from trainer.settings import TrainerConfig
from trainer.spool import Spool
from trainer.window import Stopped, WindowReader

log = structlog.get_logger(__name__)

LOCK_FILE: Final = "lock"


def run(
    config: TrainerConfig,
    models: RegistryConfig,
    encoder: EncoderConfig,
    connection: Connection,
    *,
    once: bool,
    say: Callable[[str], None],
) -> int:
    """Make rounds until SIGTERM or SIGINT, or one round; return the exit status.

    ``say`` takes a line for people for each thing that a round did. With ``once`` the status is 1 where something
    looks wrong, and an error of the round is raised; otherwise it is logged and the next round goes on. Raises
    SettingsError where another trainer holds the folder.
    """
    stop = threading.Event()
    with ExitStack() as stack:
        stack.enter_context(_lock(config.data_folder))
        stack.enter_context(_signals(stop))
        runner = stack.enter_context(asyncio.Runner())
        show = stack.enter_context(progress())
        metrics = TrainerMetrics(config.data_folder / "tensorboard" if config.tensorboard else None)
        stack.callback(metrics.close)
        _serve_metrics(config, metrics, required=not once)
        round_ = new_round(config, models, encoder, connection, runner, metrics, show, stop)
        try:
            if once:
                result = _timed(round_, metrics)
                _tell(result, say)
                return 1 if result.failed else 0
            _for_ever(round_, config, metrics, stop, say)
        except Stopped:
            log.info("trainer_stopped", done="what was done so far stands; the next start goes on from there")
        return 0


def new_round(
    config: TrainerConfig,
    models: RegistryConfig,
    encoder: EncoderConfig,
    connection: Connection,
    runner: asyncio.Runner,
    metrics: TrainerMetrics,
    show: Show,
    stop: threading.Event,
    learner: Learner | None = None,
) -> Round:
    """Put a round together from the settings; ``learner`` takes the place of fine-tuning in tests.

    Raises SettingsError where workers would refuse what this trainer announces.
    """

    def shown(step: str, done: int, total: int | None) -> None:
        # Training reports often: the way to stop in the middle of it.
        if stop.is_set():
            raise Stopped
        show(step, done, total)

    if learner is None:
        from trainer.learner import FinetuneLearner

        learner = FinetuneLearner.of(config, encoder)
    spool = Spool(config.data_folder / "spool")
    private_key = models.signer()
    if models.public_key is not None and private_key is None:
        raise SettingsError(
            "models.public_key is set, so that workers take nothing unsigned, and models.private_key_file is not: "
            "give the trainer the key that `millstream models keygen` wrote"
        )
    ports = Ports(
        source=WindowReader(connection, spool, runner, shown, stop.is_set),
        board=Announcer(connection, models.name, private_key, runner, stop.is_set),
        registry=Registry(models),
        learner=learner,
        spool=spool,
        metrics=metrics,
        show=shown,
        now_ms=lambda: time.time_ns() // 1_000_000,
        sleep=lambda seconds: _sleep(stop, seconds),
        stopping=stop.is_set,
    )
    names = Names(
        connection.topics.features,
        connection.topics.labels,
        models.cache_folder,
        models.cache_bundles,
        connection.status_interval_seconds,
        models.trusted(),
        private_key,
    )
    return Round(config, names, ports)


def _for_ever(
    round_: Round, config: TrainerConfig, metrics: TrainerMetrics, stop: threading.Event, say: Callable[[str], None]
) -> None:
    while not stop.is_set():
        started = time.monotonic()
        try:
            _tell(_timed(round_, metrics), say)
        except (MillstreamError, OSError) as error:
            # Something outside is gone, or the disk is full: the next round begins from what stands.
            log.error("round_failed", reason=getattr(error, "reason", type(error).__name__), error=str(error))
        _wait(round_, config, started, stop)


def _timed(round_: Round, metrics: TrainerMetrics) -> RoundResult:
    try:
        with metrics.step("round"):
            result = round_.run()
    except Stopped:
        raise
    except Exception as error:
        metrics.rounds.labels(str(getattr(error, "reason", type(error).__name__))).inc()
        raise
    for outcome in result.outcomes or ["nothing-to-do"]:
        metrics.rounds.labels(outcome).inc()
    return result


def _tell(result: RoundResult, say: Callable[[str], None]) -> None:
    for outcome, sentence in result.done:
        say(f"{outcome}: {sentence}")


def _wait(round_: Round, config: TrainerConfig, started: float, stop: threading.Event) -> None:
    """Return when the next round is due: by the clock, or by what was labelled since the last one began."""
    while not stop.wait(config.poll_seconds):
        if time.monotonic() - started >= config.round_minutes * 60:
            return
        try:
            if round_.newly_labelled() >= config.round_examples:
                return
        except MillstreamError as error:
            log.warning("labels_not_counted", error=str(error))


def _sleep(stop: threading.Event, seconds: float) -> None:
    stop.wait(seconds)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold the folder. The lock is the operating system's: a process that is killed leaves none behind."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SettingsError(
                f"another trainer works in {folder}; one decides. End it, or set trainer.data_folder and models.name"
            ) from None
        yield
    finally:
        os.close(handle)


@contextmanager
def _signals(stop: threading.Event) -> Iterator[None]:
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _serve_metrics(config: TrainerConfig, metrics: TrainerMetrics, *, required: bool) -> None:
    try:
        server, _ = start_http_server(config.port, config.host, registry=metrics.registry)
        log.info("metrics_served", host=config.host, port=server.server_port)
    except OSError as error:
        if required:
            raise SettingsError(
                f"{config.host}:{config.port} cannot be listened on: {error}; set trainer.port"
            ) from None
        log.warning("metrics_not_served", port=config.port, error=str(error))
