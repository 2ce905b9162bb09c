"""The line of waiting jobs: one RQ queue per priority and caller, and the order in which workers
take from them.

Interactive jobs come before batch jobs, except that every `BATCH_EVERY`th job is a batch job while
any wait. Within a priority, callers get megapixel-steps in proportion to their weights
(`worker.queue.line_scripts`).
"""

from dataclasses import dataclass

from redis import Redis
from redis.client import Pipeline
from rq.job import Job

from worker.queue.line_scripts import CLAIM, JOIN, TAKE
from worker.queue.records import PRIORITIES, JobState, Priority
from worker.queue.rq_queue import DecodeQueue
from worker.queue.store import Store

LINE_TTL_S = 7 * 24 * 3600
"""How long the order is kept without any new or taken job: longer than the records of the jobs."""
BATCH_EVERY = 20
"""At least one in so many jobs is a batch job while batch jobs wait: 5 %."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A caller whose jobs wait."""

    priority: Priority
    caller: str
    tag: float  # its first job's: the smallest is next
    since: float  # when its first job became the first, seconds since the epoch


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
        """Put a job into its caller's queue.

        `at_front` is for a job that a worker took and did not finish. Its caller gets back the
        share that it was charged for it.
        """
        self.queue_of(state).add(state.id, pipe, at_front)
        taken = self.store.key("job", state.id) if at_front else ""
        pipe.eval(JOIN, 2, *self.keys, state.priority, state.caller, taken, str(LINE_TTL_S))

    def take(self, connection: Redis, worker: str) -> tuple[str, str] | bytes | None:
        """Take the next job: the key of its list and its id.

        None if no job waits; `b"drained"` if this worker may not take jobs. `worker` is the key of
        the worker's record.
        """
        arguments = self.store.key("job", ""), BATCH_EVERY, LINE_TTL_S, worker
        reply = self._take(self.keys, arguments, client=connection)
        return (reply[0].decode(), reply[1].decode()) if isinstance(reply, list) else reply

    def wait(self, connection: Redis, seconds: int) -> bool:
        """Wait until a job is queued; False if none is within `seconds`."""
        return connection.blpop([f"{self.keys[0]}:bell"], seconds) is not None

    def claim(self, state: JobState) -> bool:
        """Take a job out of its turn; False if another worker took it first."""
        arguments = self.store.key("job", ""), state.priority, state.caller, state.id
        if not self._claim(self.keys, arguments):
            return False
        self.store.queue.delete(Job.key_for(state.id))
        return True

    def contains(self, state: JobState) -> bool:
        """True if the job waits in its caller's queue."""
        return self.queue_of(state).position(state.id) is not None

    def is_earlier(self, new: JobState, queued: JobState) -> bool:
        """Estimate whether a queued job would be drawn earlier in the queue of `new`'s caller.

        It would be put at the end of that queue. False if it waits in no queue, or there already.
        """
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
            pipe.zrange(f"{self.keys[0]}:{priority}", 0, -1, withscores=True)
            pipe.zrange(f"{self.keys[0]}:since:{priority}", 0, -1, withscores=True)
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

    def _virtual(self, priority: Priority) -> float:
        return float(self.store.queue.hget(self.keys[0], priority) or 0.0)

    @property
    def keys(self) -> tuple[str, str]:
        """The keys of the scripts."""
        return self.store.key("line"), self.base.key
