"""What a replay writes: names that stay, a picture, one HTML file that asks for nothing, sentences."""

from __future__ import annotations

import html.parser
import io
import json
import math
import struct
import sys
from typing import Any

import pytest

from models.errors import ReplayError
from models.evaluation import Interval
from trainer.replay import ReplayConfig, ReplayResult, delay_text
from trainer.replay_delay import ModeResult
from trainer.replay_html import as_html
from trainer.replay_measures import Measures, Slice
from trainer.replay_plot import draw
from trainer.replay_report import as_json, costs, lines, sentence, slate_lines, table
from trainer.replay_run import told
from trainer.replay_settings import Mode
from trainer.replay_slates import SlateMeasures

NAN = math.nan
RESULT_NAMES = {
    "mode",
    "feedback_delay_seconds",
    "auc",
    "auc_low",
    "auc_high",
    "mrr",
    "ndcg_5",
    "ndcg_10",
    "clicks_in_top_5",
    "log_loss",
    "ece",
    "impressions",
    "auc_over_frozen",
    "auc_over_frozen_low",
    "auc_over_frozen_high",
    "models",
    "trained_on",
    "slices",
    "slates",
}
HEADER_NAMES = {
    "version",
    "format",
    "paths",
    "events",
    "users",
    "items",
    "impressions",
    "scored_impressions",
    "scored_from",
    "tick_seconds",
    "item_vectors",
    "seconds",
    "seed",
    "options",
    "best",
    "results",
}
SLATES_NAMES = {
    "impressions",
    "k",
    "recall",
    "recall_200",
    "recall_200_only",
    "recall_first_k",
    "coverage",
    "gini",
    "tail_share",
    "novelty",
    "intra_list_diversity",
}


def row(mode: Mode, delay: float, auc: float, over_frozen: float | None = None) -> ModeResult:
    slices = {
        "new_item": Slice(7, Interval(0.6, 0.5, 0.7), 0.4),
        "new_user": Slice(0, Interval(NAN, NAN, NAN), NAN),
        "warm": Slice(93, Interval(auc, auc - 0.01, auc + 0.01), 0.5),
    }
    slates = SlateMeasures(50, 10, 0.3, {"mix": 0.7, "fresh": 0.0}, {"mix": 0.2}, {"mix": 0.0}, 0.1, 0.8, 0.2, 9.5, NAN)
    gain = None if over_frozen is None else Interval(over_frozen, over_frozen - 0.01, over_frozen + 0.01)
    interval = Interval(auc, auc - 0.01, auc + 0.01)
    measures = Measures(100, interval, 0.4, 0.45, 0.5, auc, 0.3, 0.02, slices)
    return ModeResult(mode, delay, measures, gain, 1, 900, slates)


def result(*rows: ModeResult) -> ReplayResult:
    config = ReplayConfig(delays_seconds=tuple({r.feedback_delay_seconds for r in rows}))
    return ReplayResult(
        kind="ebnerd",
        names=("train", "validation"),
        events=5_000,
        users=40,
        items=300,
        impressions=1_000,
        scored=100,
        start_ms=1_700_000_000_000,
        tick_seconds=0.001,
        has_item_vectors=False,
        version="1.2.3",
        config=config,
        seconds=9.0,
        results=list(rows),
    )


FULL = result(
    row("frozen", 0.0, 0.60),
    row("live", 0.0, 0.80, 0.20),
    row("retrained", 0.0, 0.81, 0.21),
    row("frozen", 3_600.0, 0.60),
    row("live", 3_600.0, 0.70, 0.10),
    row("retrained", 3_600.0, 0.69, 0.09),
)


def test_the_names_in_the_json_stay() -> None:
    told = as_json(FULL)
    assert set(told) == HEADER_NAMES
    assert {frozenset(r) for r in told["results"]} == {frozenset(RESULT_NAMES)}
    assert set(told["results"][0]["slices"]) == {"new_item", "new_user", "warm"}
    assert set(told["results"][0]["slices"]["warm"]) == {"impressions", "auc", "auc_low", "auc_high", "ndcg_10"}
    assert set(told["results"][0]["slates"]) == SLATES_NAMES


def test_the_json_has_null_where_there_is_no_figure_and_is_strict() -> None:
    told = json.loads(json.dumps(as_json(FULL), allow_nan=False))
    assert told["results"][0]["slices"]["new_user"]["auc"] is None
    assert told["results"][0]["auc_over_frozen"] is None
    assert told["results"][1]["auc_over_frozen"] == 0.2


def test_the_best_mode_of_each_delay_is_named() -> None:
    best = as_json(FULL)["best"]
    assert [(b["feedback_delay_seconds"], b["mode"], b["auc"]) for b in best] == [
        (0.0, "retrained", 0.81),
        (3_600.0, "live", 0.7),
    ]


def test_of_equal_modes_the_simplest_is_best() -> None:
    assert result(row("live", 0.0, 0.8), row("retrained", 0.0, 0.8)).best(0.0).mode == "live"


def test_the_sentence_says_what_the_delay_costs() -> None:
    assert sentence(FULL) == "If feedback comes 1 hour late, not at once, ranking quality falls from 0.810 to 0.700 AUC"
    one = result(row("frozen", 0.0, 0.6), row("live", 0.0, 0.8, 0.2))
    assert "worth +0.200 AUC" in sentence(one)
    assert "stays about 0.800" in sentence(result(row("live", 0.0, 0.8), row("live", 60.0, 0.8)))


def test_the_costs_are_against_the_shortest_delay() -> None:
    first, second = costs(FULL)
    assert first.startswith("With feedback at once, a clicked item ranks above an unclicked one")
    assert "1 hour late costs 11.0 points of AUC" in second
    assert "11.0 points fewer" in second


def test_a_picture_is_a_png_of_some_size() -> None:
    for given in (FULL, result(row("live", 0.0, 0.8)), result(row("live", 300.0, 0.8), row("live", 600.0, 0.7))):
        picture = draw(given)
        assert picture.startswith(b"\x89PNG\r\n\x1a\n")
        width, height = struct.unpack(">II", picture[16:24])
        assert width > 800
        assert height > 500


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ReplayError, match=r"millstream\[replay\]"):
        draw(FULL)


class Links(html.parser.HTMLParser):
    """Collects everything that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, Any]]) -> None:
        self.tags.append(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]


def test_the_html_asks_for_nothing_from_outside() -> None:
    page = as_html(FULL, draw(FULL))
    links = Links()
    links.feed(page)
    assert [link[:22] for link in links.fetched] == ["data:image/png;base64,"]
    assert not {"script", "link", "iframe"} & set(links.tags)
    assert "url(" not in page
    assert "@import" not in page


def test_the_html_tells_all_rows_and_what_staleness_costs() -> None:
    page = as_html(FULL, b"")
    assert page.count("<td>model frozen, rest live</td>") == 2 * (1 + 3 + 2)
    assert "What staleness costs on this log" in page
    assert "costs 11.0 points of AUC" in page


def test_the_names_of_a_log_are_escaped() -> None:
    odd = result(row("live", 0.0, 0.8))
    odd.names = ("<script>",)
    assert "<script>" not in as_html(odd, b"")


def test_lines_and_table_have_a_row_for_each_result() -> None:
    assert len(lines(FULL)) == len(table(FULL).rows) == 6
    assert lines(FULL)[1].startswith("0 s live: AUC 0.8000, 95 % interval 0.7900 – 0.8100, over frozen +0.2000")
    assert "recall@200 mix 0.700" in slate_lines(FULL)[0]


def test_delays_are_told_in_the_largest_whole_unit() -> None:
    assert [delay_text(s) for s in (0.0, 90.0, 300.0, 5_400.0, 86_400.0)] == ["0 s", "90 s", "5 min", "90 min", "1 d"]


def test_progress_off_a_terminal_is_a_sentence_every_five_seconds_at_most() -> None:
    out, now = io.StringIO(), [100.0]
    with told(out, lambda: now[0]) as show:
        show("5 min: training", 156, None)
        show("1 h: training", 12, None)
        now[0] += 4.9
        show("1 h: training", 13, 13)
        now[0] += 0.1
        show("5 min: reading, live", 20_000, 407_313)
        now[0] += 5.0
        show("1 h: training", 1, None)
    assert out.getvalue().splitlines() == [
        "5 min: training, 156 steps",
        "5 min: reading, live, 20,000 of 407,313 events",
        "1 h: training, 1 step",
    ]
