"""The worker with errors of our own built in, for tests alone: ``python -m tests.integration.faulty_worker``.

An event on the item "poison" raises in the update of rows, one on "deadly" kills the process there, and a slate for
a user whose id begins with "unrankable" raises in ranking. The batch of the user "row-only" is cut off by a death when
only its rows are written, that of "slate-only" when only its slates are. That of "slow" takes SLOW_SECONDS to send.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence
from typing import Any

from models.hashing import hash64
from models.recommender import Recommender
from models.user_state import UserEvent
from streams import pipeline, worker
from streams.sender import Delivered, Outbox, Sender

SLOW_SECONDS = 4.0


def main() -> None:
    """Build the errors in and run the worker."""
    updating: Any = pipeline
    apply = updating.apply
    recommend = Recommender.recommend
    poison, deadly = hash64("poison"), hash64("deadly")

    def faulty_apply(rows: Any, events: Sequence[UserEvent], *args: Any, **kwargs: Any) -> Any:
        if any(deadly in event.items for event in events):
            os.kill(os.getpid(), signal.SIGKILL)
        if any(poison in event.items for event in events):
            raise ZeroDivisionError("the poison works")
        return apply(rows, events, *args, **kwargs)

    def faulty_recommend(self: Recommender, rows: Any, requests: Sequence[Any], now_ms: int) -> Any:
        if any(request.user_id.startswith("unrankable") for request in requests):
            raise IndexError("cannot rank this one")
        return recommend(self, rows, requests, now_ms)

    updating.apply = faulty_apply
    _cut_batches_off()
    Recommender.recommend = faulty_recommend  # type: ignore[method-assign]
    worker.main()


def _cut_batches_off() -> None:
    send = Sender.send

    async def faulty_send(self: Sender, outbox: Outbox) -> list[Delivered]:
        keys = {key for records in outbox.records.values() for key, _, _ in records}
        if b"slow" in keys:
            await asyncio.sleep(SLOW_SECONDS)
        ending = "-changelog" if b"row-only" in keys else ".recommendations.v1" if b"slate-only" in keys else None
        if ending is None:
            return await send(self, outbox)
        await send(self, Outbox({place: r for place, r in outbox.records.items() if place[0].endswith(ending)}))
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("this process is dead")

    Sender.send = faulty_send  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
