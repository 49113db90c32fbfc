"""The HTTP endpoints of a process."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator

import aiohttp
import pytest
import pytest_asyncio
from prometheus_client import CollectorRegistry, Counter

from streams.health import HealthServer

STATE: dict[str, str | None] = {}


@pytest_asyncio.fixture
async def server() -> AsyncIterator[HealthServer]:
    """A server on a free port whose readiness the test sets."""
    registry = CollectorRegistry()
    Counter("grist", "Sacks ground.", registry=registry).inc(3)
    STATE["ready"] = None
    started = HealthServer("127.0.0.1", 0, registry, live=lambda: None, ready=lambda: STATE["ready"])
    await started.start()
    yield started
    await started.stop()


async def get(server: HealthServer, path: str) -> tuple[int, str]:
    """Return status and body."""
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{server.port}{path}") as answer:
            return answer.status, await answer.text()


async def test_a_process_that_is_ready_answers_200(server: HealthServer) -> None:
    assert await get(server, "/ready") == (200, "ok\n")


async def test_a_process_that_is_not_ready_answers_503_and_says_why(server: HealthServer) -> None:
    STATE["ready"] = "the mirrors are behind"
    assert await get(server, "/ready") == (503, "the mirrors are behind\n")


async def test_a_process_that_is_not_ready_is_alive(server: HealthServer) -> None:
    STATE["ready"] = "the mirrors are behind"
    assert (await get(server, "/live"))[0] == 200


async def test_metrics_are_in_the_text_format(server: HealthServer) -> None:
    status, body = await get(server, "/metrics")
    assert (status, "grist_total 3.0" in body) == (200, True)


async def test_a_port_that_is_taken_is_an_error_and_not_another_port() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = HealthServer("127.0.0.1", port, CollectorRegistry(), live=lambda: None, ready=lambda: None)
        with pytest.raises(OSError, match="address already in use"):
            await server.start()
        await server.stop()
