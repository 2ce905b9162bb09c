"""Predicts the order in which workers take the waiting jobs, if no other job comes.

It follows from the callers' tags and the work of their jobs, as in the script `TAKE` in
`worker.queue.line_scripts`. Only as many jobs are read from Redis as are asked for.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from worker.queue.line import BATCH_EVERY, Line
from worker.queue.records import PRIORITIES, JobState, Priority

CHUNK = 32
"""Number of a caller's jobs that are first read from Redis; then it doubles."""


@dataclass(frozen=True, slots=True)
class Place:
    """A job in the line. An empty `id` stands for a job that is not queued yet."""

    id: str
    priority: Priority
    caller: str

    @classmethod
    def of(cls, state: JobState) -> "Place":
        """The place of a queued job."""
        return cls(state.id, state.priority, state.caller)


def first(line: Line, count: int, priority: Priority) -> list[str]:
    """The first jobs of a priority."""
    return list(islice(_ordered(line, priority, None), count))


def ahead(line: Line, place: Place) -> list[str] | None:
    """The jobs that workers will take before this one, in order; None if it does not wait.

    This is the order if no other job comes. For a place without id: if it were queued now.
    """
    if place.id and line.queue(place.priority, place.caller).position(place.id) is None:
        return None
    ids: list[str] = []
    for job_id in _both(line, place):
        if job_id == place.id:
            break
        ids.append(job_id)
    return ids


def _both(line: Line, place: Place) -> Iterator[str]:
    """The jobs of both priorities in order, as `TAKE` chooses between them."""
    extra = None if place.id else place
    lines = {p: _ordered(line, p, extra if place.priority == p else None) for p in PRIORITIES}
    heads = {p: next(ids, None) for p, ids in lines.items()}
    passed = line.passed()
    while True:
        urgent, patient = heads["interactive"], heads["batch"]
        is_batch = patient is not None and (urgent is None or passed >= BATCH_EVERY - 1)
        job_id = patient if is_batch else urgent
        if job_id is None:
            return
        yield job_id
        passed = 0 if is_batch else passed + (patient is not None)
        chosen: Priority = "batch" if is_batch else "interactive"
        heads[chosen] = next(lines[chosen], None)


def _ordered(line: Line, priority: Priority, extra: Place | None) -> Iterator[str]:
    """The jobs of a priority in order; `extra` is put at the end of its caller's queue."""
    tags = {w.caller: w.tag for w in line.waiting(priority)}
    last = None if extra is None else extra.caller
    if last is not None and last not in tags:
        tags[last] = line.start_tag(priority, last)
    keys = {caller: line.queue(priority, caller).key for caller in tags}
    heads = line.costs({key: (0, CHUNK) for key in keys.values()})
    callers = [
        _tagged(tag, caller, _read(line, keys[caller], heads[keys[caller]]), caller == last)
        for caller, tag in tags.items()
    ]
    for _, _, job_id in heapq.merge(*callers, key=lambda entry: entry[:2]):
        yield job_id


def _read(line: Line, key: str, jobs: list[tuple[str, float]]) -> Iterator[tuple[str, float]]:
    """A queue's jobs and what each costs; `jobs` are the first, others are read as needed."""
    start, size = 0, CHUNK
    while jobs:
        yield from jobs
        start, size = start + len(jobs), 2 * size
        jobs = line.costs({key: (start, size)})[key] if start >= CHUNK else []


def _tagged(
    tag: float, caller: str, jobs: Iterator[tuple[str, float]], with_extra: bool
) -> Iterator[tuple[float, bytes, str]]:
    """The jobs of a caller with their tags; callers with equal tags are sorted as Redis does."""
    name = caller.encode()
    for job_id, cost in jobs:
        yield tag, name, job_id
        tag += cost
    if with_extra:
        yield tag, name, ""
