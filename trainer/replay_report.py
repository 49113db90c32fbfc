"""What a replay found, for people and programs: JSON with stable names, a table, a paragraph, one HTML file."""

from __future__ import annotations

import base64
import datetime as dt
import html
import math
from collections.abc import Sequence
from typing import Any, Final

from rich.table import Table

from trainer.replay import ReplayResult, delay_text
from trainer.replay_delay import ModeResult
from trainer.replay_measures import Slice
from trainer.replay_slates import SlateMeasures

MODE_TEXTS: Final = {
    "frozen": "all frozen",
    "live": "counters and users live",
    "retrained": "live, model retrained",
}
"""What each mode is called where people read."""
SLICE_TEXTS: Final = {"new_item": "new item clicked", "new_user": "new user", "warm": "neither new"}
_LEAST_GAP: Final = 0.0005
"""AUC that is told as a gain or a loss."""


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
        "scored_from": _time_text(result.start_ms),
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
        late = delay_text(delays[-1])
        return (
            f"When feedback comes {late} late instead of {delay_text(delays[0])}, ranking quality {how} {last:.3f} AUC"
        )
    frozen = result.row("frozen", delays[0])
    best = result.best(delays[0])
    if frozen is not None and best.mode != "frozen":
        gain = best.measures.auc.mean - frozen.measures.auc.mean
        return f"Keeping up with the events is worth {gain:+.3f} AUC against a system frozen at the start"
    return f"With feedback {delay_text(delays[0])} late, the ranking has an AUC of {first:.3f}"


def costs(result: ReplayResult) -> list[str]:
    """Return what staleness costs on this log, a sentence for each delay."""
    lines: list[str] = []
    delays = result.delays_seconds
    base = result.best(delays[0]).measures
    for delay in delays:
        best = result.best(delay)
        measures = best.measures
        if delay == delays[0]:
            text = (
                f"With feedback {delay_text(delay)} late, a clicked item ranks above an unclicked one of its impression "
                f"in {_percent(measures.auc.mean)} of the cases, and {_percent(measures.clicks_in_top_5)} of the clicks "
                "fall on the five that we put first"
            )
        else:
            text = (
                f"{delay_text(delay)} late costs {_points(base.auc.mean - measures.auc.mean)} of AUC against "
                f"{delay_text(delays[0])}; the first five hold {_percent(measures.clicks_in_top_5)} of the clicks, "
                f"{_points(base.clicks_in_top_5 - measures.clicks_in_top_5)} fewer"
            )
        gain = best.over_frozen
        if gain is not None:
            certain = "" if gain.low <= 0 <= gain.high else ", beyond chance"
            text += (
                f"; against a system that stands still it is {_points(gain.mean)} better "
                f"(95 % interval {_points(gain.low)} to {_points(gain.high)}{certain})"
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
            f"{name} {value:.3f}" for name, value in slates.source_recall.items() if not math.isnan(value) and value > 0
        )
        told.append(
            f"{delay_text(row.feedback_delay_seconds)} {row.mode}: {slates.impressions:,} slates, "
            f"recall@{slates.k} {slates.recall:.3f}; recall@200 {sources}; coverage {slates.coverage:.3f}, "
            f"Gini {slates.gini:.3f}, tail {slates.tail_share:.3f}, novelty {slates.novelty:.2f} bits"
            + ("" if math.isnan(slates.intra_list_diversity) else f", diversity {slates.intra_list_diversity:.3f}")
        )
    return told


def as_html(result: ReplayResult, picture: bytes) -> str:
    """Return the report as one HTML file that asks for nothing from outside; ``picture``: PNG."""
    image = base64.b64encode(picture).decode()
    about = (
        f"{result.events:,} events of {result.users:,} users and {result.items:,} items; {result.scored:,} of "
        f"{result.impressions:,} impressions are scored, those from {_time_text(result.start_ms)} on"
    )
    rows = [[delay_text(row.feedback_delay_seconds), MODE_TEXTS[row.mode], *cells(row)] for row in result.results]
    slices = [
        [
            delay_text(row.feedback_delay_seconds),
            MODE_TEXTS[row.mode],
            SLICE_TEXTS.get(name, name),
            f"{part.impressions:,}",
            _figure(part.auc.mean),
            _figure(part.ndcg_10),
        ]
        for row in result.results
        for name, part in row.measures.slices.items()
    ]
    return _PAGE.format(
        title=html.escape(sentence(result)),
        about=html.escape(f"Log: {result.kind}, {', '.join(result.names)}. {about}."),
        image=image,
        costs="".join(f"<li>{html.escape(line)}</li>" for line in costs(result)),
        rows=_html_table(["Delay", "Mode", *COLUMNS], rows),
        slices=_html_table(["Delay", "Mode", "Slice", "Impressions", "AUC", "nDCG@10"], slices),
        slates=_slates_html(result),
        version=html.escape(result.version),
        seconds=f"{result.seconds:,.0f}",
        seed=result.config.seed,
    )


def _slates_html(result: ReplayResult) -> str:
    found = [(row, row.slates) for row in result.results if row.slates is not None]
    if not found:
        return ""
    names = list(dict.fromkeys(name for _, slates in found for name in slates.source_recall))
    head = ["Delay", "Mode", f"Recall@{found[0][1].k}", "Coverage", "Gini", "Tail", "Novelty, bits", "Diversity"]
    rows = []
    for row, s in found:
        figures = (s.recall, s.coverage, s.gini, s.tail_share, s.novelty, s.intra_list_diversity)
        own = [_figure(value) for value in figures]
        rows.append([delay_text(row.feedback_delay_seconds), MODE_TEXTS[row.mode], *own])
    recall = [
        [
            delay_text(row.feedback_delay_seconds),
            MODE_TEXTS[row.mode],
            *(_figure(s.source_recall.get(name, math.nan)) for name in names),
        ]
        for row, s in found
    ]
    return (
        "<h2>The slates that we would have sent</h2><p>Recall is the share of the clicked items that our slate holds. "
        "The log cannot say whether a user would have clicked on what it did not show, so this is no click rate.</p>"
        + _html_table(head, rows)
        + "<h3>Share of the clicked items among 200 candidates of each source</h3>"
        + _html_table(["Delay", "Mode", *names], recall)
    )


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 6)


def _figure(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _points(difference: float) -> str:
    return f"{100 * difference:.1f} points"


def _time_text(time_ms: int) -> str:
    return dt.datetime.fromtimestamp(time_ms / 1000, dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


_PAGE: Final = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>What staleness costs</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 2rem auto; max-width: 62rem;
       padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; line-height: 1.3; }}
img {{ max-width: 100%; height: auto; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 0.85rem; margin: 1rem 0; }}
th, td {{ padding: 0.25rem 0.6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }}
th:nth-child(-n+2), td:nth-child(-n+2) {{ text-align: left; }}
.small {{ color: #666; font-size: 0.85rem; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{about}</p>
<img alt="{title}" src="data:image/png;base64,{image}">
<h2>What staleness costs on this log</h2>
<ul>{costs}</ul>
<p><b>All frozen</b>: model, item counters and user histories as they were when the scored part began. <b>Counters and
users live</b>: the same model; counters and users go on, each event that much later than it happened. <b>Live, model
retrained</b>: and the model is trained again as labels close. A worker would run the best mode of its delay.</p>
<h2>All figures</h2>
{rows}
<p class="small">AUC: how often a clicked item ranks above an unclicked one of the same impression, mean over
impressions. Intervals: bootstrap over users. Over frozen: paired difference at the same delay. ECE: expected calibration error.</p>
<h2>New items, new users</h2>
{slices}
{slates}
<h2>How such a replay can fool you</h2>
<ul>
<li>The log shows what another system chose to show; what that one never showed is judged by nobody.</li>
<li>A log that kept only some of the unclicked items makes them look rare: say so with <code>--unclicked-weight</code>.
</li>
<li>Retraining is taken to need no time here.</li>
</ul>
<p class="small">millstream {version}, {seconds} s, seed {seed}.</p>
</body>
</html>
"""
