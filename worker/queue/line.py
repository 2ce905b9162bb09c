"""The line of waiting jobs: one RQ queue per priority and caller, and the order in which workers
take from them.

Interactive jobs come before batch jobs, except that every `BATCH_EVERY`th job is a batch job while
any wait. Within a priority, callers get megapixel-steps in proportion to their weights
(`worker.queue.line_scripts`).
"""

import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from redis import Redis
from redis.client import Pipeline
from rq.job import Job

from worker.queue.line_scripts import CLAIM, JOIN, TAKE
from worker.queue.records import PRIORITIES, JobState, Priority
from worker.queue.rq_queue import DecodeQueue
from worker.queue.store import RECORD_TTL_S, Store

BATCH_EVERY = 20
"""At least one in so many jobs is a batch job while batch jobs wait: 5 %."""
CHUNK = 32
"""Number of a caller's jobs that are first read from Redis to predict the order; then it doubles."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A caller whose jobs wait."""

    priority: Priority
    caller: str
    tag: float  # its first job's: the smallest is next
    since: float  # when its first job became the first, seconds since the epoch


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


class Line:
    """The queues of all callers. Methods that take a pipeline become part of its transaction."""

    def __init__(self, store: Store, timeout_s: int) -> None:
        self.store = store
        self.base = DecodeQueue(f"{store.prefix}-decodes", store.queue, timeout_s)
        """The queue of interactive jobs without a caller, and of all jobs of former versions."""
        self._take = store.queue.register_script(TAKE)
        self._claim = store.queue.register_script(CLAIM)

    def queue(self, priority: Priority, caller: str) -> DecodeQueue:
        """The RQ queue of a caller."""
        if (priority, caller) == ("interactive", ""):
            return self.base
        name = f"{self.base.name}:{priority}:{caller}"
        return DecodeQueue(name, self.base.connection, self.base.timeout_s)

    def queue_of(self, state: JobState) -> DecodeQueue:
        """The RQ queue in which a job waits, or waited."""
        return self.queue(state.priority, state.caller)

    def add(self, state: JobState, pipe: Pipeline, at_front: bool = False) -> None:
        """Put a job into its caller's queue; at the front, it is one of the next jobs."""
        self.queue_of(state).add(state.id, pipe, at_front)
        arguments = state.priority, state.caller, int(at_front), RECORD_TTL_S
        pipe.eval(JOIN, 2, *self._keys, *map(str, arguments))

    def take(self, connection: Redis, worker: str) -> tuple[str, str] | bytes | None:
        """Take the next job: the key of its list and its id.

        None if no job waits; `b"drained"` if this worker may not take jobs. `worker` is the key of
        the worker's record.
        """
        arguments = self.store.key("job", ""), BATCH_EVERY, RECORD_TTL_S, worker
        reply = self._take(self._keys, arguments, client=connection)
        return (reply[0].decode(), reply[1].decode()) if isinstance(reply, list) else reply

    def wait(self, connection: Redis, seconds: int) -> bool:
        """Wait until a job is queued; False if none is within `seconds`."""
        return connection.blpop([f"{self._keys[0]}:bell"], seconds) is not None

    def claim(self, state: JobState) -> bool:
        """Take a job out of its turn; False if another worker took it first."""
        arguments = self.store.key("job", ""), state.priority, state.caller, state.id
        if not self._claim(self._keys, arguments):
            return False
        self.store.queue.delete(Job.key_for(state.id))
        return True

    def contains(self, state: JobState) -> bool:
        """True if the job waits in its caller's queue."""
        return self.queue_of(state).position(state.id) is not None

    def is_earlier(self, new: JobState, queued: JobState) -> bool:
        """Whether a queued job would be drawn earlier, about, at the end of the queue of `new`."""
        queue, new_queue = self.queue_of(queued), self.queue_of(new)
        place = queue.position(queued.id)
        if place is None or new_queue == queue:
            return False
        if new.priority != queued.priority:
            return new.priority == "interactive"
        return new_queue.count / new.weight < place / queued.weight

    def waiting(self, priority: Priority) -> list[Waiting]:
        """The callers whose jobs wait; may include callers whose last job was just withdrawn."""
        with self.store.queue.pipeline() as pipe:
            pipe.zrange(f"{self._keys[0]}:{priority}", 0, -1, withscores=True)
            pipe.zrange(f"{self._keys[0]}:since:{priority}", 0, -1, withscores=True)
            pipe.exists(self.base.key)
            tags, since, has_base = pipe.execute()
        times: dict[bytes, float] = dict(since)
        found = [Waiting(priority, c.decode(), tag, times.get(c, 0.0)) for c, tag in tags]
        if priority == "interactive" and has_base and all(w.caller for w in found):
            found.append(Waiting(priority, "", self._virtual(priority), 0.0))  # of a former version
        return found

    def depths(self) -> dict[Waiting, int]:
        """Number of jobs that wait, by caller."""
        waiting = [w for priority in PRIORITIES for w in self.waiting(priority)]
        with self.store.queue.pipeline(transaction=False) as pipe:
            for w in waiting:
                pipe.llen(self.queue(w.priority, w.caller).key)
            return {w: n for w, n in zip(waiting, pipe.execute(), strict=True) if n}

    def job_ids(self) -> set[str]:
        """Ids of all jobs that wait, in no order."""
        with self.store.queue.pipeline(transaction=False) as pipe:
            for priority in PRIORITIES:
                for w in self.waiting(priority):
                    pipe.lrange(self.queue(priority, w.caller).key, 0, -1)
            return {value.decode() for values in pipe.execute() for value in values}

    def next(self, count: int, priority: Priority) -> list[str]:
        """The first jobs of a priority, in the order in which workers take them."""
        return list(islice(self._ordered(priority, None), count))

    def ahead(self, place: Place) -> list[str] | None:
        """The jobs that workers will take before this one, in order; None if it does not wait.

        This is the order if no other job comes. For a place without id: if it were queued now.
        """
        if place.id and self.queue(place.priority, place.caller).position(place.id) is None:
            return None
        ids: list[str] = []
        for job_id in self._both(place):
            if job_id == place.id:
                break
            ids.append(job_id)
        return ids

    def _both(self, place: Place) -> Iterator[str]:
        """The jobs of both priorities in order, as `TAKE` chooses between them."""
        extra = None if place.id else place
        lines = {p: self._ordered(p, extra if place.priority == p else None) for p in PRIORITIES}
        heads = {p: next(line, None) for p, line in lines.items()}
        passed = int(self.store.queue.hget(self._keys[0], "passed") or 0)
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

    def _ordered(self, priority: Priority, extra: Place | None) -> Iterator[str]:
        """The jobs of a priority in order; `extra` is put at the end of its caller's queue."""
        tags = {w.caller: w.tag for w in self.waiting(priority)}
        if extra is not None and extra.caller not in tags:
            left = self.store.queue.zscore(f"{self._keys[0]}:left:{priority}", extra.caller)
            tags[extra.caller] = max(self._virtual(priority), float(left or 0.0))  # type: ignore[arg-type]
        first = self._costs({self.queue(priority, caller).key: (0, CHUNK) for caller in tags})
        streams = [
            _tagged(tag, caller, self._read(self.queue(priority, caller).key, first),
                    extra is not None and extra.caller == caller)
            for caller, tag in tags.items()
        ]  # fmt: skip
        for _, _, job_id in heapq.merge(*streams, key=lambda entry: entry[:2]):
            yield job_id

    def _read(self, key: str, first: Mapping[str, list[tuple[str, float]]]) -> Iterator[tuple[str, float]]:
        """The ids of a queue and what each costs its caller; reads more from Redis as needed."""
        jobs, start, size = first[key], 0, CHUNK
        while jobs:
            yield from jobs
            start, size = start + len(jobs), 2 * size
            jobs = self._costs({key: (start, size)})[key] if start >= CHUNK else []

    def _costs(self, parts: Mapping[str, tuple[int, int]]) -> dict[str, list[tuple[str, float]]]:
        """List key and its (start, size) -> ids, and what each costs its caller."""
        with self.store.queue.pipeline(transaction=False) as pipe:
            for key, (start, size) in parts.items():
                pipe.lrange(key, start, start + size - 1)
            lists = [[value.decode() for value in values] for values in pipe.execute()]
            for job_id in (job_id for ids in lists for job_id in ids):
                pipe.hmget(self.store.key("job", job_id), "work", "weight")
            rows = iter(pipe.execute())
        return {
            key: [(job_id, _cost(*next(rows))) for job_id in ids]
            for key, ids in zip(parts, lists, strict=True)
        }

    def _virtual(self, priority: Priority) -> float:
        return float(self.store.queue.hget(self._keys[0], priority) or 0.0)  # type: ignore[arg-type]

    @property
    def _keys(self) -> tuple[str, str]:
        """The keys of the scripts."""
        return self.store.key("line"), self.base.key


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


def _cost(work: bytes | None, weight: bytes | None) -> float:
    """What a job costs its caller, as the script `charge` computes it."""
    return float(work or 1) / float(weight or 1)
