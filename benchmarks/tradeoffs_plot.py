"""The picture of benchmarks.tradeoffs: nDCG against what is gained for it, a line for each score and setting."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from trainer.replay_plot import require_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from benchmarks.tradeoffs import Row

COLOURS: Final = {"hand": "#0072b2", "model": "#d55e00"}
"""Told apart by colour-blind people too (Okabe and Ito 2008)."""
SCORE_TEXTS: Final = {"hand": "hand-set score", "model": "learned model"}
STYLES: Final[dict[str, tuple[str, Literal["-", "--", ":", "-."]]]] = {
    "popularity_debias": ("o", "-"),
    "sameness": ("s", "--"),
    "max_per_category": ("^", ":"),
    "fresh_slots": ("D", "-."),
}
KNOB_TEXTS: Final = {
    "popularity_debias": "less of what is popular (popularity_debias)",
    "sameness": "less of the same (sameness)",
    "max_per_category": "at most so many of a category (max_per_category)",
    "fresh_slots": "places kept for new items (fresh_slots)",
}
ALL_KNOBS: Final = tuple(STYLES)
COLUMN_INCHES: Final = 6.4
LABEL_GAP: Final = 0.035
"""Of the width and height: labels of one line that would stand closer than this are left out."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture of one view: what stands from left to right, and how that is called."""

    view: str
    knobs: tuple[str, ...]
    title: str
    x_text: str
    x: Callable[[Row], float]


PANELS: Final = (
    Panel(
        "slate",
        ALL_KNOBS,
        "Ten items chosen from everything: more of the catalogue",
        "Share of all items that stand in any of the slates, % (coverage@10)",
        lambda row: 100 * row.coverage,
    ),
    Panel(
        "slate",
        ("sameness", "max_per_category"),
        "The same slates: less alike within one",
        "How unlike the items of one slate are (1 − mean cosine)",
        lambda row: row.intra_list_diversity,
    ),
    Panel(
        "shown",
        ALL_KNOBS,
        "The items that were shown, put in our order",
        "Share of the shown items that come first to third anywhere, %",
        lambda row: 100 * row.coverage,
    ),
)


def draw(title: str, rows: Sequence[Row]) -> bytes:
    """Return the picture as PNG, a panel for each that has figures. Raises ReplayError where matplotlib is missing."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [(panel, some) for panel in PANELS if len(some := _rows_of(panel, rows)) > len(SCORE_TEXTS)]
    figure = Figure(figsize=(COLUMN_INCHES * len(panels), 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (panel, some) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _lines(axes, some, panel.x)
        axes.set_title(panel.title, loc="left", fontsize=11, fontweight="bold")
        axes.set_xlabel(panel.x_text)
        axes.set_ylabel("How high clicked items stand\n(nDCG@10; 1: always first, 0: never among ten)")
    _legend(figure, rows)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=95)
    return out.getvalue()


def _rows_of(panel: Panel, rows: Sequence[Row]) -> list[Row]:
    """Return what a panel shows: its knobs, all off, and nothing that has no place in it."""
    return [
        row
        for row in rows
        if row.view == panel.view and (not row.strength or row.knob in panel.knobs) and not math.isnan(panel.x(row))
    ]


def _lines(axes: Axes, rows: Sequence[Row], at: Callable[[Row], float]) -> None:
    lines: list[list[Row]] = []
    for score in dict.fromkeys(row.score for row in rows):
        own = [row for row in rows if row.score == score]
        off = next(row for row in own if row.strength == 0)
        for knob in dict.fromkeys(row.knob for row in own):
            line = [off, *(row for row in own if row.knob == knob and row.strength)]
            if len(line) == 1:
                continue
            marker, style = STYLES[knob]
            axes.errorbar(
                [at(row) for row in line],
                [row.ndcg.mean for row in line],
                yerr=[[row.cost.mean - row.cost.low for row in line], [row.cost.high - row.cost.mean for row in line]],
                color=COLOURS[score],
                marker=marker,
                linestyle=style,
                linewidth=1.7,
                markersize=5.5,
                elinewidth=0.9,
            )
            lines.append(line)
    axes.margins(0.1)
    if min(row.ndcg.mean for row in rows) < 0.1:
        axes.set_ylim(bottom=0)
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    _label(axes, lines, at)


def _label(axes: Axes, lines: Sequence[Sequence[Row]], at: Callable[[Row], float]) -> None:
    """Write strengths beside their points, where there is room: the strong ones first, which stand apart."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    taken: list[tuple[float, float]] = []
    offs = {line[0].score: line[0] for line in lines}
    labels = [(row, "all off") for row in offs.values()]
    labels += [(row, f"{row.strength:g}") for line in lines for row in reversed(line[1:])]
    for row, text in labels:
        place = (at(row) - left) / (right - left), (row.ndcg.mean - low) / (high - low)
        if any(abs(place[0] - x) < LABEL_GAP and abs(place[1] - y) < LABEL_GAP for x, y in taken):
            continue
        taken.append(place)
        is_off = row.strength == 0
        axes.annotate(
            text,
            (at(row), row.ndcg.mean),
            xytext=(-8, 8) if is_off else (5, 4),
            textcoords="offset points",
            fontsize=9.5 if is_off else 8.5,
            fontweight="bold" if is_off else "normal",
            color=COLOURS[row.score],
        )


def _legend(figure: Figure, rows: Sequence[Row]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=COLOURS[s], linewidth=4, label=SCORE_TEXTS[s]) for s in COLOURS]
    for knob in dict.fromkeys(row.knob for row in rows):
        marker, style = STYLES[knob]
        handles.append(Line2D([], [], color="#444444", marker=marker, linestyle=style, label=KNOB_TEXTS[knob]))
    note = "Numbers: strength of a setting. Bars: 95 % interval of the difference to all off, users drawn again."
    figure.legend(
        handles=handles, loc="outside lower left", ncols=3, fontsize=9, frameon=False, title=note, title_fontsize=8.5
    )
