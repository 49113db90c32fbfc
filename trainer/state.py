"""What the trainer remembers between rounds: one small file, written whole. Losing it costs little.

The roles on the topic, the manifests and the spool hold the rest. Without the file the positive rates of the last
rounds are taken from the manifests, and a decision that was made but not carried out is made again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import msgspec
import structlog

from models.atomic import replace_file
from models.pointer import Pointer

log = structlog.get_logger(__name__)

STATE_FILE: Final = "state.json"


class Pending(msgspec.Struct, frozen=True):
    """A decision on a candidate, kept before it is carried out: its slice is never judged a second time."""

    version: str
    decision: dict[str, Any]
    live: Pointer | None = None
    """The live one that it was judged against; None: the bootstrap, which nobody had announced."""


class TrainerState(msgspec.Struct, kw_only=True):
    """The state; times are epoch milliseconds."""

    judged_to_ms: int = 0
    """Event time up to which slices were judged for promotion."""
    looked_back_to_ms: int = 0
    """Event time up to which the live bundle was compared with the previous one."""
    learned_to_ms: int = 0
    """Event time of the newest impression that a round learned from."""
    labels_end: int = 0
    """Sum of the end offsets of ``labels`` when the last round began."""
    positive_rates: list[float] = []
    """Of the last rounds, oldest first, refused ones included."""
    pending: Pending | None = None
    rounds: int = 0
    histories_due_ms: int = 0
    """When histories are looked at next."""


def load_state(folder: Path) -> TrainerState | None:
    """Return the state, None where there is none or it cannot be read (which is logged)."""
    file = folder / STATE_FILE
    try:
        return msgspec.json.decode(file.read_bytes(), type=TrainerState)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        log.warning(
            "state_unreadable", file=file.name, error=str(error), action="started anew from roles and manifests"
        )
        return None


def save_state(folder: Path, state: TrainerState) -> None:
    """Write the state. Raises OSError; the old one stays then."""
    replace_file(folder / STATE_FILE, msgspec.json.format(msgspec.json.encode(state), indent=2))
