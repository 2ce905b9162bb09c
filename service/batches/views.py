"""Reads the state of a batch, and follows its events."""

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from redis.client import Pipeline

from service.auth import Caller
from service.batches import schemas
from service.problems import BatchNotFound
from service.services import Services
from worker.queue import events as job_events
from worker.queue.batches.records import Batch
from worker.queue.batches.store import Batches


def find(services: Services, id: str, caller: Caller) -> Batch:
    """Return a batch. Raises `BatchNotFound` if there is none of this caller.

    Without API keys, a batch is shown to every caller.
    """
    batch = Batches(services.store).get(id)
    if batch is None or (services.keys is not None and batch.caller != caller.name):
        raise BatchNotFound(f"there is no batch {id}: it was never submitted, or has expired")
    return batch


def view(
    services: Services, id: str, caller: Caller, after: int = -1, limit: int = 0
) -> schemas.Batch:
    """Return the public view of a batch, with `limit` failed items whose number is above `after`.

    Raises `BatchNotFound`.
    """
    batch, batches = find(services, id, caller), Batches(services.store)
    problems = batches.failed(id, after, limit)
    failed = schemas.failed_items(batches.items(batch, problems), problems)
    return schemas.Batch.of(batch, failed, limit)


def newest(services: Services, caller: Caller, after: str, limit: int) -> schemas.BatchPage:
    """Return up to `limit` batches that the caller may see, newest first.

    They are older than the batch `after`, if it is given. Raises `BatchNotFound`.
    """
    owner = None if services.keys is None else caller.name
    found = Batches(services.store).newest(owner, after, limit)
    if found is None:
        raise BatchNotFound(f"after: there is no batch {after}, or it has expired; leave it out")
    return schemas.BatchPage.of(found, limit)


@dataclass(frozen=True, slots=True)
class _Followed:
    """A batch, as `service.feeds` reads it."""

    batches: Batches
    id: str

    @property
    def stream(self) -> str:
        """Redis key of its events."""
        return job_events.key(self.batches.store, self.id)

    def ask(self, pipe: Pipeline, now: float, viewers: Collection[str]) -> None:
        """Read the record."""
        self.batches.read(self.id, pipe)

    def parse(self, replies: Sequence[Any]) -> Batch | None:
        """The batch; None if it has expired."""
        return Batch.of(self.id, replies[0], replies[1] or b"")


async def events(
    services: Services, id: str
) -> AsyncIterator[tuple[str, str | None, Mapping[str, Any]]]:
    """Yield kind, id and data of a batch's events until it has ended; first, the present counts.

    Ends early if the server stops or the batch expires. Raises `RedisError`.
    """
    last: str | None = None
    with services.feeds.follow(_Followed(Batches(services.store), id)) as follower:
        while await follower.wait() and (batch := follower.record) is not None:
            if last is None:
                last = follower.newest
                yield "progress", None, counts(batch)
            for event in follower.after(last):
                last = event.id
                if event.kind != "ended":
                    yield event.kind, event.id, {"id": id, **event.data}
            if batch.ended:
                yield "ended", None, counts(batch)
                return


def counts(batch: Batch) -> dict[str, Any]:
    """The data of an event: the counts, and after the end what webhooks get."""
    status = {"status": "canceled" if batch.canceled else "ended"} if batch.ended else {}
    return {"id": batch.id, **status, "total": batch.total, **batch.counts}
