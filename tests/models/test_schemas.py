from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema
import msgspec
import pytest
from msgspec import Meta

from models.errors import LogFormatError
from models.schemas import RECORDS, Direction, file_name, incompatibilities, render, schema, write

PUBLISHED = Path(__file__).resolve().parents[2] / "docs" / "schemas"


class Old(msgspec.Struct, omit_defaults=True):
    name: Annotated[str, Meta(max_length=10)]
    kind: Literal["click", "like"]
    note: str | None = None


class WithNewOptionalField(msgspec.Struct, omit_defaults=True):
    name: Annotated[str, Meta(max_length=10)]
    kind: Literal["click", "like"]
    note: str | None = None
    extra: int | None = None


class WithNewRequiredField(msgspec.Struct):
    name: Annotated[str, Meta(max_length=10)]
    kind: Literal["click", "like"]
    extra: int
    note: str | None = None


class WithoutNote(msgspec.Struct):
    name: Annotated[str, Meta(max_length=10)]
    kind: Literal["click", "like"]


class WithShorterName(msgspec.Struct):
    name: Annotated[str, Meta(max_length=9)]
    kind: Literal["click", "like"]
    note: str | None = None


class WithLongerName(msgspec.Struct):
    name: Annotated[str, Meta(max_length=11)]
    kind: Literal["click", "like"]
    note: str | None = None


class WithFewerKinds(msgspec.Struct):
    name: Annotated[str, Meta(max_length=10)]
    kind: Literal["click"]
    note: str | None = None


class WithMoreKinds(msgspec.Struct):
    name: Annotated[str, Meta(max_length=10)]
    kind: Literal["click", "like", "hide"]
    note: str | None = None


class WithNumberNote(msgspec.Struct):
    name: Annotated[str, Meta(max_length=10)]
    kind: Literal["click", "like"]
    note: int | None = None


class WithNoteNeverNull(msgspec.Struct):
    name: Annotated[str, Meta(max_length=10)]
    kind: Literal["click", "like"]
    note: str = ""


class WithOptionalName(msgspec.Struct):
    kind: Literal["click", "like"]
    name: Annotated[str, Meta(max_length=10)] = "x"
    note: str | None = None


def changes(new: Any, direction: Direction = "received", old: Any = Old) -> list[str]:
    return incompatibilities(msgspec.json.schema(old), msgspec.json.schema(new), direction)


@pytest.mark.parametrize("record", RECORDS)
def test_the_published_schemas_are_those_of_the_structs(record: str) -> None:
    published = (PUBLISHED / file_name(record)).read_text("utf-8")
    assert published == render(record), "run `millstream schemas` and commit docs/schemas"


@pytest.mark.parametrize("record", RECORDS)
def test_the_structs_are_compatible_with_the_published_schemas(record: str) -> None:
    published = json.loads((PUBLISHED / file_name(record)).read_text("utf-8"))
    assert incompatibilities(published, schema(record), RECORDS[record][1]) == []


@pytest.mark.parametrize("record", RECORDS)
def test_the_schemas_are_valid_json_schemas(record: str) -> None:
    jsonschema.Draft202012Validator.check_schema(schema(record))


def test_a_valid_event_fits_the_schema() -> None:
    event = {
        "type": "action",
        "event_id": "1",
        "event_time": 1_700_000_000_000,
        "user_id": "ann",
        "item_id": "a",
        "action": "click",
    }
    jsonschema.validate(event, schema("event"))


def test_an_unknown_action_does_not_fit_the_schema() -> None:
    event = {
        "type": "action",
        "event_id": "1",
        "event_time": 1_700_000_000_000,
        "user_id": "ann",
        "item_id": "a",
        "action": "stare",
    }
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(event, schema("event"))


def test_an_unknown_field_fits_the_schema() -> None:
    jsonschema.validate({"user_id": "ann", "shoe_size": 40}, schema("user"))


@pytest.mark.parametrize("new", [Old, WithNewOptionalField, WithLongerName, WithMoreKinds, WithOptionalName])
def test_a_widening_of_what_we_receive_is_compatible(new: Any) -> None:
    assert changes(new) == []


@pytest.mark.parametrize(
    ("new", "path"),
    [
        (WithNewRequiredField, "extra"),
        (WithoutNote, "note"),
        (WithShorterName, "name"),
        (WithFewerKinds, "kind"),
        (WithNumberNote, "note"),
        (WithNoteNeverNull, "note"),
    ],
)
def test_a_narrowing_of_what_we_receive_is_refused_by_its_path(new: Any, path: str) -> None:
    found = changes(new)
    assert found
    assert all(f".{path}" in problem for problem in found)


@pytest.mark.parametrize("new", [Old, WithNewOptionalField, WithNewRequiredField, WithShorterName, WithFewerKinds])
def test_saying_more_exactly_what_we_send_is_compatible(new: Any) -> None:
    assert changes(new, "sent") == []


@pytest.mark.parametrize("new", [WithoutNote, WithLongerName, WithMoreKinds, WithNumberNote, WithOptionalName])
def test_sending_what_an_old_reader_does_not_expect_is_refused(new: Any) -> None:
    assert changes(new, "sent")


def test_an_event_type_that_goes_away_is_refused() -> None:
    published = schema("event")
    current = json.loads(json.dumps(published))
    current["anyOf"] = [choice for choice in current["anyOf"] if not choice["$ref"].endswith("/Request")]
    assert incompatibilities(published, current, "received") == ["$: Request is no longer allowed"]


def test_a_narrower_field_within_one_event_type_is_named() -> None:
    published = schema("event")
    current = json.loads(json.dumps(published))
    current["$defs"]["Action"]["properties"]["user_id"]["maxLength"] = 36
    assert incompatibilities(published, current, "received") == ["$.user_id: maxLength fell from 256 to 36"]


def test_writing_refuses_to_replace_a_schema_that_the_structs_would_break(tmp_path: Path) -> None:
    write(tmp_path)
    file = tmp_path / file_name("user")
    wider = json.loads(file.read_text("utf-8"))
    wider["$defs"]["User"]["properties"]["user_id"]["maxLength"] = 10_000
    file.write_text(json.dumps(wider), "utf-8")
    with pytest.raises(LogFormatError, match=r"user_id: maxLength fell from 10000 to 256"):
        write(tmp_path)
    assert json.loads(file.read_text("utf-8")) == wider


def test_writing_twice_changes_nothing(tmp_path: Path) -> None:
    assert len(write(tmp_path)) == len(RECORDS)
    assert write(tmp_path) == []
