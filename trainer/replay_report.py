"""What a replay found, for people and programs: JSON with stable names, a table, sentences."""

from __future__ import annotations

import datetime as dt
import math
from typing import Any, Final

from rich.table import Table

from trainer.replay import ReplayResult, delay_text
from trainer.replay_delay import ModeResult
from trainer.replay_measures import Slice
from trainer.replay_slates import SlateMeasures

MODE_TEXTS: Final = {
    "frozen": "all frozen",
    "live": "model frozen, rest live",
    "retrained": "model retrained too",
}
"""What each mode is called where people read."""
SLICE_TEXTS: Final = {"new_item": "new item clicked", "new_user": "new user", "warm": "neither new"}
_LEAST_GAP: Final = 0.0005
"""AUC that is told as a gain or a loss."""
_ALL: Final = 0.999


def as_json(result: ReplayResult) -> dict[str, Any]:
    """Return a result as it is written with ``--json``; names stay, a figure that there is not is null."""
    config = result.config
    return {
        "version": result.version,
        "format": result.kind,
        "paths": list(result.names),
        "events": result.events,
        "users": result.users,
        "items": result.items,
        "impressions": result.impressions,
        "scored_impressions": result.scored,
        "scored_from": time_text(result.start_ms),
        "tick_seconds": result.tick_seconds,
        "item_vectors": result.has_item_vectors,
        "seconds": round(result.seconds, 1),
        "seed": config.seed,
        "options": {
            "feedback_delays_seconds": sorted(set(config.delays_seconds)),
            "modes": list(config.wanted),
            "retrain_every_seconds": config.retrain_every_seconds,
            "unclicked_weight": config.unclicked_weight,
            "warm_up_share": config.warm_up_share,
            "score_share": config.score_share,
            "slates": config.slates,
            "k": config.k,
        },
        "best": [
            {"feedback_delay_seconds": delay, "mode": best.mode, "auc": _number(best.measures.auc.mean)}
            for delay in result.delays_seconds
            for best in [result.best(delay)]
        ],
        "results": [_row(row) for row in result.results],
    }


def _row(row: ModeResult) -> dict[str, Any]:
    measures, gain = row.measures, row.over_frozen
    return {
        "mode": row.mode,
        "feedback_delay_seconds": row.feedback_delay_seconds,
        "auc": _number(measures.auc.mean),
        "auc_low": _number(measures.auc.low),
        "auc_high": _number(measures.auc.high),
        "mrr": _number(measures.mrr),
        "ndcg_5": _number(measures.ndcg_5),
        "ndcg_10": _number(measures.ndcg_10),
        "clicks_in_top_5": _number(measures.clicks_in_top_5),
        "log_loss": _number(measures.log_loss),
        "ece": _number(measures.ece),
        "impressions": measures.impressions,
        "auc_over_frozen": None if gain is None else _number(gain.mean),
        "auc_over_frozen_low": None if gain is None else _number(gain.low),
        "auc_over_frozen_high": None if gain is None else _number(gain.high),
        "models": row.models,
        "trained_on": row.trained_on,
        "slices": {name: _slice(found) for name, found in measures.slices.items()},
        "slates": None if row.slates is None else _slates(row.slates),
    }


def _alone(slates: SlateMeasures, name: str) -> str:
    """Say what a source has in its first places, and what only it has: what a quota of it buys."""
    only, first = slates.source_only.get(name, 0.0), slates.source_recall_first.get(name, math.nan)
    return f" (first {slates.k}: {first:.3f}" + (f", only there {only:.3f})" if only else ")")


def _slice(found: Slice) -> dict[str, Any]:
    return {
        "impressions": found.impressions,
        "auc": _number(found.auc.mean),
        "auc_low": _number(found.auc.low),
        "auc_high": _number(found.auc.high),
        "ndcg_10": _number(found.ndcg_10),
    }


def _slates(slates: SlateMeasures) -> dict[str, Any]:
    return {
        "impressions": slates.impressions,
        "k": slates.k,
        "recall": _number(slates.recall),
        "recall_200": {name: _number(value) for name, value in slates.source_recall.items()},
        "recall_200_only": {name: _number(value) for name, value in slates.source_only.items()},
        "recall_first_k": {name: _number(value) for name, value in slates.source_recall_first.items()},
        "coverage": _number(slates.coverage),
        "gini": _number(slates.gini),
        "tail_share": _number(slates.tail_share),
        "novelty": _number(slates.novelty),
        "intra_list_diversity": _number(slates.intra_list_diversity),
    }


def sentence(result: ReplayResult) -> str:
    """Return in one sentence what the replay says; the title of the picture."""
    delays = result.delays_seconds
    first, last = (result.best(delay).measures.auc.mean for delay in (delays[0], delays[-1]))
    if len(delays) > 1:
        moved = "falls" if last < first - _LEAST_GAP else "rises" if last > first + _LEAST_GAP else "stays"
        how = "stays about" if moved == "stays" else f"{moved} from {first:.3f} to"
        return f"If feedback comes {_late(delays[-1])}, not {_late(delays[0])}, ranking quality {how} {last:.3f} AUC"
    frozen = result.row("frozen", delays[0])
    best = result.best(delays[0])
    if frozen is not None and best.mode != "frozen":
        gain = best.measures.auc.mean - frozen.measures.auc.mean
        return f"Keeping up with the events is worth {gain:+.3f} AUC against a system frozen at the start"
    return f"With feedback {_late(delays[0])}, the ranking has an AUC of {first:.3f}"


def costs(result: ReplayResult) -> list[str]:
    """Return what staleness costs on this log, a sentence for each delay."""
    lines: list[str] = []
    delays = result.delays_seconds
    base = result.best(delays[0]).measures
    for delay in delays:
        best = result.best(delay)
        measures = best.measures
        # Where slates have five items or fewer, the first five hold everything.
        has_top = base.clicks_in_top_5 < _ALL
        if delay == delays[0]:
            text = (
                f"With feedback {_late(delay)}, a clicked item ranks above an unclicked one of its impression in "
                f"{_percent(measures.auc.mean)} of the cases"
            )
            if has_top:
                text += f", and {_percent(measures.clicks_in_top_5)} of the clicks fall on the five that we put first"
        else:
            lost = base.auc.mean - measures.auc.mean
            text = f"{delay_words(delay)} late costs {_points(lost)} of AUC against feedback {_late(delays[0])}"
            if has_top:
                fewer = _points(base.clicks_in_top_5 - measures.clicks_in_top_5)
                text += f"; the first five hold {_percent(measures.clicks_in_top_5)} of the clicks, {fewer} fewer"
        gain = best.over_frozen
        if gain is not None:
            certain = "" if gain.low <= 0 <= gain.high else ", beyond chance"
            text += (
                f"; against a system that stands still it is {_points(gain.mean)} better "
                f"(95 % interval {100 * gain.low:.1f} to {100 * gain.high:.1f}{certain})"
            )
        lines.append(text + f". Best mode: {MODE_TEXTS[best.mode]}.")
    return lines


def table(result: ReplayResult) -> Table:
    """Return the rows as a table for a terminal."""
    made = Table(title=f"{result.kind}: {', '.join(result.names)}")
    made.add_column("delay")
    made.add_column("mode")
    for name in COLUMNS:
        made.add_column(name, justify="right")
    for row in result.results:
        is_best = result.best(row.feedback_delay_seconds) is row
        style = "bold" if is_best else None
        made.add_row(delay_text(row.feedback_delay_seconds), row.mode, *cells(row), style=style)
    return made


COLUMNS: Final = ("AUC", "95 % interval", "over frozen", "MRR", "nDCG@5", "nDCG@10", "log loss", "ECE", "impressions")


def cells(row: ModeResult) -> list[str]:
    """Return the figures of a row as texts, in the order of COLUMNS."""
    measures, gain = row.measures, row.over_frozen
    return [
        f"{measures.auc.mean:.4f}",
        f"{measures.auc.low:.4f} – {measures.auc.high:.4f}",
        "" if gain is None else f"{gain.mean:+.4f}",
        f"{measures.mrr:.4f}",
        f"{measures.ndcg_5:.4f}",
        f"{measures.ndcg_10:.4f}",
        f"{measures.log_loss:.4f}",
        f"{measures.ece:.4f}",
        f"{measures.impressions:,}",
    ]


def lines(result: ReplayResult) -> list[str]:
    """Return the rows as plain lines, for where there is no terminal."""
    told = []
    for row in result.results:
        pairs = ", ".join(f"{name} {cell}" for name, cell in zip(COLUMNS, cells(row), strict=True) if cell)
        told.append(f"{delay_text(row.feedback_delay_seconds)} {row.mode}: {pairs}")
    return told


def slate_lines(result: ReplayResult) -> list[str]:
    """Return what the slates that we would have sent are worth, a line for each row that has any."""
    told = []
    for row in result.results:
        slates = row.slates
        if slates is None:
            continue
        sources = ", ".join(
            f"{name} {value:.3f}{_alone(slates, name)}"
            for name, value in slates.source_recall.items()
            if not math.isnan(value) and value > 0
        )
        told.append(
            f"{delay_text(row.feedback_delay_seconds)} {row.mode}: {slates.impressions:,} slates, "
            f"recall@{slates.k} {slates.recall:.3f}; recall@200 {sources}; coverage {slates.coverage:.3f}, "
            f"Gini {slates.gini:.3f}, tail {slates.tail_share:.3f}, novelty {slates.novelty:.2f} bits"
            + ("" if math.isnan(slates.intra_list_diversity) else f", diversity {slates.intra_list_diversity:.3f}")
        )
    return told


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 6)


def delay_words(seconds: float) -> str:
    """Return a delay in whole words: ``0 seconds``, ``1 hour``."""
    number, unit = delay_text(seconds).split(" ")
    word = {"s": "second", "min": "minute", "h": "hour", "d": "day"}[unit]
    return f"{number} {word}" if number == "1" else f"{number} {word}s"


def _late(seconds: float) -> str:
    return f"{delay_words(seconds)} late" if seconds else "at once"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _points(difference: float) -> str:
    return f"{100 * difference:.1f} points"


def time_text(time_ms: int) -> str:
    """Return a time in UTC as RFC 3339 has it."""
    return dt.datetime.fromtimestamp(time_ms / 1000, dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
