"""The worker's side of encoding texts, against a real server on a socket: how texts are divided into questions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from models.bootstrap import Space
from streams import query_protocol
from streams.query_client import MAX_PART_BYTES, QueryEncoderClient, _parts
from streams.query_protocol import MAX_TEXT_CHARACTERS, MAX_TEXTS, Answer, Ask

SPACE = Space("space", "encoder", np.eye(2, dtype=np.float32))


@asynccontextmanager
async def served(folder: Path) -> AsyncIterator[tuple[QueryEncoderClient, list[int]]]:
    """A client, and how many texts each question had that reached its server; every vector is the same."""
    questions: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                ask = await query_protocol.read(reader, Ask)
                questions.append(len(ask.texts))
                vectors = np.ones((len(ask.texts), 2), "<f4").tobytes()
                writer.write(query_protocol.pack(Answer(ask.number, ask.encoder_id, vectors)))
        except (asyncio.IncompleteReadError, ValueError):
            writer.close()  # as the encoder process does

    path = query_protocol.socket_path(folder)
    server = await asyncio.start_unix_server(serve, path)
    query_protocol.write_address(folder, path)
    client = QueryEncoderClient(folder, SPACE, timeout_seconds=10)
    try:
        yield client, questions
    finally:
        await client.close()
        server.close()
        query_protocol.remove_socket(path, folder)


async def test_long_texts_that_would_not_fit_one_frame_are_all_answered(tmp_path: Path) -> None:
    texts = [f"{n} " + 17_000 * "x" for n in range(256)]
    async with served(tmp_path) as (client, _):
        assert all(vector is not None for vector in await client.vectors(texts))


async def test_query_beside_long_texts_is_answered(tmp_path: Path) -> None:
    async with served(tmp_path) as (client, _):
        *_, small = await client.vectors([*(f"{n} " + 5_700 * "語" for n in range(255)), "red apple"])
        assert small is not None


async def test_short_texts_go_in_one_question(tmp_path: Path) -> None:
    async with served(tmp_path) as (client, questions):
        await client.vectors([f"text {n}" for n in range(256)])
        assert questions == [256]


async def test_text_longer_than_a_question_may_hold_is_answered_by_its_beginning(tmp_path: Path) -> None:
    async with served(tmp_path) as (client, _):
        (vector,) = await client.vectors([(MAX_TEXT_CHARACTERS + 1) * "x"])
        assert vector is not None


@given(st.lists(st.builds(lambda sign, n: n * sign, st.sampled_from("xé語😀"), st.integers(1, 110_000)), max_size=20))
def test_parts_hold_every_text_in_order_and_fit_a_frame(texts: list[str]) -> None:
    parts = list(_parts(texts))
    assert [text for part in parts for text in part] == texts
    for part in parts:
        cut = [text[:MAX_TEXT_CHARACTERS] for text in part]
        assert sum(len(text.encode()) for text in cut) <= MAX_PART_BYTES
        assert len(query_protocol.pack(Ask(1, cut))) < query_protocol.MAX_FRAME_BYTES


def test_part_holds_no_more_texts_than_a_question_may() -> None:
    assert [len(part) for part in _parts(["x"] * (2 * MAX_TEXTS + 1))] == [MAX_TEXTS, MAX_TEXTS, 1]


@asynccontextmanager
async def two_encoders(folder: Path) -> AsyncIterator[tuple[QueryEncoderClient, asyncio.Queue[str], asyncio.Event]]:
    """A client, the encoders in the order in which they were asked, and an event without which nobody answers.

    Encoder "one" encodes every text as (1, 0), encoder "two" as (0, 1).
    """
    asked: asyncio.Queue[str] = asyncio.Queue()
    go_on = asyncio.Event()
    go_on.set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                ask = await query_protocol.read(reader, Ask)
                asked.put_nowait(ask.encoder_id)
                await go_on.wait()
                base = np.array([[1, 0] if ask.encoder_id == "one" else [0, 1]] * len(ask.texts), "<f4")
                writer.write(query_protocol.pack(Answer(ask.number, ask.encoder_id, base.tobytes())))
        except (asyncio.IncompleteReadError, ValueError):
            writer.close()

    path = query_protocol.socket_path(folder)
    server = await asyncio.start_unix_server(serve, path)
    query_protocol.write_address(folder, path)
    client = QueryEncoderClient(folder, ONE, timeout_seconds=10)
    try:
        yield client, asked, go_on
    finally:
        await client.close()
        server.close()
        query_protocol.remove_socket(path, folder)


ONE = Space("first", "one", np.eye(2, dtype=np.float32))
TURNED = Space("turned", "one", np.array([[0, 1], [1, 0]], np.float32))
TWO = Space("second", "two", np.eye(2, dtype=np.float32))


def listed(vectors: list[np.ndarray | None]) -> list[list[float] | None]:
    return [None if vector is None else vector.tolist() for vector in vectors]


async def test_after_a_swap_the_new_encoder_is_asked_and_nothing_of_the_old_one_is_used(tmp_path: Path) -> None:
    async with two_encoders(tmp_path) as (client, asked, _):
        assert listed(await client.vectors(["apple"])) == [[1, 0]]
        client.use(TWO)
        assert listed(await client.vectors(["apple"])) == [[0, 1]]
        assert [asked.get_nowait() for _ in range(asked.qsize())] == ["one", "two"]


async def test_a_swap_that_changes_the_projection_alone_asks_nobody_again(tmp_path: Path) -> None:
    async with two_encoders(tmp_path) as (client, asked, _):
        await client.vectors(["apple"])
        client.use(TURNED)
        assert listed(await client.vectors(["apple"])) == [[0, 1]]
        assert [asked.get_nowait() for _ in range(asked.qsize())] == ["one"]


async def test_an_answer_that_comes_after_the_swap_is_no_vector_of_the_new_space(tmp_path: Path) -> None:
    async with two_encoders(tmp_path) as (client, asked, go_on):
        go_on.clear()
        waiting = asyncio.create_task(client.vectors(["apple"]))
        await asyncio.wait_for(asked.get(), 10)
        client.use(TWO)
        go_on.set()
        assert listed(await waiting) == [None]
        assert listed(await client.vectors(["apple"])) == [[0, 1]]


async def test_after_a_rollback_what_was_encoded_before_is_still_known(tmp_path: Path) -> None:
    async with two_encoders(tmp_path) as (client, asked, _):
        await client.vectors(["apple"])
        client.use(TWO)
        await client.vectors(["apple"])
        client.use(ONE)
        assert listed(await client.vectors(["apple"])) == [[1, 0]]
        assert [asked.get_nowait() for _ in range(asked.qsize())] == ["one", "two"]
