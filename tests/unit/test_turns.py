"""In which order requests begin."""

import asyncio
from collections.abc import Iterable
from typing import Any

from service.turns import MAX_ACCEPTED, Turns

State = dict[str, Any]


def begin(requests: Iterable[tuple[str, int]], accepted: Iterable[int] = ()) -> list[str]:
    """Let requests arrive, each as the address of its client and the round of the event loop in
    which it arrives. Returns what happened: the clients as their requests began, and `-` for
    the end of each round. `accepted` are the connections accepted up to each round."""

    async def scenario() -> list[str]:
        began: list[str] = []
        counts = iter(accepted)
        count = 0

        async def app(scope: State, receive: Any, send: Any) -> None:
            began.append(scope["client"][0])

        def connections() -> int:
            return count

        turns = Turns(app, connections)  # type: ignore[arg-type]
        left, tasks = sorted(requests, key=lambda request: request[1]), []
        for now in range(200):
            count = next(counts, count)
            while left and left[0][1] == now:
                scope = {"type": "http", "client": (left.pop(0)[0], 1)}
                tasks.append(asyncio.create_task(turns(scope, None, None)))  # type: ignore[arg-type]
            await asyncio.sleep(0)
            began.append("-")
        await asyncio.gather(*tasks)
        return began

    return asyncio.run(scenario())


def test_a_request_that_comes_alone_begins_at_once() -> None:
    assert begin([("a", 0), ("a", 5)])[:8] == ["a", *"-----", "a", "-"]


def test_one_request_begins_in_each_round() -> None:
    rounds = "".join(begin([("a", 0)] * 5)).split("-")
    assert max(map(len, rounds)) == 1
    assert "".join(rounds) == "aaaaa"


def test_many_requests_of_a_client_do_not_delay_those_of_another() -> None:
    order = "".join(begin([("a", 0)] * 50 + [("b", 10)])).replace("-", "")
    assert len(order) == 51
    assert order.index("b") <= 12


def test_ipv6_addresses_of_a_network_take_turns_as_one_client() -> None:
    many = [(f"2001:db8::{n}", 0) for n in range(1, 50)]
    order = [client for client in begin([*many, ("b", 0)]) if client != "-"]
    assert order.index("b") <= 2


def test_connections_are_accepted_before_waiting_requests_begin() -> None:
    accepted = range(1, 41)  # one in each of the first 40 rounds
    rounds = "".join(begin([("a", 0)] * 5, accepted)).split("-")
    assert [n for n, began in enumerate(rounds) if began and n < 40] == []
    assert "".join(rounds) == "aaaaa"


def test_endless_connections_do_not_stop_requests() -> None:
    order = "".join(begin([("a", 0)] * 3, range(1, 200)))
    assert order.count("a") == 3
    assert order.index("a", 1) <= MAX_ACCEPTED + 4


def test_a_request_that_was_canceled_while_it_waited_loses_its_turn() -> None:
    async def scenario() -> list[int]:
        began: list[int] = []

        async def app(scope: State, receive: Any, send: Any) -> None:
            began.append(scope["number"])

        turns = Turns(app, lambda: 0)  # type: ignore[arg-type]
        tasks = [
            asyncio.create_task(
                turns({"type": "http", "client": None, "number": n}, None, None)  # type: ignore[arg-type]
            )
            for n in range(4)
        ]
        await asyncio.sleep(0)
        tasks[2].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return began

    assert asyncio.run(scenario()) == [0, 1, 3]
