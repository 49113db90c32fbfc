"""JSON Schemas of the public records, written from the structs, and the check that a change stays compatible.

Records that clients send: whatever the published schema allows must still be allowed, and no field may lose its
meaning. Records that Millstream sends: whatever it sends now must fit the published schema. An incompatible change
needs a new ``SCHEMA_VERSION``, hence a new topic version.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from models.errors import LogFormatError
from models.events import SCHEMA_VERSION, Event, Item, Recommendation, User

Direction = Literal["received", "sent"]
Schema = Mapping[str, Any]

RECORDS: Final[Mapping[str, tuple[Any, Direction]]] = {
    "event": (Event, "received"),
    "item": (Item, "received"),
    "user": (User, "received"),
    "recommendation": (Recommendation, "sent"),
}
_LOWER_BOUNDS: Final = ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties")
_UPPER_BOUNDS: Final = ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties")
_ONE_OF: Final = ("anyOf", "oneOf")
_CHECKED: Final = frozenset(
    {
        "$ref",
        "type",
        "enum",
        "const",
        "properties",
        "required",
        "items",
        "prefixItems",
        "additionalProperties",
        "propertyNames",
    }
    | {"pattern", "format", "discriminator", *_LOWER_BOUNDS, *_UPPER_BOUNDS, *_ONE_OF}
)
_NOTES: Final = frozenset({"title", "description", "default", "examples", "$defs", "$schema", "$id"})


def file_name(record: str) -> str:
    """Return the schema file's name of a record: event.v1.json."""
    return f"{record}.v{SCHEMA_VERSION}.json"


def schema(record: str) -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of one of RECORDS."""
    record_type, _ = RECORDS[record]
    made = msgspec.json.schema(record_type)
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"millstream {record} v{SCHEMA_VERSION}",
    }
    return {**head, **made}


def render(record: str) -> str:
    """Return the schema as the text of its file, the same for the same struct."""
    return json.dumps(schema(record), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def write(folder: Path) -> list[Path]:
    """Write every schema to ``folder`` and return the files that changed.

    Raises LogFormatError, with nothing written, where a file there has an incompatible schema of this version.
    """
    problems = []
    for record, (_, direction) in RECORDS.items():
        path = folder / file_name(record)
        if path.is_file():
            published = json.loads(path.read_text("utf-8"))
            problems += [f"{path.name}: {p}" for p in incompatibilities(published, schema(record), direction)]
    if problems:
        raise LogFormatError(
            "the structs changed in a way that breaks clients of this version; nothing was written. "
            "Undo the change, or raise SCHEMA_VERSION:\n" + "\n".join(f"  - {p}" for p in problems)
        )
    folder.mkdir(parents=True, exist_ok=True)
    changed = []
    for record in RECORDS:
        path, text = folder / file_name(record), render(record)
        if not path.is_file() or path.read_text("utf-8") != text:
            path.write_text(text, "utf-8")
            changed.append(path)
    return changed


def incompatibilities(published: Schema, current: Schema, direction: Direction) -> list[str]:
    """Return why ``current`` breaks what was published, one sentence with a path each; empty where it does not.

    It is strict: a construct that it cannot compare is reported unless both sides are equal.
    """
    if direction == "received":
        return _Comparison(published, current, direction).run()
    # What we send is read by old readers: the published schema must allow all that the current one describes.
    return _Comparison(current, published, direction).run()


class _Comparison:
    """Finds what ``narrow`` refuses of that which ``wide`` allows."""

    def __init__(self, wide: Schema, narrow: Schema, direction: Direction) -> None:
        self._wide_defs: Schema = wide.get("$defs", {})
        self._narrow_defs: Schema = narrow.get("$defs", {})
        self._wide, self._narrow = wide, narrow
        self._direction = direction
        self._found: list[str] = []
        self._open: set[tuple[str, str]] = set()

    def run(self) -> list[str]:
        self._compare(self._wide, self._narrow, "$")
        return self._found

    def _compare(self, wide: Schema, narrow: Schema, path: str) -> None:
        pair = (wide.get("$ref", ""), narrow.get("$ref", ""))
        if pair[0] and pair[1]:
            if pair in self._open:
                return
            self._open.add(pair)
        wide, narrow = _resolved(wide, self._wide_defs), _resolved(narrow, self._narrow_defs)
        if wide == narrow and not _refers(wide):
            return
        unknown = sorted((set(wide) | set(narrow)) - _CHECKED - _NOTES)
        for word in unknown:
            if wide.get(word) != narrow.get(word):
                self._found.append(f"{path}: `{word}` changed, which cannot be judged")
        if any(word in s for s in (wide, narrow) for word in _ONE_OF):
            self._compare_choices(wide, narrow, path)
        else:
            self._compare_plain(wide, narrow, path)

    def _compare_choices(self, wide: Schema, narrow: Schema, path: str) -> None:
        offers = _choices(narrow)
        for choice in _choices(wide):
            if _accepts_any(choice, offers, self):
                continue
            partner = _same_kind(choice, offers, self._wide_defs, self._narrow_defs)
            if partner is None:
                self._found.append(f"{path}: {_label(choice)} is no longer allowed")
            else:
                self._compare(choice, partner, path)

    def _compare_plain(self, wide: Schema, narrow: Schema, path: str) -> None:
        self._compare_type(wide, narrow, path)
        for word in _LOWER_BOUNDS:
            if word in narrow and (word not in wide or wide[word] < narrow[word]):
                self._found.append(f"{path}: {word} rose from {wide.get(word, 'none')} to {narrow[word]}")
        for word in _UPPER_BOUNDS:
            if word in narrow and (word not in wide or wide[word] > narrow[word]):
                self._found.append(f"{path}: {word} fell from {wide.get(word, 'none')} to {narrow[word]}")
        for word in ("pattern", "format"):
            if word in narrow and narrow[word] != wide.get(word):
                self._found.append(f"{path}: {word} is now {narrow[word]!r}, was {wide.get(word)!r}")
        self._compare_fields(wide, narrow, path)
        for word, step in (("items", "[]"), ("additionalProperties", ".*"), ("propertyNames", ".(name)")):
            old, new = wide.get(word, {}), narrow.get(word, {})
            if isinstance(old, bool) or isinstance(new, bool):
                if new is False and old is not False:
                    self._found.append(f"{path}: {word} are no longer allowed")
            elif old or new:
                self._compare(old, new, path + step)
        if wide.get("prefixItems") != narrow.get("prefixItems"):
            self._found.append(f"{path}: `prefixItems` changed, which cannot be judged")

    def _compare_type(self, wide: Schema, narrow: Schema, path: str) -> None:
        if "type" in narrow:
            types = [narrow["type"], "integer"] if narrow["type"] == "number" else [narrow["type"]]
            if wide.get("type") not in types and not ({"enum", "const"} & set(wide)):
                self._found.append(f"{path}: type is now {narrow['type']}, was {wide.get('type', 'any')}")
        allowed = _values(narrow)
        if allowed is not None:
            before = _values(wide)
            if before is None:
                self._found.append(f"{path}: any value was allowed, now only {allowed}")
            else:
                self._found += [f"{path}: the value {v!r} is no longer allowed" for v in before if v not in allowed]

    def _compare_fields(self, wide: Schema, narrow: Schema, path: str) -> None:
        for name in sorted(set(narrow.get("required", ())) - set(wide.get("required", ()))):
            self._found.append(f"{path}.{name}: is now required")
        old, new = wide.get("properties", {}), narrow.get("properties", {})
        for name in sorted(old.keys() & new.keys()):
            self._compare(old[name], new[name], f"{path}.{name}")
        lost = old.keys() - new.keys() if self._direction == "received" else new.keys() - old.keys()
        self._found += [f"{path}.{name}: was removed" for name in sorted(lost)]


def _accepts_any(choice: Schema, offers: list[Schema], comparison: _Comparison) -> bool:
    for offer in offers:
        trial = _Comparison(
            {**choice, "$defs": comparison._wide_defs},
            {**offer, "$defs": comparison._narrow_defs},
            comparison._direction,
        )
        trial._open = set(comparison._open)
        if not trial.run():
            return True
    return False


def _same_kind(choice: Schema, offers: list[Schema], wide_defs: Schema, narrow_defs: Schema) -> Schema | None:
    """Return the offer that is meant as the same choice, so that its difference can be named."""
    wanted = _kind(_resolved(choice, wide_defs))
    return next((offer for offer in offers if _kind(_resolved(offer, narrow_defs)) == wanted), None)


def _kind(resolved: Schema) -> tuple[Any, ...]:
    tag = resolved.get("properties", {}).get("type", {})
    return resolved.get("type"), resolved.get("format"), json.dumps(tag.get("enum") or tag.get("const"))


def _choices(schema: Schema) -> list[Schema]:
    for word in _ONE_OF:
        if word in schema:
            return [inner for choice in schema[word] for inner in _choices(choice)]
    return [schema]


def _resolved(schema: Schema, defs: Schema) -> Schema:
    while "$ref" in schema:
        schema = defs[schema["$ref"].rpartition("/")[2]]
    return schema


def _refers(schema: Any) -> bool:
    if isinstance(schema, Mapping):
        return "$ref" in schema or any(_refers(value) for value in schema.values())
    return isinstance(schema, list) and any(_refers(value) for value in schema)


def _values(schema: Schema) -> list[Any] | None:
    if "const" in schema:
        return [schema["const"]]
    values: list[Any] | None = schema.get("enum")
    return values


def _label(choice: Schema) -> str:
    return str(choice.get("$ref", "").rpartition("/")[2] or choice.get("type") or _values(choice) or choice)
