"""Profiles of the ``users`` topic, mirrored for the assigned partitions only; never copied into a row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from models.errors import RecordError
from models.events import USER_CODEC, User
from streams.mirror import Record

OnRefused = Callable[[Record, RecordError], None]


def profile_text(user: User) -> str:
    """Return what an encoder should read of a profile: its text, then its textual attributes as "name: value"."""
    parts = [user.text] if user.text else []
    parts += [f"{name}: {value}" for name, value in sorted((user.attributes or {}).items()) if isinstance(value, str)]
    return ". ".join(parts)


class Profiles:
    """user_id → profile text, per partition."""

    def __init__(self, on_refused: OnRefused) -> None:
        self._texts: dict[int, dict[str, str]] = {}
        self._on_refused = on_refused

    def __len__(self) -> int:
        return sum(map(len, self._texts.values()))

    def text(self, partition: int, user_id: str) -> str | None:
        """Return the profile text of a user, None where there is no profile or nothing in it to read."""
        texts = self._texts.get(partition)
        return texts.get(user_id) if texts else None

    def keep_only(self, partitions: Iterable[int]) -> None:
        """Forget the partitions that are not assigned any more."""
        wanted = set(partitions)
        for partition in [p for p in self._texts if p not in wanted]:
            del self._texts[partition]

    def apply(self, records: Sequence[Record]) -> None:
        """Apply records of one partition in order; what cannot be decoded is handed to ``on_refused``."""
        for record in records:
            texts = self._texts.setdefault(record.partition, {})
            user_id = (record.key or b"").decode("utf-8", "replace")
            if record.value is None:
                texts.pop(user_id, None)
                continue
            try:
                user = USER_CODEC.decode(record.value, content_type(record.headers))
                if user.user_id != user_id:
                    raise RecordError("key-mismatch", f"the key is {user_id!r}, user_id is {user.user_id!r}")
            except RecordError as error:
                self._on_refused(record, error)
                continue
            text = profile_text(user)
            # A user who refused consent has no profile to us, whatever the record says besides.
            if text and user.consent is not False:
                texts[user_id] = text
            else:
                texts.pop(user_id, None)


def content_type(headers: object) -> str | None:
    """Return the ``content-type`` header of a record as text, None if it has none or a null one."""
    if not headers:
        return None
    pairs = headers.items() if isinstance(headers, dict) else headers
    for name, value in pairs:  # type: ignore[attr-defined]
        if name == "content-type" and value is not None:
            return bytes(value).decode("latin-1")
    return None
