"""Following decodes: what it costs, and how it ends."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import httpx
import pytest
from redis import RedisError

from service import watching
from service.services import Services
from service.settings import ServiceSettings
from tests.support import weights
from tests.support.api import AppTransport, run_app
from tests.support.jobs import FAST, decode_of
from worker.queue import events as job_events
from worker.queue.jobs import POLL_SUBSCRIPTION_S
from worker.queue.store import Store

pytestmark = [pytest.mark.redis, pytest.mark.weights]

CALLERS = 200


class App:
    """The API in this process, and one queued decode."""

    def __init__(self, client: httpx.Client) -> None:
        transport = client._transport
        assert isinstance(transport, AppTransport)
        self.client, self._portal = client, transport._portal
        self.services: Services = transport._transport.app.state.services  # type: ignore[attr-defined]
        self.id = ""

    def run(self, scenario: Callable[[], Awaitable[Any]]) -> Any:
        """Run a coroutine function in the API's event loop."""
        return self._portal.call(scenario)

    async def follow(self, callers: int) -> list[asyncio.Task[list[str]]]:
        """Streams of so many callers, which have all had their first event; each will return the
        kinds of all events."""
        all_began = asyncio.Barrier(callers + 1)

        async def kinds(caller: str) -> list[str]:
            found: list[str] = []
            async for event in watching.events(self.services, self.id, "0", caller):
                found.append(event.kind)
                if len(found) == 1:
                    await all_began.wait()
            return found

        streams = [asyncio.create_task(kinds(f"caller {n}")) for n in range(callers)]
        await all_began.wait()
        return streams

    async def cancel(self) -> None:
        await asyncio.to_thread(self.services.jobs.withdraw, self.id, "submitter")

    def commands(self) -> dict[str, int]:
        """How often each command was called on the queue."""
        stats: dict[str, Any] = self.services.store.queue.info("commandstats")
        return {name.removeprefix("cmdstat_"): row["calls"] for name, row in stats.items()}


@pytest.fixture(scope="module")
def running(redis_urls: tuple[str, str]) -> Iterator[App]:
    queue, cache = redis_urls
    settings = ServiceSettings(
        REDIS_URL=queue, CACHE_REDIS_URL=cache, waits_at_once=1, requests_per_minute=1000
    )
    with weights.loaded_once(), run_app(settings) as client:
        yield App(client)


@pytest.fixture
def app(running: App, store: Store, small_msh: bytes) -> App:
    decode = decode_of(small_msh, FAST)
    running.id = decode.id
    running.services.jobs.submit(decode, small_msh, "submitter")
    return running


def test_many_streams_of_a_decode_cost_as_much_as_one(app: App) -> None:
    before, threads = app.commands(), threading.active_count()

    async def scenario() -> list[list[str]]:
        streams = await app.follow(CALLERS)
        assert threading.active_count() <= threads + 1
        clients: list[dict[str, str]] = await app.services.streams.client_list()
        assert sum(client["cmd"] == "xread" for client in clients) <= 1
        await app.cancel()
        return await asyncio.gather(*streams)

    assert app.run(scenario) == [["queued", "canceled"]] * CALLERS
    after = app.commands()
    for command in ("hgetall", "xrange", "zadd"):
        assert after[command] - before.get(command, 0) < 20, command


def test_a_stream_beyond_the_limit_costs_redis_nothing(app: App) -> None:
    """Not even the counting of its caller's requests."""
    queue = app.services.store.queue
    with app.services.waits.one("127.0.0.1"):
        before = queue.info("stats")["total_commands_processed"]
        for path in ("decodes", "batches"):
            refused = app.client.get(f"/v1/{path}/{'0' * 32}/events")
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "5")
            assert "1 event streams and waiting requests" in refused.json()["detail"]
        assert queue.info("stats")["total_commands_processed"] == before + 1


def test_the_subscriptions_of_all_callers_that_view_a_decode_are_extended(app: App) -> None:
    jobs = app.services.jobs
    for n in range(3):
        jobs.subscribe(app.id, f"caller {n}", 1)

    async def scenario() -> None:
        streams = await app.follow(2)
        await anext(watching.events(app.services, app.id, "0", "caller 2", watch=False))
        await app.cancel()
        for stream in streams:
            stream.cancel()

    app.run(scenario)
    rows: Any = jobs.store.queue.zrange(jobs.subscribers(app.id), 0, -1, withscores=True)
    until = dict(rows)
    least = jobs.now() + POLL_SUBSCRIPTION_S - 60
    assert [until[b"caller %d" % n] > least for n in range(3)] == [True, True, False]
    assert jobs.store.queue.exists(jobs.store.key("watched", app.id))


def test_streams_end_with_an_error_of_redis_and_others_can_begin(app: App) -> None:
    queue = app.services.store.queue
    key = job_events.key(app.services.store, app.id)

    async def scenario() -> list[str]:
        streams = await app.follow(3)
        queue.set(key, "no stream")
        for stream in streams:
            with pytest.raises(RedisError):
                await stream
        queue.delete(key)
        await app.cancel()
        return [e.kind async for e in watching.events(app.services, app.id, "0", "caller")]

    assert app.run(scenario) == ["canceled"]


def test_streams_end_when_the_server_stops(
    app: App, redis_urls: tuple[str, str], store: Store
) -> None:
    queue, cache = redis_urls
    settings = ServiceSettings(REDIS_URL=queue, CACHE_REDIS_URL=cache)
    with run_app(settings) as client:
        own = App(client)
        own.id = app.id

        async def scenario() -> list[list[str]]:
            streams = await own.follow(2)
            own.services.feeds.close()
            return await asyncio.gather(*streams)

        assert own.run(scenario) == [["queued"]] * 2
