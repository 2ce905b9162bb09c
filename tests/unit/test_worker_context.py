"""The worker's context: interruption by signals, and deferred actions."""

from typing import Any

import pytest

from worker import context
from worker.attempt import LeaseLost
from worker.context import ShutdownRequested, WorkerContext
from worker.queue.store import RedisError


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> WorkerContext:
    monkeypatch.setattr(context, "RETRY_S", 0.0)
    absent: Any = None
    return WorkerContext(absent, absent, absent, absent, max_pixels=1)


def test_a_signal_interrupts_an_interruptible_block_once(worker: WorkerContext) -> None:
    assert worker.interrupt(0) is None
    with pytest.raises(ShutdownRequested), worker.interruptible():
        worker.interrupt(0)
    assert worker.interrupt(0) is None
    with worker.interruptible():
        with pytest.raises(ShutdownRequested):
            worker.interrupt(0)
        assert worker.interrupt(0) is None  # the clean-up is not interrupted


def test_a_batch_that_is_done_within_the_limit_is_not_interrupted(worker: WorkerContext) -> None:
    worker.estimated_s = 3.0
    with worker.interruptible():
        assert worker.interrupt(5) == 3.0
        with pytest.raises(ShutdownRequested):
            worker.interrupt(2)


def test_a_stopping_worker_begins_no_interruptible_block(worker: WorkerContext) -> None:
    worker.stopping = True
    with pytest.raises(ShutdownRequested), worker.interruptible():
        pytest.fail("the block must not run")


def test_deferred_actions_run_in_order_and_are_retried_while_redis_is_down(
    worker: WorkerContext,
) -> None:
    errors: list[Exception] = [RedisError("down"), RedisError("down")]
    calls: list[str] = []

    def flaky() -> None:
        if errors:
            raise errors.pop()
        calls.append("flaky")

    worker.deferred += [flaky, lambda: calls.append("second")]
    worker.run_deferred()
    assert (calls, worker.deferred) == (["flaky", "second"], [])


@pytest.mark.parametrize("error", [LeaseLost("given away"), ValueError("a bug")])
def test_a_deferred_action_that_fails_does_not_stop_the_others(
    worker: WorkerContext, error: Exception
) -> None:
    calls: list[str] = []

    def failing() -> None:
        raise error

    worker.deferred += [failing, lambda: calls.append("second")]
    worker.run_deferred()
    assert calls == ["second"]


def test_a_stopping_worker_does_not_wait_for_redis_for_ever(
    worker: WorkerContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context, "SHUTDOWN_PATIENCE_S", 0.0)

    def failing() -> None:
        raise RedisError("down")

    worker.stopping = True
    worker.deferred.append(failing)
    worker.run_deferred()
    assert worker.deferred == [failing]


def test_a_task_outside_of_a_worker_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "_current", None)
    with pytest.raises(RuntimeError, match="install"):
        context.current()
