"""The line of waiting jobs in a real Redis: who is drawn next, and what is predicted of it."""

import threading
import time
from collections import Counter

import pytest
from rq.job import Job

from models.tiers import Settings
from tests.support.jobs import FAST, expire_lease
from worker.attempt import Attempt
from worker.queue import estimates, workers
from worker.queue.jobs import Jobs
from worker.queue.order import Place
from worker.queue.records import DecodeRequest, JobState, Priority
from worker.queue.store import Store
from worker.rq_jobs import LineQueue

pytestmark = pytest.mark.redis

LONG = Settings("ddim", 20, beta=1.0)


@pytest.fixture
def jobs(store: Store) -> Jobs:
    return Jobs(store)


def submit(
    jobs: Jobs,
    caller: str,
    seed: int,
    priority: Priority = "interactive",
    weight: float = 1.0,
    settings: Settings = FAST,
) -> str:
    decode = DecodeRequest(
        "ab" * 32, "test", settings, seed, f"codec-{caller}", "decoder", 2, 64, 64
    )
    jobs.submit(decode, b"bitstream", caller, priority=priority, weight=weight)
    return decode.id


def state(jobs: Jobs, job_id: str) -> JobState:
    found = jobs.record(job_id)
    assert found is not None
    return found


def take(jobs: Jobs) -> JobState | None:
    """The job that RQ's worker would run next; it is taken from its queue."""
    queue = LineQueue(jobs.line, jobs.store.queue, workers.key(jobs))
    taken = LineQueue.dequeue_any([queue], None, jobs.store.queue)
    return None if taken is None else state(jobs, taken[0].id)


def take_all(jobs: Jobs) -> list[JobState]:
    return list(iter(lambda: take(jobs), None))


def test_a_callers_only_job_is_next_however_many_jobs_another_caller_has(jobs: Jobs) -> None:
    for seed in range(200):
        submit(jobs, "many", seed)
    assert [taken.caller for _ in range(5) if (taken := take(jobs))] == ["many"] * 5
    for name in ("zoe", "anna"):  # whatever their names
        job_id = submit(jobs, name, 0)
        assert estimates.outlook_of(jobs, state(jobs, job_id)).position == 0
        taken = take(jobs)
        assert taken is not None and taken.id == job_id


def test_weights_of_1_2_and_4_give_shares_in_that_proportion(jobs: Jobs) -> None:
    weights = {"one": 1.0, "two": 2.0, "four": 4.0}
    for name, weight in weights.items():
        for seed in range(round(40 * weight)):
            submit(jobs, name, seed, weight=weight)
    drawn = Counter(taken.caller for _ in range(210) if (taken := take(jobs)))
    for name, weight in weights.items():
        assert drawn[name] == pytest.approx(30 * weight, rel=0.1)


def test_shares_are_shares_of_work_so_that_long_jobs_count_more(jobs: Jobs) -> None:
    for seed in range(60):
        submit(jobs, "short", seed)
    for seed in range(10):
        submit(jobs, "long", seed, settings=LONG)  # ten times as many steps
    drawn = Counter(taken.caller for _ in range(55) if (taken := take(jobs)))
    assert drawn["short"] == pytest.approx(50, abs=1)


def test_interactive_jobs_come_first_and_batch_jobs_get_5_percent(jobs: Jobs) -> None:
    for seed in range(57):
        submit(jobs, "app", seed)
    for seed in range(10):
        submit(jobs, "library", seed, "batch")
    drawn = [taken.priority for taken in take_all(jobs)]
    assert [i for i, priority in enumerate(drawn) if priority == "batch"][:3] == [19, 39, 59]
    assert drawn[60:] == ["batch"] * 7


def test_batch_callers_share_by_weight_too(jobs: Jobs) -> None:
    for seed in range(20):
        submit(jobs, "a", seed, "batch", weight=3.0)
        submit(jobs, "b", seed, "batch")
    drawn = Counter(taken.caller for _ in range(20) if (taken := take(jobs)))
    assert drawn["a"] == pytest.approx(15, abs=1)


def test_a_caller_that_pauses_saves_up_no_right_to_many_jobs_in_a_row(jobs: Jobs) -> None:
    for seed in range(30):
        submit(jobs, "steady", seed)
    for _ in range(20):
        take(jobs)
    for seed in range(10):
        submit(jobs, "late", seed)
    drawn = [taken.caller for _ in range(10) if (taken := take(jobs))]
    assert Counter(drawn)["late"] == pytest.approx(5, abs=1)


def test_a_caller_that_leaves_and_returns_gets_no_more_than_its_share(jobs: Jobs) -> None:
    for seed in range(30):
        submit(jobs, "steady", seed)
    drawn = Counter[str]()
    for seed in range(20):  # it has one job at a time, and sends the next when that is taken
        job_id = submit(jobs, "one-by-one", seed)
        while (taken := take(jobs)) is not None and taken.id != job_id:
            drawn[taken.caller] += 1
        drawn["one-by-one"] += 1
    assert drawn["steady"] == pytest.approx(20, abs=1)


def test_the_predicted_order_is_the_order_in_which_jobs_are_taken(jobs: Jobs) -> None:
    """With several callers, weights, sizes and priorities, more jobs and callers than are read at
    once, and callers that have been served before."""
    callers: list[tuple[str, Priority, float, Settings]] = [
        ("a", "interactive", 1.0, FAST), ("b", "interactive", 2.5, LONG),
        ("", "interactive", 1.0, FAST), ("c", "batch", 1.0, LONG), ("d", "batch", 0.3, FAST),
    ]  # fmt: skip
    for seed in range(24):
        for name, priority, weight, settings in callers:
            submit(jobs, name, seed, priority, weight, settings)
    for number in range(40):
        submit(jobs, f"{'aZé'[number % 3]}{number}", 0)
    for _ in range(31):
        take(jobs)
    last = submit(jobs, "new", 0)
    waiting = [state(jobs, job_id) for job_id in jobs.line.job_ids()]
    outlooks = {s.id: estimates.outlook_of(jobs, s) for s in waiting}
    taken = [s.id for s in take_all(jobs)]
    assert len(taken) == len(outlooks)
    for job_id, seen in outlooks.items():
        assert [before for before, _ in seen.ahead or ()] == taken[: taken.index(job_id)]
        assert seen.position == taken.index(job_id)
    assert taken.index(last) < 45


def test_backlog_and_eta_count_only_what_is_drawn_before(jobs: Jobs) -> None:
    work = state(jobs, submit(jobs, "many", 0)).decode.work
    estimates.record_duration(jobs, 2.0, work)  # 2 s each
    for seed in range(1, 50):
        submit(jobs, "many", seed)
    assert estimates.backlog_s(jobs, "many") == pytest.approx(100)
    assert estimates.backlog_s(jobs, "other") == pytest.approx(2)
    assert estimates.backlog_s(jobs, "other", "batch") == pytest.approx(38)  # one in 20
    other = submit(jobs, "other", 0)
    assert estimates.eta_s(jobs, state(jobs, other)) == pytest.approx(4)
    assert estimates.outlook(jobs, Place("", "interactive", "other")).position == 3


def test_a_job_that_is_put_back_is_next(jobs: Jobs) -> None:
    for seed in range(5):
        submit(jobs, "a", seed)
        submit(jobs, "b", seed)
    first = take(jobs)
    assert first is not None
    attempt = Attempt.begin(jobs, first.id)
    assert attempt is not None
    for _ in range(3):
        take(jobs)
    attempt.put_back()
    again = take(jobs)
    assert again is not None and again.id == first.id
    assert (again.caller, again.priority) == (first.caller, first.priority)


def test_a_caller_whose_job_is_put_back_gets_no_other_job_for_it(jobs: Jobs) -> None:
    for seed in range(12):
        submit(jobs, "a", seed)
        submit(jobs, "b", seed)
    first = take(jobs)
    assert first is not None
    for job_id in jobs.claim_similar(first, 9):  # in order: as many of both
        assert Attempt.begin(jobs, job_id, "batch") is not None
        expire_lease(jobs, job_id)
    jobs.reap()
    drawn = Counter(taken.caller for _ in range(10) if (taken := take(jobs)))
    assert drawn["a"] == pytest.approx(5, abs=1)


def test_a_job_that_was_lost_returns_to_its_callers_queue(jobs: Jobs) -> None:
    job_id = submit(jobs, "a", 0, "batch")
    assert take(jobs) is not None  # the worker crashes before it begins
    assert jobs.missing() == {job_id}
    jobs.requeue({job_id})
    assert jobs.line.queue("batch", "a").job_ids == [job_id]
    assert jobs.missing() == set()


def test_similar_jobs_are_claimed_in_order_within_a_priority_and_count(jobs: Jobs) -> None:
    for seed in range(4):
        submit(jobs, "a", seed)
        submit(jobs, "b", seed)
    batch = submit(jobs, "c", 0, "batch")
    first = take(jobs)
    assert first is not None
    claimed = jobs.claim_similar(first, 3)
    assert Counter(state(jobs, job_id).caller for job_id in claimed) == {"a": 1, "b": 2}
    assert len(jobs.claim_similar(first, 10)) == 4
    assert jobs.line.job_ids() == {batch}


def test_jobs_that_a_former_version_queued_are_drawn(jobs: Jobs) -> None:
    """It put all jobs into one queue, and knew no callers in the record."""
    old = submit(jobs, "", 0)
    jobs.store.queue.hdel(jobs.key(old), "caller", "priority", "weight")
    keys = jobs.store.queue.keys(f"{jobs.store.prefix}:line*")
    jobs.store.queue.delete(*keys)
    for seed in range(3):
        submit(jobs, "many", seed)
    assert estimates.outlook_of(jobs, state(jobs, old)).position == 0
    assert old in [taken.id for taken in (take(jobs), take(jobs)) if taken]
    assert old in jobs.missing()  # its worker has not begun an attempt


def test_a_queued_job_moves_to_a_caller_who_gets_it_sooner(jobs: Jobs) -> None:
    for seed in range(20):
        submit(jobs, "library", seed, "batch")
    decode = state(jobs, submit(jobs, "library", 19, "batch")).decode
    moved, is_new = jobs.submit(decode, b"bitstream", "ann")
    assert (moved.caller, moved.priority, is_new) == ("ann", "interactive", False)
    assert estimates.outlook_of(jobs, state(jobs, decode.id)).position == 0
    jobs.submit(decode, b"bitstream", "library", priority="batch")  # never back
    assert state(jobs, decode.id).caller == "ann"
    taken = take(jobs)
    assert taken is not None and taken.id == decode.id
    assert len(take_all(jobs)) == 19


def test_a_drained_worker_takes_no_job(jobs: Jobs) -> None:
    workers.mark_alive(jobs, "cpu")
    submit(jobs, "a", 0)
    assert not workers.drain(jobs, "unknown")
    assert workers.drain(jobs, workers.WORKER_NAME)
    workers.mark_alive(jobs, "cpu")  # heartbeats do not end it
    (worker,) = workers.live(jobs)
    assert (worker.drained, worker.device) == (True, "cpu")
    assert take(jobs) is None
    workers.mark_stopped(jobs)
    assert take(jobs) is not None


def test_a_waiting_worker_is_woken_by_a_new_job(jobs: Jobs) -> None:
    queue = LineQueue(jobs.line, jobs.store.queue, workers.key(jobs))
    timer = threading.Timer(0.2, submit, (jobs, "a", 0))
    timer.start()
    began = time.monotonic()
    taken = LineQueue.dequeue_any([queue], 15, jobs.store.queue)
    assert taken is not None and time.monotonic() - began < 1.5
    assert taken[0].origin == jobs.queue.name
    timer.join()


def test_queues_of_callers_leave_nothing_behind(jobs: Jobs) -> None:
    for i in range(50):
        submit(jobs, f"10.0.0.{i}", 0)
    assert len(take_all(jobs)) == 50
    assert jobs.store.queue.smembers("rq:queues") == set()
    assert jobs.line.depths() == {}
    left = f"{jobs.store.prefix}:line:left:interactive"
    for seed in range(3):
        submit(jobs, "later", seed)
    take_all(jobs)
    assert jobs.store.queue.zcard(left) == 1  # only the last


def test_depths_are_counted_by_priority_and_caller(jobs: Jobs) -> None:
    for seed in range(3):
        submit(jobs, "a", seed)
    submit(jobs, "a", 3, "batch")
    withdrawn = submit(jobs, "b", 0)
    jobs.withdraw(withdrawn, "b")
    depths = {(w.priority, w.caller): n for w, n in jobs.line.depths().items()}
    assert depths == {("interactive", "a"): 3, ("batch", "a"): 1}


def test_rq_names_the_callers_queue_as_the_origin(jobs: Jobs) -> None:
    job_id = submit(jobs, "a", 0)
    queue = jobs.line.queue("interactive", "a")
    job = Job.fetch(job_id, jobs.store.queue, serializer=queue.serializer)
    assert job.origin == queue.name == f"{jobs.queue.name}:interactive:a"
