"""The report of a replay as one HTML file that asks for nothing from outside."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Sequence
from typing import Final

from trainer.replay import ReplayResult, delay_text
from trainer.replay_report import COLUMNS, MODE_TEXTS, SLICE_TEXTS, cells, costs, sentence, time_text

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
<p><b>All frozen</b>: model, item counters and user histories as they were when the scored part began. <b>Model frozen,
rest live</b>: the same model; counters and users go on, each event that much later than it happened. <b>Model retrained
too</b>: and the model is trained again as labels close. A worker would run the best mode of its delay.</p>
<h2>All figures</h2>
{rows}
<p class="small">AUC: how often a clicked item ranks above an unclicked one of the same impression, mean over
impressions. Intervals: bootstrap over users. Over frozen: paired difference at the same delay. ECE: expected
calibration error.</p>
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


def as_html(result: ReplayResult, picture: bytes) -> str:
    """Return the report as one HTML file that asks for nothing from outside; ``picture``: PNG."""
    image = base64.b64encode(picture).decode()
    about = (
        f"{result.events:,} events of {result.users:,} users and {result.items:,} items; {result.scored:,} of "
        f"{result.impressions:,} impressions are scored, those from {time_text(result.start_ms)} on"
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


def _figure(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"
