"""The clock policies' outer bounds."""

from __future__ import annotations

import datetime as dt

import pytest

from models.errors import RecordError
from models.events import EVENT_CODEC, ClockPolicy, epoch_ms
from models.user_events import UserStateConfig, action_code
from models.user_row import NEGATIVE

NOW_MS = 1_795_000_000_000


@pytest.mark.parametrize("policy", ["live", "trusted"])
def test_a_time_before_1970_is_refused_under_both_policies(policy: str) -> None:
    before = round(dt.datetime(1960, 1, 1, tzinfo=dt.UTC).timestamp() * 1000)
    with pytest.raises(RecordError, match="event-time-absurd"):
        ClockPolicy.model_validate({"policy": policy}).event_time_ms(before, NOW_MS)


def test_a_record_may_say_1960_but_no_worker_takes_it() -> None:
    event = EVENT_CODEC.decode(
        b'{"type":"request","event_id":"e","event_time":"1960-01-01T00:00:00Z","user_id":"u","request_id":"r"}'
    )
    with pytest.raises(RecordError, match="1970"):
        ClockPolicy(policy="trusted").event_time_ms(epoch_ms(event.event_time), NOW_MS)


def test_a_time_of_2019_is_taken_as_it_is_when_trusted() -> None:
    assert ClockPolicy(policy="trusted").event_time_ms(1_573_000_000_000, NOW_MS) == 1_573_000_000_000


def test_a_negative_dwell_time_is_no_dislike() -> None:
    assert not action_code("dwell", -1.0, UserStateConfig()) & NEGATIVE
