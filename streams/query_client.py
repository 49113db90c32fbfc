"""The worker's side of query and profile encoding: bounded in time, cached, never an error for a slate.

What is cached are base encodings, by encoder: a swap of bundles with the same encoder projects them anew, and one with
another encoder finds none of the old one's.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import structlog

from models.bootstrap import Space
from models.encoder import VectorCache
from streams import query_protocol
from streams.query_protocol import Answer, Ask

log = structlog.get_logger(__name__)

RETRY_SECONDS: Final = 1.0
MAX_WAITING: Final = 1_000
MAX_PART_BYTES: Final = 1 << 20
"""UTF-8 of one question, well below the limit of a frame: one that is too long costs the connection."""
MIN_CACHE_TEXTS: Final = 1_000
"""Answers pass through the cache, so it must hold those of one call."""

Floats = npt.NDArray[np.float32]


@dataclass(slots=True)
class _Question:
    encoder_id: str
    base_dim: int
    texts: list[str]
    answered: asyncio.Future[None]


class QueryEncoderClient:
    """Asks the encoder process for the vectors of texts, over one connection that is made again when it breaks.

    A text that is not answered in time has no vector this once; a late answer is kept for the next time.
    """

    def __init__(self, folder: Path, space: Space, *, cache_texts: int = 10_000, timeout_seconds: float = 0.5) -> None:
        self.timeouts = 0
        """Calls that ended without an answer so far."""
        self._folder = folder
        self._space = space
        self._timeout_seconds = timeout_seconds
        self._cache_texts = max(cache_texts, MIN_CACHE_TEXTS)
        self._cache = VectorCache(self._cache_texts)
        self._numbers = itertools.count()
        self._waiting: dict[int, _Question] = {}
        self._asked: dict[str, asyncio.Future[None]] = {}
        """By the keys of the cache."""
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._retry_at = 0.0
        self._connecting = asyncio.Lock()

    def use(self, space: Space) -> None:
        """Answer in another space from the next call on, and ask its encoder."""
        self._space = space

    async def vectors(self, texts: Sequence[str], timeout_seconds: float | None = None) -> list[Floats | None]:
        """Return the vector of each text in the space, float32 [D] unit norm, or None where it is not there in time.

        Never raises for an encoder that is slow, absent or of another space. The space is the one that is in use when
        the call returns.
        """
        space = self._space
        missing = list(dict.fromkeys(t for t in texts if t and self._cache.get(_key(space, t)) is None))
        if missing:
            limit = self._timeout_seconds if timeout_seconds is None else timeout_seconds
            try:
                async with asyncio.timeout(limit):
                    await self._ask(space, [t for t in missing if _key(space, t) not in self._asked])
                    # A caller that gives up leaves the question open: its answer still fills the cache.
                    asked = {id(f): f for t in missing if (f := self._asked.get(_key(space, t)))}
                    for answered in asked.values():
                        await asyncio.shield(answered)
            except OSError as error:  # TimeoutError and ConnectionError are of this kind
                self.timeouts += 1
                log.debug("query_not_encoded", texts=len(missing), error=repr(error))
        return self._projected(texts)

    def _projected(self, texts: Sequence[str]) -> list[Floats | None]:
        space = self._space
        bases = [self._cache.get(_key(space, text)) if text else None for text in texts]
        found = [base for base in bases if base is not None and len(base) == space.base_dim]
        if not found:
            return [None] * len(texts)
        vectors = iter(space.vectors(np.stack(found)))
        return [None if base is None or len(base) != space.base_dim else next(vectors).copy() for base in bases]

    async def close(self) -> None:
        """Close the connection; callers that wait get None."""
        self._drop()
        if self._reading is not None:
            self._reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reading

    async def _ask(self, space: Space, texts: list[str]) -> None:
        if not texts:
            return
        writer = await self._connection()
        for part in _parts(texts):
            if len(self._waiting) >= MAX_WAITING:
                raise ConnectionError(f"{MAX_WAITING} questions wait for the encoder already")
            number = next(self._numbers)
            answered = asyncio.get_running_loop().create_future()
            self._waiting[number] = _Question(space.encoder_id, space.base_dim, part, answered)
            self._asked.update(dict.fromkeys((_key(space, text) for text in part), answered))
            # The end of an immense text is cut off: an encoder reads no more than some hundred tokens.
            asked = [text[: query_protocol.MAX_TEXT_CHARACTERS] for text in part]
            writer.write(query_protocol.pack(Ask(number, asked, space.encoder_id)))

    async def _connection(self) -> asyncio.StreamWriter:
        async with self._connecting:
            if self._writer is not None:
                return self._writer
            now = asyncio.get_running_loop().time()
            if now < self._retry_at:
                raise ConnectionError("the encoder was not there a moment ago")
            self._retry_at = now + RETRY_SECONDS
            path = query_protocol.read_address(self._folder)
            reader, self._writer = await asyncio.open_unix_connection(path)
            self._reading = asyncio.create_task(self._read(reader), name="query-answers")
            return self._writer

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                self._take(await query_protocol.read(reader, Answer))
        except (asyncio.IncompleteReadError, OSError, ValueError) as error:
            log.info("encoder_connection_lost", error=repr(error))
        finally:
            self._drop()

    def _take(self, answer: Answer) -> None:
        question = self._waiting.pop(answer.number, None)
        if question is None:
            return
        keys = [f"{question.encoder_id}\0{text}" for text in question.texts]
        for key in keys:
            self._asked.pop(key, None)
        expected_bytes = 4 * len(question.texts) * question.base_dim
        if answer.error or answer.encoder_id != question.encoder_id or len(answer.vectors) != expected_bytes:
            log.warning("query_refused", error=answer.error or f"encoded by {answer.encoder_id}")
        else:
            bases = np.frombuffer(answer.vectors, "<f4").reshape(len(keys), question.base_dim)
            for key, base in zip(keys, bases, strict=True):
                self._cache.put(key, np.array(base, np.float32))
        if not question.answered.done():
            question.answered.set_result(None)

    def _drop(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        for done in (question.answered for question in self._waiting.values()):
            if not done.done():
                done.set_exception(ConnectionError("the encoder process closed the connection"))
                done.exception()  # somebody may have given up waiting: it is not an error that nobody saw
        self._waiting.clear()
        self._asked.clear()


def _key(space: Space, text: str) -> str:
    """Return the key of a text's base encoding in the cache."""
    return f"{space.encoder_id}\0{text}"


def _parts(texts: Sequence[str]) -> Iterator[list[str]]:
    """Divide texts into questions, each of at most MAX_TEXTS texts and MAX_PART_BYTES as they are sent."""
    part: list[str] = []
    part_bytes = 0
    for text in texts:
        text_bytes = len(text[: query_protocol.MAX_TEXT_CHARACTERS].encode("utf-8"))
        if part and (len(part) == query_protocol.MAX_TEXTS or part_bytes + text_bytes > MAX_PART_BYTES):
            yield part
            part, part_bytes = [], 0
        part.append(text)
        part_bytes += text_bytes
    if part:
        yield part
