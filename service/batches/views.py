"""Reads the state of a batch, and follows its events."""

from collections.abc import AsyncIterator, Mapping
from typing import Any

import anyio.to_thread

from service.auth import Caller
from service.batches import schemas
from service.problems import BatchNotFound
from service.services import Services
from worker.queue import events as job_events
from worker.queue.batches.records import Batch
from worker.queue.batches.store import Batches
from worker.queue.store import BLOCK_S


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


async def events(
    services: Services, id: str, caller: Caller
) -> AsyncIterator[tuple[str, str | None, Mapping[str, Any]]]:
    """Yield kind, id and data of a batch's events until it has ended; first, the present counts.

    Ends early if the server stops.
    """
    key = job_events.key(services.store, id)
    last = await _newest(services, key)
    batch = await anyio.to_thread.run_sync(find, services, id, caller)
    yield "progress", None, counts(batch)
    while not services.closing.is_set():
        if batch.ended:
            yield "ended", None, counts(batch)
            return
        streams: Any = await services.streams.xread({key: last}, block=BLOCK_S * 1000)
        for event in (job_events.Event.of(entry) for _, found in streams for entry in found):
            last = event.id
            if event.kind != "ended":
                yield event.kind, event.id, {"id": id, **event.data}
        batch = await anyio.to_thread.run_sync(find, services, id, caller)


async def _newest(services: Services, key: str) -> str:
    """The id of the newest event; that of the beginning without any."""
    newest: Any = await services.streams.xrevrange(key, count=1)
    return str(newest[0][0].decode()) if newest else "0"


def counts(batch: Batch) -> dict[str, Any]:
    """The data of an event: the counts, and after the end what webhooks get."""
    status = {"status": "canceled" if batch.canceled else "ended"} if batch.ended else {}
    return {"id": batch.id, **status, "total": batch.total, **batch.counts}
