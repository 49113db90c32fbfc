"""The picture of a replay: ranking quality against the feedback delay, one line a mode, with intervals."""

from __future__ import annotations

import io
import math
import textwrap
from typing import TYPE_CHECKING, Any, Final

from models.errors import ReplayError
from trainer.replay import ReplayResult, delay_text
from trainer.replay_report import MODE_TEXTS, sentence
from trainer.replay_settings import MODES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS: Final = {"frozen": "#7f7f7f", "live": "#0072b2", "retrained": "#d55e00"}
"""Told apart by colour-blind people too (Okabe and Ito 2008)."""
MARKERS: Final = {"frozen": "s", "live": "o", "retrained": "^"}
_LINEAR_SECONDS: Final = 60.0
"""Delays up to this stand on a linear piece of the axis, so that 0 has a place."""
_LEAST_LABEL_GAP: Final = 0.055
"""Of the height, between the labels of two lines."""


def require_matplotlib() -> None:
    """Raise ReplayError where there is nothing to draw with."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ReplayError(
            "a picture needs matplotlib, which is not installed: pip install 'millstream[replay]', or leave out --plot "
            "and --report"
        ) from None


def draw(result: ReplayResult) -> bytes:
    """Return the picture as PNG. Raises ReplayError where matplotlib is missing."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 5.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    delays = result.delays_seconds
    axes.set_xscale("symlog", linthresh=_LINEAR_SECONDS, linscale=0.6)
    ends: list[tuple[float, str]] = []
    for mode in MODES:
        rows = [row for delay in delays if (row := result.row(mode, delay)) is not None]
        if not rows:
            continue
        x = [row.feedback_delay_seconds for row in rows]
        aucs = [row.measures.auc for row in rows]
        means, lows, highs = [a.mean for a in aucs], [a.low for a in aucs], [a.high for a in aucs]
        axes.fill_between(x, lows, highs, color=COLOURS[mode], alpha=0.15, linewidth=0)
        if len(x) == 1:
            axes.vlines(x, lows, highs, color=COLOURS[mode], alpha=0.6, linewidth=3)
        axes.plot(x, means, color=COLOURS[mode], marker=MARKERS[mode], linewidth=2, markersize=7)
        ends.append((means[-1], mode))
    _dress(axes, result, delays)
    _label(axes, ends, delays[-1])
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=140)
    return out.getvalue()


def _dress(axes: Axes, result: ReplayResult, delays: list[float]) -> None:
    axes.set_title("\n".join(textwrap.wrap(sentence(result), 72)), loc="left", fontsize=13, fontweight="bold")
    axes.set_xlabel("How late impressions and clicks reach the recommender")
    axes.set_ylabel("How often a clicked item ranks above\none that was not clicked (AUC; 0.5 is chance)")
    axes.set_xticks(delays, [delay_text(delay) for delay in delays])
    axes.minorticks_off()
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.margins(y=0.12)
    first, last = delays[0], max(delays[-1], _LINEAR_SECONDS)
    # Room at the right for the names of the lines.
    axes.set_xlim(first - 0.08 * _LINEAR_SECONDS if first < _LINEAR_SECONDS else first * 0.8, _room(first, last))
    note = f"{result.kind}: {result.scored:,} impressions; shaded: 95 % interval, users drawn again"
    axes.annotate(note, (0, -0.17), xycoords="axes fraction", fontsize=8.5, color="#555555")


def _room(first: float, last: float) -> float:
    """Return where the axis ends: about two fifths longer than the delays, as far as its scale goes."""
    decades = math.log10(last / _LINEAR_SECONDS) + 0.6
    begun = 0.0 if first < _LINEAR_SECONDS else math.log10(first / _LINEAR_SECONDS) + 0.6
    return last * 10 ** (0.4 * max(decades - begun, 0.4))


def _label(axes: Axes, ends: list[tuple[float, str]], last: float) -> None:
    """Write each line's name at its end, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    gap = _LEAST_LABEL_GAP * (high - low)
    places: list[tuple[float, float, str]] = []
    for value, mode in sorted(ends):
        at = max(value, places[-1][0] + gap) if places else value
        places.append((at, value, mode))
    style: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 11}
    for at, value, mode in places:
        text = f"{MODE_TEXTS[mode]} ({value:.3f})"
        axes.annotate(text, (last, at), xytext=(12, 0), color=COLOURS[mode], fontweight="bold", **style)
