"""Names and shapes of the topics, and what counts as a difference; no broker."""

from __future__ import annotations

from uuid import UUID

import pytest

from streams.settings import Settings
from streams.topic_ids import epoch
from streams.topics import Difference, TopicNames, _explain, fits, shapes


def settings(**topics: object) -> Settings:
    return Settings(topics={"prefix": "shop", "version": 2, "partitions": 12, **topics}, worker={"group": "g"})


def configs(name: str, **topics: object) -> dict[str, str]:
    (shape,) = [s for s in shapes(settings(**topics)) if s.name == name]
    return dict(shape.configs)


def test_a_name_has_prefix_and_version() -> None:
    assert TopicNames.of(settings()).item_stats == "shop.item-stats.v2"


def test_the_changelog_has_the_name_that_faust_derives() -> None:
    import faust

    app = faust.App("g", broker="kafka://127.0.0.1:1", version=1)
    table = app.Table("user_table", partitions=12)
    assert TopicNames.of(settings()).user_table_changelog == table._changelog_topic_name()


def test_every_name_has_a_shape() -> None:
    assert [s.name for s in shapes(settings())] == TopicNames.of(settings()).all()


def test_topics_that_are_joined_by_user_have_the_same_partition_count() -> None:
    names = TopicNames.of(settings())
    partitions = {s.name: s.partitions for s in shapes(settings())}
    joined = [names.events, names.users, names.item_stats, names.user_table_changelog]
    assert {partitions[name] for name in joined} == {12}


@pytest.mark.parametrize("name", ["models", "model_status"])
def test_control_topics_have_one_partition(name: str) -> None:
    partitions = {s.name: s.partitions for s in shapes(settings())}
    assert partitions[getattr(TopicNames.of(settings()), name)] == 1


def test_events_are_stamped_by_the_broker() -> None:
    assert configs("shop.events.v2")["message.timestamp.type"] == "LogAppendTime"


def test_a_record_of_the_greatest_size_fits_on_events() -> None:
    assert int(configs("shop.events.v2")["max.message.bytes"]) > 1_000_000


def test_a_dead_letter_may_be_larger_than_the_event_it_holds() -> None:
    letters, events = configs("shop.dead-letters.v2"), configs("shop.events.v2")
    assert int(letters["max.message.bytes"]) > int(events["max.message.bytes"])


def test_a_row_tombstone_outlives_the_events_that_it_forgets() -> None:
    changelog = configs("g-user_table-changelog", events_retention_hours=240)
    assert int(changelog["delete.retention.ms"]) > 240 * 3_600_000


def test_no_topic_elects_an_unclean_leader() -> None:
    assert {s.configs["unclean.leader.election.enable"] for s in shapes(settings())} == {"false"}


def test_every_topic_is_either_deleted_or_compacted() -> None:
    names = TopicNames.of(settings())
    compacted = {s.name for s in shapes(settings()) if s.configs["cleanup.policy"] == "compact"}
    assert compacted == {
        names.items,
        names.users,
        names.item_stats,
        names.item_vectors,
        names.models,
        names.model_status,
        names.user_table_changelog,
    }


@pytest.mark.parametrize(
    ("config", "wanted", "found", "expected"),
    [
        ("retention.ms", "1000", "2000", True),
        ("retention.ms", "1000", "999", False),
        ("retention.ms", "1000", "-1", True),
        ("segment.ms", "600000", "604800000", False),
        ("segment.ms", "600000", "1000", True),
        ("min.insync.replicas", "2", "1", False),
        ("message.timestamp.type", "LogAppendTime", "CreateTime", False),
        ("cleanup.policy", "compact", "compact,delete", False),
        ("min.cleanable.dirty.ratio", "0.1", "0.5", False),
    ],
)
def test_a_config_fits_where_it_serves_as_well(config: str, wanted: str, found: str, expected: bool) -> None:
    assert fits(config, wanted, found) is expected


def test_wrong_partitions_under_records_say_what_can_still_be_done() -> None:
    difference = Difference("shop.events.v2", "partitions", "12", "6", False, "")
    text = str(_explain(difference, is_empty=False))
    assert "can no longer be changed" in text
    assert "topics.version" in text


def test_late_broker_time_says_that_old_records_keep_the_clients() -> None:
    difference = Difference("shop.events.v2", "message.timestamp.type", "LogAppendTime", "CreateTime", True, "alter it")
    assert "keep their client's time" in str(_explain(difference, is_empty=False))


def test_an_epoch_is_the_folded_id() -> None:
    assert epoch(UUID("00000000-0000-0003-0000-000000000005")) == 6


def test_an_epoch_is_never_zero() -> None:
    assert epoch(UUID("12345678-1234-1234-1234-567812341234")) != 0
    assert epoch(UUID("00000000-0000-0007-0000-000000000007")) == 1
