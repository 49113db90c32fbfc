"""How the demo looks: a live terminal view, or plain lines where there is no terminal."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from rich.console import Console, Group, RenderableType
from rich.layout import Layout
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from streams.demo.catalogue import Film
from streams.demo.learning import Swap
from streams.demo.stage import WorkerMetrics
from streams.demo.statistics import RECENT_SECONDS, Line, Statistics, Story
from streams.demo.users import Half, Taste

REFRESHES_PER_SECOND: Final = 4
PLAIN_SECONDS: Final = 5.0
BAR_WIDTH: Final = 16
LOUD_SECONDS: Final = 15.0
"""How long a swap stands out."""
LOUD, QUIET, GOOD, NEW = "bold", "dim", "green", "bold yellow"


@dataclass(slots=True)
class Scene:
    """What there is to show. ``ends_at`` is None until the users start; times are ``time.monotonic()``."""

    statistics: Statistics
    films: Mapping[str, Film]
    story_taste: Taste
    persons: int
    duration_seconds: float
    metrics: WorkerMetrics
    steps: list[str] = field(default_factory=list)
    ends_at: float | None = None
    stopping: bool = False


def milliseconds(value: float) -> str:
    """Return a time as "12 ms" or "1.4 s"; a dash where there is none."""
    if math.isnan(value):
        return "–"
    return f"{value:.0f} ms" if value < 1_000 else f"{value / 1_000:.1f} s"


def percent(value: float) -> str:
    """Return a share as "12.3 %"; a dash where there is none."""
    return "–" if math.isnan(value) else f"{100 * value:.1f} %"


def plain_line(scene: Scene, now: float) -> str:
    """Return the state of the run in one line."""
    statistics = scene.statistics
    p50, p99 = statistics.freshness.recent(now)
    ours, popular = (statistics.clicks.overall(half) for half in (Half.OURS, Half.POPULAR))
    return (
        f"{now - statistics.started_at:4.0f} s: {statistics.events_per_second(now):.0f} events/s, "
        f"freshness p50 {milliseconds(p50)} p99 {milliseconds(p99)}, "
        f"click rate millstream {percent(ours)} popularity {percent(popular)}, "
        f"{scene.metrics.searchable}/{len(scene.films)} films searchable"
    )


def swap_line(swap: Swap) -> str:
    """Return the moment of a swap in one line."""
    clock = time.strftime("%H:%M:%S", time.localtime(swap.clock))
    return f"*** {clock}, {swap.after_seconds:.0f} s: {swap.version}, learned from these clicks, makes the slates now"


def render(scene: Scene, now: float) -> RenderableType:
    """Return the whole view: 100 × 30 is enough."""
    layout = Layout()
    layout.split_column(
        Layout(_header(scene, now), name="header", size=4),
        Layout(name="figures", size=8),
        Layout(name="below"),
    )
    layout["figures"].split_row(
        Layout(_stream(scene, now), ratio=31),
        Layout(_freshness(scene, now), ratio=29),
        Layout(_clicks(scene, now), ratio=40),
    )
    started = scene.ends_at is not None
    layout["below"].update(_story(scene) if started else _steps(scene))
    return layout


def _header(scene: Scene, now: float) -> Panel:
    line = Table.grid(expand=True, padding=(0, 1))
    line.add_column(ratio=1)
    line.add_column(justify="right")
    if scene.ends_at is None:
        right = Text("getting ready  ·  Ctrl-C stops", style=QUIET)
    else:
        left_seconds = max(0.0, scene.ends_at - now)
        doing = f"{scene.steps[-1]} …" if scene.stopping else f"{left_seconds:.0f} s left  ·  Ctrl-C stops"
        right = Text(doing, style=QUIET)
    title = Text.assemble(("Millstream", LOUD), f"  {scene.persons} simulated users")
    line.add_row(title, right)
    return Panel(Group(line, _model(scene, now)), border_style="blue")


def _model(scene: Scene, now: float) -> Text:
    """Return which model makes the slates, and what the trainer does; a new one is loud for a while."""
    learning = scene.statistics.learning
    if not learning.version:
        return Text("")
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append("model ", style=QUIET)
    if learning.swaps:
        swap = learning.swaps[-1]
        clock = time.strftime("%H:%M:%S", time.localtime(swap.clock))
        text.append(swap.version, style=NEW if now - swap.at < LOUD_SECONDS else GOOD)
        text.append(f" live since {clock}, after {swap.after_seconds:.0f} s", style=GOOD)
    else:
        text.append(learning.version)
    text.append(f"  ·  {learning.doing}", style=QUIET)
    return text


def _pairs(rows: list[tuple[str, str, str]]) -> Table:
    grid = Table.grid(expand=True, padding=(0, 1))
    grid.add_column(style=QUIET, ratio=1)
    grid.add_column(justify="right")
    for name, value, style in rows:
        grid.add_row(name, Text(value, style=style))
    return grid


def _stream(scene: Scene, now: float) -> Panel:
    statistics, metrics = scene.statistics, scene.metrics
    rate = f"{statistics.events_per_second(now):.0f}" if scene.ends_at is not None else "–"
    rows = [
        ("events/s", rate, LOUD),
        ("events", f"{statistics.events:,}", ""),
        ("slates", f"{statistics.slates:,}", ""),
        ("awaited", f"{statistics.freshness.unanswered:,}", ""),
        ("searchable", f"{metrics.searchable:,} / {len(scene.films):,}", ""),
    ]
    bar = ProgressBar(total=len(scene.films), completed=metrics.searchable, complete_style="blue")
    return Panel(Group(_pairs(rows), bar), title="Kafka", title_align="left")


def _freshness(scene: Scene, now: float) -> Panel:
    freshness = scene.statistics.freshness
    recent, overall = freshness.recent(now), freshness.overall()
    table = Table.grid(expand=True, padding=(0, 1))
    table.add_column(style=QUIET, ratio=1)
    table.add_column(justify="right", min_width=7)
    table.add_column(justify="right", min_width=7)
    table.add_row("", Text("p50", style=QUIET), Text("p99", style=QUIET))
    recent_name = f"last {RECENT_SECONDS:.0f} s"
    table.add_row(recent_name, *[Text(milliseconds(value), style=f"{LOUD} {GOOD}") for value in recent])
    table.add_row("whole run", *[Text(milliseconds(value)) for value in overall])
    note = Text("click in Kafka to\nnew slate at the user", style=QUIET)
    return Panel(Group(table, Text(""), note), title="Freshness", title_align="left")


def _clicks(scene: Scene, now: float) -> Panel:
    clicks = scene.statistics.clicks
    table = Table.grid(expand=True, padding=(0, 1))
    table.add_column(ratio=1)
    table.add_column(justify="right", min_width=7)
    table.add_column(justify="right", min_width=7)
    table.add_row("", Text(f"last {RECENT_SECONDS:.0f} s", style=QUIET), Text("all", style=QUIET))
    for half, style in ((Half.OURS, GOOD), (Half.POPULAR, "magenta")):
        recent, overall = clicks.recent(now, half), clicks.overall(half)
        row = (Text(half.value, style=f"{LOUD} {style}"), Text(percent(recent), style=LOUD), Text(percent(overall)))
        table.add_row(*row)
        share = 0.0 if math.isnan(recent) else recent
        table.add_row(ProgressBar(total=1.0, completed=share, width=BAR_WIDTH, complete_style=style), "", "")
    note = Text("share of slates clicked", style=QUIET)
    return Panel(Group(table, note), title="Click rate", title_align="left")


def _steps(scene: Scene) -> Panel:
    lines = [Text(f"✓ {step}", style=QUIET) for step in scene.steps[:-1]]
    lines += [Text(f"▸ {step} …", style=LOUD) for step in scene.steps[-1:]]
    return Panel(Group(*lines), title="Getting ready", title_align="left")


def _story(scene: Scene) -> Panel:
    story = scene.statistics.story
    head = [Text.assemble((f"{story.user_id} ", LOUD), (f"{scene.story_taste}", ""), (" (hidden)", QUIET))]
    clicks = list(story.clicks)
    if not clicks:
        head.append(Text("has not clicked anything yet", style=QUIET))
        return Panel(Group(*head), title="One user's story", title_align="left")
    for place, (at, item_id) in enumerate(reversed(clicks)):
        clock = time.strftime("%H:%M:%S", time.localtime(at))
        style = LOUD if place == 0 else QUIET
        head.append(Text.assemble((f"{clock} clicked  ", QUIET), (_label(scene, item_id), style), no_wrap=True))
    if not story.is_complete:
        return Panel(Group(*head), title="One user's story", title_align="left")
    return Panel(Group(*head, Text(""), _slates(scene, story)), title="One user's story", title_align="left")


def _slates(scene: Scene, story: Story) -> Table:
    table = Table(box=None, expand=True, padding=(0, 1, 0, 0), header_style=QUIET)
    table.add_column("", width=1)
    table.add_column("slate before the last click", ratio=9, no_wrap=True, overflow="ellipsis")
    table.add_column("", width=1)
    took = f"slate {milliseconds(story.took_ms)} after it" if not math.isnan(story.took_ms) else "slate after it"
    table.add_column(took, ratio=10, no_wrap=True, overflow="ellipsis")
    clicked = story.clicks[-1][1]
    for place in range(max(len(story.before), len(story.after))):
        before = story.before[place] if place < len(story.before) else None
        after = story.after[place] if place < len(story.after) else None
        new = NEW if after and after.is_new else ""
        was = Text(_name(scene, before), style=LOUD if before and before.item_id == clicked else "")
        why = Text(f"\n{after.reason}" if after else "", style=QUIET)
        table.add_row(
            Text(str(place + 1), style=QUIET),
            was,
            Text("●" if new else "", style=new),
            Text.assemble((_name(scene, after), new), why),
        )
    return table


def _name(scene: Scene, line: Line | None) -> str:
    return "" if line is None else _label(scene, line.item_id)


def _label(scene: Scene, item_id: str) -> str:
    film = scene.films.get(item_id)
    return film.label if film else item_id


def story_lines(scene: Scene) -> list[str]:
    """Return the story as plain lines, for the summary; empty without a complete one."""
    story = scene.statistics.story
    if not story.is_complete:
        return []
    took = f", {milliseconds(story.took_ms)} later" if not math.isnan(story.took_ms) else ""
    lines = [
        f"one click's story: {story.user_id} {scene.story_taste}",
        "  (hidden from the recommender)",
        f"  clicked {_label(scene, story.clicks[-1][1])}",
        "  slate before:",
        *[f"      {line.position}. {_label(scene, line.item_id)}" for line in story.before],
        f"  slate after{took} (+ marks what is new):",
    ]
    for line in story.after:
        mark = "+" if line.is_new else " "
        lines.append(f"    {mark} {line.position}. {_label(scene, line.item_id)}")
        lines.append(f"         {line.reason}")
    return lines


class View:
    """Shows a scene: ``with View(…) as view``, then ``view.update()`` several times a second."""

    def __init__(self, scene: Scene, *, plain: bool, console: Console | None = None) -> None:
        self._scene = scene
        self._console = console or Console()
        self._plain = plain or not self._console.is_terminal
        self._live: Live | None = None
        self._printed_at = -math.inf
        self._told = self._marked = 0

    def __enter__(self) -> View:
        if not self._plain:
            self._live = Live(console=self._console, screen=True, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, step: str) -> None:
        """Tell what is being done now."""
        self._scene.steps.append(step)
        if self._live is None:
            self._print(step)

    def update(self, now: float) -> None:
        """Show the scene as it is now."""
        if self._live is not None:
            self._live.update(render(self._scene, now), refresh=True)
            return
        learning = self._scene.statistics.learning
        for outcome, sentence in learning.said[self._told :]:
            self._print(f"trainer: {outcome}: {sentence}")
        for swap in learning.swaps[self._marked :]:
            self._print(swap_line(swap))
        self._told, self._marked = len(learning.said), len(learning.swaps)
        if self._scene.ends_at is not None and now - self._printed_at >= PLAIN_SECONDS:
            self._printed_at = now
            self._print(plain_line(self._scene, now))

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)
