"""What staleness costs on a recorded log: the log goes through the code that serves, once for each feedback delay.

An event enters rows and counters a delay after it happened; an impression is scored by what had arrived before it and
only then learned from. For each delay three modes are told apart: ``frozen`` (model, rows and counters as they were
when the scored part began), ``live`` (the same model; rows and counters go on) and ``retrained`` (live, and the model
is trained again every so often on labels that are closed and have arrived).

    result = replay(find_parts("ebnerd", [Path("ebnerd-demo")]), ReplayConfig(delays_seconds=(0, 3600)))
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import connection
from pathlib import Path
from queue import Empty
from threading import Thread
from typing import Any, Final, Self

import numpy as np
import torch

from models.bootstrap import find_or_compute_space
from models.encoder import EncoderConfig, TextEncoder, item_text
from models.errors import MillstreamError, ReplayError
from models.hashing import hash64
from models.logs import LogReader
from trainer.encodings import OutputCache
from trainer.replay_delay import Delay, ModeResult, Show, tick_seconds
from trainer.replay_log import Parts, Source, Survey, acted_on, find_parts, survey_log
from trainer.replay_models import ItemVectors
from trainer.replay_settings import MODES, Mode, ReplayConfig
from trainer.replay_space import learned_spaces
from trainer.scoring import encode_items
from trainer.space_learning import SpaceConfig

__all__ = [
    "Mode",
    "ModeResult",
    "Parts",
    "ReplayConfig",
    "ReplayResult",
    "Source",
    "find_parts",
    "replay",
]

HISTORY_ITEMS: Final = 40
"""Latest items of each user's history whose texts are encoded; older ones hardly move the row."""
CACHE_BYTES: Final = 4 << 30
_POLL_SECONDS: Final = 0.2


@dataclass(slots=True)
class ReplayResult:
    """All rows of a replay, by rising delay, and what they are of."""

    kind: str
    names: tuple[str, ...]
    events: int
    users: int
    items: int
    impressions: int
    scored: int
    start_ms: int
    """Event time of the first scored impression."""
    tick_seconds: float
    has_item_vectors: bool
    version: str
    config: ReplayConfig
    spaces: dict[float, str] = field(default_factory=dict)
    """Id of the space that items lay in at each delay."""
    seconds: float = 0.0
    results: list[ModeResult] = field(default_factory=list)

    @classmethod
    def of(cls, source: Source, survey: Survey, items: ItemVectors, config: ReplayConfig) -> Self:
        """Return a result without rows yet."""
        return cls(
            kind=source.kind,
            names=source.names,
            events=survey.events,
            users=survey.users,
            items=survey.items,
            impressions=survey.impressions,
            scored=len(survey.offsets),
            start_ms=survey.start_ms,
            tick_seconds=tick_seconds(survey, config),
            has_item_vectors=items.has_vectors,
            version=_version(),
            config=config,
        )

    @property
    def delays_seconds(self) -> list[float]:
        """Return the delays that there are rows of, rising."""
        return sorted({row.feedback_delay_seconds for row in self.results})

    def row(self, mode: Mode, feedback_delay_seconds: float) -> ModeResult | None:
        """Return the row of a mode at a delay, None where it was not asked for."""
        return next(
            (r for r in self.results if (r.mode, r.feedback_delay_seconds) == (mode, feedback_delay_seconds)), None
        )

    def best(self, feedback_delay_seconds: float) -> ModeResult:
        """Return the row with the highest AUC at a delay, of equals the simplest: what a worker would run."""
        rows = [row for row in self.results if row.feedback_delay_seconds == feedback_delay_seconds]
        return max(rows, key=lambda row: (np.nan_to_num(row.measures.auc.mean, nan=-1.0), -MODES.index(row.mode)))


def replay(
    source: Source,
    config: ReplayConfig | None = None,
    *,
    encoder: EncoderConfig | None = None,
    cache: Path | None = None,
    space: SpaceConfig | None = None,
    jobs: int = 1,
    show: Show = lambda step, done, total: None,
) -> ReplayResult:
    """Replay a log at all delays of ``config``.

    ``encoder``: what item texts are encoded with; None: items have no vectors. ``cache``: folder that keeps encodings
    for the next replay; None: they are kept until this one ends. ``space``: how a space is learned from histories.
    ``jobs``: processes, one delay each at a time; with 1 all is done here. ``show`` is called from this thread only.
    Raises ReplayError, and LogFormatError and EncoderError where files or encoder are not as they should be.
    """
    config = config or ReplayConfig()
    began = time.perf_counter()
    delays = sorted(set(config.delays_seconds))
    reader = source.open()
    survey = survey_log(
        reader, source.open_scored(), config.score_share, lambda events: show("looking through the log", events, None)
    )
    with tempfile.TemporaryDirectory(prefix="millstream-replay-") as folder, _one_thread():
        latest = HISTORY_ITEMS if config.histories == "off" else max(HISTORY_ITEMS, SpaceConfig().history_items)
        items = item_vectors(reader, survey, encoder, cache or Path(folder), latest, show)
        result = ReplayResult.of(source, survey, items, config)
        spaces = dict.fromkeys(delays, items)
        if config.histories != "off":
            spaces = learned_spaces(reader, survey.start_ms, items, delays, space_config(config, space), show)
        result.spaces = {delay: own.space.space_id for delay, own in spaces.items()}
        work = [(source, survey, spaces[delay], config, delay) for delay in delays]
        if min(jobs, len(work)) > 1:
            result.results = _in_processes(work, min(jobs, len(work)), show)
        else:
            for one in work:
                result.results += Delay(*one, _named(show, one[-1], len(work))).run()
    result.seconds = time.perf_counter() - began
    return result


def item_vectors(
    reader: LogReader, survey: Survey, encoder: EncoderConfig | None, folder: Path, of_history: int, show: Show
) -> ItemVectors:
    """Return where the items lie that a replay needs: those shown, and the latest ``of_history`` of each history."""
    texts: dict[int, str] = {}
    embeddings: dict[int, list[float]] = {}
    for item in reader.items():
        if encoder is not None and (text := item_text(item)):
            texts[hash64(item.item_id)] = text
        if item.embedding is not None:
            embeddings[hash64(item.item_id)] = item.embedding
    if not texts and not embeddings:
        return ItemVectors()
    needed = {hash64(item) for item in survey.first_shown_ms} | acted_on(reader, of_history)
    texts = {item: text for item, text in texts.items() if item in needed}
    embeddings = {item: own for item, own in embeddings.items() if item in needed}
    if encoder is None or not texts:
        return ItemVectors(embeddings=embeddings)
    loaded = TextEncoder.load(encoder)
    space = find_or_compute_space(loaded, folder)
    encodings = encode_items(
        loaded, texts, OutputCache(folder, CACHE_BYTES), lambda done, total: show("encoding texts", done, total)
    )
    return ItemVectors(space, texts, encodings, encoder, folder, embeddings)


def space_config(config: ReplayConfig, given: SpaceConfig | None = None) -> SpaceConfig:
    """Return how a space is learned in a replay: on a CPU, so that the same seed gives the same figures."""
    made = (given or SpaceConfig()).settled(seed=config.seed, device="cpu", cache_bytes=CACHE_BYTES)
    return made.with_encoder("frozen" if config.histories == "off" else config.histories)


def delay_text(seconds: float) -> str:
    """Return a delay in words: ``0 s``, ``5 min``, ``1 h``, ``1 d``."""
    for unit, name in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= unit and seconds % unit == 0:
            return f"{seconds / unit:g} {name}"
    return f"{seconds:g} s"


Work = tuple[Source, Survey, ItemVectors, ReplayConfig, float]


def _in_processes(work: list[Work], jobs: int, show: Show) -> list[ModeResult]:
    """Do each delay in a process of its own, ``jobs`` at once; a delay that fails ends the others that wait."""
    context = multiprocessing.get_context("spawn")
    news = context.Queue()
    with ProcessPoolExecutor(jobs, context, _begin, (news,)) as pool:
        waiting: set[Future[list[ModeResult]]] = {pool.submit(_work, one, len(work)) for one in work}
        results: list[ModeResult] = []
        try:
            while waiting:
                done, waiting = wait(waiting, _POLL_SECONDS)
                _tell(news, show)
                for future in done:
                    results += future.result()
        except BrokenProcessPool:
            raise ReplayError(
                "the process of a feedback delay was killed, most likely for want of memory; nothing was written: run "
                "fewer at once (--jobs 1), or fewer slates"
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        _tell(news, show)
    return sorted(results, key=lambda row: (row.feedback_delay_seconds, MODES.index(row.mode)))


def _tell(news: Any, show: Show) -> None:
    while True:
        try:
            step, done, total = news.get_nowait()
        except Empty:
            return
        show(step, done, total)


_news: Any = None
"""Of a child process: where it tells how far it is."""


def _begin(news: Any) -> None:
    global _news
    _news = news
    torch.set_num_threads(1)
    Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    """End this process when the replay is killed: nobody would take its rows."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _work(one: Work, delays: int) -> list[ModeResult]:
    def show(step: str, done: int, total: int | None) -> None:
        _news.put((step, done, total))

    try:
        return Delay(*one, _named(show, one[-1], delays)).run()
    except MillstreamError as error:
        # Its own class may not come over: what is raised there is made anew here from one text.
        raise ReplayError(f"at a feedback delay of {delay_text(one[-1])}: {error}") from None


def _named(show: Show, delay_seconds: float, delays: int) -> Show:
    """Return ``show`` with the delay before each step, where there are several."""
    if delays < 2:
        return show
    return lambda step, done, total: show(f"{delay_text(delay_seconds)}: {step}", done, total)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch and the libraries of child processes use one thread: the same weights again, and a core each."""
    threads, environment = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if environment is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = environment


def _version() -> str:
    try:
        return version("millstream")
    except PackageNotFoundError:
        return "unknown"
