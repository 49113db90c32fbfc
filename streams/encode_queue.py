"""One thread that encodes: texts that somebody waits for go before the catalogue's, the live model's before others'."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.errors import EncoderError

Floats = npt.NDArray[np.float32]
Encode = Callable[[Sequence[str]], Floats]
OnBatch = Callable[[bool, int, float], None]
"""Called after each batch: whether it was urgent, how many texts it had, and how many seconds it took."""


@dataclass(slots=True)
class _Job:
    texts: Sequence[str]
    done: asyncio.Future[Floats]
    urgent: bool
    encode: Encode
    rank: int


class EncodeQueue:
    """Runs encoders in one thread. Urgent texts that wait together share a batch; a batch is never interrupted."""

    def __init__(self, encode: Encode, batch_texts: int, on_batch: OnBatch | None = None) -> None:
        self._encode = encode
        self._on_batch = on_batch
        self._batch_texts = batch_texts
        self._urgent: deque[_Job] = deque()
        self._patient: deque[_Job] = deque()
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encode")

    async def encode(self, texts: Sequence[str], *, urgent: bool, using: Encode | None = None, rank: int = 0) -> Floats:
        """Return the encodings of ``texts``, float32 [n, B]. At most a batch of them, where they are not urgent.

        ``using``: the encoder, default the queue's own. Of those that are not urgent the lowest ``rank`` goes first.
        Raises EncoderError as the encoder does.
        """
        future = asyncio.get_running_loop().create_future()
        job = _Job(texts, future, urgent, using or self._encode, rank)
        (self._urgent if urgent else self._patient).append(job)
        self._wake.set()
        return await job.done

    @property
    def waiting(self) -> int:
        """Texts that wait for a batch."""
        return sum(len(job.texts) for job in (*self._urgent, *self._patient))

    async def run(self) -> None:
        """Encode until cancelled."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                jobs = self._next()
                if not jobs:
                    self._wake.clear()
                    await self._wake.wait()
                    continue
                texts = [text for job in jobs for text in job.texts]
                began = time.monotonic()
                try:
                    encoded = await loop.run_in_executor(self._thread, jobs[0].encode, texts)
                except EncoderError as error:
                    for job in jobs:
                        if not job.done.done():
                            job.done.set_exception(error)
                    continue
                if self._on_batch is not None:
                    self._on_batch(jobs[0].urgent, len(texts), time.monotonic() - began)
                start = 0
                for job in jobs:
                    if not job.done.done():
                        job.done.set_result(encoded[start : start + len(job.texts)])
                    start += len(job.texts)
        finally:
            for job in (*self._urgent, *self._patient):
                job.done.cancel()
            self._thread.shutdown(wait=True, cancel_futures=True)

    def _next(self) -> list[_Job]:
        """Return the jobs of the next batch: all of one encoder. Those that nobody waits for any more are dropped."""
        self._urgent = deque(job for job in self._urgent if not job.done.done())
        self._patient = deque(job for job in self._patient if not job.done.done())
        if not self._urgent:
            if not self._patient:
                return []
            first = min(self._patient, key=lambda job: job.rank)
            self._patient.remove(first)
            return [first]
        jobs = [self._urgent.popleft()]
        while (
            self._urgent
            and self._urgent[0].encode == jobs[0].encode
            and sum(len(j.texts) for j in jobs) < self._batch_texts
        ):
            jobs.append(self._urgent.popleft())
        return jobs
