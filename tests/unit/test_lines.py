"""Waiting lines: fair between callers, bounded by megapixels, and no work for nobody."""

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from models import cancellation
from models.errors import Canceled
from service.lines import USUAL, Deadline, Kind, Line
from service.pixel_budget import PixelBudget
from service.problems import Busy, DeadlineExceeded

LARGE = 20.0
SLOW = Kind("slow", 10)


class Lines:
    """A line, and a gate at which its work waits; `begun` lists names, first begun first."""

    def __init__(self, threads: int = 2, waiting: int = 64, limit: float = 100) -> None:
        self.budget = PixelBudget(limit)
        self.line = Line("test", threads, waiting, self.budget, megapixel_s=0.1)
        self.gate = threading.Event()
        self.begun: list[str] = []

    def send(
        self,
        name: str,
        megapixels: float,
        caller: str = "",
        work: Callable[[], Any] | None = None,
        kind: Kind = USUAL,
    ) -> "asyncio.Task[Any]":
        """Call `run` with work that notes its `name` and then waits at the gate, or does `work`."""

        def begin(_: Deadline) -> Any:
            self.begun.append(name)
            return work() if work else self.gate.wait(20)

        return asyncio.create_task(self.line.run(begin, 30, "late", megapixels, caller, kind))


def scenario(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), 60))


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.005)


async def ended(tasks: list["asyncio.Task[Any]"]) -> list[object]:
    results: list[object] = await asyncio.gather(*tasks, return_exceptions=True)
    return results


def test_a_small_picture_passes_large_ones_of_the_same_caller() -> None:
    async def main() -> None:
        lines = Lines(threads=1)
        large = [lines.send(f"large {n}", LARGE) for n in range(3)]
        await until(lambda: lines.begun)
        assert await lines.send("small", 0.4, work=lambda: 7) == 7
        assert lines.begun == ["large 0", "small"]
        lines.gate.set()
        assert await ended(list(large)) == [True] * 3
        assert lines.begun[2:] == ["large 1", "large 2"]

    scenario(main)


def test_one_large_picture_leaves_a_thread_to_small_ones() -> None:
    async def main() -> None:
        lines = Lines(threads=3)
        tasks = [lines.send("large", LARGE) for _ in range(4)]
        tasks += [lines.send("small", 0.4) for _ in range(2)]
        await until(lambda: len(lines.begun) == 3)
        await asyncio.sleep(0.05)
        assert sorted(lines.begun) == ["large", "large", "small"]
        lines.gate.set()
        await ended(tasks)

    scenario(main)


def test_callers_take_turns_by_megapixels() -> None:
    async def main() -> None:
        lines = Lines(threads=1)
        first = lines.send("first", 1, "greedy")
        await until(lambda: lines.begun)
        greedy = [lines.send("greedy", 1, "greedy") for _ in range(6)]
        other = [lines.send("other", 0.5, "other") for _ in range(4)]
        lines.gate.set()
        await ended([first, *greedy, *other])
        assert lines.begun[:7].count("other") == 4  # 2 megapixels, as many as greedy's by then

    scenario(main)


def test_a_full_line_refuses_the_caller_that_holds_most_of_it() -> None:
    async def main() -> None:
        lines = Lines(threads=1, waiting=4)
        tasks = [lines.send("running", 1, "greedy")]
        await until(lambda: lines.begun)
        greedy = [lines.send(f"greedy {n}", 1, "greedy") for n in range(4)]
        await asyncio.sleep(0)
        with pytest.raises(Busy, match="4 requests already wait|5 requests already wait") as full:
            await lines.send("greedy 4", 1, "greedy")
        assert int(full.value.headers["Retry-After"]) >= 1
        other = lines.send("other", 1, "other")
        await until(greedy[3].done)
        assert isinstance(greedy[3].exception(), Busy)
        lines.gate.set()
        assert await ended([other, *greedy[:3]]) == [True] * 4
        await ended(tasks)

    scenario(main)


def test_the_line_is_bounded_by_the_time_that_its_megapixels_take() -> None:
    """At 2 s a megapixel no second picture of 20 megapixels could be ready within 30 s."""

    async def main() -> None:
        lines = Lines(threads=1)
        lines.line._megapixel_s["", True] = 2.0
        running = lines.send("running", LARGE)
        await until(lambda: lines.begun)
        with pytest.raises(Busy) as full:
            await lines.send("waiting", LARGE)
        assert int(full.value.headers["Retry-After"]) == 40
        assert await lines.send("small", 0.4, work=lambda: 7) == 7
        lines.gate.set()
        assert await running

    scenario(main)


def test_the_duration_of_a_megapixel_is_measured() -> None:
    async def main() -> None:
        lines = Lines(threads=1)
        for _ in range(30):
            await lines.send("work", 0.01, work=lambda: time.sleep(0.02))
        assert lines.line._megapixel_s["", False] > 1

    scenario(main)


def test_each_kind_of_work_has_a_duration_of_its_own() -> None:
    async def main() -> None:
        lines = Lines(threads=1)
        assert lines.line.seconds(2, SLOW) == pytest.approx(2)  # the guess: 0.1 s × 10
        for _ in range(30):
            await lines.send("slow", 0.01, work=lambda: time.sleep(0.02), kind=SLOW)
        assert lines.line.seconds(0.01, SLOW) > 0.015
        assert lines.line.seconds(2, USUAL) == pytest.approx(0.2)

    scenario(main)


def test_slow_kinds_count_as_larger_pictures() -> None:
    """A small picture of the usual kind passes them, and takes a turn for each tenth of theirs."""

    async def main() -> None:
        lines = Lines(threads=1)
        slow = [lines.send(f"slow {n}", 0.4, kind=SLOW) for n in range(2)]
        await until(lambda: lines.begun)
        assert await lines.send("small", 0.4, work=lambda: 7) == 7
        running = lines.send("running", 0.1)
        fair = [lines.send("slow", 0.1, "slow", kind=SLOW) for _ in range(3)]
        fair += [lines.send("usual", 0.1, "usual") for _ in range(11)]
        await asyncio.sleep(0)
        lines.gate.set()
        await ended([*slow, running, *fair])
        assert lines.begun[:2] == ["slow 0", "small"]
        order = [name for name in lines.begun if name in {"slow", "usual"}]
        assert order.index("slow", order.index("slow") + 1) >= 10  # before the second slow one

    scenario(main)


def test_work_that_alone_takes_longer_than_its_timeout_is_told_so_when_it_would_wait() -> None:
    async def main() -> None:
        lines = Lines(threads=1)
        running = lines.send("running", LARGE)
        await until(lambda: lines.begun)
        with pytest.raises(Busy, match="late"):
            await lines.send("hopeless", 40, kind=SLOW)
        with pytest.raises(Busy, match="already wait"):
            tasks = [lines.send("waiting", 16, kind=SLOW) for _ in range(2)]
            await tasks[1]
        lines.gate.set()
        await ended([running, *tasks])

    scenario(main)


def test_a_call_that_is_canceled_while_it_waits_never_begins() -> None:
    async def main() -> None:
        lines = Lines(threads=1)
        running = lines.send("running", 1)
        await until(lambda: lines.begun)
        left = [lines.send("left", 1) for _ in range(10)]
        await asyncio.sleep(0.01)
        for task in left:
            task.cancel()
        await ended(left)
        assert len(lines.line._calls) == 1
        lines.gate.set()
        assert await running
        assert await lines.send("next", 1, work=lambda: 7) == 7
        assert lines.begun == ["running", "next"]

    scenario(main)


def test_work_that_is_canceled_ends_at_its_next_check() -> None:
    async def main() -> None:
        lines = Lines(threads=1)
        errors: list[Exception] = []

        def loop() -> None:
            try:
                while True:
                    time.sleep(0.005)
                    cancellation.check()
            except Canceled as e:
                errors.append(e)
                raise

        task = lines.send("loop", LARGE, work=loop)
        await until(lambda: lines.begun)
        assert lines.budget.used == LARGE
        task.cancel()
        await until(lambda: errors and not lines.budget.used)
        assert not lines.line._calls

    scenario(main)


def test_the_memory_of_canceled_work_is_freed_when_it_ends() -> None:
    """Without a collection of cycles, which may come much later."""
    tensors: list[weakref.ref[bytearray]] = []

    class Tensor(bytearray):
        """Memory that can be watched; `bytearray` itself has no weak references."""

    def work() -> None:
        tensor = Tensor(10)
        tensors.append(weakref.ref(tensor))
        while True:
            cancellation.check()
            time.sleep(0.001)

    async def main() -> None:
        lines = Lines()
        task = lines.send("work", 1, work=work)
        await until(lambda: tensors)
        task.cancel()
        await ended([task])
        await until(lambda: tensors[0]() is None)

    gc.collect()
    gc.disable()
    try:
        scenario(main)
    finally:
        gc.enable()


def test_work_that_misses_its_deadline_is_canceled() -> None:
    async def main() -> None:
        lines = Lines(threads=1)
        ends: list[bool] = []

        def loop(_: Deadline) -> None:
            try:
                while True:
                    time.sleep(0.005)
                    cancellation.check()
            finally:
                ends.append(True)

        with pytest.raises(DeadlineExceeded, match="too late"):
            await lines.line.run(loop, 0.1, "too late")
        await until(lambda: ends)

    scenario(main)


def test_all_lines_share_the_budget_of_pixels() -> None:
    async def main() -> None:
        lines, others = Lines(limit=30), Lines()
        other = Line("other", 2, 64, lines.budget, megapixel_s=0.1)
        first = lines.send("first", LARGE)
        await until(lambda: lines.begun)

        def begin(_: Deadline) -> str:
            others.begun.append("second")
            return "done"

        second = asyncio.create_task(other.run(begin, 30, "late", LARGE))
        await asyncio.sleep(0.05)
        assert (lines.budget.used, others.begun) == (LARGE, [])
        lines.gate.set()
        assert await first
        assert await second == "done"
        await until(lambda: not lines.budget.used)

    scenario(main)


def test_a_picture_beyond_the_budget_may_be_in_work_alone() -> None:
    async def main() -> None:
        lines = Lines(limit=5)
        assert await lines.send("large", LARGE, work=lambda: 7) == 7

    scenario(main)


def test_a_line_that_closes_drops_what_waits() -> None:
    async def main() -> None:
        lines = Lines(threads=1)
        tasks = [lines.send("work", 1) for _ in range(3)]
        await until(lambda: lines.begun)
        lines.line.close()
        lines.gate.set()
        results = await ended(tasks)
        assert results[0] is True
        assert [type(e) for e in results[1:]] == [asyncio.CancelledError] * 2

    scenario(main)
