"""Predicts the order in which workers take the waiting jobs, if no other job comes.

A script in Redis computes it, `worker.queue.order_scripts`, so that a prediction is one round trip.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from worker.queue import order_scripts
from worker.queue.line import BATCH_EVERY, Line
from worker.queue.records import JobState, Priority


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


NOWHERE = Place("-", "interactive", "")
"""The place of no job."""


def first(line: Line, count: int, priority: Priority) -> list[str]:
    """The ids of the first jobs of a priority."""
    ids: bytes = run(line, order_scripts.FIRST, replace(NOWHERE, priority=priority), count)
    return ids.decode().split()


def parse(jobs: bytes) -> Iterator[tuple[str, float | None]]:
    """The ids of jobs, and the megapixel-steps of those with subscribers, from the scripts."""
    for job in jobs.decode().split():
        job_id, _, work = job.partition(":")
        yield job_id, float(work) if work else None


def run(line: Line, script: str, place: Place, *arguments: str | float) -> Any:
    """Run a script of `worker.queue.order_scripts`."""
    prefixes = line.store.key("job", ""), line.store.key("interest", "")
    values = *prefixes, BATCH_EVERY, place.priority, place.caller, place.id, *arguments
    return line.store.queue.register_script(script)(line.keys, values)
