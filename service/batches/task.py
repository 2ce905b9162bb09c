"""The task of each API process that goes on with batches, under a lease for each."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

import anyio

from service.batches.feeder import Feeder, in_thread
from service.services import Services
from worker.queue.batches import leases
from worker.queue.batches.leases import LEASE_S, BatchTaken, Lease
from worker.queue.batches.store import Batches
from worker.queue.store import RedisError

BATCHES_AT_ONCE = 4
"""Batches with which a process goes on at a time: a slow store then does not stop all others."""
POLL_S = 0.5
"""Interval at which a process looks for a batch that is due."""

log = logging.getLogger(__name__)


async def run(services: Services) -> None:
    """Go on with batches until this task is canceled."""
    await asyncio.gather(*(_run_one(services) for _ in range(BATCHES_AT_ONCE)))


async def _run_one(services: Services) -> None:
    while True:
        found = False
        try:
            found = await go_on(services)
        except BatchTaken as e:
            log.warning("%s", e)
        except RedisError as e:
            log.warning("batches wait while Redis is down: %s", e)
        except Exception:
            log.exception("a batch could not go on; it is tried again")
        if not found:
            await anyio.sleep(POLL_S)


async def go_on(services: Services) -> bool:
    """Go on with a batch that is due; False if there is none. Raises `RedisError`, `BatchTaken`."""
    lease = await in_thread(leases.take, Batches(services.store))
    if lease is None:
        return False
    async with _renewed(lease):
        pause_s = await Feeder(services, lease).run()
    await in_thread(lease.due_in, pause_s)
    return True


@contextlib.asynccontextmanager
async def _renewed(lease: Lease) -> AsyncIterator[None]:
    """Renew a lease until the block ends."""

    async def renew() -> None:
        while True:
            with contextlib.suppress(RedisError, BatchTaken):  # writes in the block notice it
                await in_thread(lease.renew)
            await anyio.sleep(LEASE_S / 3)

    task = asyncio.create_task(renew())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
