from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import numpy as np
import numpy.typing as npt
import pytest

from models.errors import EncoderError
from streams.encode_queue import EncodeQueue


class Recorder:
    """Encodes a text as its length; the first batch waits until it is let go."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.started = threading.Event()
        self.go_on = threading.Event()

    def __call__(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        self.batches.append(list(texts))
        self.started.set()
        self.go_on.wait(10)
        if "bad" in texts:
            raise EncoderError("bad text")
        return np.array([[len(t)] for t in texts], np.float32)


@asynccontextmanager
async def running(recorder: Recorder, batch_texts: int) -> AsyncIterator[EncodeQueue]:
    queue = EncodeQueue(recorder, batch_texts)
    task = asyncio.create_task(queue.run())
    try:
        yield queue
    finally:
        recorder.go_on.set()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_texts_that_somebody_waits_for_go_before_items_that_came_earlier() -> None:
    recorder = Recorder()
    async with running(recorder, 4) as queue:
        first = asyncio.create_task(queue.encode(["item 1"], urgent=False))
        await asyncio.to_thread(recorder.started.wait, 10)
        second = asyncio.create_task(queue.encode(["item 2"], urgent=False))
        query = asyncio.create_task(queue.encode(["query"], urgent=True))
        await asyncio.sleep(0)
        recorder.go_on.set()
        await asyncio.gather(first, second, query)
    assert recorder.batches == [["item 1"], ["query"], ["item 2"]]


async def test_queries_that_wait_together_share_a_batch_up_to_its_size() -> None:
    recorder = Recorder()
    async with running(recorder, 2) as queue:
        jobs = [asyncio.create_task(queue.encode(["item"], urgent=False))]
        await asyncio.to_thread(recorder.started.wait, 10)
        jobs += [asyncio.create_task(queue.encode([q], urgent=True)) for q in ("a", "bb", "ccc")]
        await asyncio.sleep(0)
        recorder.go_on.set()
        vectors = await asyncio.gather(*jobs)
    assert recorder.batches == [["item"], ["a", "bb"], ["ccc"]]
    assert [float(v[0, 0]) for v in vectors] == [4, 1, 2, 3]


async def test_error_reaches_the_caller_and_the_queue_goes_on() -> None:
    recorder = Recorder()
    recorder.go_on.set()
    async with running(recorder, 2) as queue:
        with pytest.raises(EncoderError, match="bad text"):
            await queue.encode(["bad"], urgent=True)
        assert (await queue.encode(["good"], urgent=True)).tolist() == [[4]]


async def test_caller_that_gives_up_leaves_the_others_their_answers() -> None:
    recorder = Recorder()
    async with running(recorder, 4) as queue:
        first = asyncio.create_task(queue.encode(["item"], urgent=False))
        await asyncio.to_thread(recorder.started.wait, 10)
        impatient = asyncio.create_task(queue.encode(["a"], urgent=True))
        patient = asyncio.create_task(queue.encode(["bb"], urgent=True))
        await asyncio.sleep(0)
        impatient.cancel()
        recorder.go_on.set()
        assert (await patient).tolist() == [[2]]
        await first


async def test_items_of_the_lowest_rank_go_first() -> None:
    recorder = Recorder()
    async with running(recorder, 4) as queue:
        jobs = [asyncio.create_task(queue.encode(["item"], urgent=False))]
        await asyncio.to_thread(recorder.started.wait, 10)
        for text, rank in (("candidate", 1), ("previous", 2), ("live", 0), ("live too", 0)):
            jobs.append(asyncio.create_task(queue.encode([text], urgent=False, rank=rank)))
        await asyncio.sleep(0)
        recorder.go_on.set()
        await asyncio.gather(*jobs)
    assert recorder.batches == [["item"], ["live"], ["live too"], ["candidate"], ["previous"]]


async def test_texts_of_two_encoders_never_share_a_batch() -> None:
    recorder, other = Recorder(), Recorder()
    other.go_on.set()
    async with running(recorder, 4) as queue:
        jobs = [asyncio.create_task(queue.encode(["item"], urgent=False))]
        await asyncio.to_thread(recorder.started.wait, 10)
        for text, using in (("a", recorder), ("b", other), ("c", other), ("d", recorder)):
            jobs.append(asyncio.create_task(queue.encode([text], urgent=True, using=using)))
        await asyncio.sleep(0)
        recorder.go_on.set()
        await asyncio.gather(*jobs)
    assert recorder.batches == [["item"], ["a"], ["d"]]
    assert other.batches == [["b", "c"]]


async def test_text_that_nobody_waits_for_any_more_is_not_encoded() -> None:
    recorder = Recorder()
    async with running(recorder, 4) as queue:
        first = asyncio.create_task(queue.encode(["item"], urgent=False))
        await asyncio.to_thread(recorder.started.wait, 10)
        given_up = asyncio.create_task(queue.encode(["of a lane that ended"], urgent=False))
        last = asyncio.create_task(queue.encode(["last"], urgent=False))
        await asyncio.sleep(0)
        given_up.cancel()
        recorder.go_on.set()
        await asyncio.gather(first, last)
    assert recorder.batches == [["item"], ["last"]]
