"""How many requests the command line has at a service at a time."""

import anyio
import httpx
import pytest

from service.cli import pace
from service.cli.pace import Pace, Refused
from service.client import ApiError

pytestmark = pytest.mark.anyio


class Server:
    """Accepts up to `room` requests at a time, and refuses others."""

    def __init__(self, room: int, status: int = 503) -> None:
        self.room, self.status = room, status
        self.active = self.most = self.refused = 0

    async def request(self, number: int) -> int:
        if self.active >= self.room:
            self.refused += 1
            raise ApiError(self.status, {"title": "too many"}, 0.01)
        self.active += 1
        self.most = max(self.most, self.active)
        await anyio.sleep(0.005)
        self.active -= 1
        return number


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "MIN_PAUSE_S", 0.01)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def send(chosen: Pace, server: Server, count: int) -> list[int]:
    """Send so many requests at the same time; returns the results."""
    results: list[int] = []

    async def one(number: int) -> None:
        results.append(await chosen.run(server.request, number))

    async with anyio.create_task_group() as group:
        for number in range(count):
            group.start_soon(one, number)
    return results


@pytest.mark.parametrize("status", [429, 503])
async def test_refused_requests_are_sent_again_with_fewer_at_a_time(status: int) -> None:
    server, chosen = Server(room=3, status=status), Pace(16)
    assert sorted(await send(chosen, server, 60)) == [*range(60)]
    assert 0 < server.refused < 60
    assert chosen.limit < 8


async def test_a_server_with_room_gets_as_many_requests_as_are_allowed() -> None:
    server, chosen = Server(room=100), Pace(6)
    await send(chosen, server, 30)
    assert (server.most, server.refused, chosen.limit) == (6, 0, 6)


async def test_no_request_is_sent_before_retry_after_is_over() -> None:
    chosen, times = Pace(4), []

    async def request() -> None:
        times.append(anyio.current_time())
        if len(times) == 1:
            raise ApiError(429, {}, 0.2)

    await chosen.run(request)
    assert times[1] - times[0] >= 0.19


async def test_a_server_that_refuses_everything_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pace, "REFUSALS", 3)
    server = Server(room=0)
    with pytest.raises(Refused, match="4 requests in a row were refused: too many"):
        await Pace(2).run(server.request, 1)
    assert server.refused == 4


@pytest.mark.parametrize("error", [ApiError(422, {}), httpx.ConnectError("refused")])
async def test_errors_that_are_no_refusals_are_raised_at_once(error: Exception) -> None:
    sent = 0

    async def request() -> None:
        nonlocal sent
        sent += 1
        raise error

    with pytest.raises(type(error)):
        await Pace(2).run(request)
    assert sent == 1
